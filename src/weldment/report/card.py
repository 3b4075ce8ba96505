"""The model card: README.md with the metadata that the Hub reads for its family tree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weldment.methods import METHODS
from weldment.plan.plan import Plan
from weldment.report.manifest import recipes
from weldment.version import __version__

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def model_card(plan: Plan, name: str) -> str:
    """The card of the merge `plan`, titled `name`."""
    method = METHODS[plan.recipe.method]
    lines = [
        "---",
        yaml.safe_dump(_metadata(plan), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A merge of {len(set(plan.experts))} model{'s' if len(set(plan.experts)) > 1 else ''} by "
        f"`{method.name}` ({method.summary}), made with weldment {__version__}.",
        "",
    ]
    if method.paper:
        lines += [f"Method: {method.paper}" + (f" ([paper]({method.url}))." if method.url else "."), ""]
    if plan.recipe.base_model:
        lines += [f"Base: {_link(plan, plan.recipe.base_model)}", ""]
    lines += ["Models:", "", *(f"- {_link(plan, expert)}" for expert in dict.fromkeys(plan.experts)), ""]
    lines += ["## Recipe", "", "```yaml", _recipe_text(plan), "```", ""]
    lines += [f"Plan `{plan.hash[:16]}`. `weldment.json` beside this file accounts for every tensor.", ""]
    return "\n".join(lines)


def _recipe_text(plan: Plan) -> str:
    documents = [yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True).strip() for document in recipes(plan)]
    return "\n---\n".join(documents)


def _metadata(plan: Plan) -> dict[str, Any]:
    parents = [parent for reference in _parents(plan) if (parent := _hub_id(plan, reference))]
    return {
        **({"base_model": parents, "base_model_relation": "merge"} if parents else {}),
        **({"library_name": "transformers"} if plan.config else {}),
        "tags": ["weldment", "merge", plan.recipe.method],
    }


def _parents(plan: Plan) -> list[str]:
    stages = {stage.recipe.name: stage for stage in plan.stages}
    found: list[str] = []
    for reference in plan.models:
        found += _parents(stages[reference]) if reference in stages else [reference]
    return list(dict.fromkeys(found))


def _checkpoint(plan: Plan, reference: str) -> Any:
    for candidate in (plan, *plan.stages):
        if reference in candidate.models and candidate.models[reference].repo:
            return candidate.models[reference]
    return None


def _hub_id(plan: Plan, reference: str) -> str | None:
    """The Hub repo of a model; a local copy is known by the `_name_or_path` of its config, if that is one."""
    found = _checkpoint(plan, reference)
    if found is not None:
        return found.repo
    model = plan.models.get(reference)
    origin = (model.config if model is not None else {}).get("_name_or_path")
    return origin if isinstance(origin, str) and _HUB_ID.match(origin) and not Path(origin).exists() else None


def _link(plan: Plan, reference: str) -> str:
    repo = _hub_id(plan, reference)
    shown = Path(reference).name if Path(reference).is_absolute() else reference
    return f"[{shown}](https://huggingface.co/{repo})" if repo else f"`{shown}`"


