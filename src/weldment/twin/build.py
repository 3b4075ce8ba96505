"""`weld twin build`: the shared model, the experts' compressed parts and the router, put in place in one step."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from weldment.checkpoint.dtypes import torch_dtype
from weldment.checkpoint.model import Checkpoint, WeightFile
from weldment.checkpoint.opening import open_checkpoint
from weldment.checkpoint.side_files import write_json
from weldment.checkpoint.staging import Staging
from weldment.engine.memory import PROCESS_BYTES, fit
from weldment.engine.progress import Amount, Progress, Silent
from weldment.engine.run import default_threads
from weldment.engine.works import Inputs
from weldment.errors import RecipeError, UserError
from weldment.merging import check_target
from weldment.methods.masks import tensor_key
from weldment.report.manifest import file_digest, read_manifest, write_manifest
from weldment.twin.bundle import (
    EXPERTS,
    HEAD,
    HEAD_CONFIG,
    ROUTER,
    Bundle,
    expert_part,
    read_bundle,
    write_twin_json,
)
from weldment.twin.card import bundle_card
from weldment.twin.compression import Task, compress
from weldment.twin.experts import ExpertWriter, modules_of
from weldment.twin.plan import Expert, Piece, TwinPlan, plan_twin
from weldment.twin.recipe import TwinRecipe, load_twin_recipe, with_defaults
from weldment.twin.sections import RouterSection
from weldment.writing import Run

if TYPE_CHECKING:
    from weldment.twin.training import RouterSettings

FAR = 0.5
"""Norms of an expert's differences, relative to the shared model's, from which on they hardly share a base."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def build(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    threads: int | None = None,
    max_memory: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build a Twin bundle in the folder `out`, which appears when it is whole.

    theta_shared is merged as the recipe says and stored; of every expert, theta_t - theta_shared is compressed
    tensor by tensor, and a router is made. A build that was killed leaves `out` as it was, and starts anew.

    Args:
        recipe: a YAML file or its content: an ordinary recipe with a `twin` section.
        out: the bundle's folder.
        overrides: `key.path=value` changes to the recipe.
        threads: workers; all processors by default, as far as memory allows.
        max_memory: bytes that merging and compressing may use, or None.
        seed: replaces the recipe's.
        overwrite: replace a non-empty folder, once the new bundle is complete.
        progress: receives events.

    Raises:
        UserError: recipe, models or folder are at fault; nothing was written.
        MergeError: the build failed while it ran.

    Source: Lu et al. 2024, Twin-Merging (NeurIPS 2024).
    """
    progress = progress or Silent()
    read = load_twin_recipe(recipe, overrides=overrides, seed=seed)
    planned = plan_twin(read, progress)
    target = Path(out)
    check_target(target, recipe if isinstance(recipe, (str, Path)) else {}, planned.merge.models, overwrite=overwrite)
    settings = _router_settings(read, planned)
    workers = _affordable(planned, threads, max_memory)
    for note in planned.notes:
        progress.message(f"note: {note}")
    progress.message(_forecast(planned))
    with Staging(target) as staging:
        staging.check(overwrite=overwrite)
        staging.clear()
        _Build(planned, staging, target, progress).run(settings, workers, threads, max_memory)
    return read_bundle(target, check=False)


def _router_settings(recipe: TwinRecipe, planned: TwinPlan) -> RouterSettings:
    """What the router is to be; its data are looked at before anything is merged."""
    from weldment.twin.training import RouterSettings, check_data

    section = with_defaults(recipe.router, recipe.exclusive)
    given = {key: value for key in RouterSection.model_fields if (value := getattr(section, key)) is not None}
    try:
        settings = RouterSettings(**given)
        if settings.data:
            check_data(settings, [expert.name for expert in planned.experts])
    except ValueError as error:
        raise RecipeError(str(error), where=str(recipe.place.at("twin", "router"))) from error
    return settings


def _affordable(planned: TwinPlan, threads: int | None, max_memory: int | None) -> int:
    """Matrices at a time.

    Raises:
        UserError: the limit does not even allow one.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads (--threads) is {threads}", fix="It must be at least 1")
    one = max(_working_bytes(piece) for piece in planned.pieces)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if max_memory is None else max_memory
    room = memory - PROCESS_BYTES
    if max_memory is not None and room < one:
        fix = f"The least it needs is {(PROCESS_BYTES + one) // 10**6 + 1} MB"
        raise UserError("the largest matrix cannot be compressed in so little memory", where="--max-memory", fix=fix)
    return max(1, min(threads or default_threads(), room // one))


def _working_bytes(piece: Piece) -> int:
    """What compressing one tensor takes: the matrix, what it is multiplied to, and those of the short side."""
    rows, columns = piece.sides
    return 8 * (3 * rows * columns + (5 * min(rows, columns) ** 2 if piece.is_layer else 0))


def _forecast(planned: TwinPlan) -> str:
    """What the build is going to do."""
    layers, numbers = sum(piece.is_layer for piece in planned.pieces), planned.factor_numbers
    size = "" if numbers is None else f", at most {numbers * 4 / 1e6:.1f} MB in float32"
    what = f"{layers} LoRA layers{size}, {len(planned.pieces) - layers} dense differences"
    return f"{len(planned.experts)} experts, shared model of {planned.merge.write_bytes / 1e6:.1f} MB: {what}"


class _Build:
    """One bundle in the making."""

    def __init__(self, planned: TwinPlan, staging: Staging, target: Path, progress: Progress) -> None:
        self.planned, self.staging, self.target, self.progress = planned, staging, target, progress
        self.folder = staging.folder

    def run(self, settings: RouterSettings, workers: int, threads: int | None, max_memory: int | None) -> None:
        """Make everything and publish it."""
        self._merge(threads, max_memory)
        records = self._compress(workers)
        self._route(settings, records)
        self._describe(records)
        self.staging.seal()
        self.staging.publish()

    def _merge(self, threads: int | None, max_memory: int | None) -> None:
        """The shared model, in a staging folder of its own, and the heads that it keeps beside the experts."""
        machine, block = fit(self.planned.merge, "cpu", threads, max_memory)
        self.staging.stages.mkdir(parents=True)
        made = self.staging.stages / "shared"
        with Staging(made) as inner:
            Run(self.planned.merge, machine, block, self.progress).into(inner)
        made.rename(self.folder)
        for expert in self.planned.experts:
            place = self.folder / EXPERTS / expert.name
            place.mkdir(parents=True)
            if expert.head is not None:
                heads = self.folder / "heads"
                (heads / f"{expert.head}.safetensors").rename(place / HEAD)
                config = heads / f"{expert.head}.json"
                config.rename(place / HEAD_CONFIG) if config.is_file() else write_json(place / HEAD_CONFIG, {})
        if (self.folder / "heads").is_dir():
            (self.folder / "heads").rmdir()

    def _compress(self, workers: int) -> list[dict[str, Any]]:
        """All experts' parts; their records in `twin.json`."""
        shared = open_checkpoint(str(self.folder))
        writers = self._writers(shared)
        total = sum(piece.entry.read_bytes for piece in self.planned.pieces)
        self.progress.begin(Amount.of(total), Amount.of(0))
        before = torch.get_num_threads()
        exclusive = self.planned.recipe.exclusive
        try:
            with ExitStack() as stack:
                tasks = self._tasks(shared, Inputs(stack, _path))
                pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
                stack.callback(pool.shutdown, cancel_futures=True)
                for found in _in_order(pool, lambda task: compress(task, exclusive), tasks, 2 * workers):
                    writers[found.piece.expert].add(found)
                    self.progress.advance(found.piece.tensor, Amount.of(found.piece.entry.read_bytes))
        finally:
            torch.set_num_threads(before)
        pairs = zip(self.planned.experts, writers, strict=True)
        return [self._record(expert, writer) for expert, writer in pairs]

    def _writers(self, shared: Checkpoint) -> list[ExpertWriter]:
        modules = modules_of(shared.tensors)
        return [
            ExpertWriter(self.folder / EXPERTS / expert.name, self.staging.stages, shared, modules)
            for expert in self.planned.experts
        ]

    def _tasks(self, shared: Checkpoint, inputs: Inputs) -> Iterator[Task]:
        recipe = self.planned.recipe
        asked = recipe.exclusive.dtype
        for piece in self.planned.pieces:
            old = shared.tensors[piece.tensor]
            own = torch_dtype(old.dtype)
            dtype = torch_dtype(asked) if asked else own if own.itemsize == 2 else torch.float32
            key = tensor_key(recipe.merge.seed, self.planned.experts[piece.expert].written, piece.tensor)
            yield Task(piece, inputs.source(piece.entry), inputs.source(old), dtype, key)

    def _record(self, expert: Expert, writer: ExpertWriter) -> dict[str, Any]:
        adapter, changes, notes = writer.finish(str(self.target))
        for note in (*notes, *_far(expert, writer)):
            self.progress.message(f"note: {note}")
        place, config = self.folder / EXPERTS / expert.name, expert.model.config
        return {
            "name": expert.name,
            "reference": _public(expert.written),
            "adapter": adapter,
            "changes": changes,
            "head": expert.head is not None,
            "labels": _labels(config) if expert.head is not None else None,
            "problem_type": config.get("problem_type"),
            "nbytes": sum(path.stat().st_size for path in place.iterdir()),
            "kept": writer.share,
        }

    def _route(self, settings: RouterSettings, records: Sequence[Mapping[str, Any]]) -> None:
        from weldment.twin.training import make_router

        self.progress.message(f"router: {settings.kind}")
        parts = [expert_part(self.folder, str(record["name"]), record) for record in records]
        report = make_router(self.folder, parts, settings, self.folder / ROUTER)
        if report.accuracy is not None:
            self.progress.message(f"router: {report.accuracy:.1%} of validation inputs go to their expert")

    def _describe(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The card, the manifest with it, and `twin.json`."""
        planned = self.planned
        card = self.folder / "README.md"
        card.write_text(bundle_card(planned, records), encoding="utf-8")
        manifest = read_manifest(self.folder)
        files = {name: digest for name, digest in manifest["files"].items() if not name.startswith("heads/")}
        tensors = {name: digest for name, digest in manifest["tensors"].items() if not name.startswith("heads/")}
        files["README.md"] = file_digest(card)
        write_manifest(self.folder, {**manifest, "files": files, "tensors": tensors})
        shared = {
            "model_type": planned.merge.config.get("model_type"),
            "class": planned.shared_class,
            "method": "existing model" if planned.recipe.shared else planned.merge.recipe.method,
        }
        exclusive = {**planned.recipe.exclusive.record(), "exclude": list(planned.recipe.exclude)}
        write_twin_json(self.folder, shared=shared, exclusive=exclusive, experts=records)


def _path(file: WeightFile) -> Path:
    assert file.path is not None
    return file.path


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    """Of a classifier, by class; transformers writes none down where there are two that have no names."""
    named = config.get("id2label")
    if isinstance(named, dict):
        return [str(named[key]) for key in sorted(named, key=int)]
    is_classifier = str(next(iter(config.get("architectures") or []), "")).endswith("Classification")
    return ["LABEL_0", "LABEL_1"] if is_classifier else None


def _public(reference: str) -> str:
    """A model's reference; of an absolute path, which is nobody's business, only its last part."""
    return Path(reference).name if Path(reference).expanduser().is_absolute() else reference


def _far(expert: Expert, writer: ExpertWriter) -> list[str]:
    if writer.before <= 0.0 or (ratio := (writer.energy / writer.before) ** 0.5) < FAR:
        return []
    return [
        f"{expert.name} differs from the shared model by {ratio:.2f} of that one's norm: "
        "do all experts come from one base?"
    ]


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results in the order of the items, of which no more than `ahead` are begun before the first is taken."""
    running: deque[Future[Result]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
