"""The model card and the manifest of a merged adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from weldment.adapters.merge.plan import AdapterPlan
from weldment.report.manifest import FORMAT
from weldment.version import __version__


def adapter_card(plan: AdapterPlan) -> str:
    """The text of README.md; the same for every run of the same plan."""
    what = _what(plan)
    count = len(dict.fromkeys(plan.experts))
    base = plan.config["base_model_name_or_path"]
    sections = [
        f"---\n{yaml.safe_dump(_metadata(plan), sort_keys=False, allow_unicode=True).strip()}\n---",
        f"# {plan.recipe.name or f'Adapters merged by {what}'}",
        f"A merge of {count} LoRA adapter{'s' if count > 1 else ''} by `{what}`, made with weldment {__version__}.",
    ]
    if base:
        sections.append(f"Base: {_link(base, _repo_of(base))}")
    adapters = "\n".join(f"- {_link(ref, plan.adapters[ref].repo)}" for ref in dict.fromkeys(plan.experts))
    sections.append(f"Adapters:\n\n{adapters}")
    sections.append(f"## Recipe\n\n```yaml\n{_recipe_text(plan)}\n```")
    sections.append(f"Plan `{plan.hash[:16]}`. `weldment.json` beside this file accounts for every tensor.")
    return "\n\n".join(sections) + "\n"


def _what(plan: AdapterPlan) -> str:
    combination = plan.recipe.combination
    return plan.recipe.method if combination is None else combination.type


def _metadata(plan: AdapterPlan) -> dict[str, Any]:
    base = _repo_of(plan.config["base_model_name_or_path"] or "")
    return {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "peft",
        "tags": ["weldment", "merge", "lora", _what(plan)],
    }


def _repo_of(base: str) -> str | None:
    """The Hub's name of a base; a path on somebody's machine has none."""
    is_name = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    return base if is_name else None


def _link(reference: str, repo: str | None) -> str:
    return f"[{reference}](https://huggingface.co/{repo})" if repo else f"`{Path(reference).name or reference}`"


def _recipe_text(plan: AdapterPlan) -> str:
    """The recipe; of paths on this machine, which are nobody's business, only the last parts."""
    text = yaml.safe_dump(dict(plan.recipe.source), sort_keys=False, allow_unicode=True).strip()
    named = [*plan.adapters, *(path for path in (plan.recipe.base_model, plan.recipe.save_path) if path)]
    for reference in sorted(named, key=len, reverse=True):
        if Path(reference).expanduser().is_absolute():
            text = text.replace(reference, Path(reference).name)
    return text


def adapter_manifest(plan: AdapterPlan, ranks: Mapping[str, int], lost: Mapping[str, float]) -> dict[str, Any]:
    """What `weldment.json` records besides checksums; the same for every run of the same plan.

    Args:
        ranks: by module.
        lost: relative error of the cut to the rank, by module.
    """
    return {
        "format": FORMAT,
        "versions": {"weldment": __version__, "torch": torch.__version__, "numpy": numpy.__version__},
        "plan": plan.hash,
        "recipe": [plan.recipe.source],
        "seed": plan.recipe.seed,
        "inputs": input_files(plan),
        "notes": list(plan.notes),
        "modules": {
            module.name: {"space": module.space, "rank": ranks[module.name]}
            | ({"lost": float(f"{lost[module.name]:.6g}")} if plan.recipe.combination is None else {})
            for module in plan.modules
        },
        "ledger": fates(plan),
    }


def input_files(plan: AdapterPlan) -> dict[str, Any]:
    """By adapter: revision and files, with size, and SHA-256 where it was known for free."""
    found: dict[str, Any] = {}
    for reference, adapter in plan.adapters.items():
        files = [
            {"name": file.name, "size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
            for file in adapter.files
        ]
        found[reference] = {**({"revision": adapter.revision} if adapter.revision else {}), "files": files}
    return found


def fates(plan: AdapterPlan) -> dict[str, dict[str, dict[str, str]]]:
    """By adapter and fate: the tensors, each with the detail that the ledger gives, mostly none."""
    account: dict[str, dict[str, dict[str, str]]] = {}
    for entry in plan.ledger:
        account.setdefault(entry.model, {}).setdefault(entry.fate, {})[entry.tensor] = entry.detail
    return account
