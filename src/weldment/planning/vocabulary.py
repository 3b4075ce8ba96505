"""Whether the rows of merged embeddings mean the same tokens in all models, and how they are made to.

Without `tokenizer` in the recipe rows are merged by position, and vocabularies that differ stop the plan: rows of
different tokens are never mixed. With it, the rows of all models are put in the order of the output's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from weldment.checkpoint.model import Checkpoint, Rows, TensorEntry
from weldment.checkpoint.side_files import read_side_file
from weldment.errors import CheckpointError, PlanError, WeldmentError, joined
from weldment.planning.files import tokenizer_model
from weldment.planning.inputs import Inputs
from weldment.planning.plan import Plan
from weldment.planning.roles import (
    Tensors,
    has_token_rows,
    head_name,
    input_embedding,
    is_head,
    is_token_bias,
    original_of,
    seems_to_hold_tokens,
)
from weldment.planning.sorting import Sorted
from weldment.vocabulary.output import Output
from weldment.vocabulary.rows import Alignment, Counts, Embedded, align
from weldment.vocabulary.spelling import respelled
from weldment.vocabulary.tokenizer import (
    TOKENIZER,
    Tokenizer,
    Vocabulary,
    check_tokens,
    open_tokenizer,
    require_tokenizer,
    vocabulary,
)
from weldment.vocabulary.wishes import Wishes

_EXAMPLES = 3
_LEAVE_OUT = "Leave it out with `drop`, or merge models of one vocabulary without `tokenizer`"


@dataclass(frozen=True)
class Words:
    """The vocabulary of a merge.

    Attributes:
        inputs: those of the merge, with aligned embeddings.
        tokenizer: the model whose tokenizer's files the output gets.
        output: what is written of them anew; None if they are copied as they are.
    """

    inputs: Inputs
    tokenizer: Checkpoint
    output: Output | None = None
    problems: tuple[WeldmentError, ...] = ()
    notes: tuple[str, ...] = ()


def settle_vocabulary(inputs: Inputs, left: Sorted, stages: Sequence[Plan]) -> Words:
    """Find the output's tokenizer and, if the recipe asks for one, align the embeddings in `left` by token."""
    recipe = inputs.recipe
    tokenizer = tokenizer_model(inputs, left.taken, stages)
    if not recipe.tokenizer and recipe.chat_template is None:
        return Words(inputs, tokenizer)
    wishes = _wishes(inputs)
    try:
        if not recipe.tokenizer:
            return _with_template(inputs, tokenizer, wishes, stages)
        return _aligned(inputs, left, wishes, stages)
    except WeldmentError as error:
        return Words(inputs, tokenizer, problems=(error,))


def _wishes(inputs: Inputs) -> Wishes:
    recipe = inputs.recipe
    key = "tokenizer.source" if recipe.source.get("tokenizer_source") is None else "tokenizer_source"
    asked = recipe.tokenizer or {}
    start = recipe.base_model or inputs.experts[0].model
    return Wishes(asked, recipe.chat_template, recipe.base_model, start, recipe.origin, key)


def _with_template(inputs: Inputs, tokenizer: Checkpoint, wishes: Wishes, stages: Sequence[Plan]) -> Words:
    """Another chat template for a tokenizer that stays as it is."""
    where = f"{inputs.recipe.origin}: chat_template"
    start = require_tokenizer(tokenizer, where)
    others = {model: found for model in inputs.models if (found := _tokenizer(inputs, model, stages)) is not None}
    template = wishes.chat_template({tokenizer.reference: start, **others})
    return Words(inputs, tokenizer, Output(start, template=template))


def _tokenizer(inputs: Inputs, model: str, stages: Sequence[Plan]) -> Tokenizer | None:
    """A model's tokenizer, or that of an intermediate merge; None if it has none."""
    stage = _stage(model, stages)
    if stage is None:
        return open_tokenizer(inputs.models[model])
    if stage.output is not None:
        return stage.output.tokenizer(model)
    found = open_tokenizer(stage.tokenizer)
    return None if found is None else replace(found, reference=model)


def _aligned(inputs: Inputs, left: Sorted, wishes: Wishes, stages: Sequence[Plan]) -> Words:
    embeddings = {model: name for model in inputs.models if (name := input_embedding(inputs.tensors[model]))}
    if not embeddings:
        cause = "no model has token embeddings that are known by name, so there are no rows to align"
        raise PlanError(cause, where=f"{inputs.recipe.origin}: tokenizer", fix="Remove `tokenizer`")
    wishes.chosen(list(embeddings))
    tokenizers = _required(inputs, embeddings, stages)
    output = wishes.output(tokenizers)
    output = replace(output, template=wishes.chat_template(tokenizers))
    first = output.start.reference
    order = [first, *(model for model in embeddings if model != first)]
    models = [
        Embedded(
            model,
            respelled(tokenizers[model], output.start.spelling),
            inputs.tensors[model][embeddings[model]].shape[0],
            merged=any(expert.model == model for expert in inputs.experts),
        )
        for model in order
    ]
    choices, problems = wishes.choices(models)
    rows = _padded(max(models[0].rows, output.size), wishes.asked.get("pad_to_multiple_of"))
    alignment = align(output, models, rows, inputs.recipe.base_model, choices)
    aligner = _Aligner(inputs, alignment, embeddings)
    tensors = {model: aligner.tensors(model, inputs.tensors[model]) for model in inputs.models}
    aligner.problems.clear()  # of tensors that are dropped as well
    for model, kept in left.tensors.items():
        left.tensors[model] = aligner.tensors(model, kept)
    left.taken = [found._replace(entry=aligner.entry(found.model, found.name, found.entry)) for found in left.taken]
    left.heads = [found._replace(entry=aligner.entry(found.model, found.name, found.entry)) for found in left.heads]
    stage = _stage(first, stages)
    return Words(
        replace(inputs, tensors=tensors),
        inputs.models[first] if stage is None else stage.tokenizer,
        output,
        (*problems, *aligner.problems.values()),
        tuple(_alignment_notes(inputs, alignment, output)),
    )


def _required(inputs: Inputs, models: Iterable[str], stages: Sequence[Plan]) -> dict[str, Tokenizer]:
    """The tokenizers of models that have embeddings.

    Raises:
        CheckpointError: with all models that have none.
    """
    where = f"{inputs.recipe.origin}: tokenizer"
    found: dict[str, Tokenizer] = {}
    problems: list[CheckpointError] = []
    for model in models:
        try:
            found[model] = _tokenizer(inputs, model, stages) or require_tokenizer(inputs.models[model], where)
            check_tokens(found[model], where)
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise joined(CheckpointError, problems)
    return found


def _padded(rows: int, multiple: int | None) -> int:
    return rows if not multiple else -(-rows // multiple) * multiple


class _Aligner:
    """Gives embeddings the output's rows.

    Args:
        embeddings: the names of the models' token embeddings, which stand in for a head that is tied to them.
    """

    def __init__(self, inputs: Inputs, alignment: Alignment, embeddings: Mapping[str, str]) -> None:
        self._inputs = inputs
        self._alignment = alignment
        self._embeddings = embeddings
        self.problems: dict[str, PlanError] = {}

    def tensors(self, model: str, tensors: Tensors) -> dict[str, TensorEntry]:
        """The tensors of a model, those that have a row for each token aligned."""
        return {name: self.entry(model, name, entry) for name, entry in tensors.items()}

    def entry(self, model: str, name: str, entry: TensorEntry) -> TensorEntry:
        """A tensor, aligned if it has a row for each token of its model and these are not the output's already."""
        place = self._alignment.maps.get(model)
        if place is None or model not in self._embeddings:
            return entry
        embedding = self._inputs.tensors[model][self._embeddings[model]].shape
        shape = _with_rows(name, entry.shape, embedding[0], self._alignment.rows)
        if shape is None:
            self._refuse_rows(model, name, entry.shape, embedding)
            return entry
        sources: dict[int, tuple[str, TensorEntry]] = {}
        for number in sorted(place.used):
            lender = self._alignment.models[number]
            found = entry if lender.reference == model else self._lent(lender.reference, name)
            if found is None:
                cause = (
                    f"{model} gets rows of tokens that it lacks from {lender.reference}, which has no tensor {name!r}"
                )
                self._refuse(name, cause, "Choose another tokenizer, or leave the tensor out with `drop` or `take`")
                return entry
            if _with_rows(name, found.shape, lender.rows, self._alignment.rows) != shape:
                return entry  # models of different sizes; the plan says so when it compares shapes
            sources[number] = (lender.reference, found)
        return replace(entry, shape=shape, changes=(), rows=Rows(sources, place))

    def _refuse_rows(self, model: str, name: str, shape: tuple[int, ...], embedding: tuple[int, ...]) -> None:
        """A problem if a tensor has rows of tokens, though not as many as the embeddings or under an unknown name."""
        said = f"{name} is {list(shape)} in {model}, whose token embeddings are {list(embedding)}"
        if has_token_rows(name):
            self._refuse(name, f"{said}: nothing tells which tokens its rows are", _LEAVE_OUT)
        elif seems_to_hold_tokens(name, shape, embedding):
            self._refuse(name, f"{said}: it seems to have a row for each token, but is not known by name", _LEAVE_OUT)

    def _refuse(self, name: str, cause: str, fix: str) -> None:
        self.problems[name] = PlanError(cause, where=f"{self._inputs.recipe.origin}: tokenizer", fix=fix)

    def _lent(self, model: str, name: str) -> TensorEntry | None:
        tensors = self._inputs.tensors[model]
        if name in tensors:
            return tensors[name]
        return tensors.get(self._embeddings[model]) if is_head(name) else None


def _with_rows(name: str, shape: tuple[int, ...], old: int, new: int) -> tuple[int, ...] | None:
    """The shape of a tensor with a row or an element for each token, with another number of them; None for others."""
    if not has_token_rows(name):
        return None
    if is_token_bias(name):
        return (*shape[:-1], new) if shape in ((old,), (1, old)) else None
    return (new, *shape[1:]) if shape[:1] == (old,) else None


def _alignment_notes(inputs: Inputs, alignment: Alignment, output: Output) -> Iterator[str]:
    start = output.start.reference
    added = f" and {len(output.new)} tokens more" if output.new else ""
    yield f"the vocabulary is that of {start}{added}: {len(output.tokens)} tokens in {alignment.rows} rows"
    for model, counts in alignment.counts.items():
        if model in alignment.maps and model in inputs.participants:
            yield f"{model}: {_described(counts)}"


def _described(counts: Counts) -> str:
    parts = [f"{counts.kept} tokens stay at their rows", f"{counts.moved} move"]
    for lender, count in counts.lent.items():
        source = {"": "are zeros", "mean": "are means of the models that have them"}.get(lender, f"come from {lender}")
        parts.append(f"{count} {source}")
    if counts.unused:
        parts.append(f"{counts.unused} of its tokens are left out")
    return ", ".join(part for part in parts if not part.startswith("0 "))


def compare_vocabularies(inputs: Inputs, models: Sequence[str], stages: Sequence[Plan] = ()) -> tuple[PlanError, ...]:
    """A problem for each model whose tokenizer's tokens are not those of the first one that has a tokenizer."""
    raw = {model: content for model in models if (content := _raw(inputs, model, stages))}
    if len(set(raw.values())) < 2:
        return ()
    rows = {model: found for model, content in raw.items() if (found := vocabulary(content))}
    if not rows:
        return ()
    first, *others = rows
    found = (_difference(inputs, model, first, rows[model], rows[first]) for model in others)
    return tuple(problem for problem in found if problem is not None)


def _raw(inputs: Inputs, model: str, stages: Sequence[Plan]) -> bytes | None:
    """The content of `tokenizer.json`; it is downloaded if need be, for it decides whether the weights are wanted."""
    stage = _stage(model, stages)
    if stage is not None and stage.output is not None:
        return stage.output.json()
    return read_side_file(inputs.models[model] if stage is None else stage.tokenizer, TOKENIZER)


def _stage(model: str, stages: Sequence[Plan]) -> Plan | None:
    return next((stage for stage in stages if stage.recipe.name == model), None)


def _difference(inputs: Inputs, model: str, first: str, own: Vocabulary, other: Vocabulary) -> PlanError | None:
    if own == other:
        return None
    moved = [token for token, row in own.items() if other.get(token, row) != row]
    more, less = [t for t in own if t not in other], [t for t in other if t not in own]
    parts = [
        (moved, f"lie at other rows in {model} than in {first}", lambda t: f"{t!r} (row {own[t]} and {other[t]})"),
        (more, f"are in {model} alone", lambda t: f"{t!r} (row {own[t]})"),
        (less, f"are in {first} alone", lambda t: f"{t!r} (row {other[t]})"),
    ]
    said = [f"{len(found)} tokens {what}: {_few(found, show)}" for found, what, show in parts if found]
    fix = _advice(inputs, first, more, len(own.keys() | other.keys()))
    return PlanError(f"different vocabularies: {'; '.join(said)}", where=inputs.recipe.origin, fix=fix)


def _few(tokens: Sequence[str], show: Callable[[str], str]) -> str:
    return ", ".join(show(token) for token in tokens[:_EXAMPLES]) + (", ..." if len(tokens) > _EXAMPLES else "")


def _advice(inputs: Inputs, first: str, more: Sequence[str], united: int) -> str:
    """What can be done about vocabularies that differ."""
    tensors = inputs.tensors[first]
    biases = (name for name in tensors if is_token_bias(name) and original_of(name) not in tensors)
    names = [name for name in (input_embedding(tensors), head_name(tensors), *biases) if name]
    base = "base" if inputs.recipe.base_model is not None else first
    owner = inputs.recipe.base_model or first
    left_out = f" and leave {len(more)} tokens out" if more and owner == first else ""
    return (
        "Merging rows by position would mix different tokens. Align them by token: `tokenizer: {source: union}` would "
        f"give all {united} tokens, `tokenizer: {{source: {base}}}` those of {owner}{left_out}; or "
        f"take what has a row for each token from one model: `take: {json.dumps(dict.fromkeys(names, first))}`"
    )
