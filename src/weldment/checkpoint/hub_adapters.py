"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download

from weldment.checkpoint.hub import explained, fetch, incomplete, is_adapter, parallel, remote
from weldment.checkpoint.local import folder_source
from weldment.checkpoint.refusals import ADAPTER_CONFIG
from weldment.checkpoint.side_files import is_tokenizer_file


def fetch_adapter(repo: str, revision: str | None, weights: Sequence[str]) -> tuple[Path, str] | None:
    """Download an adapter: its configuration, its weights, which are small, and its tokenizer.

    Args:
        repo: `org/name`.
        revision: branch, tag or commit; the main branch if None.
        weights: names that its file of weights may have, the best first.

    Returns:
        The folder in the cache and the commit; None if the repo holds no adapter, or a model of its own.

    Raises:
        HubError: not found, private, gated, or out of reach.
    """
    if constants.HF_HUB_OFFLINE:
        return _cached_adapter(repo, revision, weights)
    source = remote(repo, revision)
    if not is_adapter(source):
        return None
    found = next(([name] for name in weights if name in source.names), [])
    names = [ADAPTER_CONFIG, *found, *(name for name in source.names if is_tokenizer_file(name))]
    config, *_ = parallel(lambda name: fetch(repo, name, source.commit), names)
    with explained(repo, revision):
        hf_hub_download(repo, ADAPTER_CONFIG, revision=revision)  # the cache learns what the branch or tag is
    return config.parent, source.commit


def _cached_adapter(repo: str, revision: str | None, weights: Sequence[str]) -> tuple[Path, str] | None:
    with explained(repo, revision):
        root = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[ADAPTER_CONFIG]))
    source = folder_source(root)
    if not is_adapter(source):
        return None
    if not any(name in source.names for name in weights):
        raise incomplete(f"{repo}@{revision}" if revision else repo)
    return root, root.name
