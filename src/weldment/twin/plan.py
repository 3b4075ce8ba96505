"""What a bundle will hold, from the recipe and from headers alone; finds every problem that these show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from weldment.adapters.extract.pairing import adapted_by_peft, kind_of, stored_transposed
from weldment.adapters.merge.coefficients import coefficients, uses_base
from weldment.adapters.merge.recognising import adapters_of, as_models
from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import Checkpoint, LowRank, TensorEntry
from weldment.engine.progress import Progress
from weldment.errors import PlanError, WeldmentError, joined
from weldment.merging import downloaded, open_models
from weldment.planning.inputs import gather
from weldment.planning.jobs import head_name_of
from weldment.planning.layers import depths, position
from weldment.planning.misfits import some
from weldment.planning.plan import Plan, TensorJob
from weldment.planning.roles import matches
from weldment.planning.stages import plan_merges
from weldment.recipe import Recipe
from weldment.twin.recipe import TwinRecipe, check_router, with_base

_HEAD_MODULES = ("classifier", "classification_head", "score", "qa_outputs")
TASK_HEADS = tuple(form for module in _HEAD_MODULES for form in (module, f"{module}.*"))
"""Modules that transformers puts on top of a backbone for a task."""

_LAYERS = ("linear", "convolution", "embedding", "head")
Term = tuple[float, LowRank]


@dataclass(frozen=True)
class Expert:
    """One of the experts.

    Attributes:
        name: in the bundle.
        written: how the recipe writes it.
        reference: how the merge does: an adapter with its base.
        head: what the merge calls the file with its head, None if it keeps none.
    """

    name: str
    written: str
    reference: str
    model: Checkpoint
    head: str | None = None


@dataclass(frozen=True)
class Piece:
    """A tensor of an expert whose difference from the shared model's is kept.

    Attributes:
        expert: its place in the plan.
        tensor: the shared model's name of it.
        kind: what it is, as in extractions.
        entry: the expert's tensor.
        is_layer: it is compressed to a LoRA layer; otherwise to a dense difference.
        rank: of the layer at most, None for the least that keeps `energy`.
        energy: the share of the squared norm that is to be kept, or None.
        density: the share of the elements that is to be kept, or None.
        transposed: the matrix is stored as (inputs, outputs).
        terms: the difference as a sum of c * scale * B A, where that is known.
    """

    expert: int
    tensor: str
    kind: str
    entry: TensorEntry
    is_layer: bool
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    transposed: bool = False
    terms: tuple[Term, ...] | None = None

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]

    @property
    def sides(self) -> tuple[int, int]:
        """As a matrix: rows, columns."""
        shape = self.entry.shape
        return (shape[0] if shape else 1), math.prod(shape[1:])


@dataclass(frozen=True)
class TwinPlan:
    """A bundle, ready to be built.

    Attributes:
        merge: the plan of the shared model, with the experts' heads.
        pieces: in the order of the shared model's tensors, those of one tensor together.
        notes: what the user should know.
    """

    recipe: TwinRecipe
    merge: Plan
    experts: tuple[Expert, ...]
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]

    @property
    def shared_class(self) -> str | None:
        """The class that the shared model's configuration names, whose names of modules the adapters have."""
        return next(iter(self.merge.config.get("architectures") or []), None)

    @property
    def factor_numbers(self) -> int | None:
        """How many numbers the layers will have at most; None where ranks are found by energy."""
        found = [(piece.rank, sum(piece.sides)) for piece in self.pieces if piece.is_layer]
        if any(rank is None for rank, _ in found):
            return None
        return sum(rank * sides for rank, sides in found if rank is not None)


def plan_twin(recipe: TwinRecipe, progress: Progress, *, download: bool = True) -> TwinPlan:
    """Plan a bundle.

    Args:
        progress: told of downloads.
        download: fetch the weights of models on the Hub.

    Raises:
        UserError: recipe and models do not fit together; every problem is named.
    """
    merge, references = _as_merge(recipe)
    models = open_models([merge])
    experts, heads = _experts(recipe, merge, models, references)
    problems: list[WeldmentError] = list(check_router(recipe, [expert.name for expert in experts]))
    merge = replace(merge, heads=heads, source=recipe.source)
    try:
        planned = plan_merges([merge], models)
        if download and not planned.is_local:
            models = {reference: downloaded(model, progress) for reference, model in models.items()}
            experts = tuple(replace(expert, model=models[expert.reference]) for expert in experts)
            planned = plan_merges([merge], models)
    except PlanError as error:
        raise joined(PlanError, [error, *problems]) from error
    kept = {id(model): name for name, model in planned.heads.items()}
    experts = tuple(replace(expert, head=kept.get(id(expert.model))) for expert in experts)
    pieces = tuple(_pieces(recipe, planned, experts))
    problems += _rank_problems(recipe, pieces)
    problems += _idle_patterns(recipe, planned)
    if not pieces:
        cause = "no tensor is left whose differences could be kept"
        problems.append(PlanError(cause, where=str(recipe.place), fix="Check `exclude`, `take` and `drop`"))
    if problems:
        raise joined(PlanError, problems)
    return TwinPlan(recipe, planned, experts, pieces, tuple(_notes(planned, pieces)))


def _as_merge(recipe: TwinRecipe) -> tuple[Recipe, dict[str, str]]:
    """The merge of full models, and how it calls the experts, by their names in the recipe."""
    merge = recipe.merge
    opened = merge if merge.base_model or recipe.shared is None else replace(merge, base_model=recipe.shared)
    adapters = adapters_of([opened])
    full = as_models(merge, adapters) if adapters else opened
    pairs = {old.model: new.model for old, new in zip(merge.models, full.models, strict=True)}
    references = {expert.model: pairs[expert.model] for expert in recipe.experts}
    return (with_base(full, recipe.shared) if recipe.shared is not None else full), references


def _experts(
    recipe: TwinRecipe, merge: Recipe, models: Mapping[str, Checkpoint], references: Mapping[str, str]
) -> tuple[tuple[Expert, ...], tuple[str, ...]]:
    """The experts with their names, and the patterns of the heads that are kept of them."""
    given = set(recipe.names.values())
    taken: dict[str, str] = {}
    for written, reference in references.items():
        plain = re.sub(r"[^\w.-]", "-", head_name_of(models[reference], ()), flags=re.ASCII)
        used = {name.lower() for name in (*taken.values(), *given)}
        numbered = (plain, *(f"{plain}-{number}" for number in range(2, 10_000)))
        taken[written] = recipe.names.get(written) or next(name for name in numbered if name.lower() not in used)
    experts = tuple(Expert(taken[written], written, ref, models[ref]) for written, ref in references.items())
    heads = merge.heads if "heads" in recipe.source else tuple(_task_heads(merge, models, experts))
    return experts, heads


def _task_heads(merge: Recipe, models: Mapping[str, Checkpoint], experts: Sequence[Expert]) -> Iterator[str]:
    """What experts have on top of what they share: tensors that the base lacks, and those named like task heads."""
    inputs = gather(merge, models)
    shared = inputs.tensors[inputs.reference]
    names = dict.fromkeys(name for expert in experts for name in inputs.tensors[expert.reference])
    for name in names:
        if not matches(merge.drop, name) and (name not in shared or matches(TASK_HEADS, name)):
            yield name


def _pieces(recipe: TwinRecipe, planned: Plan, experts: Sequence[Expert]) -> Iterator[Piece]:
    jobs = [job for job in planned.jobs if not job.file and job.action == "merge" and is_float(job.dtype)]
    stacks = depths(job.name for job in jobs)
    for job in jobs:
        if matches(recipe.exclude, job.name):
            continue
        entries = dict(zip(job.models, job.sources, strict=False))
        sums = _sums(job)
        for place, expert in enumerate(experts):
            terms = None if sums is None else _terms(job, sums, expert.reference)
            if terms != ():
                piece = _piece(recipe, planned, job, place, entries[expert.reference], position(job.name, stacks))
                yield replace(piece, terms=terms)


def _piece(
    recipe: TwinRecipe, planned: Plan, job: TensorJob, place: int, entry: TensorEntry, at: float | None
) -> Piece:
    kind, model_type = kind_of(job.name, entry.shape), planned.config.get("model_type")
    exclusive = recipe.exclusive
    is_layer = exclusive.kind == "svd" and kind in _LAYERS and adapted_by_peft(job.name, model_type)
    piece = Piece(place, job.name, kind, entry, is_layer, transposed=stored_transposed(job.name, model_type))
    if not is_layer:
        return piece if exclusive.kind == "svd" else replace(piece, density=exclusive.amount(job.name, at)[1])
    what, number = exclusive.amount(job.name, at)
    side = min(piece.sides)
    if what == "energy":
        return replace(piece, energy=number)
    return replace(piece, rank=round(number) if what == "rank" else max(1, round(number * side)))


def _sums(job: TensorJob) -> dict[str, tuple[Term, ...]] | None:
    """By model what adapters add to the common base of a weighted sum; None where that is not all there is."""
    shares = coefficients(job.method, job.parameters)
    if shares is None or job.finish is not None or (not uses_base(job.method) and abs(sum(shares) - 1.0) > 1e-12):
        return None
    origins = {(entry.file.path, entry.offset, entry.dtype) for _, entry in job.inputs}
    changes = [change for _, entry in job.inputs for change in entry.changes]
    if len(origins) > 1 or not all(_is_plain(change) for change in changes):
        return None
    return {
        model: tuple((share, change) for change in entry.changes if isinstance(change, LowRank))
        for (model, entry), share in zip(job.inputs, (*shares, 0.0), strict=False)
    }


def _is_plain(change: object) -> bool:
    return isinstance(change, LowRank) and change.magnitude is None and change.experts == 1 and change.expert is None


def _terms(job: TensorJob, sums: Mapping[str, tuple[Term, ...]], expert: str) -> tuple[Term, ...]:
    """tau_t - sum_i c_i tau_i, by its factors."""
    found = [((1.0 if model == expert else 0.0) - share, low) for model, own in sums.items() for share, low in own]
    return tuple((share, low) for share, low in found if share != 0.0)


def _rank_problems(recipe: TwinRecipe, pieces: Sequence[Piece]) -> Iterator[PlanError]:
    """Ranks that no tensor for which they are meant has."""
    if "rank" not in recipe.exclusive.settings:
        return
    largest: dict[int, Piece] = {}
    for piece in pieces:
        if piece.rank is not None and min(piece.sides) >= min(largest.get(piece.rank, piece).sides):
            largest[piece.rank] = piece
    for rank, piece in largest.items():
        if rank > (side := min(piece.sides)):
            rows, columns = piece.sides
            cause = f"rank {rank} is beyond every matrix it is for; the largest, {piece.tensor}, is {rows} x {columns}"
            fix = f"Write at most {side}, or `density: 1` for all singular values"
            yield PlanError(cause, where=str(recipe.place.at("twin", "exclusive", "rank")), fix=fix)


def _idle_patterns(recipe: TwinRecipe, planned: Plan) -> Iterator[PlanError]:
    """Patterns of `exclude` that were written and fit nothing."""
    if "exclude" not in recipe.source["twin"]:
        return
    names = [job.name for job in planned.jobs]
    for pattern in recipe.exclude:
        if not any(matches((pattern,), name) for name in names):
            where = str(recipe.place.at("twin", "exclude"))
            yield PlanError(f"the pattern {pattern!r} fits no tensor", where=where, fix="Check its spelling")


def _notes(planned: Plan, pieces: Sequence[Piece]) -> Iterator[str]:
    yield from planned.notes
    reduced = dict.fromkeys(
        piece.tensor for piece in pieces if piece.rank is not None and piece.rank > min(piece.sides)
    )
    if reduced:
        yield f"{some(list(reduced))}: smaller than the rank, and kept whole"
    dense = dict.fromkeys(piece.tensor for piece in pieces if not piece.is_layer and piece.kind == "parameter")
    if dense and any(piece.is_layer for piece in pieces):
        yield f"{some(list(dense))}: no LoRA layer can hold them; their differences are kept whole, and PEFT lacks them"
    kind = str(next(iter(planned.config.get("architectures") or []), ""))
    if kind.endswith("ForMaskedLM") and any(piece.kind == "embedding" and piece.is_layer for piece in pieces):
        yield f"PEFT does not adapt the head of {kind} where it is tied to embeddings; exclude these to have it exact"
    copied = [job.name for job in planned.jobs if not job.file and job.action == "copy" and is_float(job.dtype)]
    if copied:
        yield f"{some(copied)}: copied and not merged, so the same for all experts"
