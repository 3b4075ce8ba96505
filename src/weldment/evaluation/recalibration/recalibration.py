"""Running statistics of batch normalisation, measured anew on unlabelled inputs.

The statistics of a merged network are not a mean of its experts': activations of merged weights vary
less. They are measured from the first layer to the last, each over all inputs while the layers before
it already normalise by what was measured for them, so that what a layer stores is exactly what it
meets when the network is used. The usual single pass, in which every batch is normalised by itself,
comes close for large shuffled batches of many positions only, and not at all for a folder sorted by
class; and passes that are repeated until nothing changes need not converge in deep networks.

Batches stay in memory at the layer they have reached, as many as `HELD` allows; the others begin
again for every layer. That, and the number of workers, does not change a bit of the result: forward
passes run on one thread each, because the last bits of a convolution depend on how many share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from weldment.engine.run import default_threads
from weldment.errors import NonFiniteError, TaskError
from weldment.evaluation.networks import whole_network
from weldment.evaluation.recalibration.unlabelled import Batch, inputs_in
from weldment.evaluation.recalibration.walks import Held, Rerun, Walk, route
from weldment.evaluation.states import Head, ModelState, tokenizer_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weldment.evaluation.states import Tensors, tokenizer_folder
    from weldment.planning.plan import Plan

HELD = 1 << 31
"""Bytes of activations that may stay in memory, about."""

_LIVE = 4
"""Activations that a network holds at a time, as multiples of those before its first normalisation."""

MEAN, VARIANCE, COUNT = "running_mean", "running_var", "num_batches_tracked"


@dataclass(frozen=True)
class Moments:
    """Of each channel of some activations: their number, mean (C,) and sum of squared deviations (C,), in float64."""

    count: int
    mean: Tensor
    squares: Tensor

    def joined(self, other: Moments) -> Moments:
        """The moments of both together."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + step**2 * (self.count * other.count / count))


def moments(activations: Tensor) -> Moments:
    """Of activations (n, C, ...), over all but the channels."""
    values = activations.detach().double()
    rest = [0, *range(2, values.ndim)]
    variance, mean = torch.var_mean(values, rest, correction=0)
    count = values.numel() // values.shape[1]
    return Moments(count, mean, variance * count)


def recalibrated(state: ModelState, folder: str | Path, *, threads: int | None = None) -> ModelState:
    """The model with running statistics measured on the inputs in a folder; all else stays as it is.

    Args:
        folder: of unlabelled inputs, see `unlabelled`.
        threads: workers; all processors by default.

    Raises:
        TaskError: the model has no batch normalisation, or cannot take the inputs.
        NonFiniteError: activations are NaN or infinite.
    """
    return replace(state, tensors={**state.tensors, **statistics(state, folder, threads)})


def merge_statistics(plan: Plan, tensors: Tensors, threads: int | None = None) -> dict[str, Tensor]:
    """The running statistics, by name, of what a plan made of a recipe with `recalibrate`; errors as there.

    Args:
        tensors: of the merged model, by name.
    """
    heads = {name: Head({}, expert.config) for name, expert in plan.heads.items()}
    state = ModelState("the merged model", tensors, plan.config, tokenizer_folder(plan), heads)
    assert plan.recipe.recalibrate is not None
    return statistics(state, plan.recipe.recalibrate, threads)


def statistics(state: ModelState, folder: str | Path, threads: int | None = None) -> dict[str, Tensor]:
    """Means, variances and counts of batches, by name; arguments and errors as for `recalibrated`."""
    network = whole_network(state).float().eval()
    layers = batch_norms(network, state)
    batches = inputs_in(folder, state, network)
    return measured(network, layers, batches, state, threads or default_threads())


def batch_norms(network: nn.Module, state: ModelState) -> dict[str, _BatchNorm]:
    """The layers whose statistics are measured, by what their tensors' names begin with in the model.

    Raises:
        TaskError: there are none, or the model lacks their tensors.
    """
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    found: dict[str, _BatchNorm] = {}
    for name, module in network.named_modules():
        # Frozen layers, of classes of their own, are not statistics but constants of the network.
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            spellings = (name, prefix + name, name.removeprefix(prefix))
            stored = next((n for n in spellings if f"{n}.{MEAN}" in state.tensors), None)
            if stored is None:
                raise TaskError(f"lacks the running statistics of the layer {name}", where=state.name)
            found[stored] = module
    if not found:
        cause = f"{type(network).__name__} has no batch normalisation with running statistics"
        raise TaskError(cause, where=state.name, fix="Leave out the recalibration")
    return found


def measured(
    network: nn.Module, layers: Mapping[str, _BatchNorm], batches: Sequence[Batch], state: ModelState, threads: int
) -> dict[str, Tensor]:
    """The tensors of the layers' statistics, by name, as they are stored; the network has them when this returns."""
    found: dict[str, Tensor] = {}
    with _workers(threads) as pool, walking(network, layers, batches, state.name) as walks:
        while (arrived := _next_layer(walks, pool, state.name)) is not None:
            name, whole = arrived
            if f"{name}.{MEAN}" in found:
                raise TaskError(f"the layer {name} is used twice, with one set of statistics", where=state.name)
            tensors = _statistics(name, whole, state)
            for key in (MEAN, VARIANCE):
                # A copy: the network may share its tensors with the model.
                setattr(layers[name], key, tensors[f"{name}.{key}"].to(torch.float32, copy=True))
            found |= tensors
    missed = next((name for name in layers if f"{name}.{MEAN}" not in found), None)
    if missed is not None:
        fix = "Give inputs for all parts of the network"
        raise TaskError(f"the inputs do not reach the layer {missed}", where=state.name, fix=fix)
    counts = [name for layer in layers if (name := f"{layer}.{COUNT}") in state.tensors]
    return found | {name: torch.full_like(state.tensors[name], len(batches)) for name in counts}


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "weld", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@contextmanager
def walking(
    network: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], name: str
) -> Iterator[Sequence[Walk]]:
    """Every batch at the network's entrance; of those that will fit into memory each stays where it is on its way."""
    with route(network, layers, name) as way:
        arrived = Rerun(way, batches[0]).advance()
        room = 0 if arrived is None else HELD // max(1, _LIVE * arrived[1].nbytes)
        walks: list[Walk] = [Held(way, batch) for batch in batches[:room]]
        walks += [Rerun(way, batch) for batch in batches[room:]]
        try:
            yield walks
        finally:
            for walk in walks:
                walk.close()


def _next_layer(walks: Sequence[Walk], pool: ThreadPoolExecutor, name: str) -> tuple[str, Moments] | None:
    """The next layer and the moments of what reaches it in all walks; None at the end."""
    arrived = list(pool.map(_advanced, walks))
    layers = {arrival and arrival[0] for arrival in arrived}
    if len(layers) > 1:
        raise TaskError("the inputs take different ways through the network", where=name, fix="Give inputs of one kind")
    layer = layers.pop()
    return None if layer is None else (layer, reduce(Moments.joined, [arrival[1] for arrival in arrived if arrival]))


def _advanced(walk: Walk) -> tuple[str, Moments] | None:
    arrival = walk.advance()
    return None if arrival is None else (arrival[0], moments(arrival[1]))


def _statistics(name: str, whole: Moments, state: ModelState) -> dict[str, Tensor]:
    """Mean and variance as they are stored: the latter without bias, as everywhere where networks are trained."""
    if whole.count < 2:
        cause = f"the inputs give the layer {name} a single value for each channel"
        raise TaskError(cause, where=state.name, fix="Give more inputs")
    values = {f"{name}.{MEAN}": whole.mean, f"{name}.{VARIANCE}": whole.squares / (whole.count - 1)}
    stored = {key: value.to(state.tensors[key].dtype) for key, value in values.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in stored.values()):
        fix = "Look for NaN in the inputs, or for weights that are too large"
        raise NonFiniteError(f"NaN or infinity in what reaches the layer {name}", where=state.name, fix=fix)
    return stored
