"""Which experts answer an input: routers of several kinds, their files, and the weights they give."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weldment.checkpoint.side_files import write_json
from weldment.errors import CheckpointError, UserError

CONFIG = "config.json"
WEIGHTS = "router.safetensors"
FORMAT = 1
KINDS = ("mlp", "centroid", "arrow", "fixed", "uniform")
BY_FEATURES = ("mlp", "centroid")
"""Kinds that look at means of the shared model's hidden states."""

_RETRAIN = "Build the bundle again with `weld twin build`"


@dataclass(frozen=True)
class RouterConfig:
    """What `router/config.json` says.

    Attributes:
        kind: one of `KINDS`.
        experts: their names, in the order of the weights.
        hidden_size: of the features of all layers together; None for kinds that see none.
        layers: whose hidden states they are means of.
        temperature: T of softmax(s / T); calibrated on validation if there were examples.
        top_k: as many experts answer at most; None for all.
        min_weight: smaller weights become 0.
        threshold: the squared Mahalanobis distance per dimension from which on the shared model takes over; None for
            never.
        expert: who answers everything, of the kind `fixed`.
        accuracy: of the first choice on validation.
        confusion: validation examples, by the true expert (rows) and the first choice (columns).
        data: what it was trained on: counts and digests by expert.
    """

    kind: str
    experts: tuple[str, ...]
    hidden_size: int | None = None
    layers: tuple[int, ...] = (-1,)
    temperature: float = 1.0
    top_k: int | None = None
    min_weight: float = 0.01
    threshold: float | None = None
    expert: str | None = None
    accuracy: float | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"there is no router of the kind {self.kind!r}", fix=f"The kinds are {', '.join(KINDS)}")
        if self.kind == "fixed" and self.expert not in self.experts:
            raise unknown_expert(str(self.expert), self.experts)
        if self.top_k is not None and not 1 <= self.top_k <= len(self.experts):
            raise UserError(f"top_k is {self.top_k}", fix=f"Give 1 to {len(self.experts)}, the number of experts")
        if not self.temperature > 0.0:
            raise UserError(f"the temperature is {self.temperature}", fix="Give a number above 0")
        if not 0.0 <= self.min_weight < 1.0 / len(self.experts):
            fix = f"Give 0 or more, and less than 1/{len(self.experts)}"
            raise UserError(f"min_weight is {self.min_weight}", fix=fix)


@dataclass(frozen=True)
class Routing:
    """Who answers a batch.

    Attributes:
        weights: w (batch, experts), of the exclusive parts; a row sums to 1 minus its `fallback`.
        probabilities: (batch, experts), before `top_k`, `min_weight` and the fallback.
        fallback: (batch,), the share that the shared model takes back: 0 for inputs like those of the router's data,
            towards 1 for inputs unlike them.
    """

    weights: Tensor
    probabilities: Tensor
    fallback: Tensor

    def of(self, rows: list[int]) -> Routing:
        """That of some rows."""
        return Routing(self.weights[rows], self.probabilities[rows], self.fallback[rows])


class Router(nn.Module):
    """A router; its tensors are buffers in float32, whatever dtype the model is cast to.

    Tensors by kind:
        mlp: `mean`, `scale` (hidden,), `first` (width, hidden), `first_bias`, `second` (experts, width), `second_bias`;
            s = second gelu(first (f - mean) / scale + first_bias) + second_bias.
        centroid: s_t = -|W f - c_t|^2 / 2 with `whitening` W (k, hidden), k <= hidden, and `centres` c (experts, k).
        arrow: a (experts, inputs) matrix of directions for each module, by its name.
    With a threshold, all kinds that see features have `whitening` and `centres`, too.
    """

    def __init__(self, config: RouterConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(sorted(tensors))
        for place, name in enumerate(self.names):
            self.register_buffer(f"tensor_{place}", tensors[name].float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Follow the model to its device, and stay in float32: distances are small differences."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)

    def tensor(self, name: str) -> Tensor:
        return self.get_buffer(f"tensor_{self.names.index(name)}")

    @property
    def sees_features(self) -> bool:
        return self.config.kind in BY_FEATURES

    def scores(self, features: Tensor) -> Tensor:
        """s (batch, experts) of features (batch, hidden)."""
        if self.config.kind == "mlp":
            x = (features - self.tensor("mean")) / self.tensor("scale")
            inner = functional.gelu(functional.linear(x, self.tensor("first"), self.tensor("first_bias")))
            return functional.linear(inner, self.tensor("second"), self.tensor("second_bias"))
        return -0.5 * self.distances(features)

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances to the experts' mean features: (batch, experts)."""
        return distances(features, self.tensor("whitening"), self.tensor("centres"))

    def route(self, rows: int, seen: Tensor | None, device: torch.device) -> Routing:
        """The weights of a batch.

        Args:
            rows: of the batch.
            seen: features (rows, hidden); of the kind `arrow` the scores (rows, experts); None for kinds that see none.
        """
        count = len(self.config.experts)
        if self.config.kind == "uniform":
            probabilities = torch.full((rows, count), 1.0 / count, device=device)
        elif self.config.kind == "fixed":
            place = self.config.experts.index(str(self.config.expert))
            probabilities = torch.eye(count, device=device)[place].expand(rows, count)
        else:
            assert seen is not None
            scores = seen if self.config.kind == "arrow" else self.scores(seen)
            probabilities = torch.softmax(scores / self.config.temperature, dim=-1)
        weights = thinned(probabilities, self.config.top_k, self.config.min_weight)
        fallback = torch.zeros(rows, device=device)
        if self.config.threshold is not None and seen is not None and self.sees_features:
            distance = self.distances(seen).amin(dim=1) / self.tensor("whitening").shape[0]
            fallback = 1.0 - (self.config.threshold / distance).square().clamp(max=1.0)
        return Routing(weights * (1.0 - fallback)[:, None], probabilities, fallback)

    def altered(self, **changes: Any) -> Router:
        """The same router with another `temperature`, `top_k`, `min_weight` or `threshold`.

        Raises:
            UserError: a value is out of range.
        """
        return Router(replace(self.config, **changes), {name: self.tensor(name) for name in self.names})


def distances(features: Tensor, whitening: Tensor, centres: Tensor) -> Tensor:
    """|W f - c_t|^2: (batch, experts)."""
    return torch.cdist(features @ whitening.T, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


def thinned(probabilities: Tensor, top_k: int | None, min_weight: float) -> Tensor:
    """Without all but the largest k and those below `min_weight`; what is left sums to 1 again."""
    weights = probabilities
    if top_k is not None and top_k < weights.shape[1]:
        kept = weights.topk(top_k, dim=1)
        weights = torch.zeros_like(weights).scatter(1, kept.indices, kept.values)
    if min_weight > 0.0 and weights.shape[1] > 1:
        # Uniform weights are above `min_weight`, so one of each row always is.
        weights = weights * (weights >= min_weight)
    return weights / weights.sum(dim=1, keepdim=True)


def unknown_expert(name: str, experts: Sequence[str]) -> UserError:
    """The error for an expert that a bundle does not have."""
    return UserError(f"there is no expert {name!r}", fix=f"The experts are {', '.join(experts)}")


def save_router(router: Router, out: Path) -> None:
    """Write `config.json` and `router.safetensors` into a folder."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, {"format": FORMAT, **asdict(router.config)})
    save_file({name: router.tensor(name).contiguous() for name in router.names}, out / WEIGHTS, {"format": "pt"})


def load_router(folder: Path, experts: Sequence[str]) -> Router:
    """The router in a folder.

    Args:
        experts: of the bundle, in its order.

    Raises:
        CheckpointError: it is missing or damaged, of a later format, or was made for other experts.
    """
    from weldment.twin.attaching import read_tensors

    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number = content.pop("format")
        if number > FORMAT:
            cause = f"the router is of format {number}, and this version reads format {FORMAT}"
            raise CheckpointError(cause, where=str(path), fix="Use a later version of weldment")
        config = RouterConfig(**{**content, **_tuples(content)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the router cannot be read: {error!r}", where=str(path), fix=_RETRAIN) from error
    if config.experts != tuple(experts):
        cause = f"the router was made for the experts {_listed(config.experts)}, and the bundle has {_listed(experts)}"
        raise CheckpointError(cause, where=str(path), fix=_RETRAIN)
    return Router(config, read_tensors(folder / WEIGHTS))


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON keeps as lists."""
    rows = content.get("confusion")
    table = None if rows is None else tuple(tuple(row) for row in rows)
    return {"experts": tuple(content["experts"]), "layers": tuple(content["layers"]), "confusion": table}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
