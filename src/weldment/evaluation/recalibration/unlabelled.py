"""Unlabelled inputs in a folder: tensors, arrays, images, or the texts of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import TaskError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from weldment.evaluation.states import ModelState

Batch = Mapping[str, "Tensor"]
"""Inputs of a network by their names; the first dimension of each counts examples."""

BATCH = 32
"""Examples of a batch, however many there are in a file."""

IMAGES = (".png", ".jpg", ".jpeg")
SUFFIXES = (".safetensors", ".npy", *IMAGES)
DESCRIPTION = "task.json"

_ADVICE = "Give .safetensors files (the network's inputs by name), .npy files (pixel_values), images, or a task folder"
_SPLITS = ("train", "validation")


def input_files(folder: str | Path) -> list[Path]:
    """The files with inputs, also in folders below, in the order of their paths.

    Raises:
        TaskError: there is no such folder, it holds none, or images that take a package that is not installed.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        cause = "is a file, not a folder of unlabelled inputs" if root.exists() else "there is no such folder"
        raise TaskError(cause, where=str(folder), fix=_ADVICE)
    if (root / DESCRIPTION).is_file():
        return sorted(path for path in root.iterdir() if path.is_file())
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise TaskError("holds no inputs", where=str(folder), fix=_ADVICE)
    if any(path.suffix.lower() in IMAGES for path in found) and find_spec("PIL") is None:
        fix = "Install it: pip install 'weldment[images]'"
        raise TaskError("images take the package Pillow, which is not installed", where=str(folder), fix=fix)
    return found


def inputs_in(folder: str | Path, state: ModelState, network: PreTrainedModel) -> list[Batch]:
    """All inputs of a folder, in batches of `BATCH` examples.

    Args:
        state: the model whose tokenizer or image processor makes inputs of texts and images.
        network: of the model, which says how long a text may be.

    Raises:
        TaskError: there are none, or a file cannot be read.
    """
    files = input_files(folder)
    if (Path(folder).expanduser() / DESCRIPTION).is_file():
        return list(_texts(Path(folder).expanduser(), state, network))
    return list(batched(_pieces(files, state)))


def _pieces(files: Sequence[Path], state: ModelState) -> Iterator[Batch]:
    has_images = any(path.suffix.lower() in IMAGES for path in files)
    readers: dict[str, Callable[[Path], Batch]] = {".safetensors": _tensors, ".npy": _array}
    readers |= dict.fromkeys(IMAGES, partial(_image, _processor(state))) if has_images else {}
    for path in files:
        yield readers[path.suffix.lower()](path)


def batched(pieces: Iterator[Batch]) -> Iterator[Batch]:
    """Examples that follow each other and are of one shape, in batches that do not depend on the pieces."""
    import torch

    for _, group in groupby(pieces, _signature):
        parts = list(group)
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        cut = {name: tensor.split(BATCH) for name, tensor in whole.items()}
        for place in range(len(next(iter(cut.values())))):
            yield {name: tensors[place] for name, tensors in cut.items()}


def _signature(piece: Batch) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(piece.items())]


def _tensors(path: Path) -> Batch:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"cannot be read: {error}", where=str(path)) from error
    counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in found.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        listing = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in found.items()) or "no tensor"
        fix = "The first dimension of every input counts the same examples, at least one"
        raise TaskError(f"is not a batch of inputs: {listing}", where=str(path), fix=fix)
    return {name: _single(tensor) for name, tensor in found.items()}


def _array(path: Path) -> Batch:
    import numpy as np
    import torch

    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TaskError(f"cannot be read: {error}", where=str(path)) from error
    if found.ndim < 2 or not len(found) or not np.issubdtype(found.dtype, np.floating):
        cause = f"is not an array of pixel_values: {found.dtype} {list(found.shape)}"
        raise TaskError(cause, where=str(path), fix="Give floating point of shape (n, channels, height, width)")
    return {"pixel_values": _single(torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32)))}


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _processor(state: ModelState) -> Any:
    from weldment.evaluation.networks import quiet_transformers

    with quiet_transformers():
        from transformers import AutoImageProcessor

        try:
            if state.folder is None:
                raise OSError("the model is in no folder")
            return AutoImageProcessor.from_pretrained(str(state.folder), local_files_only=True)
        except (OSError, ValueError) as error:
            fix = "Put preprocessor_config.json beside the model's weights, or give pixel_values in .npy files"
            cause = f"has no image processor: {str(error).splitlines()[0]}"
            raise TaskError(cause, where=state.name, fix=fix) from error


def _image(processor: Any, path: Path) -> Batch:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return dict(processor(images=[image.convert("RGB")], return_tensors="pt"))
    except (OSError, ValueError) as error:
        raise TaskError(f"is not an image that can be read: {error}", where=str(path)) from error


def _texts(folder: Path, state: ModelState, network: PreTrainedModel) -> Iterator[Batch]:
    """The texts of the training split, or of the one for validation: test texts are for the final score alone."""
    from weldment.evaluation.networks import tokenizer_of
    from weldment.evaluation.predicting import encode, longest
    from weldment.evaluation.tasks import Task, load_task

    task = load_task(folder)
    split = next((name for name in _SPLITS if isinstance(task, Task) and name in task.files), None)
    if not isinstance(task, Task) or split is None:
        raise TaskError(
            "has neither a training nor a validation split", where=str(folder), fix="Add train.jsonl to the task"
        )
    tokenizer = tokenizer_of(state)
    rows = encode(tokenizer, task.split(split), longest(tokenizer, network, task.max_length)).inputs
    for start in range(0, len(rows), BATCH):
        yield dict(tokenizer.pad(list(rows[start : start + BATCH]), return_tensors="pt"))
