"""A backbone and four experts on scikit-learn's digits, trained on the CPU in seconds.

The backbone learns to remove noise from images, without labels. Then each task gets a linear head on
the frozen backbone, and its expert fine-tunes a copy of the backbone under that head. So all models
share the four heads, and what is compared is the backbone alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

PIXELS = 64
WIDTH = 64
NOISE = 0.3
BATCH = 64


@dataclass(frozen=True)
class Task:
    """A question about an image of a digit; `label` turns digits into classes."""

    name: str
    question: str
    classes: int
    label: Callable[[Tensor], Tensor]


TASKS = (
    Task("digit", "which digit is it?", 10, lambda digits: digits),
    Task("parity", "is it odd?", 2, lambda digits: digits % 2),
    Task("size", "is it greater than four?", 2, lambda digits: (digits > 4).long()),
    Task("loops", "has it a closed loop?", 2, lambda digits: torch.isin(digits, torch.tensor([0, 6, 8, 9])).long()),
)


@dataclass(frozen=True)
class Images:
    """Images, (n, 64) from 0 to 1, and the digits they show."""

    pixels: Tensor
    digits: Tensor


@dataclass(frozen=True)
class Effort:
    """Steps of training."""

    backbone: int = 200
    head: int = 1500
    expert: int = 800


QUICK = Effort(backbone=100, head=300, expert=150)


def load_images() -> tuple[Images, Images]:
    """60 % of the images to train on and 20 % to test on; the rest was used to choose the settings."""
    found, shown = load_digits(return_X_y=True)
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))
    pixels, digits = torch.tensor(found, dtype=torch.float32)[order] / 16, torch.tensor(shown)[order]
    train, test = int(0.6 * len(order)), int(0.8 * len(order))
    return Images(pixels[:train], digits[:train]), Images(pixels[test:], digits[test:])


def new_backbone() -> nn.Sequential:
    """Three layers with ReLU."""
    layers: list[nn.Module] = []
    for inputs in (PIXELS, WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers)


def minimise(
    loss: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], images: int, steps: int, rate: float
) -> None:
    """Adam on random batches; `loss` takes the indices of a batch."""
    optimiser = torch.optim.AdamW(list(parameters), lr=rate, weight_decay=1e-3)
    chance = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(images, (BATCH,), generator=chance)
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()


def pretrained(images: Images, steps: int) -> nn.Sequential:
    """The backbone that all experts start from."""
    torch.manual_seed(0)
    backbone, decoder = new_backbone(), nn.Linear(WIDTH, PIXELS)
    chance = torch.Generator().manual_seed(2)

    def loss(batch: Tensor) -> Tensor:
        clean = images.pixels[batch]
        noisy = clean + NOISE * torch.randn(clean.shape, generator=chance)
        return nn.functional.mse_loss(decoder(backbone(noisy)), clean)

    minimise(loss, [*backbone.parameters(), *decoder.parameters()], len(images.digits), steps, 1e-3)
    return backbone


def fine_tuned(base: nn.Sequential, task: Task, images: Images, effort: Effort) -> tuple[nn.Sequential, nn.Linear]:
    """An expert: a head trained on the frozen base, then a backbone trained under the frozen head."""
    torch.manual_seed(3)
    head, backbone = nn.Linear(WIDTH, task.classes), copy.deepcopy(base)
    labels = task.label(images.digits)
    with torch.no_grad():
        features = base(images.pixels)

    def head_loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(features[batch]), labels[batch])

    def backbone_loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(backbone(images.pixels[batch])), labels[batch])

    minimise(head_loss, head.parameters(), len(labels), effort.head, 3e-3)
    head.requires_grad_(False)
    minimise(backbone_loss, backbone.parameters(), len(labels), effort.expert, 2e-4)
    return backbone, head


def save_model(folder: Path, backbone: nn.Module, head: nn.Module | None = None) -> None:
    """Write `model.safetensors` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"backbone": backbone} | ({} if head is None else {"head": head})
    tensors = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "digits-mlp", "hidden_size": WIDTH, "num_hidden_layers": 3, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_models(folder: Path, images: Images, effort: Effort) -> None:
    """Write the base and the experts, one sub-folder each."""
    base = pretrained(images, effort.backbone)
    save_model(folder / "base", base)
    for task in TASKS:
        save_model(folder / task.name, *fine_tuned(base, task, images, effort))


def load_part(file: Path, part: str) -> dict[str, Tensor]:
    """The tensors of the backbone or the head in a checkpoint, without their prefix."""
    return {
        name.removeprefix(f"{part}."): value for name, value in load_file(file).items() if name.startswith(f"{part}.")
    }


def accuracies(weights: Mapping[str, Tensor], heads: Mapping[str, Path], images: Images) -> dict[str, float]:
    """Accuracy in each task of a backbone with these weights, under the head in the file of each task."""
    backbone = new_backbone()
    backbone.load_state_dict(dict(weights))
    found: dict[str, float] = {}
    with torch.no_grad():
        features = backbone(images.pixels)
        for task in TASKS:
            head = load_part(heads[task.name], "head")
            guesses = nn.functional.linear(features, head["weight"], head["bias"]).argmax(dim=1)
            found[task.name] = (guesses == task.label(images.digits)).double().mean().item()
    return found
