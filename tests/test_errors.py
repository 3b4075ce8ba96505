"""The exception tree: exit codes, messages, several problems at once."""

from __future__ import annotations

import pickle

import pytest

from weldment import errors
from weldment.errors import MergeError, PlanError, UserError, WeldmentError, joined


def test_exit_codes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, WeldmentError)]
    assert len(kinds) > 8
    for kind in kinds:
        assert kind("x").exit_code == (2 if issubclass(kind, UserError) else 1)


def test_message_has_cause_place_and_fix() -> None:
    assert str(PlanError("it is wrong", where="r.yml: models", fix="Mend it")) == "r.yml: models: it is wrong. Mend it"
    assert str(MergeError("it is wrong")) == "it is wrong"


def test_errors_cross_processes() -> None:
    error = PlanError("cause", where="place", fix="fix")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.cause, copy.where, copy.fix) == (PlanError, "cause", "place", "fix")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_joined(count: int) -> None:
    problems = [PlanError(f"problem {number}", where="here") for number in range(count)]
    error = joined(PlanError, problems)
    assert isinstance(error, PlanError)
    assert all(problem.cause in str(error) for problem in problems)
    assert (error is problems[0]) == (count == 1)
