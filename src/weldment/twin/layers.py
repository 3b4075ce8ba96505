"""What experts add to the output of single modules, for every row its own mix: low-rank products, changes, vectors.

A layer is a forward hook of the module whose output it changes, so that the shared model keeps its modules, their
names and its tensors. Its own tensors are buffers in a child of the module, which follow `.to(...)` and are not saved.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weldment.errors import CheckpointError
from weldment.twin.mixing import Blend, Mix

CHILD = "exclusive"
"""The name of a layer among the children of its module."""

Pair = tuple[Tensor, Tensor]


class Exclusive(nn.Module):
    """What all experts add to one module.

    Args:
        name: of the module, for messages.
        mix: the weights of the model's rows.
        experts: how many there are.
    """

    def __init__(self, name: str, mix: Mix, experts: int) -> None:
        super().__init__()
        self.name, self.mix, self.experts = name, mix, experts
        self.calls = 0

    def attach(self, module: nn.Module) -> None:
        """Become a part of the module, at its place and in its dtype."""
        like = next(module.parameters())
        self.to(device=like.device, dtype=like.dtype)
        module.add_module(CHILD, self)
        module.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The output with what the experts add; called by torch after the module."""
        blend = self.mix.current()
        if self.mix.watch is not None:
            self.mix.watch(self.name, args[0])
        if blend is None:
            return None
        if not torch.compiler.is_compiling():
            self.calls += 1
        return self.added(module, args[0], output, blend)

    @abstractmethod
    def added(self, module: nn.Module, x: Tensor, y: Tensor, blend: Blend) -> Tensor:
        """The module's output y for the input x, with what the experts add."""

    def by_row(self, x: Tensor, blend: Blend) -> bool:
        """Whether the first axis of a module's input has a place for each row; not if it is the same for all rows.

        Raises:
            CheckpointError: it cannot be said which part of the input belongs to which row.
        """
        if x.shape[0] == blend.rows or (x.shape[0] == blend.rows * blend.length and x.ndim <= 2):
            return True
        if x.shape[0] == 1:
            return False
        cause = f"its input {list(x.shape)} cannot be divided among the {blend.rows} rows of the batch"
        fix = "Build the bundle with this module under `exclude`"
        raise CheckpointError(cause, where=self.name, fix=fix)


class ExclusiveMatrix(Exclusive):
    """y_b += sum_t w_bt (B_t A_t + D_t) x_b + sum_t w_bt c_t, of a linear layer or an embedding.

    The factors of all experts lie in two matrices, one expert after the other; ranks may differ, and an expert may
    have none. Rows with many weights are calculated in one product for all experts: ((x A^T) * w) B^T. Where most
    weights are zero, the rows that use an expert are gathered, and nothing else is calculated for it.

    Args:
        factors: (A, B) by expert: (r, inputs) and (outputs, r), the scale applied.
        dense: D by expert, as the module's weight is stored.
        vectors: c by expert, (outputs,).
        inputs, outputs: sizes of the module; of an embedding: rows and columns.
        embedding: the inputs are places, x stands for columns of the identity.
        transposed: D is stored as (inputs, outputs).
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    dense: Tensor
    vectors: Tensor

    def __init__(
        self,
        name: str,
        mix: Mix,
        experts: int,
        *,
        sizes: tuple[int, int],
        factors: Mapping[int, Pair] | None = None,
        dense: Mapping[int, Tensor] | None = None,
        vectors: Mapping[int, Tensor] | None = None,
        embedding: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(name, mix, experts)
        inputs, self.outputs = sizes
        self.embedding = embedding
        self.keep_factors(factors or {}, inputs)
        self._keep_dense(dense or {}, turned=transposed != embedding)
        self.register_buffer("vectors", stacked(vectors or {}, experts), persistent=False)

    def keep_factors(self, factors: Mapping[int, Pair], inputs: int) -> None:
        """Have these factors, and no others."""
        order = sorted(factors)
        a = torch.cat([factors[e][0] for e in order]) if order else torch.empty(0, inputs)
        b = torch.cat([factors[e][1].T for e in order]) if order else torch.empty(0, self.outputs)
        owners = [e for e in order for _ in range(factors[e][0].shape[0])]
        self.spans = {e: (owners.index(e), owners.index(e) + owners.count(e)) for e in order if e in owners}
        self.register_buffer("a", (a.T if self.embedding else a).contiguous(), persistent=False)
        self.register_buffer("b", b.contiguous(), persistent=False)
        self.register_buffer("owners", torch.tensor(owners, dtype=torch.long), persistent=False)

    def _keep_dense(self, dense: Mapping[int, Tensor], *, turned: bool) -> None:
        """One matrix for each expert that has one: (outputs, inputs), or (inputs, outputs) of an embedding."""
        self.places = {expert: place for place, expert in enumerate(sorted(dense))}
        matrices = [dense[e].T if turned and not self.embedding else dense[e] for e in sorted(dense)]
        found = torch.stack(matrices) if matrices else torch.empty(0)
        self.register_buffer("dense", found, persistent=False)

    def added(self, module: nn.Module, x: Tensor, y: Tensor, blend: Blend) -> Tensor:
        if not self.by_row(x, blend):
            x, y = x.expand(blend.rows, *x.shape[1:]), y.expand(blend.rows, *y.shape[1:]).clone()
        shape = y.shape
        x = x.reshape(blend.rows, -1) if self.embedding else x.reshape(blend.rows, -1, x.shape[-1])
        y = y.reshape(blend.rows, -1, self.outputs)
        y = self._all(x, y, blend.weights.to(y.dtype)) if blend.groups is None else self._some(x, y, blend)
        return y.view(shape)

    def _all(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Every expert for every row."""
        if self.spans:
            z = self._narrow(x, 0, self.a.shape[1] if self.embedding else self.a.shape[0])
            y = y + (z * weights[:, None, self.owners]) @ self.b
        for expert in self.places:
            y = y + self._by_dense(x, expert) * weights[:, expert, None, None]
        return y + (weights @ self.vectors)[:, None] if self.vectors.numel() else y

    def _some(self, x: Tensor, y: Tensor, blend: Blend) -> Tensor:
        """For every expert the rows that use it."""
        assert blend.groups is not None
        for group in blend.groups:
            if group.expert in self.spans or group.expert in self.places:
                part = self._of(x if group.rows is None else x.index_select(0, group.rows), group.expert, group.weights)
                y = y.add_(part) if group.rows is None else y.index_add_(0, group.rows, part)
        if self.vectors.numel():
            y = y.add_((blend.weights.to(y.dtype) @ self.vectors)[:, None])
        return y

    def _of(self, x: Tensor, expert: int, weights: Tensor | None) -> Tensor:
        """What one expert adds for these rows: (n, tokens, outputs)."""
        part = None
        if expert in self.spans:
            start, end = self.spans[expert]
            z = self._narrow(x, start, end)
            part = (z if weights is None else z * weights.to(z.dtype)) @ self.b[start:end]
        if expert in self.places:
            whole = self._by_dense(x, expert)
            whole = whole if weights is None else whole * weights.to(whole.dtype)
            part = whole if part is None else part + whole
        assert part is not None
        return part

    def _narrow(self, x: Tensor, start: int, end: int) -> Tensor:
        """x A^T, for some rows of A."""
        if self.embedding:
            return functional.embedding(x, self.a[:, start:end])
        return functional.linear(x, self.a[start:end])

    def _by_dense(self, x: Tensor, expert: int) -> Tensor:
        matrix = self.dense[self.places[expert]]
        return functional.embedding(x, matrix) if self.embedding else functional.linear(x, matrix)


class ExclusiveVectors(Exclusive):
    """Every row with vectors of its own, of a module whose parameters are all one-dimensional, as norms are.

    y_b = f(x_b; theta + sum_t w_bt delta_t). The module's own code is run with vectors that have an axis for the rows,
    except for torch's norms, which do not take such: these are calculated without vectors, and then scaled and shifted.

    Args:
        module: calculates f; a copy of it is kept.
        vectors: by parameter, then by expert: delta_t.
    """

    def __init__(
        self, name: str, mix: Mix, experts: int, *, module: nn.Module, vectors: Mapping[str, Mapping[int, Tensor]]
    ) -> None:
        super().__init__(name, mix, experts)
        self._plain = (copy.deepcopy(module),)  # in a tuple, it is no part of the model and of what is saved
        self.changed = tuple(sorted(vectors))
        for key in self.changed:
            self.register_buffer(f"change_{key}", stacked(vectors[key], experts), persistent=False)
        self.proved = False

    def added(self, module: nn.Module, x: Tensor, y: Tensor, blend: Blend) -> Tensor:
        if not self.by_row(x, blend):
            x = x.expand(blend.rows, *x.shape[1:])
        weights = blend.weights
        if x.shape[0] != blend.rows:
            weights = weights.repeat_interleave(blend.length, 0)
        rows = {
            key: module.get_parameter(key) + weights.to(x.dtype) @ self.get_buffer(f"change_{key}")
            for key in self.changed
        }
        found = self._calculated(module, x, rows)
        if not self.proved:
            self._prove(module, x, rows, found)
        return found

    def _calculated(self, module: nn.Module, x: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        middle = (1,) * (x.ndim - 2)
        wide = {key: value.view(value.shape[0], *middle, value.shape[1]) for key, value in rows.items()}
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return _scaled(module, x, wide)
        return torch.func.functional_call(
            self._plain[0], {**dict(module.named_parameters(recurse=False)), **wide}, (x,)
        )

    def _prove(self, module: nn.Module, x: Tensor, rows: Mapping[str, Tensor], found: Tensor) -> None:
        """Compare with the module's own answer for each row with vectors of the usual shape, once.

        Raises:
            CheckpointError: the module's code does not do for rows what it does for one.
        """
        own = dict(module.named_parameters(recurse=False))
        for row in range(x.shape[0]):
            one = {**own, **{key: value[row] for key, value in rows.items()}}
            expected = torch.func.functional_call(self._plain[0], one, (x[row : row + 1],))
            rounding = max(1e-4, 4.0 * torch.finfo(x.dtype).eps * float(expected.abs().max()))
            if not torch.allclose(found[row : row + 1].float(), expected.float(), rtol=1e-2, atol=rounding):
                cause = f"a {type(module).__name__} cannot have vectors of its own for each row"
                raise CheckpointError(cause, where=self.name, fix="Build the bundle with this module under `exclude`")
        self.proved = True


def _scaled(module: nn.LayerNorm | nn.RMSNorm, x: Tensor, wide: Mapping[str, Tensor]) -> Tensor:
    """One of torch's norms with a scale and a shift for each row."""
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        found = functional.layer_norm(x, shape, None, None, module.eps)
    else:
        found = functional.rms_norm(x, shape, None, module.eps)
    scale = wide.get("weight", module.weight)
    shift = wide.get("bias", getattr(module, "bias", None))
    found = found if scale is None else found * scale
    return found if shift is None else found + shift


def stacked(vectors: Mapping[int, Tensor], experts: int) -> Tensor:
    """Vectors by expert as a matrix (experts, n), zeros for those that have none; empty without any."""
    if not vectors:
        return torch.empty(0)
    like = next(iter(vectors.values()))
    return torch.stack([vectors.get(expert, torch.zeros_like(like)) for expert in range(experts)])
