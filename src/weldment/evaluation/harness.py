"""Tasks of lm-evaluation-harness, by their names there or by a file that describes one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import TaskError
from weldment.evaluation.scores import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from weldment.evaluation.evaluate import Options
    from weldment.evaluation.tasks import LanguageTask

PREFERRED = ("acc_norm", "acc", "exact_match")
"""Which of a task's metrics is reported: the first of these that it has, else its own first."""


def harness_score(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LanguageTask, options: Options
) -> Score:
    """The score that lm-evaluation-harness gives a model, with its standard error.

    Raises:
        TaskError: the harness is not installed, does not know the task, or cannot get its examples.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        fix = "Install it: pip install 'weldment[lm]'"
        raise TaskError(f"lm:{task.source} takes lm-evaluation-harness, which is missing", fix=fix) from error
    name, manager = _find(task.source)
    model = HFLM(
        pretrained=network,
        tokenizer=tokenizer,
        batch_size=options.batch,
        max_length=options.max_length,
        truncation=True,
    )
    try:
        found = simple_evaluate(
            model=model,
            tasks=[name],
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except OSError as error:
        fix = "Its data come from the Hugging Face Hub: go online once, or describe local data in a YAML file"
        raise TaskError(f"the examples cannot be read: {error}", where=f"lm:{task.source}", fix=fix) from error
    return score_of(found or {}, task.name, name)


def _find(source: str) -> tuple[str, Any]:
    """The harness's name of a task, and what knows where it is described."""
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _name_in(path), _manager(str(path.resolve().parent))
    manager = _manager(None)
    if source not in manager.all_tasks:
        close = difflib.get_close_matches(source, manager.all_tasks, n=3)
        fix = f"Did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
        raise TaskError("lm-evaluation-harness knows no such task", where=f"lm:{source}", fix=fix)
    return source, manager


@lru_cache(maxsize=4)
def _manager(folder: str | None) -> Any:
    # Reading the thousands of descriptions that come with the harness takes a minute.
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager() if folder is None else TaskManager(include_path=folder, include_defaults=False)


def _name_in(path: Path) -> str:
    """The name of the task, or of the group of tasks, that a file describes."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes the harness's own tags, such as !function, for what follows them."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)
    fix = "See lm-evaluation-harness' guide to new tasks"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TaskError(f"cannot be read: {error}", where=str(path), fix=fix) from error
    name = content.get("group") or content.get("task") if isinstance(content, Mapping) else None
    if not isinstance(name, str):
        raise TaskError("names no task: it has no `task`", where=str(path), fix=fix)
    return name


def score_of(found: Mapping[str, Any], task: str, name: str) -> Score:
    """The main metric among the harness's results.

    Args:
        found: what the harness returns.
        task: what the score is called.
        name: the harness's name.

    Raises:
        TaskError: the task has no metric of its own.
    """
    values = {key: value for key, value in found.get("results", {}).get(name, {}).items() if _is_metric(key, value)}
    if not values:
        fix = "Give the tasks it stands for one by one, as lm:NAME"
        raise TaskError("has no score of its own", where=f"lm:{name}", fix=fix)
    key = min(values, key=lambda key: _rank(key.partition(",")[0]))
    metric, _, how = key.partition(",")
    error = found["results"][name].get(f"{metric}_stderr,{how}")
    examples = sum(int(count["effective"]) for count in found.get("n-samples", {}).values())
    higher = found.get("higher_is_better", {}).get(name, {}).get(metric)
    return Score(
        task,
        metric,
        float(values[key]),
        examples,
        error=float(error) if isinstance(error, (int, float)) else None,
        higher_is_better=higher is not False,
    )


def _is_metric(key: str, value: object) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, (int, float)) and not isinstance(value, bool)


def _rank(metric: str) -> int:
    return PREFERRED.index(metric) if metric in PREFERRED else len(PREFERRED)
