"""Whether adapters can be merged with each other, seen from their configurations and headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from weldment.adapters.adapter import Adapter, Layer
from weldment.adapters.merge.inputs import AdapterInputs
from weldment.planning.misfits import some
from weldment.planning.roles import input_embedding, is_head
from weldment.planning.vocabulary import vocabulary

_TOKENIZER = "tokenizer.json"
_BY_ROW = (
    "Rows are never merged by position, which would mix different tokens: merge into the base, where `tokenizer` "
    "aligns them (`output: model`)"
)


def check_fit(inputs: AdapterInputs) -> None:
    """Add what stands in the way, and what the user should know, to the inputs."""
    _check_keys(inputs)
    _check_bases(inputs)
    _check_kinds(inputs)
    _check_sizes(inputs)
    _check_parameters(inputs)
    _check_vocabularies(inputs)
    _note_absences(inputs)


def _check_keys(inputs: AdapterInputs) -> None:
    """Keys of recipes that have no meaning for adapters."""
    recipe = inputs.recipe
    if recipe.slices:
        fix = "Use `models`; layers of full models can be assembled with adapters in them, named base+adapter"
        inputs.problem("adapters cannot be cut into slices of layers", fix, "slices")
    source = recipe.source
    for key in ("tokenizer", "tokenizer_source", "chat_template", "layer_scale", "subspace_boost", "recalibrate"):
        if source.get(key) is not None:
            fix = "Remove it, or merge into the base with `output: model`"
            inputs.problem(f"`{key}` has no meaning for a merge of adapters to an adapter", fix, key)


def _check_bases(inputs: AdapterInputs) -> None:
    named: dict[str, list[str]] = {}
    for reference in inputs.participants:
        base = inputs.adapters[reference].config.base_model_name_or_path
        if base:
            named.setdefault(base, []).append(reference)
    names = {_last(base) for base in named}
    wanted = inputs.recipe.base_model
    if wanted is not None and wanted not in inputs.adapters:
        names.add(_last(wanted))
        named.setdefault(wanted, []).append("the recipe")
    if len(names) > 1:
        listing = ", ".join(f"{base} ({' and '.join(holders)})" for base, holders in named.items())
        if strangers := _strangers(inputs):
            cause = (
                f"the adapters are of different bases: {listing}; no module of {_and(strangers)} is one of the others"
            )
            inputs.problem(cause, "Merge adapters of one and the same base", "models")
        else:
            inputs.notes.append(f"the adapters name different bases: {listing}; they should be one and the same model")


def _strangers(inputs: AdapterInputs) -> list[str]:
    """The adapters that change nothing that another one changes."""
    found: list[str] = []
    for reference, own in inputs.layers.items():
        others = {module for other, layers in inputs.layers.items() if other != reference for module in layers}
        if own and others and not own.keys() & others:
            found.append(reference)
    return found


def _last(base: str) -> str:
    return PurePosixPath(base.partition("@")[0].rstrip("/")).name.lower()


def _kind(layer: Layer) -> str:
    if layer.embedding:
        return "an embedding"
    if len(layer.a.shape) > 2:
        return f"a convolution with the kernel {list(layer.a.shape[2:])}"
    if layer.parameter:
        return f"a parameter of {layer.experts} experts"
    return "a transposed linear layer (fan_in_fan_out)" if layer.transposed else "a linear layer"


def _check_kinds(inputs: AdapterInputs) -> None:
    differing: dict[str, dict[str, str]] = {}
    for name in inputs.modules():
        kinds = {reference: _kind(layer) for reference, layer in inputs.holders(name).items()}
        if len(set(kinds.values())) > 1:
            differing[name] = kinds
    if differing:
        first, kinds = next(iter(differing.items()))
        cause = f"{_modules(differing)}: {_listed(kinds)}"
        inputs.problem(cause, f"Only layers of one kind can be merged; leave out with `drop: {json.dumps([first])}`")
    flat = {_kind(layer) for own in inputs.layers.values() for layer in own.values()}
    linear = [kind for kind in flat if "linear" in kind]
    if len(linear) > 1 and not differing:
        fix = "One adapter has one `fan_in_fan_out`; merge into the base with `output: model`"
        inputs.problem("some linear layers are stored transposed (fan_in_fan_out) and others are not", fix)


def _check_sizes(inputs: AdapterInputs) -> None:
    differing: dict[str, dict[str, tuple[int, ...]]] = {}
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in inputs.modules():
        holders = inputs.holders(name)
        sizes = {reference: layer.sizes for reference, layer in holders.items()}
        if len(set(sizes.values())) > 1:
            is_vocabulary = all(layer.embedding for layer in holders.values())
            (rows if is_vocabulary else differing)[name] = sizes
    if differing:
        sizes = next(iter(differing.values()))
        listing = _listed({reference: f"[{' x '.join(map(str, size))}]" for reference, size in sizes.items()})
        bases = {ref: inputs.adapters[ref].config.base_model_name_or_path or "a base it does not name" for ref in sizes}
        cause = f"adapters of different bases ({_listed(bases)}): {_modules(differing)}: {listing}"
        inputs.problem(cause, "Only adapters of the same base can be merged")
    for name, sizes in rows.items():
        counts = _listed({reference: f"{size[1]} rows" for reference, size in sizes.items()})
        fix = f"{_BY_ROW}, or leave it out with `drop: {json.dumps([name])}`"
        inputs.problem(f"different vocabularies: embedding {name!r}: {counts}", fix)


def _check_parameters(inputs: AdapterInputs) -> None:
    """PEFT numbers the wrappers of a module's parameters by all that are named, so they must be the same."""
    named = {ref: set(inputs.adapters[ref].config.target_parameters) for ref in inputs.participants}
    used = {reference: parameters for reference, parameters in named.items() if parameters}
    if len({frozenset(parameters) for parameters in used.values()}) > 1:
        listing = _listed({reference: str(sorted(parameters)) for reference, parameters in used.items()})
        fix = "Merge them into the base with `output: model`"
        inputs.problem(f"the adapters have different `target_parameters`: {listing}", fix)
    left = set(inputs.modules())
    for own in (inputs.adapters[reference].layers.values() for reference in inputs.participants):
        dropped = [layer.module for layer in own if layer.parameter and layer.module not in left]
        if dropped:
            fix = "PEFT tells the parameters of a module apart by their number; drop nothing of it"
            inputs.problem(f"{_modules(dropped)} cannot be dropped alone", fix, "drop")
            return


def _check_vocabularies(inputs: AdapterInputs) -> None:
    """Tokens at other rows, where rows of embeddings are merged."""
    holders = [reference for reference in inputs.participants if merges_rows(inputs, reference)]
    raw = {ref: content for ref in holders if (content := _tokenizer(inputs.adapters[ref])) is not None}
    if len(set(raw.values())) < 2:
        return
    rows = {reference: found for reference, content in raw.items() if (found := vocabulary(content))}
    first = next(iter(rows), "")
    for other in [*rows][1:]:
        moved = [token for token, row in rows[other].items() if rows[first].get(token, row) != row]
        there = {row: token for token, row in rows[first].items()}
        moved += [token for token, row in rows[other].items() if token not in rows[first] and row in there]
        if moved:
            shown = ", ".join(map(repr, moved[:3]))
            cause = f"different vocabularies: {len(moved)} tokens have other rows in {other} than in {first}: {shown}"
            fix = f"{_BY_ROW}; take the embeddings from one adapter with `take`, or leave them out with `drop`"
            inputs.problem(cause, fix)


def merges_rows(inputs: AdapterInputs, reference: str) -> bool:
    """Whether an adapter changes token embeddings or a head that are merged with those of others."""
    saved = [name for name in inputs.saved[reference] if name not in inputs.taken]
    layers = [name for name in inputs.layers[reference] if name not in inputs.taken]
    names = [*saved, *map(inputs.tensor, layers)]
    return input_embedding(names) is not None or any(map(is_head, names))


def _tokenizer(adapter: Adapter) -> bytes | None:
    if _TOKENIZER not in adapter.side_files or adapter.folder is None:
        return None
    path = Path(adapter.folder) / _TOKENIZER
    return path.read_bytes() if path.is_file() else None


def _note_absences(inputs: AdapterInputs) -> None:
    modules = [name for name in inputs.modules() if name not in inputs.taken]
    for reference, own in inputs.layers.items():
        missing = [name for name in modules if name not in own]
        if missing:
            count = f"{len(missing)} of the {len(modules)} modules"
            inputs.notes.append(f"{reference} does not change {count}; there it counts as a change of zero")


def _modules(names: Iterable[str]) -> str:
    return some(list(names)).replace("tensor", "module", 1)


def _listed(values: Mapping[str, str]) -> str:
    grouped: dict[str, list[str]] = {}
    for reference, value in values.items():
        grouped.setdefault(value, []).append(reference)
    return ", ".join(f"{value} in {_and(references)}" for value, references in grouped.items())


def _and(references: Sequence[str]) -> str:
    return " and ".join(references)
