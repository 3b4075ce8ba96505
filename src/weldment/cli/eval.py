"""`weld eval MODEL --task DIR...`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weldment.evaluation.scores import Score

TaskOption = Annotated[
    list[str],
    typer.Option(
        "--task",
        metavar="TASK",
        help="A task folder, a file of examples (.jsonl, .csv, .parquet), org/name of a dataset, perplexity:FILE or "
        "lm:NAME; may be repeated.",
        show_default=False,
    ),
]
HeadOption = Annotated[
    list[str],
    typer.Option(
        "--head", metavar="TASK=PLACE", help="Where the head for a task is stored: a model or a file of heads/."
    ),
]
SplitOption = Annotated[str, typer.Option(help="Which examples: train, validation or test.")]
LimitOption = Annotated[
    int | None, typer.Option(help="Only so many examples of each task, the first ones.", show_default="all")
]
BatchOption = Annotated[int, typer.Option(help="Examples of a batch.")]
LengthOption = Annotated[
    int | None, typer.Option(help="Tokens after which texts are cut.", show_default="what the model takes")
]
EvalDeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps or auto.")]
RecalibrateOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Unlabelled inputs, on which running statistics of batch normalisation are measured first.",
        show_default=False,
    ),
]
EvalDtypeOption = Annotated[
    str, typer.Option(help="Arithmetic: float32, bfloat16, or auto for bfloat16 where the processor has it.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model that the experts were fine-tuned from.",
        show_default="what the recipes say",
    ),
]
ExpertOption = Annotated[
    list[str],
    typer.Option(metavar="TASK=MODEL", help="The expert of a task; by default the one whose name is that of the task."),
]


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, org/name, or base+adapter.", show_default=False)
    ],
    task: TaskOption,
    head: HeadOption = [],  # noqa: B006  (typer copies it)
    split: SplitOption = "test",
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    max_length: LengthOption = None,
    device: EvalDeviceOption = "cpu",
    dtype: EvalDtypeOption = "float32",
    recalibrate: RecalibrateOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")] = False,
) -> None:
    """Score MODEL on tasks, with 95 % confidence intervals."""
    import json

    from weldment.cli.scoring import parse_heads, scoring
    from weldment.engine.memory import pick_device
    from weldment.evaluation.evaluate import evaluate

    heads = parse_heads(head)
    with scoring(quiet) as report:
        found = evaluate(
            model,
            task,
            heads=heads,
            report=report,
            split=split,
            limit=limit,
            batch=batch_size,
            max_length=max_length,
            device=pick_device(device),
            dtype=dtype,
            recalibrate=recalibrate,
        )
    if as_json:
        records = [score.record() for score in found.values()]
        typer.echo(json.dumps({"model": model, "split": split, "scores": records}, indent=1))
    else:
        _show(found)


def _show(scores: Mapping[str, Score]) -> None:
    """A line for each task, and the mean where there are several of one kind."""
    from weldment.cli.console import columns
    from weldment.evaluation.scores import average

    rows = [("task", "metric", "score", "95 % interval", "examples")]
    for score in scores.values():
        rows.append(_row(score))
        rows += [("", name.replace("_", " "), _number(value), "", "") for name, value in score.details.items()]
    if len(scores) > 1 and all(score.higher_is_better for score in scores.values()):
        rows.append(_row(average(list(scores.values()))))
    for line in columns(rows, 100, right=(2,)):
        typer.echo(line)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _row(score: Score) -> tuple[str, str, str, str, str]:
    low, high = score.interval
    metric = score.metric if score.higher_is_better else f"{score.metric} (lower is better)"
    return score.task, metric, f"{score.value:.3f}", f"{low:.3f} to {high:.3f}", str(score.examples)
