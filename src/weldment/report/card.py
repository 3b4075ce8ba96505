"""The model card: README.md with the metadata that the Hub reads for its family tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from weldment.checkpoint.model import Checkpoint
from weldment.methods import METHODS
from weldment.planning.plan import Plan
from weldment.recipe.recipe import Recipe
from weldment.report.manifest import recipes
from weldment.version import __version__

LINES = "LiNeS ([Wang et al., ICLR 2025](https://arxiv.org/abs/2410.17146))"
SUBSPACE_BOOST = "subspace boosting ([Skorobogat et al., 2025](https://arxiv.org/abs/2506.16506))"


def model_card(plan: Plan) -> str:
    """The card of a merge; the same for every run of the same plan."""
    method = METHODS[plan.recipe.method]
    experts = list(dict.fromkeys(plan.experts))
    sections = [
        _front_matter(plan),
        f"# {_title(plan)}",
        f"A merge of {len(experts)} model{'s' if len(experts) > 1 else ''} by `{method.name}` ({method.summary}), "
        f"made with weldment {__version__}.",
    ]
    if method.paper:
        sections.append(f"Method: {method.paper}" + (f" ([paper]({method.url}))." if method.url else "."))
    if plan.recipe.is_finished:
        sections.append(f"Post-processing: {'; then '.join(_finish(plan.recipe))}.")
    if plan.recipe.recalibrate is not None:
        sections.append("Running statistics of batch normalisation were measured anew on unlabelled inputs.")
    if plan.recipe.base_model:
        sections.append(f"Base: {_link(plan, plan.recipe.base_model)}")
    sections.append("Models:\n\n" + "\n".join(f"- {_link(plan, expert)}" for expert in experts))
    sections.append(f"## Recipe\n\n```yaml\n{_recipe_text(plan)}\n```")
    sections.append(f"Plan `{plan.hash[:16]}`. `weldment.json` beside this file accounts for every tensor.")
    return "\n\n".join(sections) + "\n"


def _finish(recipe: Recipe) -> Iterator[str]:
    """What was done to the merged change, in its order."""
    if recipe.subspace_boost is not None:
        yield f"{SUBSPACE_BOOST} with {recipe.subspace_boost:g}"
    if (scale := recipe.layer_scale) is not None:
        yield f"{LINES}, from {scale.first:g} in the first layer to {scale.last:g} in the last"


def _front_matter(plan: Plan) -> str:
    return f"---\n{yaml.safe_dump(_metadata(plan), sort_keys=False, allow_unicode=True).strip()}\n---"


def _title(plan: Plan) -> str:
    if plan.recipe.name:
        return plan.recipe.name
    return f"{_short(plan, plan.recipe.base_model or plan.experts[0])}, merged by {plan.recipe.method}"


def _recipe_text(plan: Plan) -> str:
    names = _public_names(plan)
    documents = [_renamed(document, names) for document in recipes(plan)]
    return "\n---\n".join(yaml.safe_dump(d, sort_keys=False, allow_unicode=True).strip() for d in documents)


def _public_names(plan: Plan) -> dict[str, str]:
    """The folders that the recipe names by absolute paths, which are nobody's business, and their last parts."""
    plans = (plan, *plan.stages)
    named = [reference for each in plans for reference in each.models]
    own = [folder for each in plans for folder in (each.recipe.save_path, each.recipe.recalibrate)]
    named += [folder.strip().rstrip("/") for folder in own if folder is not None]
    return {text: Path(text).name for text in named if Path(text).expanduser().is_absolute()}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A recipe, or a part of it, with other names of models."""
    if isinstance(value, Mapping):
        return {_renamed(key, names): _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if not isinstance(value, str):
        return value
    reference = value.strip().rstrip("/").removeprefix("model:")
    return names.get(reference, value)


def _metadata(plan: Plan) -> dict[str, Any]:
    repos = dict.fromkeys(model.repo for model in parents(plan) if model.repo)
    library = _library(plan)
    return {
        **({"base_model": list(repos), "base_model_relation": "merge"} if repos else {}),
        **({"library_name": library} if library else {}),
        "tags": ["weldment", "merge", plan.recipe.method],
    }


def _library(plan: Plan) -> str | None:
    if "modules.json" in plan.side.side_files:
        return "sentence-transformers"
    return "transformers" if "model_type" in plan.config else None


def parents(plan: Plan) -> list[Checkpoint]:
    """Every model that was merged, also into intermediate merges; not these themselves."""
    made = {stage.recipe.name for stage in plan.stages}
    plans = (plan, *plan.stages)
    return [model for each in plans for reference, model in each.models.items() if reference not in made]


def _link(plan: Plan, reference: str) -> str:
    repo = _repo(plan, reference)
    shown = _short(plan, reference)
    return f"[{shown}](https://huggingface.co/{repo})" if repo else f"`{shown}`"


def _repo(plan: Plan, reference: str) -> str | None:
    return plan.models[reference].repo if reference in plan.models else None


def _short(plan: Plan, reference: str) -> str:
    """A model's reference; of a path on this machine only its last part."""
    return reference if _repo(plan, reference) else Path(reference).name or reference
