"""A call of PEFT's `add_weighted_adapter` written as a recipe, and the combination types that it knows.

adapters: [adapters/a, adapters/b]
weights: [1.0, 0.5]
combination_type: ties
density: 0.2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from weldment.errors import RecipeError, joined
from weldment.methods import Parameter
from weldment.methods.arguments import checked
from weldment.recipe.recipe import Combination, ModelInput, Recipe
from weldment.recipe.schema import RecipeSection, Reference, check_shape
from weldment.recipe.settings import coerced
from weldment.recipe.words import Place, shown, suggestion


@dataclass(frozen=True)
class CombinationType:
    """What a combination type does.

    Attributes:
        space: what is added up: "cat" the products B A, by stacking their factors; "factors" the A and the B
            apart; "delta" the products B A as dense matrices.
        trim: what is kept of each adapter: all, the largest elements, or random ones.
        elects: only elements that have the elected sign count, and the result is their mean.
        truncates: the result is truncated to a rank.
    """

    space: Literal["cat", "factors", "delta"]
    trim: Literal["none", "magnitude", "random"] = "none"
    elects: bool = False
    truncates: bool = False

    def uses(self, parameter: str) -> bool:
        """Whether the result depends on a parameter of the call."""
        used = {
            "density": self.trim != "none",
            "svd_rank": self.truncates,
            "svd_clamp": self.truncates,
            "majority_sign_method": self.elects,
        }
        return used[parameter]


TYPES: Mapping[str, CombinationType] = {
    "linear": CombinationType("factors"),
    "svd": CombinationType("cat", truncates=True),
    "cat": CombinationType("cat"),
    "ties": CombinationType("factors", "magnitude", elects=True),
    "ties_svd": CombinationType("delta", "magnitude", elects=True, truncates=True),
    "dare_ties": CombinationType("factors", "random", elects=True),
    "dare_linear": CombinationType("factors", "random"),
    "dare_ties_svd": CombinationType("delta", "random", elects=True, truncates=True),
    "dare_linear_svd": CombinationType("delta", "random", truncates=True),
    "magnitude_prune": CombinationType("factors", "magnitude"),
    "magnitude_prune_svd": CombinationType("delta", "magnitude", truncates=True),
}

DEFAULT_TYPE = "svd"

PARAMETERS = (
    Parameter("density", "the share of elements kept", minimum=0.0, maximum=1.0, open_minimum=True),
    Parameter("svd_rank", "the rank of the result", kind="int", minimum=1.0),
    # The factors are clamped at a quantile of their values of both signs; up to one half it is 0 or less.
    Parameter("svd_clamp", "the quantile of the clamp", minimum=0.5, maximum=1.0, open_minimum=True),
    Parameter(
        "majority_sign_method", "how signs are elected", "choice", default="total", choices=("total", "frequency")
    ),
)
_WEIGHT = Parameter("weight", "the factor of an adapter")
_SHARED = ("output", "base_model", "dtype", "seed", "name")
_NATIVE = {"models", "slices", "merge_method", "parameters"}


def faults(values: Mapping[str, Any], count: int) -> Iterator[tuple[str, str, str | None]]:
    """(key, cause, fix) of everything that is wrong with the parameters of a call.

    Args:
        values: by name, as the user gave them; None stands for the default.
        count: of the adapters. One alone is only scaled, whatever the type, and needs no density.
    """
    word = values.get("combination_type") or DEFAULT_TYPE
    row = TYPES.get(word) if isinstance(word, str) else None
    if row is None:
        yield "combination_type", f"there is no combination type {shown(word)}", suggestion(str(word), TYPES)
    for parameter in PARAMETERS:
        if (value := values.get(parameter.name)) is None:
            continue
        try:
            checked(parameter, coerced(parameter, value))
        except ValueError as error:
            yield parameter.name, str(error), None
    if row is not None and row.uses("density") and values.get("density") is None and count != 1:
        yield "density", f"{word} needs `density`", "Give the share of elements to keep, in (0, 1]"


def check(combination: Combination, count: int) -> None:
    """Nothing for a combination of `count` adapters that has a meaning.

    Raises:
        RecipeError: with everything that is wrong; `where` is the parameter.
    """
    values = {"combination_type": combination.type, **{key.name: getattr(combination, key.name) for key in PARAMETERS}}
    problems = [RecipeError(cause, where=key, fix=fix) for key, cause, fix in faults(values, count)]
    if problems:
        raise joined(RecipeError, problems)


def is_call(document: Mapping[str, Any]) -> bool:
    """Whether a document is a call of PEFT's rather than a recipe of the native dialect."""
    return "adapters" in document or "combination_type" in document


def _weight(value: object) -> object:
    return checked(_WEIGHT, coerced(_WEIGHT, value))


def _listed(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


class CallSection(BaseModel):
    """The keys of a call; `faults` checks the parameters, `check_shape` what calls share with native recipes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: tuple[Reference, ...] = Field(min_length=1)
    weights: Annotated[
        tuple[Annotated[float, BeforeValidator(_weight)], ...], BeforeValidator(_listed), Field(min_length=1)
    ] = (1.0,)
    combination_type: Any = DEFAULT_TYPE
    density: Any = None
    svd_rank: Any = None
    svd_clamp: Any = None
    majority_sign_method: Any = "total"
    output: Any = None
    base_model: Any = None
    dtype: Any = None
    seed: Any = 0
    name: Any = None


def build_call(document: Mapping[str, Any], place: Place) -> tuple[Recipe | None, list[RecipeError]]:
    """The recipe that a call stands for, or None and all that is wrong with it.

    `cat` is linear in the changes B A and nothing else, so merged into a model it is `task_arithmetic`.
    """
    given = {key: value for key, value in document.items() if value is not None}
    section, problems = _section(given, place)
    native, shared_problems = _shared(given, place)
    problems += [*shared_problems, *_contradictions(given, place)]
    if section is None or native is None or problems:
        return None, problems
    combination = _combination(given)
    into_model = native.output == "model"
    weights = section.weights if _is_list(given.get("weights")) else section.weights * len(section.adapters)
    models = [
        ModelInput(adapter, {"weight": weight}, f"adapters[{index}]")
        for index, (adapter, weight) in enumerate(zip(section.adapters, weights, strict=True))
    ]
    return Recipe(
        method="task_arithmetic",
        models=tuple(models),
        base_model=native.base_model,
        dtype=native.dtype,
        seed=native.seed,
        name=native.name,
        output=native.output,
        combination=None if into_model else combination,
        notes=tuple(_idle(given, TYPES[combination.type], combination.type, len(models))),
        source=document,
        origin=place.origin,
    ), []


def _section(given: Mapping[str, Any], place: Place) -> tuple[CallSection | None, list[RecipeError]]:
    try:
        return CallSection.model_validate(given), []
    except ValidationError as error:
        # A list whose items are all wrong is also reported as too short.
        found = [details for details in error.errors() if details["type"] != "too_short" or not details["input"]]
        return None, [_problem(details, given, place) for details in found]


def _problem(details: ErrorDetails, given: Mapping[str, Any], place: Place) -> RecipeError:
    steps, kind, value = details["loc"], details["type"], details["input"]
    if steps[0] == "weights" and not _is_list(given["weights"]):
        steps = steps[:1]
    if kind == "extra_forbidden":
        return place.at(*steps).problem(f"there is no key `{steps[0]}`", _key_advice(str(steps[0])))
    if kind == "missing":
        return place.problem(f"the key `{steps[0]}` is missing", "List the adapters to merge")
    if kind == "too_short":
        return place.at(*steps).problem("the list is empty")
    if kind == "tuple_type":
        return place.at(*steps).problem(f"{shown(value)} is not a list")
    error = details.get("ctx", {}).get("error")
    return place.at(*steps).problem(getattr(error, "cause", str(error)), getattr(error, "fix", None))


def _key_advice(key: str) -> str:
    if key in _NATIVE:
        return "With `models` and `merge_method` adapters are models too: list them there instead of under `adapters`"
    return suggestion(key, CallSection.model_fields)


def _shared(given: Mapping[str, Any], place: Place) -> tuple[RecipeSection | None, list[RecipeError]]:
    """The keys that mean the same in native recipes, checked as there."""
    stand_in = {"merge_method": "task_arithmetic", "models": ["adapters"]}
    return check_shape({**stand_in, **{key: given[key] for key in _SHARED if key in given}}, place)


def _contradictions(given: Mapping[str, Any], place: Place) -> Iterator[RecipeError]:
    """Values that are wrong, or do not fit together, as far as they can be read."""
    adapters, weights, word = given.get("adapters"), given.get("weights"), given.get("combination_type", DEFAULT_TYPE)
    count = len(adapters) if _is_list(adapters) else 2
    if _is_list(adapters) and _is_list(weights) and weights and len(weights) != count:
        cause = f"there are {len(weights)} weights for {count} {'adapter' if count == 1 else 'adapters'}"
        yield place.at("weights").problem(cause, "Give each adapter its weight, in their order, or one number for all")
    for key, cause, fix in faults(given, count):
        yield place.at(key).problem(cause, fix)
    if given.get("output") == "model" and isinstance(word, str) and word in TYPES and word != "cat":
        fix = "Use `combination_type: cat`, or list the adapters under `models` with a `merge_method`"
        yield place.at("output").problem(f"{word} makes an adapter and cannot be merged into a model", fix)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _combination(given: Mapping[str, Any]) -> Combination:
    """The combination of a call without faults."""
    values = {
        parameter.name: checked(parameter, coerced(parameter, given[parameter.name]))
        for parameter in PARAMETERS
        if parameter.name in given
    }
    return Combination(given.get("combination_type", DEFAULT_TYPE), **values)


def _idle(given: Mapping[str, Any], row: CombinationType, word: str, count: int) -> Iterator[str]:
    """A note for every parameter that changes nothing."""
    for name in (parameter.name for parameter in PARAMETERS if parameter.name in given):
        if count == 1:
            yield f"`{name}` has no effect on one adapter alone, which is only scaled by its weight"
        elif not row.uses(name):
            yield f"`{name}` has no effect on {word}"
