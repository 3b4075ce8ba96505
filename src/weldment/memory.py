"""Merging tensors and state dicts in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from weldment.checkpoint.dtypes import SAFETENSORS
from weldment.engine.blocks import BLOCK
from weldment.engine.run import Machine, default_threads, run_works
from weldment.engine.sources import MemorySource
from weldment.engine.work import Work
from weldment.errors import UserError
from weldment.methods import METHODS, Method
from weldment.methods.arguments import settle
from weldment.methods.masks import tensor_key

StateDict = Mapping[str, Tensor]


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
    single = isinstance(models[0], Tensor) if models else False
    dicts = [{"tensor": model} for model in models] if single else [dict(model) for model in models]
    base_dict = {"tensor": base} if single and base is not None else base
    if row.base_is_model and base_dict is not None:
        dicts, base_dict = [dict(base_dict), *dicts], None
    if row.base == "unused" or row.base_is_model:
        base_dict = None
    _check(row, dicts, base_dict)
    try:
        arguments = settle(row, parameters, len(dicts))
    except ValueError as error:
        raise UserError(str(error)) from error
    merged = _run(
        row, dicts, base_dict, arguments, dtype, seed, block, Machine("cpu", threads or default_threads(), accumulate)
    )
    return merged["tensor"] if single else merged


def _check(row: Method, models: Sequence[StateDict], base: StateDict | None) -> None:
    low, high = row.models
    if not low <= len(models) <= (high or len(models)):
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        raise UserError(f"{row.name} merges {wanted} models, not {len(models)}")
    if row.base == "required" and not row.base_is_model and base is None:
        raise UserError(f"{row.name} needs a base", fix="Pass base=...")
    first = models[0]
    for number, other in enumerate([*models[1:], *([base] if base is not None else [])], 1):
        if other.keys() != first.keys():
            name = sorted(other.keys() ^ first.keys())[0]
            raise UserError(f"model {number} and model 0 do not have the same tensors; {name!r} is only in one of them")
        for name, tensor in other.items():
            if tensor.shape != first[name].shape:
                raise UserError(f"shapes differ: {list(tensor.shape)} and {list(first[name].shape)}", where=name)


def _run(
    row: Method,
    models: Sequence[StateDict],
    base: StateDict | None,
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None,
    seed: int,
    block: int,
    machine: Machine,
) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    works: list[Work] = []
    for name, tensor in (base if base is not None else models[0]).items():
        group = [model[name] for model in models]
        if not tensor.is_floating_point():
            merged[name] = _agreed(name, group)
            continue
        out = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        merged[name] = out
        works.append(
            Work(
                name=name,
                shape=tuple(tensor.shape),
                method=row,
                parameters=arguments,
                sources=[MemorySource(item.detach().reshape(-1)) for item in group],
                base=None if base is None else MemorySource(base[name].detach().reshape(-1)),
                dtype=SAFETENSORS[out.dtype],
                write=_writer(out),
                keys=[tensor_key(seed, str(number), name) for number in range(len(group))],
                block=block,
            )
        )
    run_works(works, machine, finished=lambda work, outcome: None)
    return merged


def _agreed(name: str, group: Sequence[Tensor]) -> Tensor:
    if any(not torch.equal(group[0], other) for other in group[1:]):
        raise UserError("a tensor that is not floating point differs between the models", where=name)
    return group[0].clone()


def _writer(out: Tensor) -> Any:
    flat = out.view(-1)

    def write(start: int, block: Tensor) -> None:
        flat[start : start + block.numel()] = block

    return write
