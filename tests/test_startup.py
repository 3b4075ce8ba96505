"""What the command's process loads, when it loads it, and that a module that waits is as good as one that does not."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models import recipe, save_decoder
from weldment import merge
from weldment.cli import main, startup
from weldment.cli.startup import Postponed, postpone

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.4},
    "ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "dare_ties": {"density": 0.5},
    "karcher": {},
    "model_stock": {},
}


def in_a_new_process(code: str, *arguments: object) -> Any:
    """What `code` leaves in `found`, run by a fresh interpreter; `sys.argv[1:]` are the arguments."""
    script = f"import json, sys\nfound = None\n{code}\nprint(json.dumps(found))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMMAND = """
from weldment.cli import main
def weld(*arguments):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as done:
        assert not done.code
"""


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two experts."""
    return [save_decoder(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]


def written(path: Path, method: str, models: list[Path]) -> Path:
    base, *experts = models
    content = recipe(method, *experts, base=None if method == "karcher" else base, parameters=METHODS[method])
    path.write_text(json.dumps(content))
    return path


def test_a_plan_loads_neither_torch_nor_numpy(tmp_path: Path, models: list[Path]) -> None:
    file = written(tmp_path / "ties.yml", "ties", models)
    report = """
weld("plan", sys.argv[1])
found = [name for name, module in sys.modules.items() if name.partition(".")[0] in ("torch", "numpy")
         and type(module).__name__ != "Postponed"]
"""
    assert in_a_new_process(COMMAND + report, file) == []


def test_a_merge_by_the_command_is_the_library_s(tmp_path: Path, models: list[Path]) -> None:
    files = [written(tmp_path / f"{method}.yml", method, models) for method in METHODS]
    merges = """
for file in list(sys.argv[1:]):
    weld("merge", "--quiet", "--threads", "2", file, file + ".out")
found = [type(sys.modules[name]).__name__ for name in ("torch", "torch._meta_registrations")]
"""
    assert in_a_new_process(COMMAND + merges, *files) == ["module", "Postponed"]
    for file in files:
        merge(file, tmp_path / "library", overwrite=True)
        found, expected = Path(f"{file}.out"), tmp_path / "library"
        names = sorted(path.name for path in expected.iterdir())
        assert sorted(path.name for path in found.iterdir()) == names
        for name in names:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), f"{file.stem}: {name}"


def test_the_parts_of_torch_that_wait_work_when_they_are_used() -> None:
    use = """
from weldment.cli.startup import PARTS, Postponed, postpone
postpone(parts=True)
import numpy as np, torch
waiting = [type(module) is Postponed for module in (np, torch)]
torch.bfloat16
parts = {name: sys.modules[name] for name in PARTS if name in sys.modules}
waiting += [len(parts) >= 5, *(type(part) is Postponed for part in parts.values())]
values = torch.from_numpy(np.ones(3, np.float32)).bfloat16().add_(0.5)
torch._meta_registrations.aten
batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(values), batch_size=2)
found = {
    "all waited": all(waiting),
    "values": values.tolist(),
    "cuda": isinstance(torch.cuda.is_available(), bool),
    "batches": len(list(batches)),
    "meta": list(torch.nn.functional.fold(torch.empty(1, 4, 4, device="meta"), (4, 4), 2, stride=2).shape),
    "normal": torch.distributions.Normal(0.0, 1.0).mean.item(),
    "masked": torch.masked.sum(values, mask=values > 9).item(),
    "jit": torch.jit.script(torch.nn.Linear(2, 1))(torch.zeros(2)).shape[0],
    "svd": torch.linalg.svdvals(torch.eye(2)).tolist(),
    "gradient": torch.autograd.grad((x := torch.ones(1, requires_grad=True)).square().sum(), x)[0].tolist(),
    "quantised": torch.quantization.QuantStub.__name__,
    "still waiting": [name for name, part in parts.items() if type(part) is Postponed and "distributed" not in name],
}
"""
    assert in_a_new_process(use) == {
        "all waited": True,
        "values": [1.5, 1.5, 1.5],
        "cuda": True,
        "batches": 2,
        "meta": [1, 1, 4, 4],
        "normal": 0.0,
        "masked": 0.0,
        "jit": 1,
        "svd": [1.0, 1.0],
        "gradient": [2.0],
        "quantised": "QuantStub",
        "still waiting": [],
    }


def test_only_a_process_of_its_own_gets_the_finder() -> None:
    finders = list(sys.meta_path)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert sys.meta_path == finders
    assert type(torch) is type(sys)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `parcel` that may wait, and says in `loads` how often its code ran; its name is importable."""
    folder = tmp_path / "parcel"
    folder.mkdir()
    (folder / "__init__.py").write_text("import sys\nsys.loads = getattr(sys, 'loads', 0) + 1\nvalue = 1\n")
    (folder / "part.py").write_text("from parcel import value\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "loads", 0, raising=False)
    monkeypatch.setattr(startup, "WHOLE", frozenset({"parcel"}))
    importlib.invalidate_caches()
    postpone()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "parcel"]:
        del sys.modules[name]


def loads() -> int:
    return vars(sys)["loads"]


def test_importing_loads_nothing_however_often(package: Path) -> None:
    module = importlib.import_module("parcel")
    assert importlib.import_module("parcel") is module
    exec("import parcel")
    assert type(module) is Postponed
    assert module.__name__ == "parcel"
    assert module.__file__ == str(package / "__init__.py")
    assert importlib.util.find_spec("parcel") is module.__spec__
    assert loads() == 0


def test_a_use_loads_once_and_completely(package: Path) -> None:
    module = importlib.import_module("parcel")
    assert (module.value, module.value, loads()) == (1, 1, 1)
    assert type(module) is type(sys)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        module.other  # noqa: B018


def test_importing_a_submodule_loads_the_package_first(package: Path) -> None:
    assert importlib.import_module("parcel.part").value == 1
    assert loads() == 1


def test_what_is_set_before_a_module_loads_stays(package: Path) -> None:
    module: Any = importlib.import_module("parcel")
    module.value = 2
    assert (module.value, loads()) == (2, 1)
    other = importlib.reload(module)
    assert (other.value, loads()) == (1, 2)
    del module.value
    assert not hasattr(module, "value")


def test_a_package_may_use_itself_while_it_loads(package: Path) -> None:
    (package / "__init__.py").write_text("value = 3\nimport parcel.part\nagain = parcel.part.value\n")
    assert importlib.import_module("parcel").again == 3


def test_a_module_that_fails_to_load_fails_at_every_use(package: Path) -> None:
    (package / "__init__.py").write_text("raise ImportError('no such library')\n")
    module = importlib.import_module("parcel")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such library"):
            module.value  # noqa: B018
    (package / "__init__.py").write_text("value = 'mended'\n")
    assert module.value == "mended"


def test_threads_wait_until_a_module_is_whole(package: Path) -> None:
    (package / "__init__.py").write_text("import time\ntime.sleep(0.05)\nlast = 1\n")
    module = importlib.import_module("parcel")
    start = threading.Barrier(8)
    found: list[int] = []

    def use() -> None:
        start.wait()
        found.append(module.last)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


@pytest.mark.parametrize(
    ("version", "waits"),
    [("2.4.0", True), ("2.13.1+cu130", True), ("2.99.0", False), ("3.0", False), ("1.13.1", False), ("git", False)],
)
def test_parts_wait_only_in_versions_that_were_tried(
    package: Path, monkeypatch: pytest.MonkeyPatch, version: str, waits: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(startup, "PARTS", frozenset({"parcel.part", "parcel.missing"}))
    postpone(parts=True)
    assert (type(importlib.import_module("parcel.part")) is Postponed) == waits
    with pytest.raises(ModuleNotFoundError, match=r"parcel\.missing"):
        importlib.import_module("parcel.missing")
    assert importlib.import_module("parcel.part").value == 1


def test_what_is_not_plain_python_loads_at_once() -> None:
    finder = startup._Finder(frozenset({"math", "nowhere"}))
    assert finder.find_spec("math", None) is None
    assert finder.find_spec("nowhere", None) is None
