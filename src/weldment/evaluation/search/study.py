"""Studies of Optuna: where the trials of a search are stored, how the next point is chosen, and what a study is of."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import OutputError, TaskError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler

FAILURE = "failure"
"""The attribute of a trial that says why its merge failed."""

_PATIENCE = 60
"""Seconds that a process waits for another one that writes to the same SQLite file."""

_ATTEMPTS = 10
"""To open a storage whose tables another process is making."""


def missing_search(error: ImportError) -> TaskError:
    """An error that says what to install."""
    fix = "Install them: pip install 'weldment[search]'"
    return TaskError(f"a search takes packages that are not installed ({error.name or error})", fix=fix)


def digest(content: object) -> str:
    """Tells JSON-able values apart."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_url(storage: str | Path) -> str:
    """The address of a storage that is a SQLite file or an address already."""
    return str(storage) if "://" in str(storage) else f"sqlite:///{Path(storage).expanduser()}"


def shown_storage(storage: str | Path) -> str:
    """The storage without a password."""
    head, at, tail = str(storage).rpartition("@")
    user, colon, _ = head.rpartition(":")
    return f"{user}:***@{tail}" if at and colon and "://" in user else str(storage)


def open_study(
    name: str, storage: str | Path | None, sampler: BaseSampler, of: Mapping[str, str], *, fresh: bool
) -> Study:
    """The study of a name, made where there is none.

    Args:
        storage: a SQLite file or an address that Optuna knows; None for this process's memory.
        of: digests of what the study is of, by what they are of; they are kept with the study.
        fresh: delete a study of that name.

    Raises:
        OutputError: the storage cannot be used, or holds a study of that name that is of something else.
    """
    optuna = load_optuna()
    place = "memory" if storage is None else shown_storage(storage)
    with storage_errors(place):
        opened = None if storage is None else _opened(storage)
        pruner = optuna.pruners.MedianPruner()
        if fresh and name in optuna.get_all_study_names(opened or optuna.storages.InMemoryStorage()):
            optuna.delete_study(study_name=name, storage=opened)
        study = optuna.create_study(
            study_name=name,
            storage=opened,
            sampler=sampler,
            pruner=pruner,
            direction="maximize",
            load_if_exists=True,
        )
        _claim(study, of, place)
    return study


def _opened(storage: str | Path) -> Any:
    """The storage."""
    url = as_url(storage)
    try:
        return _patient(url, {"connect_args": {"timeout": _PATIENCE}} if url.startswith("sqlite") else {})
    except ImportError as error:
        cause = f"the storage takes a package that is not installed ({error.name})"
        raise OutputError(cause, where=shown_storage(storage), fix="Install the driver of that database") from error


def _patient(url: str, options: Mapping[str, Any]) -> Any:
    """A storage whose tables another process may be making at this moment, which fails for all but one."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import IntegrityError, OperationalError

    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(url, engine_kwargs=dict(options))
        except (IntegrityError, OperationalError) as error:
            is_race = isinstance(error, IntegrityError) or "already exists" in str(error) or "locked" in str(error)
            if not is_race or attempt + 1 == _ATTEMPTS:
                raise
        time.sleep(0.1 * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


def _claim(study: Study, of: Mapping[str, str], place: str) -> None:
    """Write down what a new study is of, or check it."""
    known = study.user_attrs
    if not study.get_trials(deepcopy=False) and not known:
        for what, value in of.items():
            study.set_user_attr(what, value)
        return
    others = [what for what, value in of.items() if known.get(what, value) != value]
    if others or not of.keys() & known.keys():
        what = f"another search: different {', '.join(others)}" if others else "another program"
        fix = "Give another --storage, or --fresh to delete that study and its trials"
        raise OutputError(f"its study {study.study_name!r} belongs to {what}", where=place, fix=fix)


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Say in our words that a storage cannot be used."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, OptunaError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        fix = "Give a file that can be written, or an address that Optuna knows, such as postgresql://host/name"
        if isinstance(cause, NoSuchModuleError):
            fix = "Addresses begin like postgresql://, mysql:// or sqlite:///"
        raise OutputError(f"the storage cannot be used: {reason}", where=place, fix=fix) from error


def load_optuna() -> Any:
    """The library, told to report only errors.

    Raises:
        TaskError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise missing_search(error) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
