"""Names of tensor dtypes: as safetensors writes them, as recipes spell them, as torch holds them."""

from __future__ import annotations

import torch

FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
OTHERS: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TORCH: dict[str, torch.dtype] = {**FLOATS, **OTHERS}
SAFETENSORS: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}

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

CONFIG: dict[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_float(dtype: str) -> bool:
    """Whether tensors of this safetensors dtype can be merged."""
    return dtype in FLOATS
