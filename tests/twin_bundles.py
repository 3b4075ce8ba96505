"""Twin bundles made by hand: a tiny shared model with random weights, and experts whose whole weights are known."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from classifiers import save_tokenizer
from weldment.twin.bundle import write_twin_json
from weldment.twin.router import Router, RouterConfig, save_router

State = dict[str, Tensor]


@dataclass
class Expert:
    """Deltas of one expert: factors (A, B) of modules, changes of tensors, and a head."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    changes: State = field(default_factory=dict)
    head: State = field(default_factory=dict)
    head_config: Mapping[str, Any] = field(default_factory=dict)

    def whole(self, model: PreTrainedModel) -> State:
        """The shared model's tensors with all deltas."""
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, (a, b) in self.factors.items():
            module = model.get_submodule(name)
            turned = isinstance(module, nn.Embedding | Conv1D)
            state[f"{name}.weight"] += (b @ a).T if turned else b @ a
        for name, change in self.changes.items():
            state[name] += change
        return state


def random_expert(
    model: PreTrainedModel,
    seed: int,
    *,
    rank: int = 2,
    vectors: bool = True,
    embeddings: Collection[str] = (),
    skip: Collection[str] = ("lm_head", "predictions"),
    scale: float = 0.4,
) -> Expert:
    """Random factors for every linear layer (every third has one rank more), and changes of all vectors."""
    chance = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=chance)

    expert = Expert()
    for number, (name, module) in enumerate(model.named_modules()):
        if any(word in name for word in skip):
            continue
        if isinstance(module, nn.Linear | Conv1D) or name in embeddings:
            rows, columns = module.weight.shape  # pyright: ignore[reportCallIssue]
            inputs, outputs = (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
            own = rank + (number % 3 == 0)
            expert.factors[name] = draw(own, inputs), draw(outputs, own)
    if vectors:
        named = [(name, tensor) for name, tensor in model.state_dict().items() if tensor.ndim == 1]
        kept = [(name, tensor) for name, tensor in named if not any(word in name for word in skip)]
        expert.changes.update({name: draw(*tensor.shape) for name, tensor in kept})
    return expert


def make_bundle(
    folder: Path, model: PreTrainedModel, experts: Mapping[str, Expert], router: Router | None = None
) -> Path:
    """Write a bundle; the router is uniform if none is given."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    for name, expert in experts.items():
        _save_expert(folder / "experts" / name, model, expert)
    save_router(router or Router(RouterConfig("uniform", tuple(experts)), {}), folder / "router")
    records = [_record(folder, name, expert) for name, expert in experts.items()]
    shared = {"model_type": model.config.model_type, "class": type(model).__name__, "method": "linear"}
    write_twin_json(folder, shared=shared, exclusive={"kind": "svd"}, experts=records)
    return folder


def _save_expert(folder: Path, model: PreTrainedModel, expert: Expert) -> None:
    folder.mkdir(parents=True)
    tensors: State = {}
    for name, (a, b) in expert.factors.items():
        kind = "lora_embedding_" if isinstance(model.get_submodule(name), nn.Embedding) else "lora_"
        ending = "" if kind == "lora_embedding_" else ".weight"
        tensors[f"base_model.model.{name}.{kind}A{ending}"] = a
        tensors[f"base_model.model.{name}.{kind}B{ending}"] = b
    if tensors:
        ranks = {name: a.shape[0] for name, (a, _) in expert.factors.items()}
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2,
            "target_modules": sorted(ranks),
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors")
    if expert.changes:
        save_file(expert.changes, folder / "changes.safetensors")
    if expert.head:
        save_file(expert.head, folder / "head.safetensors")
        (folder / "head.json").write_text(json.dumps(dict(expert.head_config)), encoding="utf-8")


def _record(folder: Path, name: str, expert: Expert) -> dict[str, Any]:
    labels = list((expert.head_config.get("id2label") or {}).values())
    parts = {"adapter": bool(expert.factors), "changes": bool(expert.changes), "head": bool(expert.head)}
    return {"name": name, "reference": f"models/{name}", "nbytes": 1, "kept": 1.0, "labels": labels or None, **parts}


def mixed_model(model: PreTrainedModel, experts: Sequence[Expert], weights: Tensor) -> PreTrainedModel:
    """The model with weights rebuilt for one row: theta + sum_t w_t (theta_t - theta)."""
    import copy

    whole = [expert.whole(model) for expert in experts]
    own = model.state_dict()
    mixed = {
        name: tensor + sum(float(w) * (state[name] - tensor) for w, state in zip(weights, whole, strict=True))
        for name, tensor in own.items()
    }
    rebuilt = copy.deepcopy(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    rebuilt.load_state_dict({name: tensor for name, tensor in mixed.items() if name not in tied}, strict=False)
    return rebuilt.eval()
