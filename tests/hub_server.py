"""A Hugging Face Hub for tests: the part of its HTTP API that opening and downloading models uses.

Two servers on 127.0.0.1, as the real one has: the Hub itself, and a content network on another
origin to which large files redirect. Every request is recorded with the bytes it transferred.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

MEMBER = "hf_member"
OUTSIDER = "hf_outsider"
LARGE = (".safetensors", ".bin", ".pt")

INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass(frozen=True)
class Request:
    """One answered request."""

    method: str
    path: str
    status: int
    sent: int
    token: str | None


@dataclass
class Repo:
    """A model: commits by name or hash, and who may read it."""

    gated: bool = False
    private: bool = False
    commits: dict[str, str] = field(default_factory=dict)
    files: dict[str, Mapping[str, bytes]] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.files else self.commits.get(revision)


@dataclass
class HubServer:
    """The state of both servers."""

    endpoint: str = ""
    cdn: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    failing: int | None = None

    def add(
        self, repo: str, files: Mapping[str, bytes], *, branch: str = "main", gated: bool = False, private: bool = False
    ) -> str:
        """Commit these files to a branch; returns the hash of the commit."""
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, sort_keys=True)
        commit = hashlib.sha1(f"{repo}{branch}{content}".encode()).hexdigest()
        entry = self.repos.setdefault(repo, Repo(gated, private))
        entry.commits[branch] = commit
        entry.files[commit] = dict(files)
        self.blobs.update({hashlib.sha256(data).hexdigest(): data for data in files.values()})
        return commit

    def seen(self, part: str, method: str | None = None) -> list[Request]:
        """The requests whose path contains `part`."""
        return [request for request in self.requests if part in request.path and method in (None, request.method)]


@dataclass(frozen=True)
class Answer:
    """What to send back."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def error(status: int, code: str | None, message: str) -> Answer:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return Answer(status, headers, json.dumps({"error": message}).encode())


def partial(body: bytes, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    """The body, or the range of it that the request asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if match is None:
        return Answer(200, headers, body)
    start, end = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
    if start > end:
        return Answer(416, {"Content-Range": f"bytes */{len(body)}"})
    return Answer(206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}, body[start : end + 1])


def missing(token: str | None) -> Answer:
    """Who is not logged in is not told whether a repo exists."""
    if token is None:
        return error(401, None, "Invalid username or password.")
    return error(404, "RepoNotFound", "Repository not found")


def refusal(hub: HubServer, repo: str, revision: str, token: str | None) -> Answer | None:
    """Why this commit cannot be seen by this user, or None."""
    if token not in (None, MEMBER, OUTSIDER):
        return error(401, None, "Invalid credentials in Authorization header")
    entry = hub.repos.get(repo)
    if entry is None or (entry.private and token != MEMBER):
        return missing(token)
    if entry.commit(revision) is None:
        return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return None


def info(hub: HubServer, repo: str, revision: str) -> Answer:
    """Commit and files, with sizes and digests."""
    commit = hub.repos[repo].commit(revision)
    assert commit is not None
    content: dict[str, Any] = {"id": repo, "modelId": repo, "sha": commit, "siblings": []}
    for name, data in hub.repos[repo].files[commit].items():
        sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if name.endswith(LARGE):
            sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        content["siblings"].append(sibling)
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())


def resolve(hub: HubServer, repo: str, revision: str, name: str, wanted: str | None, token: str | None) -> Answer:
    """One file: itself if small, a redirect to the content network if large."""
    entry = hub.repos[repo]
    commit = entry.commit(revision)
    assert commit is not None
    if entry.gated and token != MEMBER:
        return error(401 if token is None else 403, "GatedRepo", f"Access to model {repo} is restricted.")
    data = entry.files[commit].get(name)
    if data is None:
        refused = error(404, "EntryNotFound", "Entry not found")
        return Answer(404, {**refused.headers, "X-Repo-Commit": commit}, refused.body)
    if not name.endswith(LARGE):
        etag = hashlib.sha1(data).hexdigest()
        return partial(data, wanted, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
    digest = hashlib.sha256(data).hexdigest()
    headers = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"', "X-Repo-Commit": commit}
    return Answer(302, {**headers, "ETag": f'"{digest}"', "Location": f"{hub.cdn}/cdn/{digest}"})


def respond(hub: HubServer, path: str, wanted: str | None, token: str | None) -> Answer:
    """The answer to a request, whatever its method."""
    if hub.failing is not None:
        return error(hub.failing, None, "Internal error")
    if path.startswith("/cdn/"):
        return partial(hub.blobs[path.removeprefix("/cdn/")], wanted, {"ETag": f'"{path.removeprefix("/cdn/")}"'})
    match = RESOLVE.fullmatch(path) or INFO.fullmatch(path)
    if match is None:
        return error(404, None, "Not found")
    repo, revision = match["repo"], unquote(match["revision"] or "main")
    refused = refusal(hub, repo, revision, token)
    if refused is not None:
        return refused
    if "/resolve/" in path:
        return resolve(hub, repo, revision, unquote(match["name"]), wanted, token)
    return info(hub, repo, revision)


def handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """The request handler of both servers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            answer = respond(hub, path, self.headers.get("Range"), token)
            sent = len(answer.body) if with_body else 0
            hub.requests.append(Request(self.command, path, answer.status, sent, token))
            self.send_response(answer.status)
            for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(answer.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are recorded, not logged."""

    return Handler


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Both servers, on free ports, until the context ends."""
    hub = HubServer()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}) for server in servers]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def configure(settings: Mapping[str, str]) -> None:
    """Give a fresh process these environment variables, before it imports huggingface_hub.

    Whatever it inherited about the Hub goes, and all that is not on this machine is out of reach.
    """
    for name in list(os.environ):
        if name.upper().startswith(("HF_", "HUGGING")) or name.upper().endswith("_PROXY"):
            del os.environ[name]
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    os.environ.update({**quiet, "HTTPS_PROXY": "http://127.0.0.1:9", **settings})


def as_user(token: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with this access token."""
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    return function(*arguments)


class Client:
    """A process of its own that uses the Hub: huggingface_hub reads its settings only once."""

    def __init__(self, endpoint: str, home: Path, *, offline: bool = False) -> None:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), **({"HF_HUB_OFFLINE": "1"} if offline else {})}
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=configure, initargs=(settings,))

    def __call__(self, function: Callable[..., Any], *arguments: Any, token: str | None = None) -> Any:
        """The result of the function in that process; its exceptions are raised here."""
        return self.pool.submit(as_user, token, function, *arguments).result(timeout=90)
