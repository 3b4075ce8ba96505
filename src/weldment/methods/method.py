"""What a method is, as data: a kernel and what the rest of the program must know about it."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from weldment.methods.block import Statistic, Total, Unit

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["float", "int", "bool", "choice", "patterns", "counts"]
"""`patterns`: regular expressions, of which names must match one from their start; `counts`: a whole number of at
least 1 for each of several regular expressions."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its type, range, default and meaning.

    `per_model` parameters take a value for each model and reach the kernel as a tuple, the others
    as a single value. `default` None means that the recipe must give it. Bounds are inclusive
    unless `open_minimum`/`open_maximum`. `aliases` are other spellings with a factor: the value
    under the alias times the factor is the value of the parameter (`window_size` is
    2 * `epsilon`, hence a factor of 0.5).
    """

    name: str
    help: str
    kind: Kind = "float"
    default: Any = None
    per_model: bool = False
    minimum: float | None = None
    maximum: float | None = None
    open_minimum: bool = False
    open_maximum: bool = False
    choices: tuple[str, ...] = ()
    aliases: Mapping[str, float] | None = None
    required: bool = False

    @property
    def by_pattern(self) -> bool:
        """Whether its value speaks of names of tensors, and so is one for the whole merge."""
        return self.kind in ("patterns", "counts")

    @property
    def argument(self) -> str:
        """The keyword under which kernels receive it (`lambda` is `lambda_`)."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


class Cost(Protocol):
    """What a tensor costs, from the number of models and the kernel's arguments."""

    def numbers(self, models: int, parameters: Mapping[str, Any]) -> int:
        """Numbers that the kernel holds at most besides the models', the base's and the merged elements."""
        ...

    def nanoseconds(self, models: int, parameters: Mapping[str, Any]) -> float:
        """How long its arithmetic takes on one core, about."""
        ...


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Attributes:
        kernel: `kernel(block, **parameters) -> Tensor`, the merged block, shaped like the models'.
        unit: the smallest part of a tensor that the kernel can work on, or a function of the
            parameters that says so.
        statistics: passes over the tensor before the kernel, or a function of the parameters.
        models: least and greatest number of models, the base not counted (None: no limit).
        base: "required", "optional" (changes the result when given) or "unused".
        base_is_model: the base counts as the first of the models (slerp, nearswap, arcee_fusion).
        random: uses `block.keys`.
        float64: the kernel or its order statistics calculate in float64 on the device.
        check: called with the parameters of each tensor; raises ValueError with the cause.
        arrange: called with the parameters of each tensor, its name and shape and whether it holds token
            embeddings (or their inverse, a head); gives the kernel's arguments. Raises ValueError with the cause.
        cost: memory and time; None for a few blocks, and the time of reading and averaging.
    """

    name: str
    family: str
    summary: str
    kernel: Callable[..., Tensor]
    parameters: tuple[Parameter, ...] = ()
    unit: Unit | Callable[..., Unit] = "element"
    statistics: tuple[Statistic, ...] | Callable[..., tuple[Statistic, ...]] = ()
    models: tuple[int, int | None] = (1, None)
    base: Literal["required", "optional", "unused"] = "required"
    base_is_model: bool = False
    random: bool = False
    float64: bool = False
    check: Callable[..., None] | None = None
    arrange: Callable[..., dict[str, Any]] | None = None
    cost: Cost | None = None
    paper: str = ""
    url: str = ""

    @property
    def takes_base(self) -> bool:
        """Whether kernels get a base besides the models; they must not see one that only post-processing needs."""
        return self.base != "unused" and not self.base_is_model

    def unit_for(self, parameters: Mapping[str, Any]) -> Unit:
        """The unit this method needs with these parameters."""
        return self.unit(**parameters) if callable(self.unit) else self.unit

    def statistics_for(self, parameters: Mapping[str, Any]) -> tuple[Statistic, ...]:
        """The passes this method needs with these parameters."""
        return self.statistics(**parameters) if callable(self.statistics) else self.statistics

    def needs_float64(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the device must have float64: totals are summed in it."""
        return self.float64 or any(isinstance(statistic, Total) for statistic in self.statistics_for(parameters))

    def arranged(
        self, parameters: Mapping[str, Any], name: str, shape: tuple[int, ...], *, is_embedding: bool
    ) -> dict[str, Any]:
        """The kernel's arguments for one tensor; ValueError if they do not fit it."""
        if self.arrange is None:
            return dict(parameters)
        return self.arrange(parameters, name, shape, is_embedding=is_embedding)

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of this name or alias, or None."""
        for parameter in self.parameters:
            if parameter.name == name or name in (parameter.aliases or {}):
                return parameter
        return None
