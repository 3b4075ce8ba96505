"""The model that is served: all that the server asks of `weldment.TwinModel` and of tokenizers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weldment.errors import RequestError
from weldment.serving.classification import Answer, Question

if TYPE_CHECKING:
    from weldment.twin.runtime import Answer as Said

TOKENS = 8192
"""Of a batch of inputs, padding included; an input that is longer makes a batch of its own."""


@dataclass(frozen=True)
class Mixture:
    """Which experts answer a row.

    Attributes:
        expert: the one with the largest weight; None if the shared model's share is larger than any.
        weights: of the experts, in their order.
        fallback: the share that the shared model took back, 0 to 1.
    """

    expert: str | None
    weights: tuple[float, ...]
    fallback: float


@dataclass(frozen=True)
class Mixed:
    """The mixtures of a batch, and their weights (B, E) as the model takes them."""

    weights: Tensor
    mixtures: list[Mixture]


class Engine:
    """A Twin model and its tokenizer; one thread asks the model, and another the tokenizer.

    Args:
        folder: the bundle.
        name: that it is served by; the folder's by default.
        dtype: of the arithmetic; None for that of the bundle's tensors.

    Attributes:
        experts: their names.
        labels: of each expert with a head.
        longest: tokens that the model takes.
        together: tokens of questions that are calculated at once, padding included.
        ends: tokens that end a text.
        pad: the token that fills batches; no row sees it.

    Raises:
        CheckpointError: the folder is no whole bundle.
        TaskError: it has no tokenizer.
    """

    def __init__(self, folder: Path, *, name: str | None = None, dtype: str | None = None, device: str = "cpu") -> None:
        from weldment.evaluation.networks import tokenizer_of
        from weldment.evaluation.predicting import longest
        from weldment.evaluation.states import ModelState
        from weldment.twin.model import TwinModel
        from weldment.twin.runtime import CPU_TOKENS

        self.model: Any = TwinModel.from_pretrained(folder, dtype=dtype, device=device)
        self.tokenizer: Any = tokenizer_of(ModelState(str(folder), {}, {}, folder))
        self.name = name or folder.resolve().name
        self.experts: tuple[str, ...] = tuple(self.model.expert_names)
        outputs = self.model.twin.outputs
        self.labels = {expert: heads.labels for expert, heads in zip(self.experts, outputs, strict=False)}
        self._problems = {expert: heads.problem for expert, heads in zip(self.experts, outputs, strict=False)}
        self.longest = longest(self.tokenizer, self.model, None)
        self.ends = _ends(self.model, self.tokenizer)
        self.together = CPU_TOKENS if self.device.type == "cpu" else TOKENS
        self.pad = int(self.tokenizer.pad_token_id or 0)
        self._taken = frozenset(inspect.signature(self.model.forward).parameters)
        # transformers gave the key-value cache another name.
        self._cache = "cache" if "cache" in self._taken else "past_key_values"
        # Without it, logits of whole prompts would be made, which takes time, and memory for a large vocabulary.
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in self._taken else {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def classifies(self) -> bool:
        """Whether the experts have heads."""
        return bool(self.labels)

    @property
    def writes(self) -> bool:
        """Whether the model continues texts."""
        return not self.labels and self.model.can_generate() and not self.model.config.is_encoder_decoder

    @property
    def chats(self) -> bool:
        """Whether the tokenizer knows how conversations look."""
        return self.writes and bool(self.tokenizer.chat_template)

    def encode(self, text: str, pair: str | None = None) -> dict[str, list[int]]:
        """What the model reads of a text or of two."""
        found = self.tokenizer(text, pair, verbose=False)
        return {name: found[name] for name in _FILLS if name in found and name in self._taken}

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the model's turn begins.

        Raises:
            RequestError: the chat template does not take these messages.
        """
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            cause = f"the model's chat template refuses these messages: {error.message}"
            raise RequestError(cause, where="messages", code="invalid_messages") from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Classify questions of one kind; each row by its own task and experts."""
        tasks = [question.task for question in questions if question.task]
        experts = [question.expert for question in questions if question.expert]
        inputs = self._padded([question.inputs for question in questions])
        found = self.model.classify(inputs, task=tasks or None, experts=experts or None)
        return [self._answer(said) for said in found]

    def _answer(self, said: Said) -> Answer:
        problem = self._problems[said.expert]
        mixture = self._mixture(said.weights, said.fallback)
        if problem == "regression":
            return Answer(said.expert, None, None, None, said.scores[0], mixture)
        scores = dict(zip(said.labels, said.scores, strict=True))
        if problem == "multi_label_classification":
            likely = tuple(label for label, score in scores.items() if score >= 0.5)
            return Answer(said.expert, None, likely, scores, None, mixture)
        return Answer(said.expert, said.label, None, scores, None, mixture)

    def mix(self, prompts: Sequence[Sequence[int]], experts: Sequence[str | None]) -> Mixed:
        """Who writes after these prompts: the given expert, or whom the router chooses."""
        weights = torch.zeros(len(prompts), len(self.experts), device=self.device)
        fallback = torch.zeros(len(prompts))
        routed = [n for n, expert in enumerate(experts) if expert is None]
        if routed:
            inputs = self._padded([{"input_ids": prompts[n]} for n in routed])
            routing = self.model.route(**inputs)
            weights[routed], fallback[routed] = routing.weights.float(), routing.fallback.float().cpu()
        for row, expert in enumerate(experts):
            if expert is not None:
                weights[row, self.experts.index(expert)] = 1.0
        pairs = zip(weights.tolist(), fallback.tolist(), strict=True)
        return Mixed(weights, [self._mixture(tuple(row), share) for row, share in pairs])

    def _mixture(self, weights: Sequence[float], fallback: float) -> Mixture:
        best = max(range(len(weights)), key=weights.__getitem__)
        return Mixture(self.experts[best] if weights[best] >= fallback else None, tuple(weights), fallback)

    def read(self, ids: Tensor, mask: Tensor, cache: Any, weights: Tensor) -> tuple[Tensor, Any]:
        """Logits (B, V) of the tokens that come next, and the cache of all that were read.

        Args:
            ids: (B, t), what is new.
            mask: (B, T), 1 at tokens, of all columns that were ever read; rows are padded on the left.
            cache: of the first T - t columns; None at the beginning.
            weights: (B, E).
        """
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            found = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                expert_weights=weights,
                **{self._cache: cache, **self._last},
            )
        return found.logits[:, -1], found[self._cache]

    def _padded(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """A batch, filled on the right."""
        length = max(len(row["input_ids"]) for row in rows)
        fills = {**_FILLS, "input_ids": self.pad}
        found = {
            name: torch.tensor([[*row[name], *[fills[name]] * (length - len(row[name]))] for row in rows])
            for name in rows[0]
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        found["attention_mask"] = (torch.arange(length)[None] < lengths[:, None]).long()
        return {name: tensor.to(self.device) for name, tensor in found.items()}


_FILLS = {"input_ids": 0, "token_type_ids": 0}
"""What models read of texts, besides the mask, and what fills rows."""


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list | tuple) else [ends] if ends is not None else [])
