"""Inputs to be classified, and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from weldment.serving.rows import Row

if TYPE_CHECKING:
    from weldment.serving.engine import Mixture


@dataclass(frozen=True)
class Answer:
    """What a head says of an input.

    Attributes:
        head: whose head it is, by the expert's name.
        label: the most probable class; None for a regression and where an input may have several labels.
        labels: the classes with a probability of at least one half, where an input may have several; None elsewhere.
        scores: probability by class; None for a regression.
        value: of a regression; None elsewhere.
        mixture: which experts answered.
    """

    last: ClassVar[bool] = True

    head: str
    label: str | None
    labels: tuple[str, ...] | None
    scores: Mapping[str, float] | None
    value: float | None
    mixture: Mixture

    @property
    def is_nan(self) -> bool:
        """Whether anything was calculated that is no number."""
        scores = () if self.scores is None else self.scores.values()
        return any(map(math.isnan, scores)) or (self.value is not None and math.isnan(self.value))


@dataclass(eq=False)
class Question(Row):
    """An input to be classified.

    Attributes:
        inputs: what the model reads, by name: `input_ids`, and `token_type_ids` where the tokenizer makes them.
        task: whose head answers; the router decides if it is None.
        expert: the only expert that takes part; the router decides if it is None.
    """

    inputs: Mapping[str, Sequence[int]] = field(default_factory=dict)
    task: str | None = None
    expert: str | None = None

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether its task is given, and its expert; the model takes questions of one kind at a time."""
        return self.task is not None, self.expert is not None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])
