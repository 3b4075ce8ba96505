"""A fine-tune and its base, tensor by tensor: what becomes a LoRA layer, what is saved whole, what is left out.

Decided from headers alone, with everything that does not fit in one error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.errors import PlanError, UserError, joined
from weldment.planning.layers import is_embedding
from weldment.planning.misfits import some
from weldment.planning.names import align
from weldment.planning.roles import head_name, input_embedding, is_head, is_recomputed, matches, original_of
from weldment.planning.tying import tying_state

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Values of `model_type` whose attention and feed-forward weights are stored as (inputs, outputs), in a
module that transformers calls Conv1D."""

_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Values of `model_type` whose `out_proj` PEFT refuses to adapt: their fused code passes it by."""

_TABLE = re.compile(r"(^|\.)(relative_attention_bias|emb|\w+_emb)\.weight$")
"""Embeddings whose names do not say so."""

_LANGUAGE_MODEL = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")

Fate = Literal["layer", "saved", "left"]


@dataclass(frozen=True)
class Choice:
    """What the user wants; patterns are globs that fit whole names of tensors or modules, or their ends.

    Attributes:
        save: modules to store whole.
        include: tensors that may become LoRA layers; all that can by default.
        exclude: tensors to leave out, whatever is the matter with them.
        fan_in_fan_out: all matrices are stored as (inputs, outputs).
    """

    save: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class Pair:
    """One tensor of the fine-tune and its partner.

    Attributes:
        name: in the fine-tune.
        kind: "linear", "convolution", "embedding", "head", "norm", "bias" or "parameter".
        old: the base's, None for a tensor that only the fine-tune has.
        why: it is left out.
        transposed: the matrix is stored as (inputs, outputs).
    """

    name: str
    kind: str
    new: TensorEntry
    old: TensorEntry | None
    fate: Fate
    why: str = ""
    transposed: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.new.nbytes + (self.old.nbytes if self.old is not None else 0)


@dataclass(frozen=True)
class Pairing:
    """All tensors of both models.

    Attributes:
        dropped: reasons for tensors without a partner, by "finetuned" or "base" and the name there.
        saved: the modules that are stored whole.
        modules: every module of the fine-tune and every part that holds some.
        transposed: LoRA layers are of the Conv1D kind.
        copies: tensors that are the fine-tune's token embeddings, where these are saved, with the name of
            these; PEFT would leave them as the base has them if they were not saved too.
    """

    pairs: tuple[Pair, ...]
    dropped: Mapping[tuple[str, str], str]
    saved: tuple[str, ...]
    modules: frozenset[str]
    transposed: bool
    copies: Mapping[str, str]
    notes: tuple[str, ...] = field(default_factory=tuple)


def pair_up(finetuned: Checkpoint, base: Checkpoint, choice: Choice) -> Pairing:
    """Match the tensors of a fine-tune with those of its base, under the names of the fine-tune.

    Raises:
        UserError: a pattern that fits nothing.
        PlanError: tensors that differ in shape or kind, or that only the fine-tune has; the message lists all.
    """
    names, renames = align(_shapes(base.tensors), _shapes(finetuned.tensors))
    olds = {names[name]: entry for name, entry in base.tensors.items()}
    dropped = {
        **{("finetuned", name): why for name, why in _needless(finetuned).items()},
        **{("base", name): why for name, why in _needless(base).items()},
    }
    news = {name: entry for name, entry in finetuned.tensors.items() if ("finetuned", name) not in dropped}
    modules = frozenset(part for name in finetuned.tensors for part in _parents(name))
    saved = _saved_modules(news, modules, choice)
    transposed = choice.fan_in_fan_out or _is_conv1d(finetuned) or _is_conv1d(base)
    sort = _Sorting(choice, saved, transposed, finetuned.config.get("model_type") in _MAMBA)
    pairs = tuple(sort.pair(name, entry, olds.get(name)) for name, entry in news.items())
    _refuse(pairs, finetuned, base, choice)
    alone = [names[name] for name in base.tensors if names[name] not in news and ("base", name) not in dropped]
    dropped |= {("base", olds[name].name): "the fine-tune has no such tensor" for name in alone}
    notes = [f"tensor names of {base.reference} were matched by prefix: {change}" for change in renames]
    if alone:
        notes.append(f"{some(alone)} of the base: the fine-tune has no such tensor, the adapter does not change it")
    if transposed:
        notes.append("matrices are taken to be stored as (inputs, outputs), and the adapter says fan_in_fan_out")
    copies = tied_copies(finetuned, [pair.name for pair in pairs if pair.fate == "saved"])
    if copies:
        notes.append(f"the token embeddings are saved for {' and '.join(copies)} too, which PEFT would not change")
    return Pairing(pairs, dropped, saved, modules, transposed, copies, tuple(notes))


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """What a tensor is, by its name and its number of dimensions."""
    if name.endswith(".bias"):
        return "bias"
    if not name.endswith(".weight"):
        return "parameter"
    if is_head(name):
        return "head"
    if len(shape) == 2:
        return "embedding" if is_embedding(name) or _TABLE.search(name) else "linear"
    if len(shape) == 1:
        return "norm"
    # One input channel and several outputs: each has a group of its own, which PEFT cannot merge.
    is_grouped = shape[1:2] == (1,) and shape[0] > 1
    return "convolution" if len(shape) == 4 and not is_grouped else "parameter"


@dataclass(frozen=True)
class _Sorting:
    """Decides what becomes of one tensor."""

    choice: Choice
    saved: tuple[str, ...]
    transposed: bool
    is_mamba: bool

    def pair(self, name: str, new: TensorEntry, old: TensorEntry | None) -> Pair:
        pair = Pair(name, kind_of(name, new.shape), new, old, "left")
        if any(name.startswith(f"{module}.") for module in self.saved):
            return replace(pair, fate="saved")
        if matches(self.choice.exclude, name, pair.module):
            return replace(pair, why="excluded")
        if pair.kind not in ("linear", "convolution"):
            return replace(pair, why=f"a tensor of the kind {pair.kind} is not made a LoRA layer")
        if self.choice.include and not matches(self.choice.include, name, pair.module):
            return replace(pair, why="not included")
        if self.is_mamba and pair.module.endswith("out_proj"):
            return replace(pair, why="PEFT does not adapt it in Mamba models")
        if pair.kind == "linear" and self.transposed and not self._is_transposed(name):
            return replace(pair, why="stored as (outputs, inputs), other than the layers of the adapter")
        return replace(pair, fate="layer", transposed=self.transposed and pair.kind == "linear")

    def _is_transposed(self, name: str) -> bool:
        return self.choice.fan_in_fan_out or _CONV1D.search(name) is not None


def stored_transposed(name: str, model_type: object) -> bool:
    """Whether a matrix is known to be stored as (inputs, outputs)."""
    return model_type in CONV1D_MODELS and _CONV1D.search(name) is not None


def adapted_by_peft(name: str, model_type: object) -> bool:
    """False for layers that PEFT refuses to adapt."""
    return not (model_type in _MAMBA and name.endswith("out_proj.weight"))


def _saved_modules(tensors: Iterable[str], modules: frozenset[str], choice: Choice) -> tuple[str, ...]:
    """The modules to store whole, none inside another.

    PEFT replaces every module whose name ends with one that is listed, and then wants its tensors.
    """
    wanted = {name.rpartition(".")[0] for name in tensors if matches(choice.save, name, name.rpartition(".")[0])}
    if "" in wanted:
        cause = "a tensor outside of all modules cannot be stored whole"
        raise UserError(cause, where="--save", fix="Leave it out: PEFT only stores modules")
    closed = wanted | {module for module in modules if module.endswith(tuple(wanted))} if wanted else wanted
    return tuple(sorted(module for module in closed if not closed & set(_parents(module))))


def _parents(name: str) -> list[str]:
    """The module of a tensor (or the parent of a module) and all that it lies in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def tied_copies(model: Checkpoint, saved: Sequence[str]) -> dict[str, str]:
    """Names of tensors that are saved token embeddings under another name, with the name of these."""
    embedding = input_embedding(saved)
    if embedding is None:
        return {}
    prefix = embedding.removesuffix("shared.weight")
    towers = [f"{prefix}{tower}.embed_tokens.weight" for tower in ("encoder", "decoder")] if prefix != embedding else []
    kinds = model.config.get("architectures") or []
    state = tying_state(model.tensors, model.config)
    is_language_model = any(_LANGUAGE_MODEL.search(str(kind)) for kind in kinds)
    is_tied = (is_language_model and state in ("tied", "unknown")) or (not kinds and state == "tied")
    head = [head_name(model.tensors) or "lm_head.weight"] if is_tied else []
    return dict.fromkeys([*towers, *head], embedding)


def _needless(model: Checkpoint) -> dict[str, str]:
    """Tensors that say nothing, with the reason."""
    found = {n: "the model's code computes it" for n, entry in model.tensors.items() if is_recomputed(n, entry.shape)}
    for name in model.tensors:
        if (original := original_of(name)) in model.tensors:
            found[name] = f"a copy of {original}"
    head = head_name(model.tensors)
    if head is not None and tying_state(model.tensors, model.config) == "tied":
        found[head] = "a copy of the token embeddings"
    return found


def _is_conv1d(model: Checkpoint) -> bool:
    return model.config.get("model_type") in CONV1D_MODELS


def _shapes(tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in tensors.items()}


def _refuse(pairs: Sequence[Pair], finetuned: Checkpoint, base: Checkpoint, choice: Choice) -> None:
    """PlanError with everything that keeps the models from being compared."""
    _refuse_idle_patterns(pairs, finetuned, choice)
    where = f"{finetuned.reference}, {base.reference}"
    wanted = [pair for pair in pairs if pair.why != "excluded"]
    alone = [pair.name for pair in wanted if pair.old is None and pair.fate != "saved"]
    misshapen = [pair for pair in wanted if pair.old is not None and pair.old.shape != pair.new.shape]
    foreign = [pair for pair in wanted if pair.fate != "left" and _foreign_dtype(pair)]
    if (count := len(alone) + len(misshapen)) > len(pairs) / 2:
        kinds = " and ".join(f"{model.reference} {_model_type(model)}" for model in (finetuned, base))
        cause = f"models of different architecture or size: {count} of {len(pairs)} tensors do not fit ({kinds})"
        raise PlanError(cause, where=where, fix="Name the model that the fine-tune was trained from as --base")
    found: dict[str, str] = {}
    if alone:
        fix = "Store their modules whole with --save, or leave them out with --exclude"
        found[f"only the fine-tune has {some(alone)}"] = fix
    if misshapen:
        fix = "Leave them out with --exclude; of a resized vocabulary, the adapter then does not know the new tokens"
        found[f"different shapes: {some([_shape_words(pair) for pair in misshapen])}"] = fix
    if foreign:
        cause = f"{some([pair.name for pair in foreign])}: {_foreign_dtype(foreign[0])} cannot be extracted"
        found[cause] = "Use the models in float32, float16 or bfloat16"
    if found:
        raise joined(PlanError, [PlanError(cause, where=where, fix=fix) for cause, fix in found.items()])


def _refuse_idle_patterns(pairs: Sequence[Pair], finetuned: Checkpoint, choice: Choice) -> None:
    """UserError for a pattern that fits nothing."""
    for option, patterns in {"--save": choice.save, "--include": choice.include, "--exclude": choice.exclude}.items():
        for pattern in patterns:
            if not any(matches([pattern], pair.name, pair.module) for pair in pairs):
                cause = f"{pattern!r} fits no tensor and no module of {finetuned.reference}"
                raise UserError(cause, where=option, fix=f"Names look like {pairs[-1].name}" if pairs else None)


def _foreign_dtype(pair: Pair) -> str:
    """The dtype that keeps a tensor from being an adapter's, or nothing."""
    dtypes = [pair.new.dtype, *([pair.old.dtype] if pair.old is not None and pair.fate == "layer" else [])]
    return next((dtype for dtype in dtypes if not is_float(dtype)), "")


def _model_type(model: Checkpoint) -> str:
    return f"is {model.config['model_type']}" if "model_type" in model.config else "does not say what it is"


def _shape_words(pair: Pair) -> str:
    old = list(pair.old.shape) if pair.old is not None else []
    return f"{pair.name} {list(pair.new.shape)}, in the base {old}"
