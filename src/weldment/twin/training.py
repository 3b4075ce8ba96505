"""Routers made for the experts of a bundle: trained on the train splits of their tasks, chosen on validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weldment.engine.run import one_thread
from weldment.errors import TaskError, UserError, WeldmentError, joined
from weldment.evaluation.tasks import Split, Task, load_task
from weldment.twin.arrow import directions
from weldment.twin.bundle import ExpertPart
from weldment.twin.features import features, spread_layers
from weldment.twin.fitting import Sample, best_temperature, class_means, threshold_of, train_mlp
from weldment.twin.router import BY_FEATURES, KINDS, Router, RouterConfig, save_router

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST = 8
"""Examples of each split that every expert needs."""

Progress = Callable[[str, int, int], None]
"""Told what is read, how many examples were read since the last call, and how many there are."""


@dataclass(frozen=True)
class RouterSettings:
    """How a router is made.

    Attributes:
        kind: `mlp`: a small network on means of the shared model's hidden states; `centroid`: the expert whose inputs'
            mean is nearest, by Mahalanobis distance; `arrow`: by the experts' factors, without data; `fixed`: always
            `expert`; `uniform`: all alike.
        data: the task folder of each expert, for `mlp` and `centroid`.
        top_k: as many experts answer at most.
        temperature: of the softmax; None to calibrate it on validation (of `arrow`: 1).
        expert: of the kind `fixed`.
        fallback: whether the shared model takes over for inputs unlike all of the data.
        fallback_share: of the validation examples that are beyond its threshold.
        min_weight: smaller weights become 0.
        examples: of each expert's train split, drawn at random; a quarter as many of validation.
        max_length: tokens after which examples are cut.
        layers: `spread`: the means of the embeddings, the middle layer and the last one; `last`: of the last one.
        width: of the network's inner layer.
        epochs: of training, at most.
        seed: of what is drawn, and of the network's first state.
    """

    kind: str = "mlp"
    data: Mapping[str, str] = field(default_factory=dict)
    top_k: int | None = None
    temperature: float | None = None
    expert: str | None = None
    fallback: bool = True
    fallback_share: float = 0.01
    min_weight: float = 0.01
    examples: int = 4000
    max_length: int = 128
    layers: str = "spread"
    width: int = 128
    epochs: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"examples": LEAST, "max_length": 1, "width": 1, "epochs": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"router.{name} is {getattr(self, name)}", fix=f"Give at least {value}")
        if self.layers not in ("spread", "last"):
            raise UserError(f"router.layers is {self.layers!r}", fix="Give spread or last")
        if not 0.0 < self.fallback_share < 1.0:
            raise UserError(f"router.fallback_share is {self.fallback_share}", fix="Give a number between 0 and 1")


@dataclass(frozen=True)
class RouterReport:
    """What is known of a new router.

    Attributes:
        accuracy: of its first choice on validation; None without data.
        confusion: validation examples by the true expert (rows) and the first choice (columns).
        train, validation: examples by expert.
    """

    kind: str
    experts: tuple[str, ...]
    accuracy: float | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    temperature: float = 1.0
    threshold: float | None = None
    train: Mapping[str, int] = field(default_factory=dict)
    validation: Mapping[str, int] = field(default_factory=dict)


def make_router(
    shared: str | Path,
    experts: Sequence[ExpertPart],
    settings: RouterSettings,
    out: str | Path,
    *,
    progress: Progress = lambda what, count, total: None,
) -> RouterReport:
    """Make a router and write `config.json` and `router.safetensors` into `out`.

    Test splits are never opened. The same data, seed and shared model give the same bytes.

    Args:
        shared: the folder of the shared model, with its tokenizer.
        experts: of the bundle, in its order.

    Raises:
        UserError: the settings name an unknown expert.
        TaskError: data is missing, for an unknown expert, too little, or not as it must be; all problems together.
    """
    names = tuple(expert.name for expert in experts)
    config = _config(settings, names)
    tasks = check_data(settings, names)
    if settings.kind in BY_FEATURES:
        router = _from_data(Path(shared), config, settings, tasks, progress)
    else:
        router = Router(config, directions(experts) if settings.kind == "arrow" else {})
    save_router(router, Path(out))
    found = router.config
    counts = {key: {name: found.data[name][key] for name in found.data} for key in ("train", "validation")}
    return RouterReport(
        found.kind, names, found.accuracy, found.confusion, found.temperature, found.threshold, **counts
    )


def _config(settings: RouterSettings, names: tuple[str, ...]) -> RouterConfig:
    return RouterConfig(
        kind=settings.kind,
        experts=names,
        temperature=settings.temperature or 1.0,
        top_k=settings.top_k,
        min_weight=min(settings.min_weight, 0.5 / len(names)),
        expert=settings.expert,
        seed=settings.seed,
    )


def check_data(settings: RouterSettings, names: Sequence[str]) -> dict[str, Task]:
    """The experts' tasks, in their order; no examples are read. Empty for kinds without data.

    Raises:
        TaskError: data is missing, for an unknown expert, or no task with the splits that are needed.
    """
    if settings.kind not in KINDS:
        raise UserError(f"there is no router of the kind {settings.kind!r}", fix=f"The kinds are {', '.join(KINDS)}")
    known = ", ".join(names)
    problems: list[WeldmentError] = [
        TaskError(f"there is no expert {name!r}", where=f"router.data.{name}", fix=f"The experts are {known}")
        for name in settings.data
        if name not in names
    ]
    if settings.kind not in BY_FEATURES:
        return _or_raise({}, problems)
    fix = "Give each expert a task folder, or choose a router without data: arrow, fixed or uniform"
    lacking = [name for name in names if name not in settings.data]
    if lacking:
        problems.append(TaskError(f"there is no data for {', '.join(lacking)}", where="router.data", fix=fix))
    tasks: dict[str, Task] = {}
    for name in names:
        if name in settings.data:
            try:
                tasks[name] = _task(name, settings.data[name])
            except TaskError as error:
                problems.append(error)
    return _or_raise(tasks, problems)


def _or_raise(tasks: dict[str, Task], problems: Sequence[WeldmentError]) -> dict[str, Task]:
    if problems:
        raise joined(TaskError, problems)
    return tasks


def _task(name: str, given: str) -> Task:
    task = load_task(given)
    place = f"router.data.{name}"
    if not isinstance(task, Task):
        raise TaskError(f"{given!r} is no task of examples", where=place, fix="Give a task folder")
    missing = [split for split in ("train", "validation") if split not in task.files]
    if missing:
        fix = "A router is trained on train and chosen on validation: give a folder with both"
        raise TaskError(f"the task has no {' and no '.join(missing)} split", where=place, fix=fix)
    return task


def _from_data(
    shared: Path, config: RouterConfig, settings: RouterSettings, tasks: Mapping[str, Task], progress: Progress
) -> Router:
    reader = Reader(shared, settings.layers, settings.max_length, progress)
    splits = {split: _drawn(tasks, split, settings) for split in ("train", "validation")}
    train, validation = (_sample(reader, splits[split], split) for split in ("train", "validation"))
    count = len(config.experts)
    with one_thread():
        state = class_means(train, count)
        if settings.kind == "mlp":
            drawn = {"width": settings.width, "epochs": settings.epochs, "seed": settings.seed}
            state |= train_mlp(train, validation, count, **drawn)
        first = Router(config, state)
        scores = first.scores(validation.features)
        temperature = settings.temperature or best_temperature(scores, validation.experts)
        threshold = threshold_of(validation.features, state, settings.fallback_share) if settings.fallback else None
    if settings.kind == "mlp" and threshold is None:
        state = {name: tensor for name, tensor in state.items() if name not in ("whitening", "centres")}
    table = confusion(validation.experts, scores.argmax(dim=1), count)
    known = replace(
        config,
        layers=reader.layers,
        hidden_size=train.features.shape[1],
        temperature=temperature,
        threshold=threshold,
        accuracy=sum(table[n][n] for n in range(count)) / len(validation.experts),
        confusion=table,
        data={name: {split: len(splits[split][name]) for split in splits} | _digests(splits, name) for name in tasks},
    )
    return Router(known, state)


def _drawn(tasks: Mapping[str, Task], name: str, settings: RouterSettings) -> dict[str, Split]:
    """Examples of each task's split, shuffled, as many as are asked for.

    Raises:
        TaskError: a task has too few.
    """
    limit = settings.examples if name == "train" else max(LEAST, settings.examples // 4)
    found: dict[str, Split] = {}
    problems: list[WeldmentError] = []
    for expert, task in tasks.items():
        try:
            found[expert] = shuffled(task.split(name), settings.seed).first(limit)
            if len(found[expert]) < LEAST:
                cause = f"the {name} split has {len(found[expert])} examples"
                problems.append(TaskError(cause, where=f"router.data.{expert}", fix=f"Give at least {LEAST}"))
        except TaskError as error:
            problems.append(error)
    if problems:
        raise joined(TaskError, problems)
    return found


def shuffled(split: Split, seed: int) -> Split:
    """The examples in an order that the seed draws."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = None if split.pairs is None else tuple(split.pairs[place] for place in order)
    return Split(tuple(split.texts[place] for place in order), pairs, split.labels[order])


def _sample(reader: Reader, splits: Mapping[str, Split], what: str) -> Sample:
    """Features of all experts' examples."""
    parts = [reader(split, f"{name}, {what}") for name, split in splits.items()]
    experts = [torch.full((len(part),), place) for place, part in enumerate(parts)]
    return Sample(torch.cat(parts), torch.cat(experts))


class Reader:
    """Features of texts by the shared model alone.

    Args:
        shared: the model's folder, with its tokenizer.
        layers: `spread` or `last`.
        max_length: tokens after which texts are cut.

    Raises:
        TaskError: there is no tokenizer, or transformers does not know the model.
    """

    def __init__(
        self, shared: Path, layers: str, max_length: int, progress: Progress = lambda what, count, total: None
    ) -> None:
        from weldment.evaluation.networks import quiet_transformers
        from weldment.evaluation.predicting import longest

        with quiet_transformers():
            self.network, self.tokenizer = _loaded(shared)
        self.layers = spread_layers(self.network) if layers == "spread" else (-1,)
        self._length = longest(self.tokenizer, self.network, max_length)
        self._progress = progress

    def __call__(self, split: Split, what: str) -> Tensor:
        """(n, hidden), float32, in the order of the split."""
        from weldment.evaluation.predicting import encode, read_in_batches

        def read(inputs: Mapping[str, Any]) -> Tensor:
            return features(self.network, inputs, self.layers)

        encoded = encode(self.tokenizer, split, self._length)
        report = lambda count: self._progress(what, count, len(split))  # noqa: E731
        return torch.from_numpy(read_in_batches(self.network, self.tokenizer, encoded, read, name=what, report=report))


def _loaded(shared: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModel

    from weldment.evaluation.networks import dtype_word, tokenizer_of
    from weldment.evaluation.states import ModelState

    tokenizer = tokenizer_of(ModelState("the shared model", {}, {}, shared))
    network = AutoModel.from_pretrained(shared, local_files_only=True, **{dtype_word(): torch.float32})
    return network.eval(), tokenizer


def confusion(true: Tensor, chosen: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """How many examples of each expert (rows) went to each (columns)."""
    table = (true * count + chosen).bincount(minlength=count * count).view(count, count)
    return tuple(tuple(row) for row in table.tolist())


def _digests(splits: Mapping[str, Mapping[str, Split]], name: str) -> dict[str, str]:
    """SHA-256 of the texts that were drawn."""
    found: dict[str, str] = {}
    for split, by_expert in splits.items():
        digest = hashlib.sha256()
        for text, pair in zip(by_expert[name].texts, by_expert[name].pairs or by_expert[name].texts, strict=True):
            digest.update(f"{len(text)}|{text}|{pair}\n".encode())
        found[f"{split}_sha256"] = digest.hexdigest()
    return found
