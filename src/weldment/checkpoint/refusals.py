"""Models that cannot be merged as they are, each refused by its name and with a way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from weldment.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
UNQUANTISED = "Use the unquantised model, or dequantise this one and save it in bfloat16"


METHOD_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
}
SUFFIX_NAMES = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
}
QUANT_STATE = ".quant_state."
FOREIGN_NAMES = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".ot": "Rust"}


def refuse_quantised_config(config: Mapping[str, Any], where: str) -> None:
    """CheckpointError if the configuration, or a part of it, says that the weights are quantised."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings:
            fix = f"{UNQUANTISED}; if that was done, delete quantization_config from config.json"
            raise CheckpointError(f"the model is quantised with {_method(settings)}", where=where, fix=fix)


def _method(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "an unknown method"
    method = settings.get("quant_method")
    if isinstance(method, str):
        return METHOD_NAMES.get(method.lower(), method)
    loaded = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return "bitsandbytes" if loaded else "an unknown method"


def refuse_quantised_tensors(dtypes: Mapping[str, str], where: str) -> None:
    """CheckpointError if names or dtypes of the tensors (name -> dtype) are those of quantised weights."""
    found = {method: name for name, dtype in dtypes.items() if (method := _quantised_by(name, dtype))}
    for method, name in found.items():
        cause = f"the model is quantised with {method} (tensor {name!r})"
        raise CheckpointError(cause, where=where, fix=UNQUANTISED)


def _quantised_by(name: str, dtype: str) -> str | None:
    if dtype.startswith("F8_"):
        return "FP8"
    if QUANT_STATE in name:
        return "bitsandbytes"
    return SUFFIX_NAMES.get(f".{name.rpartition('.')[2]}")


def refuse_adapter(config: Any, where: str) -> NoReturn:
    """CheckpointError for an adapter alone, where a model is needed.

    Args:
        config: the content of its `adapter_config.json`.
        where: the adapter, as the user would write it.
    """
    kind = config.get("peft_type") if isinstance(config, dict) else None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    named = base if isinstance(base, str) and base else None
    cause = f"is a {kind or 'PEFT'} adapter of {named or 'a base model that it does not name'}, not a whole model"
    spelling = f"{named or '<base>'}+{where}"
    fix = f"Name it together with its base: {spelling!r}"
    raise CheckpointError(cause, where=where, fix=fix if named else f"{fix}, with the base's path or Hub name")


def refuse_gguf(where: str) -> NoReturn:
    """CheckpointError for a GGUF file."""
    fix = "Merge the safetensors checkpoints it was made from, then convert the result to GGUF"
    raise CheckpointError("is a GGUF file, a format for inference whose weights cannot be merged", where=where, fix=fix)


def missing_weights(names: Collection[str], nested: Collection[str], where: str) -> CheckpointError:
    """The error for a model without weights that can be read.

    Args:
        names: the files in its root.
        nested: weight files one folder further down, if the user could mean one of them.
        where: the folder or repo.
    """
    if nested:
        folder = min(nested).rpartition("/")[0]
        return CheckpointError("has no weights", where=where, fix=f"Name its sub-folder {folder}, which has some")
    if not names:
        return CheckpointError("is empty", where=where, fix="Name a folder that holds a model")
    suffixes = {name[name.rfind(".") :] for name in names}
    foreign = sorted(FOREIGN_NAMES[suffix] for suffix in suffixes & FOREIGN_NAMES.keys())
    if foreign:
        cause = f"has weights only in a format that cannot be merged: {', '.join(foreign)}"
        return CheckpointError(cause, where=where, fix="Use the safetensors or PyTorch files of this model")
    cause = "has no weights: no .safetensors, .bin, .pt or .pth file of a model"
    return CheckpointError(cause, where=where, fix="Name the folder that holds model.safetensors")
