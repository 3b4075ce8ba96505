"""Runs a plan of a merge of adapters, module by module, and writes the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weldment.adapters.adapter import PREFIX
from weldment.adapters.loading import load
from weldment.adapters.merge.card import adapter_card, adapter_manifest
from weldment.adapters.merge.layering import Merged, merge_layer
from weldment.adapters.merge.memory import is_dense
from weldment.adapters.merge.plan import AdapterPlan, Module, SavedTensor
from weldment.adapters.merge.settings import pattern_of, with_ranks
from weldment.adapters.merge.spaces import Kernel
from weldment.adapters.writing import AdapterWriter
from weldment.checkpoint.dtypes import torch_dtype
from weldment.engine.progress import Amount, Progress
from weldment.engine.run import one_thread
from weldment.errors import NonFiniteError
from weldment.planning.build import head_file
from weldment.planning.misfits import some

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Outcome:
    """What a merge of adapters made.

    Attributes:
        ranks: by module.
        lost: relative error of the cut to the rank, by module.
        energies: squared Frobenius norms of the changes before the cut, by module.
        wrong: modules and saved tensors that have NaN or infinity.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def total_lost(self) -> float:
        """Relative error of all modules together."""
        energy = sum(self.energies.values())
        gone = sum(self.lost[name] ** 2 * self.energies[name] for name in self.lost)
        return math.sqrt(gone / energy) if energy > 0.0 else 0.0

    def summary(self, *, measured: bool = True) -> str:
        """Ranks in a sentence, and errors, which PEFT's combination types do not measure."""
        if not self.ranks:
            return "no low-rank layers"
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        if not measured:
            return shown
        worst = max(self.lost, key=lambda name: self.lost[name])
        if self.lost[worst] < 1e-6:
            return f"{shown}; nothing was lost by the cut to the rank"
        return (
            f"{shown}; the cut to the rank lost {self.total_lost:.2%} of the change "
            f"(Frobenius norm), at most {self.lost[worst]:.2%}, in {worst}"
        )


def merge_adapters(
    plan: AdapterPlan,
    out: Path,
    *,
    threads: int = 1,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress,
) -> tuple[Mapping[str, str], Mapping[str, float]]:
    """Merge, and write the adapter into the folder `out`, where it appears when it is complete.

    Returns:
        the checksum of every tensor, by `file|name`, and the relative error of every module.

    Raises:
        OutputError: `out` cannot be written.
        NonFiniteError: an input or the result has NaN or infinity.
    """
    progress.begin(Amount.of(plan.read_bytes), Amount.of(0))
    outcome = Outcome()
    with AdapterWriter(out, overwrite=overwrite) as writer:
        with one_thread():
            for module, merged in _merged_layers(plan, threads):
                _add(module, merged, outcome, writer)
                progress.advance(module.name, Amount.of(module.read_bytes))
            for saved in plan.saved:
                tensor = _saved_tensor(plan, saved, threads)
                writer.add(f"{PREFIX}{saved.stored_name}", tensor)
                outcome.wrong += [] if torch.isfinite(tensor).all() else [saved.name]
                progress.advance(saved.name, Amount.of(saved.read_bytes))
        _judge(outcome, progress, allow_nonfinite=allow_nonfinite)
        progress.message(outcome.summary(measured=plan.recipe.combination is None))
        for name, entries in plan.heads.items():
            for entry in entries:
                writer.add(entry.name.removeprefix(PREFIX), load(entry, torch_dtype(entry.dtype)), head_file(name))
        ranks = {pattern_of(plan, module): outcome.ranks[module.name] for module in plan.modules}
        record = adapter_manifest(plan, outcome.ranks, outcome.lost)
        return writer.publish(with_ranks(plan.config, ranks), adapter_card(plan), record), outcome.lost


def _merged_layers(plan: AdapterPlan, threads: int) -> Iterator[tuple[Module, Merged]]:
    """The layers in order; dense ones take all memory and processors for themselves."""
    groups: list[tuple[bool, list[Module]]] = []
    for module in plan.modules:
        heavy = is_dense(plan, module)
        if not groups or groups[-1][0] != heavy:
            groups.append((heavy, []))
        groups[-1][1].append(module)
    for heavy, modules in groups:
        work = partial(merge_layer, plan, threads=threads if heavy else 1)
        yield from _in_parallel(work, modules, 1 if heavy else threads)


def _in_parallel(
    work: Callable[[Module], Merged], modules: Sequence[Module], threads: int
) -> Iterator[tuple[Module, Merged]]:
    """Results in order, few of them ahead of what was asked for."""
    with ThreadPoolExecutor(threads, "weld", torch.set_num_threads, (1,)) as pool:
        ahead = [pool.submit(work, module) for module in modules[: 2 * threads]]
        try:
            for place, module in enumerate(modules):
                merged = ahead.pop(0).result()
                if place + 2 * threads < len(modules):
                    ahead.append(pool.submit(work, modules[place + 2 * threads]))
                yield module, merged
        finally:
            for future in ahead:
                future.cancel()


def _add(module: Module, merged: Merged, outcome: Outcome, writer: AdapterWriter) -> None:
    embedding = module.pattern.embedding
    names = {
        "A": "lora_embedding_A" if embedding else "lora_A.weight",
        "B": "lora_embedding_B" if embedding else "lora_B.weight",
        "B.bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
    }
    for part, tensor in merged.parts.items():
        writer.add(f"{PREFIX}{module.stored_name}.{names[part]}", tensor)
    outcome.ranks[module.name] = merged.rank
    outcome.lost[module.name] = merged.lost
    outcome.energies[module.name] = merged.energy
    outcome.wrong += [] if merged.is_finite else [module.name]


def _saved_tensor(plan: AdapterPlan, saved: SavedTensor, threads: int) -> Tensor:
    """A tensor that is stored whole, merged."""
    recipe, dtype = plan.recipe, torch_dtype(saved.dtype)
    if saved.method == "passthrough" and saved.parameters["scale"] == (1.0,):
        return load(saved.entries[0], dtype)
    wide: torch.dtype = getattr(torch, recipe.accumulate)
    kernel = Kernel(saved.method, saved.parameters, recipe.accumulate, recipe.seed, saved.name, threads)
    base = None if saved.base is None else load(saved.base, wide)
    return kernel([load(entry, wide) for entry in saved.entries], base).to(dtype)


def _judge(outcome: Outcome, progress: Progress, *, allow_nonfinite: bool) -> None:
    """Report or refuse NaN and infinity."""
    if not outcome.wrong:
        return
    cause = f"NaN or infinity in {some(outcome.wrong)} of the result"
    if not allow_nonfinite:
        fix = "Look for too large weights, or a dtype too narrow (float16 ends at 65504)"
        raise NonFiniteError(cause, fix=f"{fix}, or allow it (--allow-nonfinite)")
    progress.message(cause)
