"""`TwinModel.from_pretrained`: a bundle as a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import CheckpointError, UserError
from weldment.twin.bundle import Bundle, ExpertPart, read_bundle

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from weldment.twin.heads import Outputs


class TwinModel:
    """Loads a Twin bundle. What comes back is a model of transformers' own class, with a little more:

    >>> model = TwinModel.from_pretrained("out/")                             # doctest: +SKIP
    >>> model(**tokenizer(texts, padding=True, return_tensors="pt")).logits   # doctest: +SKIP

    Every module that the experts change adds to its output y_b the mix of the input's row b,

        y_b += sum_t w_bt (B_t A_t x_b + D_t x_b + c_t),

    and norms have vectors of their own for each row; weights are never rebuilt. w comes from the first of these that
    there is: `experts` (a name for all rows or one for each) or `expert_weights` (rows, experts) of the call, those
    held by `with model.weights(...)`, those that the key-value cache was made with, the router.

    model(..., experts=, expert_weights=, task=): as the class's `forward`. With heads (`task_class`), a row goes
        through that of `task` (a name or one for each row) or of the router's first choice. With one name the logits
        are those of that head, (rows, C). Otherwise the logits of all heads stand one after the other, (rows, sum C),
        and those of other heads than the row's are -inf: softmax and argmax see the row's own alone, and
        `config.id2label` names them "EXPERT/LABEL". So `pipeline("text-classification")` gives the routed expert's
        labels. `labels` count within the row's head. The number that a regression gives is its logit.
    model.generate(..., experts=, expert_weights=): as the class's; routed once, on the prompt.
    model.route(input_ids, attention_mask): a `Routing`: `weights`, `probabilities`, `fallback`.
    model.weights(W): a context in which the model does not route.
    model.classify(inputs, task=): an `Answer` for each row: `expert`, `label`, `labels`, `scores`, `weights`.
    model.expert_names, model.twin: the names in the order of the weights; the bundle, the router, the heads' outputs.

    One thread at a time may call a model. The shared parameters are frozen, and the exclusive parts are buffers.
    """

    def __init__(self) -> None:
        raise UserError("TwinModel is loaded, not made", fix="Call TwinModel.from_pretrained(FOLDER)")

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        task_class: str | type | None = None,
        check: bool = True,
    ) -> PreTrainedModel:
        """The model in a bundle, in evaluation mode.

        Args:
            folder: what `weld twin build` wrote.
            dtype: of the arithmetic, such as "bfloat16"; None for that of the shared model's tensors.
            device: where it runs; None for the CPU.
            task_class: transformers' class; None for that of the experts if all have heads, else the shared model's.
            check: compare all files with the digests in `twin.json`.

        Raises:
            CheckpointError: a file is missing or altered, or a part of the bundle cannot be calculated for each row.
            UserError: there is no such class, or transformers is not installed.
        """
        from weldment.evaluation.networks import quiet_transformers

        bundle = read_bundle(folder, check=check)
        with quiet_transformers():
            return _loaded(bundle, dtype, device, task_class)


def _loaded(bundle: Bundle, dtype: Any, device: Any, task_class: str | type | None) -> PreTrainedModel:
    from weldment.twin.attaching import attach, prove
    from weldment.twin.heads import attach_heads, outputs_of_heads
    from weldment.twin.mixing import Mix
    from weldment.twin.router import load_router
    from weldment.twin.runtime import Twin

    router = load_router(bundle.router, bundle.names)
    kind, has_heads = _class(bundle, task_class)
    outputs = outputs_of_heads(bundle.experts) if has_heads else ()
    network = _network(kind, bundle, dtype, outputs)
    mix = Mix()
    chosen = attach_heads(network, bundle.experts, outputs) if outputs else None
    layers = attach(network, bundle, mix)
    twin = Twin(network, bundle, router, mix, (chosen, outputs) if chosen is not None else None)
    prove(network, layers, mix, twin.chosen)
    twin.install()
    return network if device is None else network.to(device)  # pyright: ignore[reportArgumentType]


def _class(bundle: Bundle, task_class: str | type | None) -> tuple[Any, bool]:
    """The class to load, and whether it has the experts' heads."""
    import transformers

    heads = [expert for expert in bundle.experts if expert.head is not None]
    own = _own_class(bundle, heads)
    name = task_class or (_class_of_heads(heads) if heads else own)
    kind = getattr(transformers, name, None) if isinstance(name, str) else name
    if kind is None:
        raise UserError(f"transformers has no class {name!r}", where=str(bundle.folder), fix="Give `task_class`")
    has_heads = bool(heads) and kind.__name__ != own
    if has_heads and len(heads) < len(bundle.experts):
        without = next(expert.name for expert in bundle.experts if expert.head is None)
        cause = f"the expert {without!r} has no head, and {heads[0].name!r} has one"
        raise UserError(cause, where=str(bundle.folder), fix=f"To load it without heads, give task_class={own!r}")
    return kind, has_heads


def _own_class(bundle: Bundle, heads: Sequence[ExpertPart]) -> str | None:
    """The class of the shared model: of the backbone where its configuration names that of the experts' heads."""
    from transformers import AutoConfig

    from weldment.evaluation.networks import named_class

    named = bundle.shared["class"]
    if named is None or named not in map(_architecture, heads):
        return named
    config = AutoConfig.from_pretrained(bundle.folder, local_files_only=True)
    return named_class(config, str(bundle.folder), backbone=True).__name__


def _architecture(expert: ExpertPart) -> str | None:
    """The class that the configuration of an expert with a head names."""
    from weldment.twin.heads import head_config

    return (head_config(expert).get("architectures") or [None])[0]


def _class_of_heads(experts: Sequence[ExpertPart]) -> str:
    names = [_architecture(expert) for expert in experts]
    others = [expert.name for expert, name in zip(experts, names, strict=True) if name != names[0]]
    if names[0] is None or others:
        cause = f"the experts' heads are of different classes: {', '.join(map(str, names))}"
        raise UserError(cause, fix="Give `task_class`, and build bundles of experts with the same kind of head")
    return names[0]


def _network(kind: Any, bundle: Bundle, dtype: Any, outputs: tuple[Outputs, ...]) -> PreTrainedModel:
    """The shared model's network; what it lacks are parts of heads, which are put in later.

    Raises:
        CheckpointError: other tensors are missing.
    """
    from weldment.evaluation.networks import dtype_word

    config = kind.config_class.from_pretrained(bundle.folder)
    if outputs:
        labels = [f"{e.name}/{label}" for e, o in zip(bundle.experts, outputs, strict=True) for label in o.labels]
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: place for place, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    given = {"config": config, dtype_word(): dtype or "auto", "output_loading_info": True, "local_files_only": True}
    try:
        network, info = kind.from_pretrained(bundle.folder, **given)
    except (OSError, ValueError, RuntimeError) as error:
        cause = f"the shared model does not load as {kind.__name__}: {str(error).splitlines()[0]}"
        raise CheckpointError(cause, where=str(bundle.folder), fix="Give `task_class`, or build again") from error
    missing = [key for key in info["missing_keys"] if not outputs or _is_inside(network, key)]
    if missing:
        cause = f"the shared model lacks tensors of {kind.__name__}: {', '.join(sorted(missing)[:3])}"
        raise CheckpointError(cause, where=str(bundle.folder), fix="Give `task_class`, a class that it is of")
    return network.eval().requires_grad_(False)


def _is_inside(network: PreTrainedModel, key: str) -> bool:
    """Whether a tensor belongs to the backbone; poolers there may come with the heads."""
    return key.startswith(f"{network.base_model_prefix}.") and ".pooler." not in key
