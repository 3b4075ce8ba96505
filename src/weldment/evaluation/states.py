"""A model in memory: its tensors, configuration, tokenizer and heads, wherever it comes from."""

from __future__ import annotations

import atexit
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePath
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from weldment.adapters.adapter import PREFIX
from weldment.adapters.merge.recognising import base_model_of
from weldment.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from weldment.merging import RecipeSource
    from weldment.planning.plan import Plan
    from weldment.vocabulary.output import Output

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Head:
    """The tensors that a model has for one task alone, and the configuration they belong to.

    Attributes:
        folder: where the tokenizer of the model lies that they come from, if that is known.
    """

    tensors: Tensors
    config: Mapping[str, Any]
    folder: Path | None = None


@dataclass(frozen=True)
class ModelState:
    """A model.

    Attributes:
        name: how it is called.
        folder: where its tokenizer lies, on this machine.
        heads: kept beside a merged model, by their names.
        nbytes: of its tensors.
    """

    name: str
    tensors: Tensors
    config: Mapping[str, Any]
    folder: Path | None = None
    heads: Mapping[str, Head] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def tokenizer_folder(plan: Plan) -> Path | None:
    """Where the tokenizer of a merge lies; one that the merge makes lies in a folder that goes with the process."""
    return plan.tokenizer.root if plan.output is None else _written(plan.output)


@lru_cache(maxsize=64)
def _written(output: Output) -> Path:
    from weldment.vocabulary.writing import write_tokenizer

    folder = Path(mkdtemp(prefix="weld-tokenizer-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    write_tokenizer(folder, output)
    return folder


def short_name(reference: str) -> str:
    """The last part of a reference, without the ending of a file."""
    path = PurePath(reference.rstrip("/"))
    return path.stem if path.suffix in (".safetensors", ".yml", ".yaml", ".json") else path.name or reference


def load_state(reference: str | Path) -> ModelState:
    """A model that is stored: a folder, a file, `org/name` on the Hub, or `base+adapter`.

    Raises:
        CheckpointError: it cannot be opened.
    """
    from weldment.adapters.opening import open_model
    from weldment.merging import merge_in_memory

    # What is wrong with it is not said to be wrong with a recipe, which the user has not written.
    open_model(str(reference))
    merged = merge_in_memory({"merge_method": "passthrough", "models": [str(reference)]})
    model = next(iter(merged.plan.models.values()))
    name = "+".join(short_name(part) for part in str(reference).split("+"))
    return ModelState(name, merged.tensors, model.config, model.root, stored_heads(model.root))


def merged_state(
    recipe: RecipeSource, name: str, *, overrides: Sequence[str] = (), seed: int | None = None
) -> ModelState:
    """The model that a recipe makes; nothing is left on the disk.

    Raises:
        UserError: the recipe or its models are at fault.
        MergeError: the merge failed.
    """
    from weldment.merging import merge_in_memory, recognised
    from weldment.recipe import load_recipes

    recipes, adapters = recognised(load_recipes(recipe, overrides=overrides))
    if adapters:
        return _merged_adapter(recipe, name, base_model_of(recipes[-1], adapters), overrides, seed)
    merged = merge_in_memory(recipe, overrides=overrides, seed=seed)
    experts = merged.plan.heads
    heads = {head: Head(tensors, experts[head].config) for head, tensors in merged.heads.items()}
    return ModelState(name, merged.tensors, merged.plan.config, tokenizer_folder(merged.plan), heads)


def _merged_adapter(
    recipe: RecipeSource, name: str, base: str, overrides: Sequence[str], seed: int | None
) -> ModelState:
    """The base with the merged adapter; adapters are small, and are written to a folder that is removed."""
    from tempfile import TemporaryDirectory

    from weldment.merging import merge

    with TemporaryDirectory() as scratch:
        out = merge(recipe, Path(scratch) / "adapter", overrides=overrides, seed=seed).path
        heads = {head: replace(stored, folder=None) for head, stored in stored_heads(out).items()}
        return replace(load_state(f"{base}+{out}"), name=name, heads=heads)


def stored_heads(root: Path | None) -> dict[str, Head]:
    """The heads that a merge kept in the folder `heads` of its output."""
    found = sorted((root / "heads").glob("*.safetensors")) if root is not None else ()
    return {path.stem: stored_head(path) for path in found}


def stored_head(path: Path) -> Head:
    """A head in a file of its own, with the configuration beside it if there is one (`NAME.json` or `config.json`).

    Raises:
        CheckpointError: the file or the configuration is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    configs = (path.with_suffix(".json"), path.parent / "config.json")
    config = next((place for place in configs if place.is_file()), None)
    try:
        content = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    return Head(tensors, content, path.parent.parent if path.parent.name == "heads" else None)
