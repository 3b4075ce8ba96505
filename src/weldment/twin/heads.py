"""The experts' task heads in one network: each row goes through the head of its expert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weldment.errors import CheckpointError
from weldment.evaluation.networks import config_of, with_head, without_data
from weldment.twin.attaching import read_tensors
from weldment.twin.bundle import ExpertPart

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Chosen:
    """Whose head each row of the batch goes through; all heads of one model read it."""

    def __init__(self) -> None:
        self.heads: Tensor | None = None


@dataclass(frozen=True)
class Outputs:
    """The outputs of one head among those of all heads.

    Attributes:
        labels: as the expert's configuration names them.
        problem: `regression`, `single_label_classification` or `multi_label_classification`.
    """

    start: int
    labels: tuple[str, ...]
    problem: str

    @property
    def end(self) -> int:
        return self.start + len(self.labels)


def outputs_of_heads(experts: Sequence[ExpertPart]) -> tuple[Outputs, ...]:
    """The places of all heads' outputs, one head after the other."""
    found: list[Outputs] = []
    for expert in experts:
        config = head_config(expert)
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        labels = tuple(str(name) for _, name in sorted((int(place), name) for place, name in names.items()))
        problem = config.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
        found.append(Outputs(found[-1].end if found else 0, labels, problem))
    return tuple(found)


def head_config(expert: ExpertPart) -> dict[str, Any]:
    """The configuration of an expert with its head."""
    assert expert.head_config is not None
    return json.loads(expert.head_config.read_text(encoding="utf-8"))


class RoutedHead(nn.Module):
    """One part of the heads of all experts, in the place where a network has that of one.

    Rows are divided by `chosen`. If the outputs of the experts' parts are equally wide, a row's output is that of its
    expert's part. If `places` are given, the outputs stand one head after the other, and all that are not those of the
    row's head are -inf: softmax over all of them is softmax over the row's own.

    Args:
        parts: that of each expert.
        places: where each expert's outputs begin and end among all.
    """

    def __init__(self, parts: Sequence[nn.Module], chosen: Chosen, places: Sequence[tuple[int, int]] | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.chosen = chosen
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        heads = self.chosen.heads
        assert heads is not None
        if torch.compiler.is_compiling():
            return self._by_mask(x, heads)
        out: Tensor | None = None
        for head in sorted(set(heads.tolist())):
            rows = (heads == head).nonzero()[:, 0]
            part = self._widened(self.parts[head](x.index_select(0, rows)), head)
            out = part.new_empty(x.shape[0], *part.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, part)
        assert out is not None
        return out

    def _by_mask(self, x: Tensor, heads: Tensor) -> Tensor:
        """All heads for all rows: what is compiled must not depend on how many rows have which."""
        found = torch.stack([self._widened(part(x), head) for head, part in enumerate(self.parts)])
        return found[heads, torch.arange(x.shape[0], device=x.device)]

    def _widened(self, part: Tensor, head: int) -> Tensor:
        if self.places is None:
            return part
        start, end = self.places[head]
        return nn.functional.pad(part, (start, self.places[-1][1] - end), value=float("-inf"))


def attach_heads(network: PreTrainedModel, experts: Sequence[ExpertPart], outputs: Sequence[Outputs]) -> Chosen:
    """Replace the parts of the network that differ between the experts' heads.

    Raises:
        CheckpointError: a head does not fit the network's class, or is none that works on each row by itself.
    """
    chosen = Chosen()
    tensors = [_tensors_of(expert, network) for expert in experts]
    for name in _replaced(network, tensors):
        parts = [_part(network, name, expert, own) for expert, own in zip(experts, tensors, strict=True)]
        widths = {tuple(p.shape for p in part.parameters()) for part in parts}
        last = len(widths) > 1 or _is_last(network, name, outputs)
        places = [(o.start, o.end) for o in outputs] if last else None
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, RoutedHead(parts, chosen, places))
    return chosen


def _is_last(network: PreTrainedModel, name: str, outputs: Sequence[Outputs]) -> bool:
    """Whether a part gives the logits: its last vector or matrix has as many rows as all heads have outputs."""
    shapes = [parameter.shape for parameter in network.get_submodule(name).parameters()]
    return any(shape[0] == outputs[-1].end for shape in shapes)


def _tensors_of(expert: ExpertPart, network: PreTrainedModel) -> dict[str, Tensor]:
    """The head's tensors by their names in the network."""
    assert expert.head is not None
    prefix = f"{network.base_model_prefix}."
    names = set(network.state_dict())
    found: dict[str, Tensor] = {}
    for name, tensor in read_tensors(expert.head).items():
        spelled = next((s for s in (name, prefix + name, name.removeprefix(prefix)) if s in names), None)
        if spelled is None:
            cause = f"{type(network).__name__} has no {name!r}"
            raise CheckpointError(cause, where=str(expert.head), fix="Give `task_class`, the class the head is of")
        found[spelled] = tensor
    return found


def _replaced(network: PreTrainedModel, tensors: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """The modules that hold the heads: whole children of the network, and of the backbone what heads bring of it."""
    prefix = f"{network.base_model_prefix}."
    own = [n for n, child in network.named_children() if f"{n}." != prefix and any(True for _ in child.parameters())]
    inside = {
        prefix + name.removeprefix(prefix).split(".")[0] for t in tensors for name in t if name.startswith(prefix)
    }
    return [*own, *sorted(inside)]


def _part(network: PreTrainedModel, name: str, expert: ExpertPart, tensors: Mapping[str, Tensor]) -> nn.Module:
    """One expert's part, in the network's place and dtype."""
    content = with_head(network.config.to_dict(), head_config(expert))
    whole = without_data(type(network), config_of(content, expert.name), expert.name)
    part = whole.get_submodule(name)
    state = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    common = dict(network.state_dict())
    for key, meta in part.state_dict().items():
        if key not in state and f"{name}.{key}" in common and not expert_own(network, name):
            state[key] = common[f"{name}.{key}"]
        if key not in state or state[key].shape != meta.shape:
            shape = list(state[key].shape) if key in state else "missing"
            cause = f"the head's {name}.{key} is {shape}, and {type(network).__name__} needs {list(meta.shape)}"
            raise CheckpointError(cause, where=str(expert.head), fix="Build the bundle from whole experts")
    part.load_state_dict(state, assign=True)
    return part.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)


def expert_own(network: PreTrainedModel, name: str) -> bool:
    """Whether a module lies beside the backbone, where the shared model has nothing."""
    return not name.startswith(f"{network.base_model_prefix}.")
