"""The public names, and that the light ones stay light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import weldment

HEAVY = ("torch", "numpy", "yaml", "safetensors", "huggingface_hub", "transformers", "rich", "tokenizers")


def test_the_public_names_are_these() -> None:
    assert sorted(weldment.__all__) == [
        "CheckpointError",
        "METHODS",
        "MergeError",
        "MergeResult",
        "NonFiniteError",
        "OutputError",
        "Plan",
        "PlanError",
        "RecipeError",
        "TwinModel",
        "UserError",
        "VerificationError",
        "WeldmentError",
        "__version__",
        "add_weighted_adapter",
        "extract",
        "merge",
        "merge_tensors",
        "plan",
        "verify",
    ]
    assert len(weldment.__all__) <= 20


@pytest.mark.parametrize("name", weldment.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(weldment, name)
    assert name == "__version__" or name == "METHODS" or value.__doc__
    assert name in dir(weldment)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        weldment.merg  # noqa: B018


def loaded(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after `code`."""
    report = f"import json, sys; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    script = f"try:\n {code}\nfinally:\n {report}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["merge", "--help"], ["plan", "--help"], ["merge"], ["merg"]], ids=" ".join
)
def test_help_and_usage_errors_wait_for_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(f"from weldment.cli import main; main({arguments})") == set()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import weldment") == set()


def test_a_plan_of_local_models_does_not_wait_for_the_hub() -> None:
    assert not loaded("from weldment import plan; plan('nowhere.yml')") & {
        "huggingface_hub",
        "transformers",
        "tokenizers",
    }
