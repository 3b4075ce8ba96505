"""The main job: models are opened, examined, measured together, and what was found is put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.checkpoint.staging import MANIFEST
from weldment.doctor.advice import Advice, advise
from weldment.doctor.agreement import Comparison, compare
from weldment.doctor.cases import Cases, compare_tensors, joints_of, open_cases
from weldment.doctor.configs import compare_configs
from weldment.doctor.examining import Facts, examine, examine_numbers, facts_of
from weldment.doctor.findings import Finding, ranked
from weldment.doctor.finished import Finished, examine_merge, merged_from, open_merge
from weldment.doctor.measuring import Numbers, measure
from weldment.doctor.ranks import rank_shares
from weldment.doctor.relating import relate, relate_tokens
from weldment.doctor.sampling import BUDGET, sample
from weldment.engine.progress import Progress, Silent
from weldment.engine.run import default_threads
from weldment.errors import UserError
from weldment.merging import downloaded

if TYPE_CHECKING:
    from weldment.evaluation.scores import Score


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        facts: of each model, the base or the merge first.
        findings: the worst first.
        comparison: of several models; None for one, and for a merge.
        merge: what a finished merge is against its parents; None for models.
        advice: how to merge the models; None if that makes no sense.
        read: elements that were read of all models, of `elements` that they have.
        scores: perplexity on a text, by model, if that was asked for.
    """

    facts: tuple[Facts, ...]
    findings: tuple[Finding, ...]
    comparison: Comparison | None = None
    merge: Finished | None = None
    advice: Advice | None = None
    read: int = 0
    elements: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def has_problems(self) -> bool:
        """Whether a model is broken, or models cannot be merged."""
        return any(finding.level == "problem" for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "ok": not self.has_problems,
            "models": [facts.record() for facts in self.facts],
            "findings": [finding.record() for finding in self.findings],
            "comparison": None if self.comparison is None else self.comparison.record(),
            "merge": None if self.merge is None else self.merge.record(),
            "advice": None if self.advice is None else self.advice.record(),
            "read_elements": self.read,
            "elements": self.elements,
            "perplexity": {name: score.record() for name, score in self.scores.items()},
        }


@dataclass(frozen=True)
class Settings:
    """How to look.

    Attributes:
        full: read every element instead of a sample.
        threads: workers.
        progress: told of downloads and of what is read.
    """

    full: bool
    threads: int
    progress: Progress


def diagnose(
    models: str | Sequence[str],
    *,
    base: str | None = None,
    full: bool = False,
    text: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Examine one model, several models that are to be merged, or a finished merge.

    One folder that `weld merge` wrote is compared with what it was made of. Nothing is written.

    Args:
        models: folders, files, `org/name` on the Hub, adapters, or `base+adapter`.
        base: what they were fine-tuned from; adapters say it themselves.
        full: read every element; by default a sample, the same in every run.
        text: a text file, on which the perplexity of a finished merge and of its parents is calculated.
        threads: workers; all processors by default.
        progress: told of downloads and of what is read.

    Raises:
        UserError: what was given is no model, or names one twice.
        TaskError: the perplexity cannot be calculated.
    """
    references = [models] if isinstance(models, str) else list(models)
    settings = _settings(references, full, threads, progress)
    if base is None and len(references) == 1 and (Path(references[0]).expanduser() / MANIFEST).is_file():
        return _of_merge(references[0], settings, text)
    if text is not None:
        fix = "Give one folder that `weld merge` wrote, or use `weld eval MODEL --task perplexity:FILE`"
        raise UserError("a text compares a finished merge with its parents", where="--text", fix=fix)
    cases = _here(open_cases(references, base), settings)
    facts = tuple(facts_of(model) for model in cases.models)
    numbers, read = _measured(cases, facts, settings)
    found = [*_each(cases, facts), *examine_numbers(cases.given, numbers)]
    elements = sum(one.parameters for one in facts)
    if len(cases.models) == 1:
        return Diagnosis(facts, ranked(found), read=read, elements=elements)
    joints = [tensor.joint for tensor in numbers]
    ranks = rank_shares(joints, 0) if cases.base else {}
    comparison = compare(cases.given, 0 if cases.base else None, numbers, ranks)
    found += [*compare_configs(cases.models), *relate_tokens(cases.given, [one.tokens for one in facts])]
    found += [*compare_tensors(cases), *relate(comparison, cases.adapters)]
    advice, more = advise(cases, comparison, found)
    return Diagnosis(facts, ranked([*found, *more]), comparison, None, advice, read, elements)


def _settings(references: Sequence[str], full: bool, threads: int | None, progress: Progress | None) -> Settings:
    if not references:
        raise UserError("there is no model to examine", fix="Name one or more")
    if threads is not None and threads < 1:
        raise UserError(f"threads (--threads) is {threads}", fix="It must be at least 1")
    return Settings(full, threads or default_threads(), progress or Silent())


def _here(cases: Cases, settings: Settings) -> Cases:
    """The models, with their weights on this machine."""
    if all(model.is_local for model in cases.models):
        return cases
    return cases.with_models([downloaded(model, settings.progress) for model in cases.models])


def _each(cases: Cases, facts: Sequence[Facts]) -> list[Finding]:
    """What is wrong with each model, under the name that the user gave it; adapters say nothing new of their base."""
    found: list[Finding] = []
    for number, (model, own) in enumerate(zip(cases.models, facts, strict=True)):
        if number in cases.adapters and cases.base:
            continue
        found += [replace(finding, subject=cases.given[number]) for finding in examine(model, own)]
    return found


def _measured(cases: Cases, facts: Sequence[Facts], settings: Settings) -> tuple[list[Numbers], int]:
    """The numbers of all tensors, and how many elements were read for them."""
    joints = joints_of(cases.tensors, [one.tokens for one in facts])
    sizes = [joint.numel for joint in joints]
    runs = [[(0, size)] for size in sizes] if settings.full else sample(sizes, budget=BUDGET)
    numbers = measure(joints, runs, settings.threads, settings.progress)
    return numbers, sum(tensor.read * len(tensor.members) for tensor in numbers)


def _of_merge(reference: str, settings: Settings, text: str | None) -> Diagnosis:
    """A finished merge against its parents."""
    made, cases, found = open_merge(merged_from(reference))
    cases = _here(cases, settings)
    facts = tuple(facts_of(model) for model in cases.models)
    numbers, read = _measured(cases, facts, settings)
    found += [replace(finding, subject=reference) for finding in examine(cases.models[0], facts[0])]
    found += examine_numbers(cases.given, numbers)
    merge, more = examine_merge(made, cases, numbers)
    scores = _perplexities(cases, text) if text is not None else {}
    elements = sum(one.parameters for one in facts)
    return Diagnosis(facts, ranked([*found, *more]), None, merge, None, read, elements, scores)


def _perplexities(cases: Cases, text: str) -> dict[str, Score]:
    from weldment.evaluation.evaluate import evaluate

    task = f"perplexity:{text}"
    return {model.reference: next(iter(evaluate(model.reference, [task]).values())) for model in cases.models}
