"""Models on the Hugging Face Hub: opened from headers alone, downloaded when asked to.

All traffic goes through huggingface_hub, so its cache, its tokens and its environment variables
(HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) mean what its users expect. What opening a repo
transfers is its list of files, its JSON files and the first bytes of its safetensors files.
Torch files cannot be described without their end, so repos that have no other weights are
downloaded when they are opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from weldment.checkpoint.contents import (
    FOREIGN,
    LEFT_OUT,
    SAFETENSORS,
    module_folders,
    parse_json,
    read_contents,
    select_weights,
    side_files,
)
from weldment.checkpoint.headers import PREFIX_BYTES, header_length, parse_header
from weldment.checkpoint.local import (
    MODULES,
    Folder,
    folder_source,
    open_folder,
    read_bytes,
    tensor_entries,
    weight_file,
)
from weldment.checkpoint.model import Checkpoint, TensorEntry, WeightFile
from weldment.checkpoint.refusals import ADAPTER_CONFIG, missing_weights, refuse_adapter
from weldment.errors import CheckpointError, HubError

FIRST_BYTES = 1 << 16
"""Enough for the header of almost every shard, so that most files take one request."""

CONNECTIONS = 8

# huggingface_hub has changed its HTTP library more than once; its own error derives from that
# library's. Its downloader in native code raises RuntimeError.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    *cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__),
)

OFFLINE_FIX = "Check the connection, or set HF_HUB_OFFLINE=1 to use only what is in the cache"

NOT_FOUND = (
    "there is no such folder here, and no such model on the Hub that this account may see",
    "Check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """The files of a repo at one commit, as a `Source`."""

    repo: str
    commit: str
    files: Mapping[str, WeightFile]

    @property
    def names(self) -> frozenset[str]:
        """The files in the root."""
        return frozenset(name for name in self.files if "/" not in name)

    def place(self, name: str = "") -> str:
        """The repo at this commit, or a file in it."""
        return f"{self.repo}@{self.commit[:8]}" + (f": {name}" if name else "")

    def nested_weights(self) -> Collection[str]:
        """None: a sub-folder of a repo cannot be named on its own."""
        return ()

    def json(self, name: str) -> Any:
        """The content of a JSON file, which is downloaded."""
        return parse_json(read_bytes(fetch(self.repo, name, self.commit)), self.place(name))

    def tensors(self, names: Sequence[str]) -> list[tuple[WeightFile, list[TensorEntry]]]:
        """What the headers of these files say; torch files are downloaded for it."""
        files = [self.files[name] for name in names]
        return list(zip(files, parallel(self._tensors, files), strict=True))

    def _tensors(self, file: WeightFile) -> list[TensorEntry]:
        path = cached(self.repo, file.name, self.commit)
        if path is None and not file.name.endswith(SAFETENSORS):
            path = fetch(self.repo, file.name, self.commit)
        return self._remote_tensors(file) if path is None else tensor_entries(file, path)

    def _remote_tensors(self, file: WeightFile) -> list[TensorEntry]:
        """The tensors of a safetensors file, from its first bytes."""
        place = self.place(file.name)
        first = self._read(file.name, 0, min(FIRST_BYTES, file.size))
        length = header_length(first, file.size, place)
        end = PREFIX_BYTES + length
        rest = self._read(file.name, len(first), end) if end > len(first) else b""
        header = parse_header((first + rest)[PREFIX_BYTES:end], file.size - end, place)
        return [TensorEntry(e.name, e.dtype, e.shape, file, end + e.start) for e in header.tensors.values()]

    def _read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, over the network."""
        if end <= start:
            return b""
        url = hf_hub_url(self.repo, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with explained(self.repo, self.commit):
            response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
        if len(response.content) != end - start:
            cause = f"the Hub sent {len(response.content)} bytes instead of {end - start}"
            raise HubError(cause, where=self.place(name), fix="Try again; behind a proxy, let range requests pass")
        return response.content


def open_repo(repo: str, revision: str | None = None) -> Checkpoint:
    """A model on the Hub, without its weights unless they are in the cache already.

    Args:
        repo: `org/name`.
        revision: branch, tag or commit; the main branch if None.

    Returns:
        The checkpoint, pinned to a commit. Its files have no path, and it no root, until all of
        them are in the cache (`download`).

    Raises:
        HubError: not found, private, gated, or out of reach.
        CheckpointError: the repo holds no model that can be merged.
    """
    reference = f"{repo}@{revision}" if revision else repo
    if constants.HF_HUB_OFFLINE:
        return _open_cached(repo, revision, reference)
    source = remote(repo, revision)
    if is_adapter(source):
        refuse_adapter(source.json(ADAPTER_CONFIG), reference)
    contents = read_contents(source)
    modules = module_folders(source.json(MODULES)) if MODULES in source.names else ()
    checkpoint = Checkpoint(
        reference=reference,
        tensors=contents.tensors,
        weight_files=contents.weight_files,
        config=contents.config,
        side_files=side_files(source.files, modules),
        repo=repo,
        revision=source.commit,
    )
    paths = {name: cached(repo, name, source.commit) for name in _wanted(checkpoint)}
    found = {name: path for name, path in paths.items() if path is not None}
    return _localised(checkpoint, found) if len(found) == len(paths) else checkpoint


def download(checkpoint: Checkpoint) -> Checkpoint:
    """Download a model that `open_repo` opened, its weights and its side files, into the cache.

    Args:
        checkpoint: from `open_repo`; one that is complete on this machine is returned as it is.

    Returns:
        The same checkpoint with paths.

    Raises:
        HubError: a file cannot be downloaded.
    """
    repo, commit = checkpoint.repo, checkpoint.revision
    if checkpoint.root is not None or repo is None or commit is None:
        return checkpoint
    names = _wanted(checkpoint)
    paths = parallel(lambda name: fetch(repo, name, commit), names)
    local = _localised(checkpoint, dict(zip(names, paths, strict=True)))
    sizes = dict(zip(names, (path.stat().st_size for path in paths), strict=True))
    _record_revision(local, repo, min(names, key=sizes.__getitem__))
    return local


def fetch(repo: str, name: str, commit: str) -> Path:
    """One file of a repo, from the cache or downloaded into it; HubError if that fails."""
    with explained(repo, commit, name):
        return Path(hf_hub_download(repo, name, revision=commit))


def cached(repo: str, name: str, commit: str) -> Path | None:
    """One file of a repo, if it is in the cache."""
    path = try_to_load_from_cache(repo, name, revision=commit)
    return Path(path) if isinstance(path, str) else None


def remote(repo: str, revision: str | None) -> Remote:
    """The files of a repo at a branch, tag or commit; HubError if they cannot be listed."""
    with explained(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    place = f"{repo}@{revision}" if revision else repo
    if info.sha is None:
        raise HubError("the Hub did not name the commit", where=place, fix="Check HF_ENDPOINT")
    files: dict[str, WeightFile] = {}
    for sibling in info.siblings or ():
        if sibling.size is None:
            raise HubError(
                f"the Hub did not tell the size of {sibling.rfilename}", where=place, fix="Check HF_ENDPOINT"
            )
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        files[sibling.rfilename] = WeightFile(sibling.rfilename, sibling.size, sha256=sha256)
    return Remote(repo, info.sha, files)


def _open_cached(repo: str, revision: str | None, reference: str) -> Checkpoint:
    """A model from the cache alone."""
    needless = [f"*{suffix}" for suffix in FOREIGN] + list(LEFT_OUT)
    try:
        with explained(repo, revision):
            root = Path(snapshot_download(repo, revision=revision, local_files_only=True, ignore_patterns=needless))
        _require_weights(root)
    except CheckpointError as error:
        raise incomplete(reference) from error
    if is_adapter(source := folder_source(root)):
        refuse_adapter(source.json(ADAPTER_CONFIG), reference)
    return open_folder(root, reference, repo=repo, revision=root.name)


def incomplete(reference: str) -> HubError:
    """The error for what offline mode cannot open."""
    cause = "is not complete in the cache, and offline mode (HF_HUB_OFFLINE) is on"
    return HubError(cause, where=reference, fix="Run once without HF_HUB_OFFLINE to download it")


def is_adapter(source: Remote | Folder) -> bool:
    """Whether there is an adapter and no model."""
    return ADAPTER_CONFIG in source.names and select_weights(source.names, source.json, source.place) is None


def _require_weights(root: Path) -> None:
    """CheckpointError if weights are missing, as they are when only headers were read before."""
    source = folder_source(root)
    if select_weights(source.names, source.json, source.place) is None and ADAPTER_CONFIG not in source.names:
        raise missing_weights(source.names, (), source.place())


def _wanted(checkpoint: Checkpoint) -> list[str]:
    """The files to download; those that adapters brought are here."""
    weights = [file.name for file in checkpoint.weight_files if file.path is None]
    return weights + [name for name in checkpoint.side_files if name not in checkpoint.elsewhere]


def _localised(checkpoint: Checkpoint, paths: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint with the paths of all its files in the cache."""
    files: dict[str, WeightFile] = {}
    for remote in (file for file in checkpoint.weight_files if file.path is None):
        local = weight_file(paths[remote.name], remote.name)
        if local.size != remote.size:
            cause = f"has {local.size} bytes in the cache and {remote.size} on the Hub"
            raise HubError(cause, where=str(local.path), fix="Delete the file from the cache and try again")
        files[remote.name] = replace(local, sha256=local.sha256 or remote.sha256)
    first = checkpoint.weight_files[0].name

    def found(file: WeightFile) -> WeightFile:
        return files[file.name] if file.path is None else file

    return replace(
        checkpoint,
        root=paths[first].parents[first.count("/")],
        weight_files=tuple(map(found, checkpoint.weight_files)),
        tensors={name: replace(entry, file=found(entry.file)) for name, entry in checkpoint.tensors.items()},
    )


def _record_revision(checkpoint: Checkpoint, repo: str, name: str) -> None:
    """Have the cache learn which commit the user's branch or tag is, as offline mode needs it, by one of the files."""
    revision = checkpoint.reference.partition("+")[0].partition("@")[2] or None
    with explained(repo, revision):
        hf_hub_download(repo, name, revision=revision)


def parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The function of every item, in order; the first error cancels what has not begun."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def explained(repo: str, revision: str | None, name: str | None = None) -> Iterator[None]:
    """Turn the errors of huggingface_hub, and of the network under it, into HubError."""
    try:
        yield
    except (HFValidationError, EntryNotFoundError, *TRANSPORT_ERRORS) as error:
        cause, fix = _explanation(error, repo, revision, name)
        raise HubError(cause, where=f"{repo}@{revision}" if revision else repo, fix=fix) from error


def _explanation(error: Exception, repo: str, revision: str | None, name: str | None) -> tuple[str, str]:
    """Cause and fix of an error, the most specific first."""
    url = f"{constants.ENDPOINT}/{repo}"
    match error:
        case GatedRepoError():
            fix = f"Ask for access at {url}, then log in with `hf auth login` or set HF_TOKEN"
            return "the model is gated, and this account has no access to it", fix
        case RepositoryNotFoundError():
            return NOT_FOUND
        case RevisionNotFoundError():
            return f"the model has no branch, tag or commit {revision!r}", f"See {url}/commits for what there is"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            return f"{name or 'the model'} is not in the cache, and the Hub cannot be reached", OFFLINE_FIX
        case EntryNotFoundError():
            return f"the model has no file {name!r} at this revision", f"See {url}/tree/{revision or 'main'}"
        case HFValidationError():
            return "is neither a file or folder here nor a valid name of a model", "Name models as org/name"
        case HfHubHTTPError():
            return _status_explanation(error.response.status_code if error.response is not None else 0)
        case OSError(errno=int(number)) if not isinstance(error, ConnectionError):
            return f"the Hub's cache cannot be used: {os.strerror(number)}", "Set HF_HOME to a folder with free space"
        case _:
            return f"the Hub cannot be reached at {constants.ENDPOINT} ({type(error).__name__})", OFFLINE_FIX


def _status_explanation(status: int) -> tuple[str, str]:
    # Without a token, the Hub answers 401 for whatever is not public, and so for what does not exist.
    if status == 404 or (status == 401 and get_token() is None):
        return NOT_FOUND
    match status:
        case 401 | 403:
            return f"the Hub refused the access token (HTTP {status})", "Log in again with `hf auth login`"
        case 429:
            return "the Hub limits the rate of requests (HTTP 429)", "Wait a few minutes, or log in for a higher limit"
        case _:
            return f"the Hub answered with an error (HTTP {status})", "Try again later"
