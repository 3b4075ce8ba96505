"""Two models in, the adapter between them out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from weldment.adapters.adapter import PREFIX
from weldment.adapters.extract.extraction import Examined, ExtractedLayer, Settings, adapter_config, examine
from weldment.adapters.extract.extraction_report import Extraction
from weldment.adapters.extract.pairing import Choice, Pair, pair_up
from weldment.adapters.lowrank import ENERGY
from weldment.adapters.opening import is_adapter_folder
from weldment.adapters.writing import AdapterFolder, write_adapter
from weldment.checkpoint.dtypes import RECIPE, torch_dtype
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.opening import open_checkpoint
from weldment.engine.progress import Amount, Progress, Silent
from weldment.engine.run import default_threads
from weldment.errors import CheckpointError, PlanError, UserError, joined
from weldment.merging import check_target


@dataclass(frozen=True)
class ExtractionResult:
    """A finished extraction.

    Attributes:
        path: where the adapter is.
        layers: its LoRA layers, each with its rank and what was kept.
        saved: the modules that it stores whole.
        unchanged: the number of tensors that both models have with the same values.
        nbytes: of the adapter's tensors.
        model_bytes: of the fine-tune's tensors.
        notes: what the user should know, one sentence each.
    """

    path: Path
    layers: tuple[ExtractedLayer, ...]
    saved: tuple[str, ...]
    unchanged: int
    nbytes: int
    model_bytes: int
    notes: tuple[str, ...] = ()


def extract(
    finetuned: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    rank: int | str = "auto",
    energy: float = ENERGY,
    modules_to_save: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    dtype: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractionResult:
    """Write a PEFT LoRA adapter that approximates a fine-tune: base + adapter is about the fine-tune.

    For the weight W (outputs, inputs) of every linear layer and convolution, the adapter's B (outputs, r) and
    A (r, inputs) are U_r sqrt(S_r) and sqrt(S_r) V_r^T of the singular value decomposition U S V^T of
    W_finetuned - W_base in float64: no product of rank r is nearer in the Frobenius norm. The scale
    is 1 (`lora_alpha` is r). Where the difference is of rank r, the fine-tune comes back up to the rounding of
    `dtype`. A base of more precision than the fine-tune is first rounded as the fine-tune was.

    Embeddings, output heads, norms and biases are left out, and notes say how much they changed, unless they
    are stored whole. Tensors that did not change are left out.

    Args:
        finetuned: a full checkpoint: a folder, a file, or `org/name` on the Hub.
        out: the adapter's folder.
        base: the model that it was trained from.
        rank: the largest rank of a layer, or "auto" for the least that keeps `energy`.
        energy: share of the squared Frobenius norm of every layer's difference, in (0, 1].
        modules_to_save: patterns (globs over names of modules and tensors) of modules to store whole.
        include: patterns of the tensors that may become LoRA layers; all that can by default.
        exclude: patterns of tensors to leave out, also if they do not fit together.
        fan_in_fan_out: matrices are stored as (inputs, outputs); known of GPT-2 and its like.
        dtype: of the adapter. By default float32, which adds nothing to the error, or that of the fine-tune if
            that has 16 bits: it is no more exact itself, and the adapter is half the size.
        threads: matrices at a time, each on one processor; all processors by default, as far as memory allows.
        overwrite: replace a non-empty `out`, once the adapter is complete.
        progress: receives events.

    Raises:
        UserError: the models do not fit together, do not differ, or the output folder cannot be used.
        MergeError: a model holds NaN or infinity, or the adapter cannot be written.
    """
    settings = _settings(rank, energy, dtype)
    if threads is not None and threads < 1:
        raise UserError(f"threads (--threads) is {threads}", fix="It must be at least 1")
    progress = progress or Silent()
    models = _open(str(finetuned), str(base))
    check_target(Path(out), {}, {model.reference: model for model in models}, overwrite=overwrite)
    choice = Choice(tuple(modules_to_save), tuple(include), tuple(exclude), fan_in_fan_out)
    pair_up(*models, choice)  # before anything is downloaded
    new, old = (_local(model, progress) for model in models)
    pairing = pair_up(new, old, choice)
    found = tuple(_examined(pairing.pairs, settings, threads, progress))
    extraction = Extraction(new, old, pairing, found, settings)
    _refuse_nothing(extraction)
    for note in extraction.notes:
        progress.message(f"note: {note}")
    tensors = {name: tensor for each in found for name, tensor in each.tensors.items()}
    tensors |= {f"{PREFIX}{copy}": tensors[f"{PREFIX}{name}"].clone() for copy, name in pairing.copies.items()}
    config = adapter_config(extraction.layers, pairing, (new, old))
    content = AdapterFolder(config, tensors, extraction.card(), extraction.record())
    write_adapter(Path(out), content, overwrite=overwrite)
    return ExtractionResult(
        Path(out),
        extraction.layers,
        pairing.saved,
        extraction.unchanged,
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        model_bytes=sum(entry.nbytes for entry in new.tensors.values()),
        notes=extraction.notes,
    )


def _settings(rank: int | str, energy: float, dtype: str | None) -> Settings:
    if rank != "auto" and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UserError(f"rank (--rank) is {rank!r}", fix="Give a whole number of at least 1, or auto")
    if not 0.0 < energy <= 1.0:
        raise UserError(f"energy (--energy) is {energy!r}", fix="Give a share above 0 and at most 1, such as 0.99")
    if dtype is not None and dtype not in RECIPE:
        raise UserError(f"dtype (--dtype) is {dtype!r}", fix="Use float32, float16 or bfloat16")
    wanted = torch_dtype(RECIPE[dtype]) if dtype is not None else None
    return Settings(rank if isinstance(rank, int) else None, energy, wanted)


def _open(finetuned: str, base: str) -> tuple[Checkpoint, Checkpoint]:
    """The fine-tune and its base; CheckpointError with what is wrong with each."""
    opened: list[Checkpoint] = []
    problems: list[CheckpointError] = []
    for reference, where in ((finetuned, "FINETUNED"), (base, "--base")):
        try:
            opened.append(_open_model(reference, where))
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise joined(CheckpointError, problems)
    first, second = opened
    if _origin(first) == _origin(second):
        raise PlanError("the fine-tune and the base are the same model", where=finetuned, fix="Name two models")
    return first, second


def _origin(model: Checkpoint) -> tuple[object, ...]:
    """The same for two names of one model."""
    root = model.root.resolve() if model.root is not None else None
    return model.repo, model.revision, root, *(file.name for file in model.weight_files)


def _open_model(reference: str, where: str) -> Checkpoint:
    cause = "is an adapter, and an extraction compares full models"
    fix = "Name full models; an adapter is merged into its base by `weld merge` with `output: model`"
    path = Path(reference).expanduser()
    if is_adapter_folder(path) or ("+" in reference and not path.exists()):
        raise CheckpointError(cause, where=f"{where}: {reference}", fix=fix)
    model = open_checkpoint(reference, where=where)
    if any(entry.changes for entry in model.tensors.values()):
        raise CheckpointError(cause, where=f"{where}: {reference}", fix=fix)
    return model


def _local(model: Checkpoint, progress: Progress) -> Checkpoint:
    if model.is_local:
        return model
    # Only models on the Hub need its library.
    from weldment.checkpoint.hub import download

    progress.message(f"downloading {model.reference}")
    return download(model)


def _examined(pairs: Sequence[Pair], settings: Settings, threads: int | None, progress: Progress) -> Iterator[Examined]:
    """What is found of each pair, in order; each worker is one of torch's threads, so their number shows nowhere."""
    before = torch.get_num_threads()
    progress.begin(Amount.of(sum(pair.nbytes for pair in pairs)), Amount.of(0))
    pool = ThreadPoolExecutor(threads or _affordable(pairs), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for found in pool.map(lambda pair: examine(pair, settings), pairs):
            progress.advance(found.pair.name, Amount.of(found.pair.nbytes))
            yield found
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _affordable(pairs: Sequence[Pair]) -> int:
    """As many workers as there are processors, if their matrices fit into half of the machine's memory."""
    largest = max((pair.new.numel for pair in pairs if pair.fate == "layer"), default=1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(default_threads(), memory // 2 // (24 * largest)))


def _refuse_nothing(extraction: Extraction) -> None:
    """PlanError if nothing changed that the adapter could hold."""
    changed = [found for found in extraction.examined if found.energy > 0.0]
    if any(found.pair.fate != "left" for found in changed):
        return
    where = f"{extraction.finetuned.reference}, {extraction.base.reference}"
    if not changed:
        raise PlanError("the models hold the same values: there is nothing to extract", where=where, fix="Check --base")
    names = ", ".join(found.pair.name for found in changed[:3])
    cause = f"the models differ only in tensors that are left out, such as {names}"
    raise PlanError(cause, where=where, fix="Store their modules whole with --save")
