"""Tiny bundles to be served, and servers of them in this process, on free ports of the loopback interface."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from classifiers import save_classifier
from models import GROUPED
from twin_bundles import Expert, make_bundle, random_expert
from weldment.serving.app import create_app
from weldment.serving.batching import Batching
from weldment.serving.engine import Engine
from weldment.serving.limits import Limits
from weldment.serving.server import Server, listen, url_of
from weldment.twin.router import Router, RouterConfig

LABELS = {"mood": ("bad", "good"), "topic": ("sport", "art", "war"), "stars": ("LABEL_0",)}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}{{ m.content }} w1 {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
)


def save_writer(folder: Path, *, template: str | None = TEMPLATE, router: Router | None = None) -> Path:
    """A bundle of a tiny Llama with two experts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "eos_token_id": 3, "tie_word_embeddings": False}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    experts = {name: random_expert(model, seed, scale=0.2) for seed, name in enumerate(("prose", "verse"))}
    make_bundle(folder, model, experts, router)
    if template is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        _restate(folder)
    return folder


def save_reader(folder: Path) -> Path:
    """A bundle of a tiny BERT with three heads: two classifiers, and a regression."""
    wholes = {n: save_classifier(folder / n, labels=v, seed=s) for s, (n, v) in enumerate(LABELS.items())}
    shared = copy.deepcopy(wholes["mood"].base_model)
    experts: dict[str, Expert] = {}
    for seed, (name, whole) in enumerate(wholes.items()):
        experts[name] = expert = random_expert(shared, seed, skip=("pooler",), scale=0.2)
        expert.head = {key: t for key, t in whole.state_dict().items() if not key.startswith(whole.base_model_prefix)}
        expert.head_config = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
    return make_bundle(folder / "reader", shared, experts, fixed("topic"))


def fixed(expert: str) -> Router:
    return Router(RouterConfig("fixed", tuple(LABELS), expert=expert), {})


def _restate(folder: Path) -> None:
    """Let `twin.json` know of files that were changed."""
    import json

    from weldment.report.manifest import file_digest

    content = json.loads((folder / "twin.json").read_text())
    for name, stated in content["files"].items():
        stated |= {"size": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    for path in folder.glob("*.jinja"):
        content["files"][path.name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    (folder / "twin.json").write_text(json.dumps(content))


@dataclass
class Served:
    """A server in a thread of this process."""

    url: str
    engine: Engine
    server: Server
    client: httpx.Client
    thread: threading.Thread = field(repr=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def metric(self, name: str, **labels: str) -> float:
        value = self.server._service.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    def batch_sizes(self, kind: str) -> tuple[float, float]:
        """Batches and rows up to now."""
        count, total = (self.metric(f"weldment_batch_rows_{part}", kind=kind) for part in ("count", "sum"))
        return count, total


@contextmanager
def served(engine: Engine, batching: Batching | None = None, limits: Limits | None = None) -> Iterator[Served]:
    """Serve until the block ends."""
    listener = listen("127.0.0.1", 0)
    started = threading.Event()
    app = create_app(engine, batching or Batching(), limits or Limits())
    server = Server(app, listener, ready=started.set)
    thread = threading.Thread(target=server.serve_all, daemon=True)
    thread.start()
    assert started.wait(30)
    with httpx.Client(base_url=url_of(listener), timeout=30) as client:
        yield Served(url_of(listener), engine, server, client, thread)
    if thread.is_alive():
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
