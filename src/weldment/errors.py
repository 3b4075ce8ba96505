"""Every exception the package raises on purpose, drawn once.

    WeldmentError
    ├── UserError            the input is at fault: exit code 2
    │   ├── RecipeError      the recipe: YAML, keys, values, methods
    │   ├── CheckpointError  a model: files, headers, dtypes, configs
    │   │   └── HubError     a model on the Hugging Face Hub: missing, gated, offline
    │   ├── PlanError        models and recipe do not fit together
    │   ├── TaskError        an evaluation: tasks, examples, heads, metrics
    │   ├── OutputError      the output folder: not empty, not writable, in use, no space
    │   └── RequestError     a request to a server, with the status of HTTP that answers it
    └── MergeError           the merge itself failed: exit code 1
        ├── NonFiniteError   the merge produced NaN or infinity
        └── VerificationError  an output folder is not what its manifest says

A message has three parts: the cause, the place (a YAML path, a file, a tensor) and the fix.
"""

from __future__ import annotations

from collections.abc import Sequence


class WeldmentError(Exception):
    """Base of all errors of this package.

    Args:
        cause: what is wrong, one sentence without a full stop.
        where: the YAML path, file or tensor at fault.
        fix: what to do about it, one sentence without a full stop.
    """

    exit_code = 1

    def __init__(self, cause: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.cause = cause
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f". {self.fix}" if self.fix else ""
        return f"{place}{self.cause}{advice}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.cause, self.where, self.fix), self.__dict__


def _rebuild(kind: type[WeldmentError], cause: str, where: str | None, fix: str | None) -> WeldmentError:
    return kind(cause, where=where, fix=fix)


class UserError(WeldmentError):
    """The input is at fault; nothing was written."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe is not valid."""


class CheckpointError(UserError):
    """A model cannot be read."""


class HubError(CheckpointError):
    """A model on the Hugging Face Hub cannot be reached."""


class PlanError(UserError):
    """The models and the recipe do not fit together."""


class TaskError(UserError):
    """A task is not valid, or a model cannot be evaluated on it."""


class OutputError(UserError):
    """The output folder cannot be used."""


class RequestError(UserError):
    """A request to a server is refused.

    Args:
        cause: what is wrong.
        where: the field of the request at fault.
        fix: what to do about it.
        status: of HTTP.
        code: a word for programs.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        cause: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(cause, where=where, fix=fix)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class MergeError(WeldmentError):
    """The merge failed while it ran."""


class NonFiniteError(MergeError):
    """The merge produced NaN or infinity."""


class VerificationError(MergeError):
    """An output folder differs from what its manifest records."""


def joined(kind: type[WeldmentError], problems: Sequence[WeldmentError]) -> WeldmentError:
    """One error that carries all `problems`; a single problem is returned as it is."""
    if len(problems) == 1:
        return problems[0]
    listing = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
    return kind(f"{len(problems)} problems:\n{listing}")
