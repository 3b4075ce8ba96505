"""Merging tensors and state dicts in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from weldment.checkpoint.dtypes import FLOATS, safetensors_dtype, torch_dtype
from weldment.engine.blocks import BLOCK
from weldment.engine.outputs import MemoryOutput
from weldment.engine.run import Machine, default_threads, run_works
from weldment.engine.sources import MemorySource
from weldment.engine.work import Work
from weldment.errors import UserError
from weldment.methods import METHODS, Method
from weldment.methods.arguments import settle
from weldment.methods.block import CHUNK
from weldment.methods.masks import tensor_key
from weldment.planning.roles import holds_tokens

StateDict = Mapping[str, Tensor]
_FLOATS = tuple(map(torch_dtype, FLOATS))


@overload
def merge_tensors(
    method: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    accumulate: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    block: int = BLOCK,
    **parameters: Any,
) -> Tensor: ...


@overload
def merge_tensors(
    method: str,
    models: Sequence[StateDict],
    base: StateDict | None = None,
    *,
    dtype: torch.dtype | None = None,
    accumulate: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    block: int = BLOCK,
    **parameters: Any,
) -> dict[str, Tensor]: ...


def merge_tensors(
    method: str,
    models: Sequence[Any],
    base: Any = None,
    *,
    dtype: torch.dtype | None = None,
    accumulate: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    block: int = BLOCK,
    **parameters: Any,
) -> Any:
    """Merge tensors, or state dicts name by name, in memory; the inputs are not changed.

    Args:
        method: a name in `METHODS` (`weld methods` lists them).
        models: tensors of one shape, or state dicts with the same names and shapes.
        base: the base tensor or state dict, for methods that use one. For methods whose base is
            one of the models (slerp, nearswap, arcee_fusion) it may be given here or first in `models`.
        dtype: of the result; by default that of the base, or of the first model.
        accumulate: "float32" or "float64" arithmetic.
        seed: for random methods.
        threads: worker threads; all processors by default.
        block: elements that are worked on at a time, a multiple of 65536; the result does not depend on it.
        parameters: the method's parameters (`lambda` as `lambda_`); a per-model parameter takes one
            value or a sequence with one per model.

    Returns:
        a tensor, or a dict of tensors. Tensors that are not floating point must agree and are copied.

    Raises:
        UserError: unknown method or parameter, or models that do not fit together.
    """
    row = METHODS.get(method)
    if row is None:
        raise UserError(f"unknown method {method!r}", fix=f"The methods are {', '.join(METHODS)}")
    machine = _machine(threads, accumulate, block, dtype)
    single = not isinstance(base, Mapping) and all(isinstance(model, Tensor) for model in models)
    dicts, base_dict = _as_dicts(row, models, base, single=single)
    _check(row, dicts, base_dict)
    try:
        arguments = settle(row, parameters, len(dicts))
    except ValueError as error:
        raise UserError(str(error)) from error
    merged: dict[str, Tensor] = {}
    works: list[Work] = []
    for name, first in (base_dict if base_dict is not None else dicts[0]).items():
        group = [model[name] for model in dicts]
        if not first.is_floating_point():
            merged[name] = _agreed(name, group)
            continue
        merged[name] = out = torch.empty(first.shape, dtype=dtype or first.dtype)
        origin = None if base_dict is None else base_dict[name]
        keys = [tensor_key(seed, str(number), name) for number in range(len(group))]
        own = _arranged(row, arguments, name, out)
        works.append(replace(_work(name, row, group, origin, out), parameters=own, keys=keys, block=block))
    run_works(works, machine, finished=lambda work, outcome: None)
    return merged["tensor"] if single else merged


def _arranged(row: Method, arguments: Mapping[str, Any], name: str, out: Tensor) -> dict[str, Any]:
    shape = tuple(out.shape)
    try:
        return row.arranged(arguments, name, shape, is_embedding=holds_tokens(name, shape))
    except ValueError as error:
        raise UserError(str(error), where=name) from error


def _work(name: str, row: Method, group: Sequence[Tensor], base: Tensor | None, out: Tensor) -> Work:
    return Work(
        name=name,
        shape=tuple(out.shape),
        method=row,
        parameters={},
        sources=[_source(tensor) for tensor in group],
        base=None if base is None else _source(base),
        dtype=safetensors_dtype(out.dtype),
        output=MemoryOutput(out),
    )


def _machine(threads: int | None, accumulate: str, block: int, dtype: torch.dtype | None) -> Machine:
    if accumulate not in ("float32", "float64"):
        raise UserError(f"accumulate must be float32 or float64, not {accumulate!r}")
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, not {threads}")
    if block < CHUNK or block % CHUNK:
        raise UserError(f"block must be a multiple of {CHUNK}, not {block}")
    if dtype is not None and dtype not in _FLOATS:
        raise UserError(f"dtype must be one of {', '.join(map(str, _FLOATS))}, not {dtype!r}")
    return Machine("cpu", threads or default_threads(), accumulate)


def _as_dicts(
    row: Method, models: Sequence[Any], base: Any, *, single: bool
) -> tuple[list[StateDict], StateDict | None]:
    """State dicts of the models and of the base that takes part, if any."""
    if isinstance(models, (Tensor, Mapping)):
        raise UserError("models must be a sequence of tensors or of state dicts, not a single one")
    given = [*models, *([base] if base is not None else [])]
    if not single and not all(isinstance(model, Mapping) for model in given):
        raise UserError("models and base must be all tensors or all state dicts")
    dicts: list[StateDict] = [{"tensor": model} if single else model for model in given]
    *merged, last = dicts if base is not None else [*dicts, None]
    if last is not None and row.base_is_model:
        return [last, *(model for model in merged if model is not None)], None
    found = [model for model in merged if model is not None]
    return found, None if row.base == "unused" else last


def _check(row: Method, models: Sequence[StateDict], base: StateDict | None) -> None:
    low, high = row.models
    if not low <= len(models) <= (high or len(models)):
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        raise UserError(f"{row.name} merges {wanted} models, not {len(models)}")
    if row.base == "required" and not row.base_is_model and base is None:
        raise UserError(f"{row.name} needs a base", fix="Pass base=...")
    first = models[0]
    others: list[StateDict] = [*models[1:], *([base] if base is not None else [])]
    for number, other in enumerate(others, 1):
        if other.keys() != first.keys():
            name = sorted(other.keys() ^ first.keys())[0]
            raise UserError(f"model {number} and model 0 do not have the same tensors; {name!r} is only in one of them")
        for name, tensor in other.items():
            if tensor.shape != first[name].shape:
                raise UserError(f"shapes differ: {list(tensor.shape)} and {list(first[name].shape)}", where=name)
            if tensor.is_floating_point() != first[name].is_floating_point():
                raise UserError("floating point in some models and integer in others", where=name)
    for name, tensor in first.items():
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise UserError(f"tensors of {tensor.dtype} cannot be merged", where=name, fix="Convert them first")


def _source(tensor: Tensor) -> MemorySource:
    return MemorySource(tensor.detach().reshape(-1))


def _agreed(name: str, group: Sequence[Tensor]) -> Tensor:
    if any(not torch.equal(group[0], other) for other in group[1:]):
        raise UserError("a tensor that is not floating point differs between the models", where=name)
    return group[0].clone()
