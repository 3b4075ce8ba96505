"""A Twin model at work: who answers each row, through which head, and what a call of the model does with that."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weldment.errors import UserError
from weldment.evaluation.predicting import positions_of
from weldment.twin.arrow import arrow_scores
from weldment.twin.bundle import Bundle
from weldment.twin.features import features
from weldment.twin.heads import Chosen, Outputs
from weldment.twin.mixing import Mix, blend_of
from weldment.twin.router import Router, Routing, unknown_expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Names = str | Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What a classifier says of one input.

    Attributes:
        expert: whose head spoke.
        labels: of that head, in the order of `scores`.
        scores: probabilities of the labels (softmax; of several labels at once, sigmoid), or a regression's number.
        weights: of the experts in the network, in the order of `model.expert_names`.
        fallback: the share that the shared model took back, 0 to 1.
    """

    expert: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    fallback: float

    @property
    def label(self) -> str:
        """The label with the largest score."""
        return self.labels[max(range(len(self.scores)), key=self.scores.__getitem__)]


class Twin:
    """The state of one Twin model, and the methods that a network gets from it (see `TwinModel`).

    Not for several threads at once: the weights that a call calculates with are kept in the model.

    Attributes:
        bundle: what it was loaded from.
        router: may be replaced: `twin.router = twin.router.altered(top_k=1)`.
        outputs: of each expert's head among the logits of all; empty without heads.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        bundle: Bundle,
        router: Router,
        mix: Mix,
        heads: tuple[Chosen, tuple[Outputs, ...]] | None,
    ) -> None:
        self.network, self.bundle, self.mix = network, bundle, mix
        self.chosen, self.outputs = heads if heads is not None else (Chosen(), ())
        self._held: Routing | None = None
        self.router = router
        network.add_module("twin_router", router)

    @property
    def names(self) -> tuple[str, ...]:
        return self.bundle.names

    def install(self) -> None:
        """Give the network its methods: those of its class where the class has them, with the same signatures."""
        network: Any = self.network
        for name in ("forward", "generate"):
            plain = getattr(type(network), name, None)
            if plain is None:  # only those write text that can
                continue
            setattr(network, name, _like(functools.partial(getattr(self, name)), plain.__get__(network)))
        for name in ("route", "weights", "classify", "save_pretrained", "push_to_hub"):
            setattr(network, name, getattr(self, name))
        network.twin, network.expert_names = self, self.names

    def route(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Routing:
        """Who answers: one pass of the shared model alone, for routers that see anything.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 0 for padding.
            inputs: what else the network takes.

        Raises:
            UserError: the input is longer than the model's limit, or there is none.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        rows, length = _size(given)
        self._refuse_long(length)
        router, seen = self.router, None
        if router.sees_features or router.config.kind == "arrow":
            with torch.inference_mode(), self.mix.using(None):
                if router.sees_features:
                    seen = features(self.network, given, router.config.layers)
                else:
                    seen = arrow_scores(self.network, given, mix=self.mix, router=router)
            seen = seen.clone()  # what was made in inference mode cannot take part in training
        return router.route(rows, seen, self.network.device)

    def routing_of(
        self,
        rows: int,
        experts: Names | None = None,
        expert_weights: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> Routing:
        """The routing that is given: experts by name, one for all rows or one for each, or their weights.

        Raises:
            UserError: an unknown expert, or the wrong shape.
        """
        if experts is not None and expert_weights is not None:
            raise UserError("both `experts` and `expert_weights` are given", fix="Give one of them")
        device = self.network.device
        if experts is not None:
            places = torch.tensor(self._places(experts, rows), device=device)
            weights = torch.eye(len(self.names), device=device)[places]
        else:
            weights = torch.as_tensor(expert_weights, dtype=torch.float32, device=device)
            weights = weights[None] if weights.ndim == 1 else weights
            weights = weights.expand(rows, -1) if weights.shape[0] == 1 else weights
            if tuple(weights.shape) != (rows, len(self.names)):
                cause = f"`expert_weights` is {list(weights.shape)}, and {rows} rows and {len(self.names)} experts need"
                raise UserError(f"{cause} {[rows, len(self.names)]}", fix="Give one row for each input")
        return Routing(weights, weights, torch.zeros(rows, device=device))

    def _places(self, names: Names, rows: int) -> list[int]:
        listed = [names] * rows if isinstance(names, str) else list(names)
        if len(listed) != rows:
            raise UserError(f"{len(listed)} names for {rows} rows", fix="Give one name, or one for each row")
        for name in listed:
            if name not in self.names:
                raise unknown_expert(name, self.names)
        return [self.names.index(name) for name in listed]

    @contextmanager
    def weights(
        self,
        weights: Routing | Tensor | Sequence[Sequence[float]] | None = None,
        *,
        experts: Sequence[str] | None = None,
    ) -> Iterator[None]:
        """Inside, calls of the model take these weights and do not route; batches of k times as many rows repeat each.

        Args:
            weights: (batch, experts), or what `route` returned.
            experts: a name for each row instead.
        """
        before = self._held
        if isinstance(weights, Routing):
            self._held = weights
        else:
            count = len(experts) if experts is not None else len(weights) if weights is not None else 0
            self._held = self.routing_of(count, experts=experts, expert_weights=weights)
        try:
            # Parts that are called by themselves, as `generate` calls an encoder, calculate with these weights, too.
            with self.mix.using(blend_of(self._held.weights, 1)):
                yield
        finally:
            self._held = before

    def forward(
        self,
        *args: Any,
        experts: Names | None = None,
        expert_weights: Tensor | None = None,
        task: Names | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the network's own `forward` does, with the experts that are given, held by `weights`, or routed to."""
        plain = getattr(type(self.network), "forward")  # noqa: B009 - not the one on the instance
        given = _named(plain, self.network, args, kwargs)
        rows, length = _size(given)
        routing = self._routing(given, rows, experts, expert_weights)
        heads = self._heads(routing, task, rows)
        if heads is not None and given.get("labels") is not None:
            given["labels"] = self._joint(given["labels"], heads)
        before, self.chosen.heads = self.chosen.heads, heads
        try:
            with self.mix.using(blend_of(routing.weights, length)):
                found = plain(self.network, **given)
        finally:
            self.chosen.heads = before
        _remember(found, routing)
        return self._of_task(found, task) if isinstance(task, str) else found

    def _routing(self, given: Mapping[str, Any], rows: int, experts: Names | None, weights: Any) -> Routing:
        if experts is not None or weights is not None:
            self._refuse_long(_size(given)[1])
            return self.routing_of(rows, experts=experts, expert_weights=weights)
        cache = _cache_of(given)
        is_filled = cache is not None and cache.get_seq_length() > 0
        # An emptied cache is for another prompt.
        known = self._held or (getattr(cache, "twin_routing", None) if is_filled else None)
        if known is not None:
            return _repeated(known, rows)
        if is_filled:
            cause = "there is a key-value cache of tokens that this model was not routed on"
            raise UserError(cause, fix="Use `generate`, or give `experts` or `expert_weights`")
        return self.route(**given)

    def _refuse_long(self, length: int) -> None:
        limit = positions_of(self.network)
        if limit is not None and length > limit:
            fix = "Cut the input: tokenizer(..., truncation=True, max_length=...)"
            raise UserError(f"the input has {length} tokens, and the model takes {limit}", fix=fix)

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        experts: Names | None = None,
        expert_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the network's own `generate` does; routed once, on the prompt (of an encoder-decoder: the encoder's)."""
        plain = getattr(type(self.network), "generate")  # noqa: B009 - not the one on the instance
        prompt = {**kwargs, "input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
        rows, _ = _size(prompt)
        if prompt.get("attention_mask") is None and prompt["input_ids"] is not None:
            prompt["attention_mask"] = self._mask(prompt["input_ids"], kwargs)
        seen = {key: prompt[key] for key in _PROMPT if key in prompt}
        with self.weights(self._routing(seen, rows, experts, expert_weights)):
            return plain(self.network, inputs, *args, **kwargs)

    def _mask(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The mask that `generate` itself infers of prompts with padding."""
        config = kwargs.get("generation_config") or self.network.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        end = kwargs.get("eos_token_id", config.eos_token_id)
        ends = end if isinstance(end, (list, tuple)) else [end]
        return None if pad is None or pad in ends else (ids != pad).long()

    def _heads(self, routing: Routing, task: Names | None, rows: int) -> Tensor | None:
        """Whose head each row goes through: the given task's, or that of the expert with the largest probability."""
        if not self.outputs:
            if task is not None:
                fix = "Say who answers instead: `experts=`"
                raise UserError("`task` chooses a head, and this model has none", fix=fix)
            return None
        if task is not None:
            return torch.tensor(self._places(task, rows), device=self.network.device)
        return routing.probabilities.argmax(dim=1)

    def _joint(self, labels: Tensor, heads: Tensor) -> Tensor:
        """Labels of single heads as labels of all heads together."""
        if any(outputs.problem != "single_label_classification" for outputs in self.outputs):
            cause = "a loss needs heads that all choose one label"
            raise UserError(cause, fix="Calculate it from the logits, without `labels`")
        starts = torch.tensor([outputs.start for outputs in self.outputs], device=labels.device)
        return labels + starts[heads.to(labels.device)].view(-1, *(1,) * (labels.ndim - 1))

    def _of_task(self, found: Any, task: str) -> Any:
        """The output with the logits of one head alone."""
        outputs = self.outputs[self.names.index(task)]
        if isinstance(found, tuple):
            place = next(n for n, part in enumerate(found) if part.ndim > 1)
            return (*found[:place], found[place][..., outputs.start : outputs.end], *found[place + 1 :])
        found["logits"] = found["logits"][..., outputs.start : outputs.end]
        return found

    def classify(
        self,
        inputs: Mapping[str, Tensor],
        *,
        task: Names | None = None,
        experts: Names | None = None,
        expert_weights: Tensor | None = None,
    ) -> list[Answer]:
        """The labels and scores of each row's head.

        On the CPU, rows of similar length are calculated together, without most of the padding.

        Args:
            inputs: of the network, a tokenizer's output.
            task: the expert whose head speaks, one for all rows or one for each; None for the router's first choice.
            experts, expert_weights: who answers, instead of the router.

        Raises:
            UserError: the model has no heads.
        """
        if not self.outputs:
            raise UserError("the model has no heads to classify with", fix="Build the bundle from classifiers")
        given = {key: value.to(self.network.device) for key, value in inputs.items()}
        rows, _ = _size(given)
        known = None if experts is None and expert_weights is None else self.routing_of(rows, experts, expert_weights)
        known = known or (None if self._held is None else _repeated(self._held, rows))
        speakers = None if task is None else self._places(task, rows)
        answers: list[Answer | None] = [None] * rows
        for places in _parts(given.get("attention_mask"), rows, on_cpu=self.network.device.type == "cpu"):
            heads = None if speakers is None else [speakers[place] for place in places]
            part = self._classified(_cut(given, places), None if known is None else known.of(places), heads)
            for place, answer in zip(places, part, strict=True):
                answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def _classified(self, given: dict[str, Any], known: Routing | None, speakers: list[int] | None) -> list[Answer]:
        """The answers to rows that are calculated together."""
        with torch.inference_mode():
            routing = known or self.route(**given)
            heads = routing.probabilities.argmax(dim=1).tolist() if speakers is None else speakers
            with self.weights(routing):
                logits = self.network(**given, task=[self.names[head] for head in heads]).logits
        return [self._answer(logits[row], routing, row, head) for row, head in enumerate(heads)]

    def _answer(self, logits: Tensor, routing: Routing, row: int, head: int) -> Answer:
        outputs = self.outputs[head]
        own = logits[outputs.start : outputs.end].float()
        if outputs.problem != "regression":
            own = own.softmax(0) if outputs.problem == "single_label_classification" else own.sigmoid()
        weights = tuple(routing.weights[row].tolist())
        return Answer(self.names[head], outputs.labels, tuple(own.tolist()), weights, float(routing.fallback[row]))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the network's tensors are the shared model's alone, and a folder of them would be no bundle."""
        cause = "a Twin model is not saved from memory: its parts are in the bundle"
        raise UserError(cause, where=str(self.bundle.folder), fix="Copy the folder, which has all of it")

    push_to_hub = save_pretrained


def _parts(mask: Tensor | None, rows: int, *, on_cpu: bool) -> list[list[int]]:
    """Rows that are calculated together: all of them, or on the CPU, the longest first, not more than some tokens."""
    if mask is None or not on_cpu:
        return [list(range(rows))]
    lengths = mask.sum(dim=1).tolist()
    order = sorted(range(rows), key=lambda row: -lengths[row])
    parts: list[list[int]] = []
    while order:
        count = max(1, CPU_TOKENS // max(1, int(lengths[order[0]])))
        parts.append(order[:count])
        order = order[count:]
    return parts


def _cut(given: Mapping[str, Any], places: list[int]) -> dict[str, Any]:
    """Some rows of a batch, without the columns that are padding in all of them."""
    found = {key: value[places] for key, value in given.items()}
    mask = found.get("attention_mask")
    if mask is None:
        return found
    kept = mask.any(dim=0)
    return {
        key: value[:, kept] if value.ndim == 2 and value.shape == mask.shape else value for key, value in found.items()
    }


CPU_TOKENS = 1024
"""Of a part of a batch on the CPU, where larger ones are hardly faster."""

_PROMPT = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


def _like(function: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the name and the signature of another one."""
    return functools.update_wrapper(function, plain)


def _named(plain: Callable[..., Any], network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(plain).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _size(given: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and tokens of a batch."""
    for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        found = given.get(key)
        if found is not None:
            return found.shape[0], found.shape[1]
    raise UserError("there are no inputs", fix="Give `input_ids` (batch, length)")


def _repeated(routing: Routing, rows: int) -> Routing:
    """The routing for a batch in which each row stands several times, as beams do.

    Raises:
        UserError: the batch is another one.
    """
    have = routing.weights.shape[0]
    if rows == have:
        return routing
    if rows % have:
        cause = f"the weights are for {have} rows, and the batch has {rows}"
        raise UserError(cause, fix="Give weights for each row of the batch")
    parts = (routing.weights, routing.probabilities, routing.fallback)
    return replace(
        routing, **dict(zip(_PARTS, (part.repeat_interleave(rows // have, 0) for part in parts), strict=True))
    )


_PARTS = ("weights", "probabilities", "fallback")


def _remember(found: Any, routing: Routing) -> None:
    """Keep the routing of a prompt with its key-value cache, for the tokens that follow."""
    cache = _cache_of(found) if isinstance(found, dict) else None
    if cache is not None:
        cache.twin_routing = routing


def _cache_of(found: Mapping[str, Any]) -> Any:
    """The key-value cache among inputs or outputs, under the name of this version of transformers or the older one."""
    present = list(found)  # asked for by name, the older one would make transformers complain
    cache = next((found[name] for name in ("cache", "past_key_values") if name in present), None)
    return cache if hasattr(cache, "get_seq_length") else None
