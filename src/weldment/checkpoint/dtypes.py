"""Names of tensor dtypes: as safetensors writes them, as recipes spell them, as torch holds them."""

from __future__ import annotations

import torch

# Torch's names, not its dtypes: a plan is made without torch, which takes longer to load than the plan takes.
FLOATS: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TORCH: dict[str, str] = {
    **FLOATS,
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_SAFETENSORS: dict[str, str] = {name: dtype for dtype, name in TORCH.items()}

ITEM_BYTES: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

RECIPE: dict[str, str] = {
    "float64": "F64", "fp64": "F64",
    "float32": "F32", "fp32": "F32", "float": "F32",
    "float16": "F16", "fp16": "F16", "half": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


def is_float(dtype: str) -> bool:
    """Whether tensors of this safetensors dtype can be merged."""
    return dtype in FLOATS


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype, one of `TORCH`."""
    return getattr(torch, TORCH[dtype])


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors dtype of a torch dtype, one of those that `TORCH` names."""
    return _SAFETENSORS[str(dtype).removeprefix("torch.")]
