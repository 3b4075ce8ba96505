"""Routers from features: class means and their common covariance, a small network, temperature and threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weldment.twin.router import distances

State = dict[str, Tensor]

_SHRINKAGE = 0.05
"""The share of the identity, at the mean variance, in the covariance: with few examples it has no inverse."""

_DIRECTIONS = 2048
"""Distances are measured in no more dimensions: what decides is the square of that many numbers."""

_RATE, _DECAY, _BATCH = 1e-3, 1e-2, 128


@dataclass(frozen=True)
class Sample:
    """Features (n, hidden) of examples, and the experts that they belong to (n,)."""

    features: Tensor
    experts: Tensor


def class_means(sample: Sample, count: int) -> State:
    """`whitening` W and `centres` c_t = W mu_t, with W' W the inverse of the features' covariance around their means.

    More than `_DIRECTIONS` features are first projected to as many principal directions.
    """
    x = sample.features.double()
    directions = _principal(x)
    x = x if directions is None else x @ directions
    means = torch.stack([x[sample.experts == expert].mean(dim=0) for expert in range(count)])
    rest = x - means[sample.experts]
    covariance = rest.T @ rest / max(1, len(x) - count)
    level = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    lower = torch.linalg.cholesky((1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * level * identity)
    whitening = torch.linalg.solve_triangular(lower, identity, upper=False)
    centres = means @ whitening.T
    whitening = whitening if directions is None else whitening @ directions.T
    return {"whitening": whitening.float().contiguous(), "centres": centres.float()}


def _principal(x: Tensor) -> Tensor | None:
    """(hidden, k), orthonormal: the directions in which features (n, hidden) differ most; None if all are kept."""
    if x.shape[1] <= _DIRECTIONS:
        return None
    centred = x - x.mean(dim=0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -_DIRECTIONS:]


def train_mlp(train: Sample, validation: Sample, count: int, *, width: int, epochs: int, seed: int) -> State:
    """A network of two layers on standardised features, by AdamW on the cross-entropy of balanced examples.

    The order of the examples is drawn anew for every epoch. What is kept is the state with the least loss on
    validation; after five epochs without a better one, training ends.
    """
    chance = torch.Generator().manual_seed(seed)
    mean, scale = train.features.mean(dim=0), train.features.std(dim=0).clamp(min=1e-6)
    inputs, held = (train.features - mean) / scale, (validation.features - mean) / scale
    layers = _initial(inputs.shape[1], width, count, chance)
    balance = _balance(train.experts, count)
    optimizer = torch.optim.AdamW(layers.values(), lr=_RATE, weight_decay=_DECAY)
    best, best_loss, waited = _copied(layers), float("inf"), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=chance).split(_BATCH):
            loss = functional.cross_entropy(_logits(layers, inputs[rows]), train.experts[rows], balance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(functional.cross_entropy(_logits(layers, held), validation.experts))
        best, best_loss, waited = (_copied(layers), loss, 0) if loss < best_loss else (best, best_loss, waited + 1)
        if waited == 5:
            break
    return {**best, "mean": mean, "scale": scale}


def _initial(inputs: int, width: int, outputs: int, chance: torch.Generator) -> State:
    sizes = {"first": (width, inputs), "second": (outputs, width)}
    state = {name: torch.randn(size, generator=chance) / size[1] ** 0.5 for name, size in sizes.items()}
    state |= {f"{name}_bias": torch.zeros(size[0]) for name, size in sizes.items()}
    return {name: tensor.requires_grad_() for name, tensor in state.items()}


def _logits(layers: Mapping[str, Tensor], x: Tensor) -> Tensor:
    inner = functional.gelu(functional.linear(x, layers["first"], layers["first_bias"]))
    return functional.linear(inner, layers["second"], layers["second_bias"])


def _balance(experts: Tensor, count: int) -> Tensor:
    """Weights of the experts, by which those with few examples count as much as others."""
    return len(experts) / (count * experts.bincount(minlength=count).clamp(min=1))


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def best_temperature(scores: Tensor, experts: Tensor) -> float:
    """The T of softmax(s / T) with the least negative log-likelihood, between 0.05 and 20 times the scores' spread."""
    spread = float(scores.std().clamp(min=1e-6))
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    wide = scores.double() / spread
    optimizer = torch.optim.LBFGS([logarithm], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(wide / logarithm.exp(), experts)
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return spread * min(20.0, max(0.05, float(logarithm.detach().exp())))


def threshold_of(features: Tensor, state: Mapping[str, Tensor], share: float) -> float:
    """The squared distance per dimension to the nearest centre that a share of the features exceeds."""
    nearest = distances(features, state["whitening"], state["centres"]).amin(dim=1) / state["whitening"].shape[0]
    return float(nearest.double().quantile(1.0 - share))
