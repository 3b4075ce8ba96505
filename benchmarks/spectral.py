"""Time spectral merges of single matrices against the full-SVD route of the papers' code.

    python benchmarks/spectral.py [--shapes 2048x2048,1024x1024] [--methods drm,tsv_m] [--runs 3] [--bound]

Both routes run in turn in one process on the same random matrices, in float32, by default with as many threads as
there are processors; every figure is a median. The full route is written after the formulas as the papers'
code does them: `torch.linalg.svd(full_matrices=False)` of each matrix or stack, and the products and masks that
follow. `drm` is timed in both directions. The last column is the relative difference of both results.

`--bound` times, instead of our route, nothing but the steps that no route over Gram matrices can do without: each Gram
matrix at half of a product's operations, one `torch.linalg.eigh` for each factorisation, and the fewest products that
give the result. Trimming, elections, copies and whatever accuracy costs are not in it, so no such route can be faster.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from weldment.methods import METHODS
from weldment.methods.arguments import settle
from weldment.methods.block import Block
from weldment.methods.spectral.bases import descending, gram

Merge = Callable[[Sequence[Tensor]], Tensor]
svd = partial(torch.linalg.svd, full_matrices=False)


def full_drm(taus: Sequence[Tensor], *, direction: str, drop: float = 0.8) -> Tensor:
    """DRM by the SVD of the stack, sign election by mass, disjoint mean."""
    side = 0 if direction == "vertical" else 1
    u, s, v = svd(torch.cat(list(taus), dim=side))
    rank = int((s > 0.01 * s[0]).sum())
    split, rest = (u[:, :rank], v[:rank]) if side == 0 else (v[:rank], u[:, :rank])
    parts = torch.stack(split.split(taus[0].shape[side], dim=side))
    lengths = parts.norm(dim=1 + side, keepdim=True)
    parts = parts / lengths
    sizes = parts.abs().reshape(-1)
    threshold = sizes.kthvalue(sizes.numel() - round(sizes.numel() * (1.0 - drop))).values
    scale = lengths * (s[:rank] if side == 0 else s[:rank, None])
    parts = parts.masked_fill(parts.abs() < threshold, 0.0) * scale
    signs = parts.sum(dim=0).sign()
    signs = torch.where(signs == 0.0, signs.sum().sign(), signs)
    parts = parts.masked_fill(parts.sign() != signs, 0.0)
    merged = parts.sum(dim=0) / torch.count_nonzero(parts, dim=0).clamp(min=1)
    return merged @ rest if side == 0 else rest @ merged


def polar(x: Tensor) -> Tensor:
    """The orthonormal factor of a matrix."""
    p, _, q = svd(x)
    return p @ q


def full_tsv_m(taus: Sequence[Tensor]) -> Tensor:
    """TSV-Merge by an SVD of every matrix and of both stacks of singular vectors."""
    each = min(taus[0].shape) // len(taus)
    found = [svd(tau) for tau in taus]
    u = torch.cat([u[:, :each] for u, _, _ in found], dim=1)
    s = torch.cat([s[:each] for _, s, _ in found])
    v = torch.cat([v[:each] for _, _, v in found])
    return torch.linalg.multi_dot([polar(u), torch.diag(s), polar(v)])


def full_iso_c(taus: Sequence[Tensor]) -> Tensor:
    """Iso-C by the SVD of the sum."""
    u, s, v = svd(sum(taus[1:], taus[0]))
    return torch.linalg.multi_dot([u, torch.diag(torch.full_like(s, float(s.mean()))), v])


def full_iso_cts(taus: Sequence[Tensor], fraction: float = 0.8) -> Tensor:
    """Iso-CTS by an SVD of the sum, of what every expert has besides, and of both stacks."""
    rank = min(taus[0].shape)
    own = round((rank - int(fraction * rank)) / len(taus))
    common = rank - own * len(taus)
    u, s, v = (part[..., :common] if part.dim() < 2 else part for part in svd(sum(taus[1:], taus[0])))
    us, ss, vs = [u[:, :common]], [s[:common]], [v[:common]]
    for tau in taus:
        mine = svd(tau - us[0] @ (us[0].T @ tau))
        us.append(mine[0][:, :own])
        ss.append(mine[1][:own])
        vs.append(mine[2][:own])
    u, s, v = torch.cat(us, dim=1), torch.cat(ss), torch.cat(vs)
    return torch.linalg.multi_dot([polar(u), torch.diag(torch.full_like(s, float(s.mean()))), polar(v)])


def full_knots_ties(taus: Sequence[Tensor], density: float = 0.2) -> Tensor:
    """KnOTS by a float64 SVD of the matrices side by side, then TIES on the parts of V."""
    u, s, v = svd(torch.cat(list(taus), dim=1).double())
    keep = s > 1e-5 * s[0]
    u, s, v = u[:, keep].float(), s[keep].float(), v[keep].float()
    parts = torch.stack(v.split(taus[0].shape[1], dim=1))
    flat = parts.reshape(len(taus), -1)
    dropped = flat.shape[1] - max(1, int(density * flat.shape[1]))
    thresholds = flat.abs().kthvalue(dropped + 1, dim=1).values
    parts = parts.masked_fill(parts.abs() < thresholds[:, None, None], 0.0)
    signs = parts.sum(dim=0).sign()
    signs = torch.where(signs == 0.0, 1.0, signs)
    parts = parts.masked_fill(parts.sign() != signs, 0.0)
    return (u * s) @ (parts.sum(dim=0) / torch.count_nonzero(parts, dim=0).clamp(min=1))


def ours(method: str, shape: tuple[int, int], **parameters: object) -> Merge:
    """The kernel of a method on changes from a base of zero."""
    row = METHODS[method]

    def merge(taus: Sequence[Tensor]) -> Tensor:
        arguments = row.arranged(settle(row, parameters, len(taus)), "weight", shape, is_embedding=False)
        stack = torch.stack(list(taus))  # kernels overwrite it
        return row.kernel(Block(list(stack), torch.zeros(shape), shape, stack=stack), **arguments)

    return merge


def cases(methods: Sequence[str], shape: tuple[int, int]) -> Iterator[tuple[str, Merge, Merge]]:
    """Label, our route and the full one."""
    full: dict[str, Merge] = {"tsv_m": full_tsv_m, "iso_c": full_iso_c, "iso_cts": full_iso_cts}
    for method in methods:
        if method == "drm":
            for direction in ("vertical", "horizontal"):
                yield (
                    f"drm {direction}",
                    ours("drm", shape, direction=direction),
                    partial(full_drm, direction=direction),
                )
        elif method == "knots_ties":
            yield method, ours(method, shape, density=0.2), full_knots_ties
        else:
            yield method, ours(method, shape), full[method]


Step = tuple[str, int, int, int]
"""`product` of (rows, inner, columns); `gram` and `eigh` of a matrix of (rows, columns), made of so many bases."""


def _factored(rows: int, columns: int, bases: int = 0) -> list[Step]:
    """The Gram matrix of the columns and its eigenvectors."""
    return [("gram", rows, columns, 0), ("eigh", rows, columns, bases)]


def _triples(long: int, short: int, count: int) -> list[Step]:
    """The first `count` singular triples of a matrix."""
    return [*_factored(long, short), ("product", long, short, count)]


def _polars(rows: int, columns: int, experts: int, left: int) -> list[Step]:
    """polar(U) S polar(V)' = U M V' of (rows, s) and (columns, s), M made of the eigenvectors of both Gram matrices.

    All but `left` columns of U are orthogonal to all others, so that these have a Gram matrix of their own.
    """
    s = min(rows, columns)
    factors = [*_factored(rows, left, experts), *_factored(columns, s, experts)]
    inner: list[Step] = [("product", left, s, s), ("product", s, left, s), ("product", s, s, s), ("product", s, s, s)]
    return [*factors, *inner, ("product", rows, s, columns)]


def needed(label: str, shape: tuple[int, int], experts: int) -> list[Step]:
    """The steps that a merge over Gram matrices of full rank needs."""
    (rows, columns), s, long = shape, min(shape), max(shape)
    if label in ("drm horizontal", "knots_ties"):
        return needed("drm vertical", (columns, rows), experts)
    if label == "drm vertical":
        stacked = experts * rows
        if columns <= stacked:
            return [*_triples(stacked, columns, columns), ("product", rows, columns, columns)]
        rest: list[Step] = [("product", rows, stacked, stacked), ("product", rows, stacked, columns)]
        return [*_factored(columns, stacked), *rest]
    if label == "tsv_m":
        return [*_triples(long, s, s // experts) * experts, *_polars(rows, columns, experts, s)]
    if label == "iso_c":
        return [*_factored(long, s), ("product", s, s, s), ("product", long, s, s)]
    own = round((s - int(0.8 * s)) / experts)
    common = s - own * experts
    alone: list[Step] = [("product", common, rows, columns), ("product", rows, common, columns)]
    alone += _triples(long, s, own)
    return [*_triples(long, s, common), *alone * experts, *_polars(rows, columns, experts, own * experts)]


def _random(rows: int, columns: int, bases: int) -> Tensor:
    """Normal numbers, or as many orthonormal bases side by side: what `eigh` takes depends on the eigenvalues."""
    if not bases:
        return torch.randn(rows, columns)
    widths = [columns // bases + (place < columns % bases) for place in range(bases)]
    return torch.cat([torch.linalg.qr(torch.randn(rows, width)).Q for width in widths], dim=1)


@cache
def step_seconds(step: Step, runs: int) -> float:
    """How long a step takes, on random numbers."""
    kind, rows, second, third = step
    seconds: list[float] = []
    for _ in range(runs):
        one = torch.randn(rows, second) if kind != "eigh" else gram([[_random(rows, second, third)]])
        if kind == "product":
            work: Callable[[], object] = partial(
                torch.mm, one, torch.randn(second, third), out=torch.empty(rows, third)
            )
        else:
            work = partial(gram, [[one]]) if kind == "gram" else partial(descending, one)
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def bounded(label: str, full: Merge, taus: Sequence[Tensor], runs: int) -> float:
    """Print a row of the table of bounds; how many times as long as the needed steps the full route takes."""
    shape = (int(taus[0].shape[0]), int(taus[0].shape[1]))
    steps = needed(label, shape, len(taus))
    least = sum(step_seconds(step, runs) for step in steps)
    factors = sum(step_seconds(step, runs) for step in steps if step[0] == "eigh")
    slow = statistics.median(timed(full, taus)[0] for _ in range(runs))
    print(
        f"| {shape[0]} x {shape[1]} | {label} | {least:.2f} | {factors:.2f} | {slow:.2f} | {slow / least:.1f}x |",
        flush=True,
    )
    return slow / least


def timed(merge: Merge, taus: Sequence[Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    merged = merge(taus)
    return time.perf_counter() - started, merged


def measured(label: str, mine: Merge, full: Merge, taus: Sequence[Tensor], runs: int) -> float:
    """Print a row of the table; how many times as long the full route takes."""
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[Tensor] = []
    for _ in range(runs):
        results = []
        for place, merge in enumerate((mine, full)):
            took, merged = timed(merge, taus)
            seconds[place].append(took)
            results.append(merged)
    quick, slow = (statistics.median(each) for each in seconds)
    error = float((results[0] - results[1]).norm() / results[1].norm())
    rows, columns = taus[0].shape
    print(
        f"| {rows} x {columns} | {label} | {quick:.2f} | {slow:.2f} | {slow / quick:.1f}x | {error:.0e} |", flush=True
    )
    return slow / quick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1024x1024,2048x2048,2048x8192,8192x2048")
    parser.add_argument("--methods", default="drm,tsv_m,iso_c,iso_cts,knots_ties")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--bound", action="store_true", help="time the steps that no route over Gram matrices can spare"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, medians of {options.runs}\n")
    columns = (
        "needed s | eigh of it s | full SVD s | ratio at most"
        if options.bound
        else "s | full SVD s | ratio | difference"
    )
    print(f"| shape | method | {columns} |\n" + "|---" * 6 + "|")
    ratios: dict[str, list[float]] = {}
    for text in options.shapes.split(","):
        rows, columns = map(int, text.split("x"))
        draw = torch.Generator().manual_seed(0)
        taus = [torch.randn(rows, columns, generator=draw) for _ in range(options.experts)]
        for label, mine, full in cases(options.methods.split(","), (rows, columns)):
            if options.bound:
                ratio = bounded(label, full, taus, options.runs)
            else:
                ratio = measured(label, mine, full, taus, options.runs)
            ratios.setdefault(label.split()[0], []).append(ratio)
    print()
    for method, found in ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, found)))
        print(
            f"{method}: {'at most ' * options.bound}{mean:.1f}x in the geometric mean, {min(found):.1f}x at the least"
        )


if __name__ == "__main__":
    main()
