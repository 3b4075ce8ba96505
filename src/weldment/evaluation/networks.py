"""Networks of transformers that run a model in memory; the networks of several heads share one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from weldment.errors import TaskError
from weldment.evaluation.metrics import missing_extra
from weldment.evaluation.states import Head, ModelState, Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 3


class Networks:
    """Networks for one model after another.

    The first model is loaded as transformers loads it. Where the next ones have the same tensors, these are
    copied into the networks that are there.

    Args:
        device: where they run.
        dtype: of the arithmetic.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        self._state: ModelState | None = None
        self._networks: dict[int, tuple[Head, PreTrainedModel]] = {}
        self._backbone: PreTrainedModel | None = None
        self._writer: PreTrainedModel | None = None

    def use(self, state: ModelState) -> None:
        """From now on the networks are those of this model."""
        if state is self._state:
            return
        self._state = state
        self._writer = None
        names = None if self._backbone is None else names_of(self._backbone, state.tensors)
        if names is None:
            self._networks.clear()
            self._backbone = None
            return
        assert self._backbone is not None
        with torch.no_grad():
            for name, target in self._backbone.state_dict().items():
                target.copy_(state.tensors[names[name]])

    def classifier(self, head: Head) -> PreTrainedModel:
        """The model with a head, ready to classify.

        Raises:
            TaskError: the model and the head do not make a whole network.
        """
        assert self._state is not None
        known = self._networks.get(id(head))
        if known is None:
            known = self._networks[id(head)] = (head, self._built(self._state, head))
        return known[1]

    def writer(self) -> PreTrainedModel:
        """The model as one that writes text.

        Raises:
            TaskError: it is not of such a kind.
        """
        assert self._state is not None
        if self._writer is None:
            state = self._state
            with _transformers():
                config = config_of(state.config, state.name)
                network = load(_writer_class(config, state.name), config, state.tensors, state.name)
            self._writer = self._ready(network)
        return self._writer

    def _built(self, state: ModelState, head: Head) -> PreTrainedModel:
        with _transformers():
            config = config_of(head.config or state.config, state.name)
            kind = _classifier_class(config, state.name)
            if self._backbone is not None and isinstance(self._backbone, _backbone_class(kind, config)):
                network = _with_backbone(kind, config, self._backbone, head, state.name)
            else:
                network = load(kind, config, {**state.tensors, **head.tensors}, state.name)
                self._backbone = getattr(network, network.base_model_prefix)
            return self._ready(network)

    def _ready(self, network: torch.nn.Module) -> Any:
        return network.to(device=self._device, dtype=self._dtype).eval()


def names_of(backbone: PreTrainedModel, tensors: Tensors) -> dict[str, str] | None:
    """For each tensor of a network, the name of a model's tensor that belongs there; None if one is missing."""
    found: dict[str, str] = {}
    for name, target in backbone.state_dict().items():
        spellings = (name, f"{backbone.base_model_prefix}.{name}")
        match = next((n for n in spellings if n in tensors and tensors[n].shape == target.shape), None)
        if match is None:
            return None
        found[name] = match
    return found


def load(kind: Any, config: PretrainedConfig, tensors: Tensors, name: str) -> PreTrainedModel:
    """A network of a class of transformers with these tensors.

    Raises:
        TaskError: tensors are missing or have other shapes than the configuration says.
    """
    try:
        network, info = kind.from_pretrained(None, config=config, state_dict=dict(tensors), output_loading_info=True)
    except RuntimeError as error:
        cause = f"its tensors do not fit {kind.__name__}: {str(error).splitlines()[0]}"
        raise TaskError(cause, where=name) from error
    _refuse_missing(kind, info["missing_keys"], name)
    return network


def _refuse_missing(kind: Any, missing: Any, name: str) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise TaskError(
            f"lacks tensors that {kind.__name__} needs: {shown}",
            where=name,
            fix="Give the head that goes with the task: --head TASK=FOLDER or FILE",
        )


def _with_backbone(
    kind: Any, config: PretrainedConfig, backbone: PreTrainedModel, head: Head, name: str
) -> PreTrainedModel:
    """A network with a head of its own and a backbone that others have too."""
    with torch.device("meta"):
        network = kind(config)
    setattr(network, network.base_model_prefix, backbone)
    own = [key for key in network.state_dict() if not key.startswith(f"{network.base_model_prefix}.")]
    _refuse_missing(kind, [key for key in own if key not in head.tensors], name)
    try:
        network.load_state_dict({key: head.tensors[key].clone() for key in own}, strict=False, assign=True)
    except RuntimeError as error:
        raise TaskError(f"the head does not fit {kind.__name__}: {error}", where=name) from error
    return network


def head_of(state: ModelState) -> Head:
    """What a model has besides its backbone, as a head; it may be empty."""
    with _transformers():
        config = config_of(state.config, state.name)
        prefix = _classifier_class(config, state.name).base_model_prefix
    own = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(f"{prefix}.")}
    has_prefix = len(own) < len(state.tensors)
    return Head(own if has_prefix else {}, state.config)


def config_of(content: Mapping[str, Any], name: str) -> PretrainedConfig:
    """A configuration of transformers.

    Raises:
        TaskError: there is none, or transformers does not know the kind of model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING:
        cause = "has no config.json" if kind is None else f"transformers does not know models of the type {kind!r}"
        raise TaskError(cause, where=name, fix="Models are evaluated with transformers, without code of their own")
    return AutoConfig.for_model(**content)


def _classifier_class(config: PretrainedConfig, name: str) -> Any:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    try:
        return CLASSES[type(config)]
    except KeyError as error:
        cause = f"transformers has no classifier for models of the type {config.model_type!r}"
        raise TaskError(cause, where=name, fix="Evaluate it by perplexity:FILE or by tasks of lm:NAME") from error


def _writer_class(config: PretrainedConfig, name: str) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES

    try:
        return CLASSES[type(config)]
    except KeyError as error:
        cause = f"models of the type {config.model_type!r} do not write text"
        raise TaskError(cause, where=name, fix="Evaluate it on task folders") from error


def _backbone_class(kind: Any, config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return type(getattr(kind(config), kind.base_model_prefix))


def tokenizer_of(state: ModelState) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Raises:
        TaskError: there is none.
    """
    with _transformers():
        from transformers import AutoTokenizer

        try:
            if state.folder is None:
                raise OSError("the model is in no folder")
            return AutoTokenizer.from_pretrained(str(state.folder), local_files_only=True)
        except (OSError, ValueError) as error:
            fix = "Copy the tokenizer's files beside the model's weights"
            raise TaskError(f"has no tokenizer: {str(error).splitlines()[0]}", where=state.name, fix=fix) from error


@contextmanager
def _transformers() -> Iterator[None]:
    """Work with transformers, which speaks up only about errors; without it, an error that says what to install."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise missing_extra() from error
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
