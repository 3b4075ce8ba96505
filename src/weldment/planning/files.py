"""Which models the output's side files and tokenizer come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from weldment.checkpoint.model import Checkpoint
from weldment.errors import PlanError
from weldment.planning.inputs import Inputs
from weldment.planning.plan import Plan
from weldment.planning.roles import input_embedding
from weldment.planning.sorting import Found

_WEIGHTS = (".safetensors", ".bin")


def config_model(inputs: Inputs) -> str:
    """The model whose configuration the output's is made from: the reference, or the first one that has any."""
    candidates = dict.fromkeys([inputs.reference, *inputs.models])
    return next((model for model in candidates if inputs.models[model].config), inputs.reference)


def side_model(inputs: Inputs, stages: Sequence[Plan]) -> Checkpoint:
    """The model whose side files the output gets: the one that gives the configuration."""
    chosen = config_model(inputs)
    stage = _stage(chosen, stages)
    return inputs.models[chosen] if stage is None else stage.side


def tokenizer_model(
    inputs: Inputs, taken: Sequence[Found], stages: Sequence[Plan]
) -> tuple[Checkpoint, list[PlanError]]:
    """The model whose tokenizer the output gets, and what is wrong with the recipe's wish for one.

    It is the model that the recipe names, else the one that the token embeddings are taken from,
    else the one that gives the other side files.
    """
    asked = dict(inputs.recipe.tokenizer or {})
    problems = [_unsupported(inputs, key) for key in ("tokens", "pad_to_multiple_of") if asked.get(key)]
    chosen = str(asked.get("source") or "").removeprefix("model:")
    if chosen in ("", "base", "union"):
        embedding = input_embedding(found.name for found in taken)
        chosen = next((found.model for found in taken if found.name == embedding), config_model(inputs))
    if chosen not in inputs.models:
        fix = f"Name one of: base, union, {', '.join(inputs.models)}"
        key = "tokenizer.source" if inputs.recipe.source.get("tokenizer_source") is None else "tokenizer_source"
        where = f"{inputs.recipe.origin}: {key}"
        problems.append(PlanError(f"{chosen} is not among the models of this merge", where=where, fix=fix))
        chosen = inputs.reference
    stage = _stage(chosen, stages)
    return inputs.models[chosen] if stage is None else stage.tokenizer, problems


def _unsupported(inputs: Inputs, key: str) -> PlanError:
    cause = f"`{key}` is not supported in this version: vocabularies are merged as they are"
    return PlanError(cause, where=f"{inputs.recipe.origin}: tokenizer.{key}", fix="Remove it")


def _stage(reference: str, stages: Sequence[Plan]) -> Plan | None:
    return next((stage for stage in stages if stage.recipe.name == reference), None)


def file_notes(inputs: Inputs, side: Checkpoint, tokenizer: Checkpoint) -> list[str]:
    """What the user should know of the files that are not weights of the model."""
    notes: list[str] = []
    if config_model(inputs) != inputs.reference:
        notes.append(f"{inputs.reference} has no configuration; it comes from {side.reference}, with the side files")
    if (inputs.recipe.tokenizer or {}).get("source") == "union":
        notes.append(f"vocabularies are not united in this version: the tokenizer is that of {tokenizer.reference}")
    if inputs.recipe.chat_template is not None:
        notes.append(f"`chat_template` is not applied in this version: it stays that of {tokenizer.reference}")
    weights = [name for name in side.side_files if PurePosixPath(name).suffix in _WEIGHTS]
    notes += [f"{name} is copied from {side.reference}, not merged" for name in weights]
    return notes
