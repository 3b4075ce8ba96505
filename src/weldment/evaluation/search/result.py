"""What a search is told and what it gives: settings, messages, the result, and the best recipe as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import OutputError, UserError
from weldment.evaluation.comparison.rows import Comparison, Row
from weldment.evaluation.evaluate import Report
from weldment.evaluation.search.space import point
from weldment.evaluation.search.study import shown_storage
from weldment.evaluation.search.trials import Goal, Told, Trial
from weldment.evaluation.states import short_name

if TYPE_CHECKING:
    from weldment.merging import RecipeSource

_HEADER = "Found by weld search"


@dataclass(frozen=True)
class Settings:
    """How a search runs.

    Attributes:
        trials: in all, those of earlier runs included.
        sampler: a name in `SAMPLERS`.
        seed: of the sampler; for the same seed, recipe and trials the search is the same.
        storage: a SQLite file or an address that Optuna knows; by default `RECIPE.search.db` in the current
            folder, and the memory for a recipe that is no file.
        out: where the best recipe is written; None for nowhere.
        fresh: delete the trials of earlier runs.
        overwrite: replace `out` even if no search wrote it.
        timeout: seconds after which no further trial begins; None for no limit.
    """

    trials: int = 50
    sampler: str = "tpe"
    seed: int = 0
    storage: str | Path | None = None
    out: str | Path | None = None
    fresh: bool = False
    overwrite: bool = False
    timeout: float | None = None

    @property
    def place(self) -> str:
        """The storage, for messages."""
        return "memory" if self.storage is None else shown_storage(self.storage)

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UserError(f"trials must be at least 1, not {self.trials}", where="--trials")
        if self.timeout is not None and not self.timeout > 0:
            raise UserError(f"the timeout must be above 0 seconds, not {self.timeout:g}", where="--timeout")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the seed must be from 0 to 2**32 - 1, not {self.seed}", where="--seed")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best trial.
        documents: the best recipe, as parsed YAML.
        trials: all that ended, in order.
        goal: what was maximised.
        comparison: the best recipe beside the experts, the base and the baselines, on the test split.
        notes: what the reader should know, one sentence each.
        settings: the search's, with the storage that was used.
    """

    best: Trial
    documents: Sequence[Mapping[str, Any]]
    trials: tuple[Trial, ...]
    goal: Goal
    comparison: Comparison
    notes: tuple[str, ...]
    settings: Settings

    @property
    def row(self) -> Row:
        """The best recipe's in the comparison."""
        return next(row for row in self.comparison.rows if row.kind == "merge")

    def record(self) -> dict[str, Any]:
        """As JSON-able values."""
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.settings).items()
        }
        return {
            "best": self.best.record(),
            "recipe": list(self.documents),
            "objective": "normalised" if self.goal.is_normalised else "score",
            "settings": settings | {"storage": self.settings.place},
            "trials": [trial.record() for trial in self.trials],
            "test": self.comparison.record(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Messages:
    """Who is told what happens.

    Attributes:
        text: of what the user should know.
        trial: of each trial that has ended.
        report: of what is scored at the moment.
    """

    text: Callable[[str], None] = lambda text: None
    trial: Told = lambda trial, best, goal: None
    report: Report = lambda what, count, total: None


def with_storage(settings: Settings, recipe: RecipeSource) -> Settings:
    """The settings with the default storage where they name none."""
    if settings.storage is None and isinstance(recipe, (str, Path)):
        return replace(settings, storage=f"{short_name(str(recipe))}.search.db")
    return settings


def checked_out(settings: Settings, recipe: RecipeSource) -> Path | None:
    """Where the best recipe goes.

    Raises:
        OutputError: it cannot be written there, or would replace another file.
    """
    if settings.out is None:
        return None
    out = Path(settings.out).expanduser()
    if not out.parent.is_dir():
        raise OutputError("there is no such folder", where=str(out.parent), fix="Make it, or give another --out")
    if out.is_dir():
        raise OutputError("this is a folder", where=str(out), fix="Give --out the name of a file")
    is_recipe = isinstance(recipe, (str, Path)) and out.resolve() == Path(recipe).expanduser().resolve()
    if is_recipe:
        raise OutputError(
            "the best recipe would replace the one with the marks", where=str(out), fix="Give another --out"
        )
    if out.exists() and not settings.overwrite and not _is_own(out):
        fix = "Give another --out, or --overwrite to replace it"
        raise OutputError("the file is there already, and no search wrote it", where=str(out), fix=fix)
    return out


def _is_own(out: Path) -> bool:
    with out.open("rb") as file:
        return file.readline().startswith(f"# {_HEADER}".encode())


def explained(best: Trial, trials: int, tasks: Sequence[str], goal: Goal, origin: str) -> str:
    """Where the best recipe comes from, in lines.

    Args:
        trials: how many there were.
        tasks: their names.
        origin: the recipe with the marks.
    """
    first = f"{_HEADER} in {origin}: the best of {trials} trials, number {best.number}."
    value = goal.shown(best.value or 0.0)
    return f"{first}\nOn the validation splits of {', '.join(tasks)}: {value}.\n{point(best.values)}"


def write_recipe(out: Path, documents: Sequence[Mapping[str, Any]], comment: str) -> None:
    """Write a recipe with lines of comment before it.

    Raises:
        OutputError: it cannot be written.
    """
    import yaml

    header = "".join(f"# {line}\n" for line in comment.splitlines())
    text = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)
    try:
        out.write_text(header + text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(out), fix="Give another --out") from error
