"""The study's statistics and tables: means over seeds, differences within seeds, and which claims they bear out.

A record is a dict of `world`, `leak_strength`, `seed`, `method` and the rates of METRICS, None where a method has none.
All but `report` and `claims_across` take the records of one world. An interval is Student's, 95 %, over seeds; a
difference is taken within each seed first; p is of the paired two-sided t-test, not corrected for how many there are.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

METRICS = {
    "score": "Score",
    "prior": "Prior",
    "valid": "valid",
    "described": "described",
    "leak": "leak",
    "reasoned": "reasoned",
    "palr_d": "PALR T_d",
    "palr_ra": "PALR T_ra",
    "palr_y": "PALR T_y",
}
WORLD_TITLES = {"demo": "First world: looking", "demo_reasoning": "Second world: reasoning"}
METHODS = {
    "base_free_form": "base, free form",
    "opsd": "OPSD, free form",
    "base": "base",
    "opsd_same_prompt": "OPSD, same prompt",
    "vigos": "**ViGOS**",
    "no_perception": "no perception role",
    "no_reasoning": "no reasoning role",
    "no_reference": "no reference role",
    "reference_forward_kl": "reference role, forward KL",
    "clipped": "clip",
    "paper_rate": "low rate",
    "paper_rate_clipped": "low rate, clip",
    "shuffled_perception": "perception sees another image",
    "shuffled_reasoning": "reasoning sees another image",
    "image_dependence": "tokens by image dependence",
}
MIN_SEEDS = 3  # of fewer there is no interval: with two, Student's is 13 standard errors wide
LEAKY, FAITHFUL = 0.7, 0.0  # the leak strengths that claims are made of
PRIOR_MARGIN = 0.02  # of Prior, that may be lost without being called a loss
GAP_MARGIN = 0.05  # of Score, below which a gap counts as closed

NOTE = (
    "± is half of Student's 95 % interval over seeds (none for fewer than three). Differences are taken within a seed; "
    "p is of the paired two-sided t-test that there is none, not corrected for the number of tests. Score is accuracy "
    "on conflict images, Prior on prior images, valid the share of well-formed responses. Of valid responses to "
    "conflict images: described is the share of descriptions without any error, leak that of descriptions with the "
    "prior; reasoned is accuracy where the description has right what was asked. Leak strength is what was planted in "
    "the base: how often a description of a turn that shows a reference follows it. Clip is the paper's 0.05, low rate "
    "its learning rate scaled to 80 steps. A claim is shown if its interval lies within its bounds, contradicted if it "
    "lies outside, else undecided."
)

LEAK_METRICS = ("score", "prior", "leak", "palr_ra")  # that are shown by leak strength

Records = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      half: half the width of the 95 % interval; NaN for fewer than MIN_SEEDS seeds.
      p: that the mean is 0, two-sided; NaN likewise.
      n: seeds; above: how many of them lie above 0.
    """

    mean: float
    half: float
    p: float
    n: int
    above: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + self.half


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that should come out here, with the number that decides it.

    Attributes:
      source: who says so: paper | project.
      measure: what `evidence` is of; within seeds.
      evidence: None where nothing was measured.
      bounds: the claim is that the measure lies between them.
    """

    text: str
    source: str
    measure: str
    evidence: Estimate | None
    bounds: tuple[float, float]

    @property
    def verdict(self) -> str:
        """shown | undecided | contradicted | too few seeds | not measured."""
        e, (low, high) = self.evidence, self.bounds
        if e is None:
            return "not measured"
        if e.n < MIN_SEEDS:
            return "too few seeds"
        if low < e.low and e.high < high:
            return "shown"
        return "contradicted" if e.high < low or e.low > high else "undecided"


def rates(measured: dict[str, Any], palr: dict[str, Any] | None, *, free_form: bool) -> dict[str, float | None]:
    """METRICS of one student: of its evaluation's rates and, if there is one, PALR's summary.json.

    None where nothing was measured: no rollout is valid, or a role table scores no token of a group.
    """
    has_descriptions = not free_form and measured["valid"]
    groups = {"palr_d": "T_d", "palr_ra": "T_ra", "palr_y": "T_y"}
    ratios = {k: palr[group]["palr"] if palr and palr[group]["tokens"] else None for k, group in groups.items()}
    return {
        "score": measured["score"],
        "prior": measured["prior"],
        "valid": None if free_form else measured["valid"],
        "described": measured["description_accuracy"] if has_descriptions else None,
        "leak": measured["leak"] if has_descriptions else None,
        "reasoned": measured["reasoning"] if has_descriptions else None,
        **ratios,
    }


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one number per seed. ValueError without any."""
    x = np.asarray(values, np.float64)
    n, mean, above = len(x), float(x.mean()), int((x > 0).sum())
    if n < MIN_SEEDS:
        return Estimate(mean, math.nan, math.nan, n, above)
    error = float(x.std(ddof=1)) / math.sqrt(n)
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Estimate(mean, float(stats.t.ppf(0.975, n - 1)) * error, p, n, above)


def worlds(records: Records) -> dict[str, list[dict[str, Any]]]:
    """{world: its records}, of those that have any."""
    found = {world: [r for r in records if r["world"] == world] for world in WORLD_TITLES}
    return {world: its for world, its in found.items() if its}


def by_seed(records: Records, leak: float, method: str, metric: str) -> dict[int, float]:
    """{seed: rate}, of the seeds where there is one."""
    chosen = [r for r in records if r["leak_strength"] == leak and r["method"] == method]
    return {r["seed"]: r[metric] for r in chosen if r.get(metric) is not None}


def within(records: Records, leak: float, metric: str, terms: dict[str, int]) -> dict[int, float]:
    """{seed: sum of sign * rate over `terms`, method -> sign}, of the seeds that have all of them."""
    values = {method: by_seed(records, leak, method, metric) for method in terms}
    seeds = set.intersection(*(set(v) for v in values.values()))
    return {s: sum(sign * values[method][s] for method, sign in terms.items()) for s in sorted(seeds)}


def difference(records: Records, leak: float, first: str, second: str, metric: str) -> Estimate | None:
    """first - second within each seed that has both; None where there is none."""
    found = within(records, leak, metric, {first: 1, second: -1})
    return estimate(list(found.values())) if found else None


def claims(records: Records) -> list[Claim]:
    """What the paper says of its methods and what this project expects of the rest, asked of one world."""
    out = []

    def claim(
        source: str, text: str, measure: str, values: dict[int, float], *, low: float = 0.0, high: float = math.inf
    ) -> None:
        out.append(Claim(text, source, measure, estimate(list(values.values())) if values else None, (low, high)))

    def more(source: str, text: str, metric: str, first: str, second: str, **bounds: float) -> None:
        measure = f"{METRICS[metric]}: {_plain(first)} − {_plain(second)}"
        claim(source, text, measure, within(records, LEAKY, metric, {first: 1, second: -1}), **bounds)

    paper, ours, same = "paper", "project", "opsd_same_prompt"
    more(paper, "ViGOS raises its base's Score", "score", "vigos", "base")
    more(
        paper, f"ViGOS loses less than {PRIOR_MARGIN} of its base's Prior", "prior", "vigos", "base", low=-PRIOR_MARGIN
    )
    more(paper, "ViGOS has a higher Score than OPSD with the same prompt", "score", "vigos", same)
    more(paper, "ViGOS has a higher Score than free-form OPSD", "score", "vigos", "opsd")
    more(paper, "PALR of reasoning and answer is lower under ViGOS", "palr_ra", same, "vigos")
    more(paper, "PALR of all tokens is lower under ViGOS", "palr_y", same, "vigos")
    more(paper, "without the perception role Score is lower", "score", "vigos", "no_perception")
    more(paper, "without the reasoning role Score is lower", "score", "vigos", "no_reasoning")
    more(paper, "without the reference role Score is lower", "score", "vigos", "no_reference")
    more(paper, "with forward KL in the reference role Score is lower", "score", "vigos", "reference_forward_kl")

    more(ours, "ViGOS lowers its base's leak", "leak", "base", "vigos")
    more(ours, "ViGOS leaks less than OPSD with the same prompt", "leak", same, "vigos")
    more(ours, "ViGOS raises the share of valid rollouts", "valid", "vigos", "base")
    more(ours, "without the reference role fewer rollouts are valid", "valid", "vigos", "no_reference")
    free = {"vigos": 1, "base": -1, "opsd": -1, "base_free_form": 1}
    claim(ours, "ViGOS gains more over its base than free-form OPSD over its own",
          "Score: ViGOS − base − (OPSD − base)", within(records, LEAKY, "score", free))  # fmt: skip
    lead = {leak: within(records, leak, "score", {"vigos": 1, same: -1}) for leak in (LEAKY, FAITHFUL)}
    fall = {s: lead[LEAKY][s] - lead[FAITHFUL][s] for s in lead[LEAKY].keys() & lead[FAITHFUL].keys()}
    claim(ours, "ViGOS's lead over OPSD is smaller where no leak was planted",
          f"its Score − OPSD's, at {LEAKY:g} − at {FAITHFUL:g}", fall)  # fmt: skip
    claim(ours, f"where no leak was planted, ViGOS and OPSD are within {GAP_MARGIN} of Score",
          f"its Score − OPSD's, at {FAITHFUL:g}", lead[FAITHFUL], low=-GAP_MARGIN, high=GAP_MARGIN)  # fmt: skip
    more(ours, "the reasoning role teaches reasoning", "reasoned", "vigos", "no_reasoning")
    more(ours, "the perception role teaches looking", "described", "vigos", "no_perception")
    more(ours, "the clip costs Score at the demo's learning rate", "score", "vigos", "clipped")
    more(ours, f"the clip costs less than {GAP_MARGIN} of Score at the low rate", "score", "paper_rate_clipped",
         "paper_rate", low=-GAP_MARGIN)  # fmt: skip
    more(ours, "with clip and low rate ViGOS raises its base's Score", "score", "paper_rate_clipped", "base")
    more(ours, "a perception teacher that sees another image leaves Score lower", "score", "vigos",
         "shuffled_perception")  # fmt: skip
    more(ours, "a perception teacher that sees another image leaves fewer descriptions right", "described", "vigos",
         "shuffled_perception")  # fmt: skip
    more(ours, "a reasoning teacher that sees another image leaves Score lower", "score", "vigos", "shuffled_reasoning")
    more(ours, "weights by image dependence raise Score", "score", "image_dependence", "vigos")
    return out


def claims_across(records: Records) -> list[Claim]:
    """Claims about two worlds. Paired by seed, though equal seeds have little more in common than initial weights."""
    role = {"vigos": 1, "no_reasoning": -1}
    of = worlds(records)
    looking, reasoning = (within(of.get(w, []), LEAKY, "score", role) for w in ("demo", "demo_reasoning"))
    more = [reasoning[s] - looking[s] for s in reasoning.keys() & looking.keys()]
    measure = "Score: ViGOS − no reasoning role, second world − first"
    text = "the reasoning role matters more where answers must be reasoned"
    return [Claim(text, "project", measure, estimate(more) if more else None, (0.0, math.inf))]


def _plain(method: str) -> str:
    return METHODS[method].strip("*")


# Text ---------------------------------------------------------------------------------------------


def with_interval(e: Estimate | None, *, sign: bool = False) -> str:
    """Text like "0.741 ± 0.012"; a dash for none."""
    if e is None:
        return "–"
    mean = f"{e.mean:+.3f}" if sign else f"{e.mean:.3f}"
    return mean if math.isnan(e.half) else f"{mean} ± {e.half:.3f}"


def with_test(e: Estimate | None) -> str:
    """Text like "+0.236 ± 0.012, p 0.0003, 5 of 5 above"; a dash for none."""
    if e is None:
        return "–"
    if math.isnan(e.p):
        return with_interval(e, sign=True)
    p = "< 0.0001" if e.p < 1e-4 else f"{e.p:.2g}" if e.p < 0.1 else f"{e.p:.2f}"
    return f"{with_interval(e, sign=True)}, p {p}, {e.above} of {e.n} above"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def titles(records: Records) -> dict[str, str]:
    """{method: how a table calls it}; methods of one's own stand last."""
    return METHODS | {r["method"]: r["method"] for r in records if r["method"] not in METHODS}


def methods_table(records: Records) -> str:
    """Every method on the leaky bases: means over seeds with their intervals."""
    rows = []
    for method, title in titles(records).items():
        values = [by_seed(records, LEAKY, method, metric) for metric in METRICS]
        if any(values):
            rows.append([title, *map(_mean, values)])
    return table(["", *METRICS.values()], rows)


def differences_table(records: Records) -> str:
    """ViGOS minus every other method, within seeds, on the leaky bases."""
    metrics = ("score", "prior", "leak", "reasoned", "palr_ra")
    rows = []
    for method, title in titles(records).items():
        found = [difference(records, LEAKY, "vigos", method, metric) for metric in metrics]
        if method != "vigos" and any(found):
            rows.append([title, *map(with_test, found)])
    return table(["ViGOS minus", *(METRICS[m] for m in metrics)], rows)


def learned_table(records: Records) -> str:
    """What was planted in the bases and what they made of it."""
    rows = []
    for leak in sorted({r["leak_strength"] for r in records}):
        learned = by_seed(records, leak, "base", "follows_reference")
        leaks = by_seed(records, leak, "base", "leak")
        rows.append([f"{leak:g}", f"{len(learned)}", *(_mean(v) for v in (learned, leaks))])
    return table(
        ["leak strength", "bases", "privileged descriptions that follow a wrong reference", "the student's leak"], rows
    )


def leak_table(records: Records, metric: str) -> str:
    """A rate by leak strength: base, OPSD, ViGOS, and what lies between the last two."""
    rows = []
    for leak in sorted({r["leak_strength"] for r in records}):
        values = [by_seed(records, leak, method, metric) for method in ("base", "opsd_same_prompt", "vigos")]
        gap = difference(records, leak, "vigos", "opsd_same_prompt", metric)
        rows.append([f"{leak:g}", f"{gap.n if gap else 0}", *map(_mean, values), with_test(gap)])
    head = ["base", "OPSD, same prompt", "ViGOS", "ViGOS minus OPSD"]
    return table([f"{METRICS[metric]} at leak strength", "bases", *head], rows)


def claims_table(found: Sequence[Claim]) -> str:
    """The claims with their verdicts."""
    rows = []
    for c in found:
        low, high = c.bounds
        needed = f"> {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        evidence = f"{with_interval(c.evidence, sign=True)} ({needed})"
        rows.append([c.text, c.source, f"**{c.verdict}**", c.measure, evidence, f"{c.evidence.n if c.evidence else 0}"])
    return table(["claim", "source", "", "measure", "mean ± half of the interval (needed)", "seeds"], rows)


def report(records: Records) -> str:
    """All tables, with titles."""
    out = ["# The paper in miniature", NOTE]
    for world, found in worlds(records).items():
        out += [f"## {WORLD_TITLES[world]}: methods, leak strength {LEAKY:g}", methods_table(found)]
        out += ["### Within seeds", differences_table(found)]
        out += ["### With and without the leak", learned_table(found)]
        out += [leak_table(found, metric) for metric in LEAK_METRICS]
        out += ["### Claims", claims_table(claims(found))]
    return "\n\n".join([*out, "## Claims about both worlds", claims_table(claims_across(records))])


def _mean(values: dict[int, float]) -> str:
    return with_interval(estimate(list(values.values())) if values else None)
