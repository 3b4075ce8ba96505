"""Twin models under torch.compile: the same answers, and the same code for other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

import weldment
from classifiers import save_classifier
from models import ARCHITECTURES
from twin_bundles import make_bundle, random_expert

IDS = torch.arange(5, 17).view(3, 4)


def compared(twin: Any, cases: list[Any]) -> int:
    """Check compiled answers against plain ones; how many times code was compiled after the first call."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(twin, backend=counter)
    first = 0
    with torch.no_grad():
        for number, keys in enumerate(cases):
            found = compiled(input_ids=IDS, **keys).logits
            torch.testing.assert_close(found, twin(input_ids=IDS, **keys).logits, rtol=1e-4, atol=1e-5)
            first = counter.frame_count if number == 0 else first
    assert first > 0
    return counter.frame_count - first


def test_a_compiled_decoder_answers_alike_and_is_not_compiled_again_for_other_weights(tmp_path: Path) -> None:
    model: PreTrainedModel = ARCHITECTURES["llama"].build()
    experts = {name: random_expert(model, seed) for seed, name in enumerate("ab")}
    twin: Any = weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", model, experts))
    cases = [{"expert_weights": torch.rand(3, 2)}, {"expert_weights": torch.eye(2)[[0, 1, 1]]}]
    assert compared(twin, cases) == 0


def test_a_compiled_classifier_sends_rows_through_their_heads(tmp_path: Path) -> None:
    whole = save_classifier(tmp_path / "whole", labels=3)
    experts = {name: random_expert(whole.base_model, seed, skip=("pooler",)) for seed, name in enumerate("ab")}
    for expert in experts.values():
        expert.head = {key: tensor for key, tensor in whole.state_dict().items() if key.startswith("classifier")}
        expert.head_config = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
    twin: Any = weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", whole.base_model, experts))
    cases = [
        {"expert_weights": torch.tensor(rows)} for rows in ([[0.9, 0.1]] * 3, [[0.2, 0.8], [0.7, 0.3], [0.0, 1.0]])
    ]
    assert compared(twin, cases) == 0
