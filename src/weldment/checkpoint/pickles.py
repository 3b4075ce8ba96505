"""Torch checkpoints (`.pt`, `.pth`, `.bin`): where their tensors lie, without loading or trusting them.

Such a file is a zip archive: one pickle that describes the tensors, and one uncompressed member
for each storage. The pickle is read by an unpickler that knows a short list of names and gives
each a stand-in of its own: nothing is imported, no code of the file runs, no weights are read.

Source: the notes on serialization semantics in torch's documentation.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.checkpoint.headers import AGAIN, HEADER_LIMIT, LFS_POINTER, is_text
from weldment.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model")
RESAVE = "Load it where you trust it (torch.load) and save it with safetensors.torch.save_file"

PICKLE_MAGIC = b"\x80"
ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30
ENCRYPTED = 0x1

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
# What the standard library raises on damaged input.
CORRUPT_PICKLE = (
    pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError,
    MemoryError, OverflowError, RecursionError,
)  # fmt: skip
CORRUPT_ZIP = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, LookupError, ValueError,
    MemoryError, OverflowError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PickleEntry:
    """One tensor, row-major; its first element is at byte `offset` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _StorageType:
    """Stands for a storage class; None is torch's untyped storage, counted in bytes."""

    dtype: str | None


@dataclass(frozen=True, slots=True)
class _DType:
    """Stands for a torch dtype."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Stands for a storage: the archive member `data/<key>`."""

    key: str
    dtype: str | None
    length: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Stands for a tensor: a strided view of a storage, as the pickle gives it, unchecked."""

    storage: Any
    start: Any
    shape: Any
    strides: Any
    dtype: Any = None
    lazy: Any = None


@dataclass(frozen=True, slots=True)
class _Archive:
    """A torch zip archive: its open file, its members, and the folder they lie in."""

    file: BinaryIO
    size: int
    prefix: str
    members: Mapping[str, zipfile.ZipInfo]
    description: bytes
    where: str


def _tensor(
    storage: Any, start: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None, lazy: Any = None
) -> _Tensor:
    return _Tensor(storage, start, shape, strides, lazy=lazy)


def _tensor_of_dtype(
    storage: Any, start: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, lazy: Any = None
) -> _Tensor:
    return _Tensor(storage, start, shape, strides, dtype, lazy)


def _parameter(data: Any, *_: Any) -> Any:
    return data


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): _DType(dtype) for name, dtype in DTYPES.items()},
}
"""Every name that a pickle may use, and what it gets; all else is refused."""


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins only; refuses every name that is not in `ALLOWED`."""

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.where = where

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The stand-in for a name in the pickle."""
        try:
            return ALLOWED[module_name, global_name]
        except KeyError:
            cause = f"its pickle asks for {module_name}.{global_name}, which is not part of a plain state dict"
            raise CheckpointError(cause, where=self.where, fix=RESAVE) from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        """The stand-in for a storage."""
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int(length)):
                return _Storage(key, dtype, length)
            case _:
                cause = "its pickle refers to something that is not a storage"
                raise CheckpointError(cause, where=self.where, fix=AGAIN)


def read_pickle(path: Path) -> dict[str, PickleEntry]:
    """The tensors of a torch checkpoint on this machine, by name.

    A state dict may be the whole content or lie under one of `WRAPPERS`, as training scripts save
    it; what lies beside such a wrapper (an optimizer, a step count) is not part of the model.

    Args:
        path: the file.

    Returns:
        For each tensor its dtype, shape and place in the file.

    Raises:
        CheckpointError: not a torch zip checkpoint, damaged, compressed, big-endian, a pickle that
            asks for anything but tensors, or a tensor that is not stored row by row.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            archive = _archive(file, where)
            tensors = _state_dict(_unpickled(archive), where)
            return {name: _entry(name, tensor, archive) for name, tensor in tensors.items()}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=where) from error


def _archive(file: BinaryIO, where: str) -> _Archive:
    _check_kind(file.read(len(LFS_POINTER)), where)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            prefix = _prefix(members, where)
            if f"{prefix}/byteorder" in members and archive.read(f"{prefix}/byteorder") != b"little":
                raise CheckpointError("was written by a big-endian machine", where=where, fix=RESAVE)
            description = archive.read(f"{prefix}/data.pkl")
    except CORRUPT_ZIP as error:
        raise CheckpointError(f"its zip archive is damaged: {error}", where=where, fix=AGAIN) from error
    return _Archive(file, file.seek(0, 2), prefix, members, description, where)


def _check_kind(start: bytes, where: str) -> None:
    """Refuse by name what is not a zip archive."""
    if start.startswith(ZIP_MAGIC):
        return
    if start.startswith(LFS_POINTER):
        cause, fix = "is a Git LFS pointer, not the weights themselves", "Run `git lfs pull` in that folder"
    elif start.startswith(PICKLE_MAGIC):
        cause, fix = "is in torch's legacy format (before version 1.6), which cannot be read lazily", RESAVE
    else:
        cause, fix = "is not a torch checkpoint", "Check that the file is what its name says"
    raise CheckpointError(cause, where=where, fix=fix)


def _prefix(members: Mapping[str, zipfile.ZipInfo], where: str) -> str:
    """The folder inside the archive that holds the checkpoint."""
    if any(name.endswith("/constants.pkl") for name in members):
        raise CheckpointError("is a TorchScript program, not a state dict", where=where, fix=RESAVE)
    for name, info in members.items():
        folder, _, base = name.rpartition("/")
        if base == "data.pkl" and "/" not in folder:
            _check_member(info, where)
            if info.file_size > HEADER_LIMIT:
                raise CheckpointError(f"its pickle has {info.file_size} bytes", where=where, fix=RESAVE)
            return folder
    raise CheckpointError("is a zip archive without data.pkl, not a torch checkpoint", where=where, fix=RESAVE)


def _check_member(info: zipfile.ZipInfo, where: str) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
        raise CheckpointError(f"its member {info.filename} is compressed or encrypted", where=where, fix=RESAVE)


def _unpickled(archive: _Archive) -> Any:
    try:
        return _Unpickler(archive.description, archive.where).load()
    except CORRUPT_PICKLE as error:
        raise CheckpointError(f"its pickle is damaged: {error}", where=archive.where, fix=AGAIN) from error


def _state_dict(content: Any, where: str) -> dict[str, _Tensor]:
    """The tensors of the state dict; other values in it are no weights, unless they hide tensors."""
    state = _unwrapped(content, where)
    tensors: dict[str, _Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not is_text(name):
            raise CheckpointError(f"the state dict has the key {reprlib.repr(name)}", where=where, fix=RESAVE)
        if isinstance(value, _Tensor):
            tensors[name] = value
        elif _holds_tensors(value):
            cause = f"{name!r} holds tensors of its own beside the tensors of the state dict"
            raise CheckpointError(cause, where=where, fix=RESAVE)
    return tensors


def _unwrapped(content: Any, where: str) -> dict[Any, Any]:
    """The mapping that has tensors as its values: `content` or what lies under one of `WRAPPERS`."""
    if _is_state_dict(content):
        return content
    if not isinstance(content, dict):
        raise CheckpointError("does not hold a state dict", where=where, fix=RESAVE)
    found = [key for key in WRAPPERS if _is_state_dict(content.get(key))]
    if len(found) == 1:
        return content[found[0]]
    keys = reprlib.repr(list(content))
    cause = f"holds several state dicts: {', '.join(found)}" if found else f"holds no state dict, but the keys {keys}"
    raise CheckpointError(cause, where=where, fix=RESAVE)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, _Tensor) for item in value.values())


def _holds_tensors(value: Any) -> bool:
    """Whether a tensor lies anywhere in nested containers, which may contain themselves."""
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if isinstance(item, _Tensor):
            return True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)
    return False


def _entry(name: str, tensor: _Tensor, archive: _Archive) -> PickleEntry:
    place = f"{archive.where}: tensor {name!r}"
    storage = tensor.storage
    if not isinstance(storage, _Storage) or not _are_sizes(tensor.shape) or not _are_sizes((tensor.start,)):
        raise CheckpointError("its description is damaged", where=place, fix=AGAIN)
    if tensor.lazy or not _is_row_major(tensor.shape, tensor.strides):
        raise CheckpointError("is not stored row by row (it is a view of another tensor)", where=place, fix=RESAVE)
    dtype = tensor.dtype.name if isinstance(tensor.dtype, _DType) else storage.dtype
    if dtype is None:
        raise CheckpointError("has no dtype", where=place, fix=AGAIN)
    item = ITEM_BYTES[dtype]
    end = (tensor.start + math.prod(tensor.shape)) * item
    offset = _storage_offset(storage, end, archive, place)
    return PickleEntry(name, dtype, tensor.shape, offset + tensor.start * item)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _is_row_major(shape: tuple[int, ...], strides: Any) -> bool:
    """Whether elements lie one after the other; the stride of a dimension of size 1 means nothing."""
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        return False
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def _storage_offset(storage: _Storage, end: int, archive: _Archive, place: str) -> int:
    """Where the first byte of a storage lies in the file; the tensor needs its first `end` bytes."""
    info = archive.members.get(f"{archive.prefix}/data/{storage.key}")
    if info is None:
        raise CheckpointError(f"its storage {storage.key!r} is missing", where=place, fix=AGAIN)
    _check_member(info, place)
    held = min(info.file_size, storage.length * (ITEM_BYTES[storage.dtype] if storage.dtype else 1))
    archive.file.seek(info.header_offset)
    local = archive.file.read(LOCAL_HEADER_BYTES)
    # The local header repeats name and extra field, and pads the latter so that data are aligned.
    names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = info.header_offset + LOCAL_HEADER_BYTES + names
    if end > held or not local.startswith(ZIP_MAGIC) or offset + end > archive.size:
        raise CheckpointError(f"lies beyond the end of its storage {storage.key!r}", where=place, fix=AGAIN)
    return offset
