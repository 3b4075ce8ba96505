"""How good a Twin model is: its shared model alone, its experts, and all together, with several ways to route.

    task folder -> batches -> route, once -> shared alone | the task's expert | mixed | the first choice alone
                                          -> mixed, at each level of a sweep

All ways answer the same examples through the task's own head, as in the paper's evaluation. Who routes must also choose
the head: in the row of the routed head, what another expert's head says counts as wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weldment.errors import CheckpointError, HubError, TaskError
from weldment.evaluation.comparison.rows import Comparison, Kind, Row, total_bytes
from weldment.evaluation.evaluate import Evaluator, Options, Report, dtype_of
from weldment.evaluation.heads import answers
from weldment.evaluation.networks import tokenizer_of
from weldment.evaluation.predicting import Encoded, encode, longest, read_in_batches
from weldment.evaluation.scores import Score, score
from weldment.evaluation.states import ModelState, load_state
from weldment.evaluation.tasks import AnyTask, Task, load_tasks
from weldment.twin.bundle import Bundle, ExpertPart
from weldment.twin.cutting import Cutter, Level
from weldment.twin.heads import head_config
from weldment.twin.model import TwinModel
from weldment.twin.router import thinned, unknown_expert

if TYPE_CHECKING:
    from numpy import ndarray

SHARED, ORACLE, ROUTED, TOP, ROUTED_HEAD = "shared", "oracle", "routed", "top 1", "routed head"
_WAYS = {
    SHARED: "the shared model alone, with the task's head",
    ORACLE: "the task's expert, as the bundle has it, with its head",
    ROUTED: "experts mixed by the router, with the task's head",
    TOP: "the router's first choice alone, with the task's head",
}


@dataclass(frozen=True)
class TwinComparison(Comparison):
    """A comparison of the ways to use one bundle.

    Attributes:
        routes: by task and expert, how many examples the router gave to whom in the first place.
        accuracy: the share of examples that it gave to their task's expert.
        sweep: the names of the rows that are cut to fewer singular values.
    """

    routes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    accuracy: float = 0.0
    sweep: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON-able values."""
        routes = {task: dict(row) for task, row in self.routes.items()}
        router = {"accuracy": self.accuracy, "confusion": routes}
        return {**super().record(), "router": router, "sweep": list(self.sweep)}


def evaluate_twin(
    folder: str | Path,
    tasks: Iterable[str | Path | AnyTask],
    *,
    experts: Mapping[str, str] | None = None,
    originals: Mapping[str, str] | None = None,
    sweep: Sequence[Level] = (),
    report: Report = lambda what, count, total: None,
    **options: Any,
) -> TwinComparison:
    """Scores of a bundle's shared model, of its experts and of the whole, routed in several ways.

    Percents are of the experts that the bundle was made of, if they are given or still where the bundle says;
    otherwise of the experts as the bundle has them.

    Args:
        folder: what `weld twin build` wrote, of experts with heads.
        tasks: task folders, files of examples, or ids of datasets on the Hub.
        experts: for a task's name, the name of its expert in the bundle; by default the one of the same name.
        originals: for an expert's name in the bundle, the model it was made of; bundles do not keep absolute paths.
        sweep: levels that all factors are cut to, each with a row for the oracle and for the router.
        report: told what is scored at the moment.
        options: attributes of `Options`, without `recalibrate`.

    Raises:
        UserError: the bundle, a task or an option is at fault.
    """
    evaluator = Evaluator(load_tasks(tasks), Options(**options), {}, report)
    model: Any = TwinModel.from_pretrained(
        folder, dtype=dtype_of(evaluator.options.dtype), device=evaluator.options.device
    )
    bundle: Bundle = model.twin.bundle
    places = _places(evaluator.tasks, bundle, model, experts or {})
    _refuse_unknown(originals or {}, bundle)
    return _Evaluating(evaluator, model, bundle, places, tuple(sweep), originals or {}).run()


def _refuse_unknown(originals: Mapping[str, str], bundle: Bundle) -> None:
    """UserError for the original of an expert that the bundle does not have."""
    for name in originals:
        if name not in bundle.names:
            raise unknown_expert(name, bundle.names)


def _places(tasks: Sequence[AnyTask], bundle: Bundle, model: Any, given: Mapping[str, str]) -> dict[str, int]:
    """The expert of every task.

    Raises:
        TaskError: there is none, or its head does not fit.
    """
    unknown = [name for name in given if name not in {task.name for task in tasks}]
    if unknown:
        names = ", ".join(task.name for task in tasks)
        raise TaskError(f"there is no task {unknown[0]!r}", where="--expert", fix=f"The tasks are {names}")
    found: dict[str, int] = {}
    for task in tasks:
        name = given.get(task.name, task.name)
        if not isinstance(task, Task) or not model.twin.outputs:
            cause = f"{task.name} cannot be scored: only classification and regression by experts with heads can"
            raise TaskError(cause, where=str(bundle.folder), fix="Score what writes text by `weld eval` of its parts")
        if name not in bundle.names:
            fix = f"Say whose it is: --expert {task.name}=NAME, one of {', '.join(bundle.names)}"
            raise TaskError(f"the bundle has no expert {name!r}", where=task.name, fix=fix)
        found[task.name] = bundle.names.index(name)
        _refuse_other_labels(task, name, len(model.twin.outputs[found[task.name]].labels))
    return found


def _refuse_other_labels(task: Task, name: str, have: int) -> None:
    wanted = 1 if task.labels is None else len(task.labels)
    if have != wanted:
        cause = f"the head of {name!r} has {have} outputs, and the task takes {wanted}"
        raise TaskError(cause, where=task.name, fix=f"Name the right expert: --expert {task.name}=NAME")


@dataclass
class _Read:
    """What was read of one task: logits (n, C) of each way, who was routed to, and the weights for a sweep."""

    encoded: Encoded
    logits: dict[str, ndarray]
    first: ndarray
    weights: ndarray
    seconds: dict[str, float]

    def spent(self, way: str) -> float:
        """Seconds, with those of routing where the router chose."""
        return self.seconds[way] + (self.seconds["routing"] if way in (ROUTED, TOP) else 0.0)


@dataclass
class _Evaluating:
    """One evaluation while it runs."""

    evaluator: Evaluator
    model: Any
    bundle: Bundle
    places: Mapping[str, int]
    levels: tuple[Level, ...]
    originals: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> TwinComparison:
        self.tokenizer = tokenizer_of(ModelState(self.bundle.folder.name, {}, {}, self.bundle.folder))
        read = {task.name: self._read(task) for task in self._tasks}
        originals = self._originals()
        rows = [*originals, *self._ways(read), *self._sweep(read)]
        return self._comparison(rows, read, originals)

    @property
    def _tasks(self) -> list[Task]:
        return [task for task in self.evaluator.tasks if isinstance(task, Task)]

    def _originals(self) -> list[Row]:
        """The experts that the bundle was made of, each on its own tasks; empty if one is not to be had."""
        rows: dict[str, Row] = {}
        try:
            for task in self._tasks:
                expert = self.bundle.experts[self.places[task.name]]
                state = replace(self._original(expert), name=expert.name)
                start = time.perf_counter()
                scores = {task.name: self.evaluator.score(state, task, {})}
                spent = time.perf_counter() - start
                row = rows.get(expert.name) or Row(expert.name, "expert", {}, what=expert.reference)
                rows[expert.name] = replace(
                    row,
                    scores={**row.scores, **scores},
                    nbytes=total_bytes(state),
                    evaluation_seconds=row.evaluation_seconds + spent,
                )
        except (CheckpointError, HubError) as error:
            if self.originals:
                raise
            self.notes.append(f"percents are of the experts as the bundle has them, since one is missing: {error}")
            return []
        return list(rows.values())

    def _original(self, expert: ExpertPart) -> ModelState:
        """The model that an expert was made of.

        Raises:
            CheckpointError: it is not where the bundle says; a name alone is what is left of an absolute path.
        """
        given = self.originals.get(expert.name, expert.reference)
        if expert.name not in self.originals and "/" not in given and not Path(given).exists():
            fix = f"Say where it is: --original {expert.name}=MODEL"
            raise CheckpointError(f"the expert {expert.name!r} is not here", where=given, fix=fix)
        return load_state(given)

    def _read(self, task: Task) -> _Read:
        """Every way to answer, batch by batch, after one look at whom the router chooses."""
        split = self.evaluator.split(task)
        length = longest(self.tokenizer, self.model, self.evaluator.options.max_length or task.max_length)
        read = _Read(encode(self.tokenizer, split, length), {}, np.empty(0), np.empty(0), {})
        routing = self._batches(read, task, "routing", self._routing)
        count = len(self.bundle.names)
        probabilities, read.weights, fallback = np.split(routing, [count, 2 * count], axis=1)
        read.first = probabilities.argmax(axis=1)
        top = thinned(torch.from_numpy(probabilities), 1, 0.0).numpy() * (1.0 - fallback)
        oracle = self._oracle(task, len(top))
        for way, weights in ((SHARED, 0.0 * top), (ORACLE, oracle), (ROUTED, read.weights), (TOP, top)):
            read.logits[way] = self._answered(read, task, way, weights)
        return read

    def _routing(self, inputs: Mapping[str, Tensor]) -> Tensor:
        found = self.model.route(**inputs)
        return torch.cat([found.probabilities, found.weights, found.fallback[:, None]], dim=1)

    def _answered(self, read: _Read, task: Task, way: str, weights: ndarray) -> ndarray:
        """Logits (n, C) of the task's head, mixed with these weights (n, experts) in the order of the split."""
        ordered = torch.from_numpy(weights[read.encoded.places].astype(np.float32))
        name = self.bundle.names[self.places[task.name]]
        done = 0

        def answer(inputs: Mapping[str, Tensor]) -> Tensor:
            nonlocal done
            rows = inputs["input_ids"].shape[0]
            own = ordered[done : done + rows]
            done += rows
            return self.model(**inputs, expert_weights=own.to(inputs["input_ids"].device), task=name).logits

        return self._batches(read, task, way, answer)

    def _batches(self, read: _Read, task: Task, way: str, answer: Any) -> ndarray:
        what = f"{way} on {task.name}"
        start = time.perf_counter()
        taken = {*self.tokenizer.model_input_names}
        found = read_in_batches(
            self.model,
            self.tokenizer,
            read.encoded,
            lambda inputs: answer({key: value for key, value in inputs.items() if key in taken}),
            name=self.bundle.folder.name,
            batch=self.evaluator.options.batch,
            report=lambda count: self.evaluator.report(what, count, len(read.encoded)),
            workers=1,
        )
        read.seconds[way] = time.perf_counter() - start
        return found

    def _score(self, task: Task, logits: ndarray, wrong: ndarray | None = None) -> Score:
        """The score of a task's logits; answers that are `wrong` (n,) whatever they are count as such."""
        labels = self.evaluator.split(task).labels
        config = head_config(self.bundle.experts[self.places[task.name]])
        found = answers(logits, task, config)
        if wrong is not None and task.labels is not None:
            found = np.where(wrong, (labels + 1) % len(task.labels), found)
        elif wrong is not None:
            found = np.where(wrong, found.mean(), found)
        return score(task.name, task.metric, labels, found, self.evaluator.options.seed)

    def _ways(self, read: Mapping[str, _Read]) -> Iterator[Row]:
        whole, shared = self._bytes()
        for way, what in _WAYS.items():
            scores = {task.name: self._score(task, read[task.name].logits[way]) for task in self._tasks}
            seconds = sum(
                of.seconds[way] + (of.seconds["routing"] if way in (ROUTED, TOP) else 0) for of in read.values()
            )
            kind: Kind = "base" if way == SHARED else "merge"
            yield Row(way, kind, scores, 0.0, shared if way == SHARED else whole, seconds, what=what)
        scores = {
            task.name: self._score(
                task, read[task.name].logits[ROUTED], read[task.name].first != self.places[task.name]
            )
            for task in self._tasks
        }
        what = "experts mixed by the router, with the head of its first choice; another task's head is wrong"
        seconds = sum(of.spent(ROUTED) for of in read.values())
        yield Row(ROUTED_HEAD, "merge", scores, 0.0, whole, seconds, what=what)

    def _sweep(self, read: Mapping[str, _Read]) -> Iterator[Row]:
        if not self.levels:
            return
        cutter = Cutter(self.model, self.levels)
        whole, full = self._bytes()[0], cutter.nbytes
        for level in self.levels:
            if not cutter.cuts(level):
                note = "the bundle keeps no more singular values than that, so nothing is cut"
                self.notes.append(f"{ROUTED}, {level}: {note}")
            with cutter.cut(level):
                nbytes = whole - full + cutter.nbytes
                # What is lost by cutting alone shows where every input has its expert.
                for way in (ORACLE, ROUTED):
                    start = time.perf_counter()
                    scores = {task.name: self._cut_score(read[task.name], task, way, level) for task in self._tasks}
                    spent = time.perf_counter() - start
                    what = f"{_WAYS[way]}, cut to {level}"
                    yield Row(f"{way}, {level}", "merge", scores, 0.0, nbytes, spent, what=what)

    def _cut_score(self, read: _Read, task: Task, way: str, level: Level) -> Score:
        weights = read.weights if way == ROUTED else self._oracle(task, len(read.weights))
        return self._score(task, self._answered(read, task, f"{way}, {level}", weights))

    def _oracle(self, task: Task, count: int) -> ndarray:
        """Weights (n, experts) of the task's expert alone."""
        weights = np.zeros((count, len(self.bundle.names)))
        weights[:, self.places[task.name]] = 1.0
        return weights

    def _bytes(self) -> tuple[int, int]:
        """Of all tensors in memory, and of the shared model's."""
        own = [tensor.numel() * tensor.element_size() for tensor in self.model.parameters()]
        parts = [tensor.numel() * tensor.element_size() for tensor in self.model.buffers()]
        heads = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in self.model.named_parameters()
            if ".parts." in name
        )
        return sum(own) + sum(parts), sum(own) - heads

    def _comparison(self, rows: Sequence[Row], read: Mapping[str, _Read], originals: Sequence[Row]) -> TwinComparison:
        names, options = self.bundle.names, self.evaluator.options
        routes = {task: np.bincount(of.first, minlength=len(names)).tolist() for task, of in read.items()}
        right = sum(row[self.places[task]] for task, row in routes.items())
        accuracy = right / sum(len(of.first) for of in read.values())
        scores = {task: found for row in rows for task, found in row.scores.items()}
        self.notes.insert(0, f"the router gives {100 * accuracy:.1f} % of the examples to their task's expert first")
        return TwinComparison(
            tasks=tuple(task.name for task in self._tasks),
            metrics={task: found.metric for task, found in scores.items()},
            examples={task: found.examples for task, found in scores.items()},
            rows=tuple(rows),
            experts={task: names[place] if originals else ORACLE for task, place in self.places.items()},
            split=options.split,
            limit=options.limit,
            notes=tuple(self.notes),
            routes={task: dict(zip(names, row, strict=True)) for task, row in routes.items()},
            accuracy=accuracy,
            sweep=tuple(row.name for row in rows if row.name.startswith(f"{ROUTED}, ")),
        )
