"""Networks and configurations of transformers for models in memory, and what in them is a model's head."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from weldment.errors import TaskError
from weldment.evaluation.metrics import missing_extra
from weldment.evaluation.states import Head, ModelState, Tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 3

_LABELS = ("id2label", "label2id", "num_labels")
_OF_HEADS = (*_LABELS, "problem_type", "pad_token_id", "architectures")
_PARTS_OF_HEADS = ("classifier", "pooler", "summary")


def is_of_head(key: str) -> bool:
    """Whether a key of a configuration says how a head calculates, and not how the backbone does."""
    return key in _OF_HEADS or key.startswith(_PARTS_OF_HEADS)


def with_head(model: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model with a head that may come from another one; what the head's is silent of, is too."""
    if not head:
        return dict(model)
    backbone = {key: value for key, value in model.items() if not is_of_head(key)}
    return {**head, **backbone}


def with_outputs(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A configuration with a head of so many outputs, without names of their own."""
    names = [f"LABEL_{place}" for place in range(count)]
    others = {key: value for key, value in config.items() if key not in _LABELS}
    return {**others, "id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}


def load(
    kind: Any, config: PretrainedConfig, tensors: Tensors, name: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A network of a class of transformers with these tensors, or with copies of them in another dtype.

    Raises:
        TaskError: tensors are missing or have other shapes than the configuration says.
    """
    try:
        network, info = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, **{dtype_word(): dtype}
        )
    except (RuntimeError, ValueError) as error:
        cause = f"its tensors do not fit {kind.__name__}: {str(error).splitlines()[0]}"
        raise TaskError(cause, where=name, fix="Look at its config.json, and whose the head is") from error
    _refuse_missing(kind, info["missing_keys"], name)
    return network


def dtype_word() -> str:
    """How transformers calls the dtype; without it, it is that of the configuration, which tensors may exceed."""
    from transformers import __version__

    return "dtype" if int(__version__.partition(".")[0]) >= 5 else "torch_dtype"


def refuse_misfits(kind: Any, wanted: Tensors, given: Tensors, name: str) -> None:
    """Check that a head has all tensors that a network has besides its backbone, in their shapes.

    Raises:
        TaskError: it has not.
    """
    _refuse_missing(kind, [key for key in wanted if key not in given], name)
    for key, tensor in wanted.items():
        if given[key].shape != tensor.shape:
            cause = f"the head's {key} is {list(given[key].shape)}, and {kind.__name__} needs {list(tensor.shape)}"
            raise TaskError(cause, where=name, fix="Give the head of a model of the same architecture and size")


def _refuse_missing(kind: Any, missing: Collection[str], name: str) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise TaskError(
            f"lacks tensors that {kind.__name__} needs: {shown}",
            where=name,
            fix="Give the head that goes with the task: --head TASK=FOLDER or FILE",
        )


def whole_network(state: ModelState) -> PreTrainedModel:
    """The network of the class that a model's configuration names; its backbone where its heads are kept beside it.

    Raises:
        TaskError: transformers does not know the class, or the tensors do not make a whole network.
    """
    with quiet_transformers():
        config = config_of(state.config, state.name)
        kind = named_class(config, state.name, backbone=bool(state.heads))
        try:
            return load(kind, config, state.tensors, state.name)
        except TaskError as error:
            fix = "Put the class that the tensors are of into `architectures` of config.json"
            raise TaskError(error.cause, where=error.where, fix=fix) from error


def named_class(config: PretrainedConfig, name: str, *, backbone: bool = False) -> Any:
    """The class of transformers that a configuration names, or that of the backbone where it names none.

    Raises:
        TaskError: there is no such class.
    """
    import transformers

    named = None if backbone else (config.architectures or [None])[0]
    if named is None:
        found = transformers.MODEL_MAPPING.get(type(config), None)
    else:
        found = getattr(transformers, named, None)
    if found is None:
        cause = f"transformers has no class {named or f'for backbones of the type {config.model_type!r}'}"
        raise TaskError(cause, where=name, fix="Write a class of transformers into `architectures` of config.json")
    return found


def head_of(state: ModelState) -> Head:
    """What a model has besides its backbone, as a head; it may be empty."""
    with quiet_transformers():
        shapes = _head_shapes(json.dumps(state.config), state.name)
    own = {name: state.tensors[name] for name in shapes if name in state.tensors}
    return Head(own, state.config, state.folder)


def outputs_of(head: Head, config: Mapping[str, Any], name: str) -> int | None:
    """How many outputs a head has by its tensors, whatever its configuration says; None if none of them tells.

    Args:
        config: of the model with the head.
        name: of the model.
    """
    with quiet_transformers():
        few, more = (_head_shapes(json.dumps(with_outputs(config, count)), name) for count in (2, 3))
    for key, shape in few.items():
        axes = [axis for axis, (two, three) in enumerate(zip(shape, more[key], strict=True)) if two != three]
        if axes and key in head.tensors and head.tensors[key].ndim == len(shape):
            return head.tensors[key].shape[axes[0]]
    return None


@lru_cache(maxsize=64)
def _head_shapes(content: str, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what a classifier has besides its backbone, from a configuration as JSON."""
    config = config_of(json.loads(content), name)
    kind = classifier_class(config, name)
    network = without_data(kind, config, name)
    prefix = f"{network.base_model_prefix}."
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if not key.startswith(prefix)}


def without_data(kind: Any, config: PretrainedConfig, name: str) -> PreTrainedModel:
    """A network whose tensors have shapes alone.

    Raises:
        TaskError: the configuration contradicts itself.
    """
    try:
        with torch.device("meta"):
            return kind(config)
    except ValueError as error:
        cause = f"its config.json does not make a {kind.__name__}: {str(error).splitlines()[0]}"
        raise TaskError(cause, where=name, fix="Restore the configuration that was saved with the model") from error


def config_of(content: Mapping[str, Any], name: str) -> PretrainedConfig:
    """A configuration of transformers.

    Raises:
        TaskError: there is none, or transformers does not know the kind of model.
    """
    from huggingface_hub import errors
    from transformers import CONFIG_MAPPING

    strict = getattr(errors, "StrictDataclassError", ValueError)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        cause = "has no config.json" if kind is None else f"transformers does not know models of the type {kind!r}"
        raise TaskError(cause, where=name, fix="Models are evaluated with transformers, without code of their own")
    try:
        return CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(content)))
    except (TypeError, ValueError, AttributeError, strict) as error:
        cause = f"its config.json does not fit the type {kind!r}: {' '.join(str(error).split())}"
        raise TaskError(cause, where=name, fix="Restore the configuration that was saved with the model") from error


def classifier_class(config: PretrainedConfig, name: str) -> Any:
    """The class that classifies texts with a backbone.

    Raises:
        TaskError: there is none.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    cause = f"transformers has no classifier for models of the type {config.model_type!r}"
    return _class_in(
        CLASSES, config, TaskError(cause, where=name, fix="Evaluate it by perplexity:FILE or by tasks of lm:NAME")
    )


def writer_class(config: PretrainedConfig, name: str) -> Any:
    """The class that writes text.

    Raises:
        TaskError: there is none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES

    cause = f"models of the type {config.model_type!r} do not write text"
    return _class_in(CLASSES, config, TaskError(cause, where=name, fix="Evaluate it on task folders"))


def _class_in(classes: Any, config: PretrainedConfig, missing: TaskError) -> Any:
    try:
        return classes[type(config)]
    except KeyError as error:
        raise missing from error


def tokenizer_of(state: ModelState) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Raises:
        TaskError: there is none.
    """
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            if state.folder is None:
                raise OSError("the model is in no folder")
            tokenizer = AutoTokenizer.from_pretrained(str(state.folder), local_files_only=True)
            # For some kinds of models, transformers makes a tokenizer without words of no file at all.
            names = {*type(tokenizer).vocab_files_names.values(), "tokenizer.json"}
            if len(names) > 1 and not any((state.folder / name).is_file() for name in names):
                raise OSError(f"there is none of {', '.join(sorted(names))}")
            return tokenizer
        except (OSError, ValueError) as error:
            fix = "Copy the tokenizer's files beside the model's weights"
            raise TaskError(f"has no tokenizer: {str(error).splitlines()[0]}", where=state.name, fix=fix) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
