"""What an experiment's report says in sentences; every number in them comes from its results. No torch."""

from collections.abc import Mapping, Sequence

from ebft_mega.apps.experiment.arm_values import CROSS_ENTROPY
from ebft_mega.apps.experiment.comparing import LEVEL, Finding, Verdict
from ebft_mega.apps.experiment.experiment_findings import Declared, Findings
from ebft_mega.apps.experiment.experiment_tables import choice_text, extent, interval_text, p_text, seeds_text
from ebft_mega.apps.experiment.spec import ExperimentSpec
from ebft_mega.apps.experiment.trials import Choice
from ebft_mega.apps.report.metric_names import metric_named

RULE = (
    "Shown: the intervals over rows, over documents, and over documents and seeds leave out zero, training was "
    f"repeated, and Holm's correction for the number of primary comparisons gives p < {LEVEL:g}. Suggested: the "
    "intervals leave out zero, but there is one seed, or the correction does not hold. The interval quoted is the "
    "widest of the three."
)
GENERAL_LIMITS = (
    "The intervals cover the seeds of training and the documents of the report split: not other corpora, models, sizes "
    "or settings.",
    "Best temperatures are the best of those that were tried, on the tuning split; the report split chose nothing.",
    "A seed varies what the training's seed varies; where arms start from the same model, its own training is not "
    "varied.",
    "Alignment and raw cosine also rise when a policy only gets sharper; the duplicate share then rises with them. "
    "Read the feature-matching loss beside them.",
)


def verdict_sentences(declared: Sequence[Declared], number: int) -> dict[str, list[str]]:
    """One sentence for each primary comparison, sorted by what may be said.

    Args:
        number: of primary comparisons, which p is corrected for.
    """
    titles: dict[Verdict, str] = {"shown": "Shown", "suggested": "Suggested", "not shown": "Not shown"}
    return {
        title: [declared_sentence(each, number) for each in declared if each.finding.verdict == verdict]
        for verdict, title in titles.items()
    }


def declared_sentence(declared: Declared, number: int = 0) -> str:
    """What one comparison says, with its numbers and those at the other choice of temperatures."""
    finding = declared.finding
    text = f"{_claim(finding)}: {interval_text(finding.evidence.quoted)} at {_at(finding)}"
    text += f"; {_seeds(finding)}, {finding.evidence.interval.rows} rows"
    p = p_text(finding.evidence.interval.p)
    text += f"; p {p}" + (f", corrected for {number} comparisons {p_text(finding.corrected_p)}" if number else "")
    if finding.verdict == "suggested":
        text += f" ({_why_suggested(finding)})"
    text += "."
    if declared.counterpart is not None:
        other = declared.counterpart
        text += f" At {_at(other)}: {interval_text(other.evidence.quoted)}, {_leaning(other)}."
    return text


def secondary_sentence(declared: Declared) -> str:
    """What a secondary comparison says; nothing corrects it for the number of them."""
    by_itself = {"shown": "Shown by its own intervals", "suggested": "Suggested", "not shown": "Not shown"}
    return f"{by_itself[declared.finding.verdict]}: {declared_sentence(declared)}"


def arm_sentences(spec: ExperimentSpec, findings: Findings, choices: Mapping[str, Choice]) -> list[str]:
    """What each arm is, in the spec's words, with what was chosen for it."""
    sentences = []
    for arm in findings.arms:
        declared = spec.arms[arm.arm]
        parts = [declared.about.rstrip(".")] if declared.about else []
        parts += [f"like {declared.like}"] if declared.like else []
        parts += [f"starts from {declared.start}"] if declared.start else []
        parts += [f"the model {declared.model} as it is"] if declared.model else []
        parts += [", ".join(f"{key} = {value}" for key, value in declared.set.items())] if declared.set else []
        parts += [f"chosen: {choice_text(choices[arm.arm])}"] if choices.get(arm.arm) else []
        parts.append(f"seeds: {seeds_text(arm.seeds)}")
        sentences.append(f"{arm.arm} — {'; '.join(parts)}.")
    return sentences


def limit_sentences(spec: ExperimentSpec, findings: Findings) -> list[str]:
    """What the experiment does not show: the spec's own words, those of every experiment, and notes on single arms."""
    limits = [*spec.limits, *findings.notes, *GENERAL_LIMITS]
    number = len(findings.table) + len(findings.by_features) + len(findings.by_length)
    limits.append(
        f"Secondary comparisons and tables are not corrected: of {number} differences in tables with 95 % intervals of "
        "their own, one in twenty of those without a difference leaves out zero by chance."
    )
    if len(findings.primary) == 0:
        limits.append("No primary comparison was named beforehand, so nothing here is more than suggested.")
    if findings.documents is None:
        limits.append("Rows have no documents, so rows are taken to be independent.")
    return limits


def _claim(finding: Finding) -> str:
    metric = metric_named(finding.metric)
    if finding.verdict == "not shown":
        return f"No difference in {metric.label} between {finding.arm} and {finding.against} is shown"
    better = {True: ", which is better", False: ", which is worse", None: ""}[finding.is_better]
    return f"{finding.arm} has a {finding.direction} {metric.label} than {finding.against}{better}"


def _at(finding: Finding) -> str:
    ours, theirs = (measure.temperature for measure in finding.measures)
    if finding.metric == CROSS_ENTROPY:
        return f"temperature {ours:g}"
    if finding.at == "equal_temperature":
        return f"equal temperature {ours:g}"
    return f"each arm's best temperature ({ours:g} and {theirs:g})"


def _seeds(finding: Finding) -> str:
    seeds = finding.evidence.seeds
    return f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}" if seeds else "models without seeds"


def _why_suggested(finding: Finding) -> str:
    reasons = ["one seed"] if len(finding.evidence.seeds) == 1 else []
    is_held = finding.corrected_p is None or finding.corrected_p < LEVEL
    return " and ".join([*reasons, *([] if is_held else ["the correction does not hold"])])


def _leaning(finding: Finding) -> str:
    words = {1: "higher", -1: "lower", 0: "no difference shown"}[finding.evidence.sign]
    return words if not finding.evidence.sign else f"{words} by its own intervals"


def experiment_extent(findings: Findings) -> str:
    """Arms, rows and documents, for the page's head."""
    return f"{len(findings.arms)} arms on {extent(findings)}"
