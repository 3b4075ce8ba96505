"""Which models the output's side files and tokenizer come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from weldment.checkpoint.model import Checkpoint
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


def tokenizer_model(inputs: Inputs, taken: Sequence[Found], stages: Sequence[Plan]) -> Checkpoint:
    """The model whose tokenizer the output gets if the recipe wishes for none.

    It is the one that the token embeddings are taken from, else the one that gives the other side files.
    """
    embedding = input_embedding(found.name for found in taken)
    chosen = next((found.model for found in taken if found.name == embedding), config_model(inputs))
    stage = _stage(chosen, stages)
    return inputs.models[chosen] if stage is None else stage.tokenizer


def _stage(reference: str, stages: Sequence[Plan]) -> Plan | None:
    return next((stage for stage in stages if stage.recipe.name == reference), None)


def file_notes(inputs: Inputs, side: Checkpoint) -> list[str]:
    """What the user should know of the files that are not weights of the model."""
    notes: list[str] = []
    if config_model(inputs) != inputs.reference:
        notes.append(f"{inputs.reference} has no configuration; it comes from {side.reference}, with the side files")
    weights = [name for name in side.side_files if PurePosixPath(name).suffix in _WEIGHTS]
    notes += [f"{name} is copied from {side.reference}, not merged" for name in weights]
    return notes
