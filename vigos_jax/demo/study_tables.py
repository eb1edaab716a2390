"""The study's statistics and tables: means over seeds, differences within seeds, and which claims they bear out.

A record is a dict of `leak_strength`, `seed`, `method` and the rates of METRICS, None where a method has none. An
interval is Student's, 95 %, over seeds; a difference is taken within each seed first; p is of the paired two-sided
t-test, not corrected for how many there are.
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
    "leak": "leak",
    "palr_d": "PALR T_d",
    "palr_ra": "PALR T_ra",
    "palr_y": "PALR T_y",
}
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
}
LEAKY, FAITHFUL = 0.7, 0.0  # the leak strengths that claims are made of
PRIOR_MARGIN = 0.02  # of Prior, that may be lost without being called a loss
GAP_MARGIN = 0.05  # of Score, below which a gap counts as closed

Records = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      half: half the width of the 95 % interval; NaN for fewer than two seeds.
      p: that the mean is 0, two-sided; NaN for fewer than two seeds.
      n: seeds; above: how many of them lie above 0.
    """

    mean: float
    half: float
    p: float
    n: int
    above: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that the paper would have here, with the number that decides it.

    Attributes:
      verdict: shown | undecided | contradicted.
    """

    text: str
    verdict: str
    evidence: Estimate


def rates(measured: dict[str, Any], palr: dict[str, Any] | None, *, free_form: bool) -> dict[str, float | None]:
    """METRICS of one student: of its evaluation's rates and, if there is one, PALR's summary.json."""
    of_format = {k: None if free_form else measured[k] for k in ("valid", "leak")}
    groups = {"palr_d": "T_d", "palr_ra": "T_ra", "palr_y": "T_y"}
    ratios = {k: palr[group]["palr"] if palr else None for k, group in groups.items()}
    return {"score": measured["score"], "prior": measured["prior"], **of_format, **ratios}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one number per seed. ValueError without any."""
    x = np.asarray(values, np.float64)
    n, mean, above = len(x), float(x.mean()), int((x > 0).sum())
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n, above)
    error = float(x.std(ddof=1)) / math.sqrt(n)
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Estimate(mean, float(stats.t.ppf(0.975, n - 1)) * error, p, n, above)


def by_seed(records: Records, leak: float, method: str, metric: str) -> dict[int, float]:
    """{seed: rate}, of the seeds where there is one."""
    chosen = [r for r in records if r["leak_strength"] == leak and r["method"] == method]
    return {r["seed"]: r[metric] for r in chosen if r[metric] is not None}


def difference(records: Records, leak: float, first: str, second: str, metric: str) -> Estimate | None:
    """first - second within each seed that has both; None where there is none."""
    a, b = (by_seed(records, leak, method, metric) for method in (first, second))
    seeds = sorted(a.keys() & b.keys())
    return estimate([a[s] - b[s] for s in seeds]) if seeds else None


def gap_change(records: Records) -> Estimate | None:
    """How much of the gap in Score between ViGOS and OPSD comes from the leak: LEAKY - FAITHFUL, within seeds."""
    gaps = []
    for leak in (LEAKY, FAITHFUL):
        a, b = (by_seed(records, leak, method, "score") for method in ("vigos", "opsd_same_prompt"))
        gaps.append({s: a[s] - b[s] for s in a.keys() & b.keys()})
    seeds = sorted(gaps[0].keys() & gaps[1].keys())
    return estimate([gaps[0][s] - gaps[1][s] for s in seeds]) if seeds else None


def claims(records: Records) -> list[Claim]:
    """What the paper says of its methods, asked of this world."""
    out = []

    def above(text: str, evidence: Estimate | None, *, bound: float = 0.0) -> None:
        if evidence is not None:
            is_shown, is_not = evidence.low > bound, evidence.high < bound
            out.append(Claim(text, "shown" if is_shown else "contradicted" if is_not else "undecided", evidence))

    def vigos_minus(other: str, metric: str) -> Estimate | None:
        return difference(records, LEAKY, "vigos", other, metric)

    def minus_vigos(other: str, metric: str) -> Estimate | None:
        return difference(records, LEAKY, other, "vigos", metric)

    above("ViGOS raises its base's Score", vigos_minus("base", "score"))
    above(f"ViGOS loses no more than {PRIOR_MARGIN} of its base's Prior", vigos_minus("base", "prior"),
          bound=-PRIOR_MARGIN)  # fmt: skip
    above("ViGOS lowers its base's leak", minus_vigos("base", "leak"))
    above("ViGOS raises the share of valid rollouts", vigos_minus("base", "valid"))
    above("ViGOS has a higher Score than OPSD with the same prompt", vigos_minus("opsd_same_prompt", "score"))
    above("ViGOS has a higher Score than free-form OPSD", vigos_minus("opsd", "score"))
    above("ViGOS leaks less than OPSD with the same prompt", minus_vigos("opsd_same_prompt", "leak"))
    above("PALR of reasoning and answer is lower under ViGOS", minus_vigos("opsd_same_prompt", "palr_ra"))
    above("PALR of all tokens is lower under ViGOS", minus_vigos("opsd_same_prompt", "palr_y"))
    above("without the perception role Score is lower", vigos_minus("no_perception", "score"))
    above("without the reasoning role Score is lower", vigos_minus("no_reasoning", "score"))
    above("without the reference role Score is lower", vigos_minus("no_reference", "score"))
    above("without the reference role fewer rollouts are valid", vigos_minus("no_reference", "valid"))
    above("with forward KL in the reference role Score is lower", vigos_minus("reference_forward_kl", "score"))
    above("ViGOS's lead over OPSD shrinks when the base does not leak", gap_change(records))
    gap = difference(records, FAITHFUL, "vigos", "opsd_same_prompt", "score")
    if gap is not None:
        is_closed = -GAP_MARGIN < gap.low and gap.high < GAP_MARGIN
        is_open = gap.low > GAP_MARGIN or gap.high < -GAP_MARGIN
        verdict = "shown" if is_closed else "contradicted" if is_open else "undecided"
        out.append(Claim(f"and is within {GAP_MARGIN} of nothing then", verdict, gap))
    return out


# Text ---------------------------------------------------------------------------------------------


def with_interval(e: Estimate | None, *, sign: bool = False) -> str:
    """"0.741 ± 0.012"; a dash for none."""
    if e is None:
        return "–"
    mean = f"{e.mean:+.3f}" if sign else f"{e.mean:.3f}"
    return mean if math.isnan(e.half) else f"{mean} ± {e.half:.3f}"


def with_test(e: Estimate | None) -> str:
    """"+0.236 ± 0.012, p 0.0003, 5 of 5 above"; a dash for none."""
    if e is None:
        return "–"
    if math.isnan(e.p):
        return with_interval(e, sign=True)
    p = "< 0.0001" if e.p < 1e-4 else f"{e.p:.1g}" if e.p < 0.1 else f"{e.p:.2f}"
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
            rows.append([title, *(with_interval(estimate(list(v.values())) if v else None) for v in values)])
    return table(["", *METRICS.values()], rows)


def differences_table(records: Records) -> str:
    """ViGOS minus every other method, within seeds, on the leaky bases."""
    metrics = ("score", "prior", "valid", "leak", "palr_ra")
    rows = []
    for method, title in titles(records).items():
        found = [difference(records, LEAKY, "vigos", method, metric) for metric in metrics]
        if method != "vigos" and any(found):
            rows.append([title, *map(with_test, found)])
    return table(["ViGOS minus", *(METRICS[m] for m in metrics)], rows)


def leak_table(records: Records) -> str:
    """Score by leak strength: base, OPSD, ViGOS, and what lies between the last two."""
    rows = []
    for leak in sorted({r["leak_strength"] for r in records}):
        values = [by_seed(records, leak, method, "score") for method in ("base", "opsd_same_prompt", "vigos")]
        means = [with_interval(estimate(list(v.values())) if v else None) for v in values]
        gap = difference(records, leak, "vigos", "opsd_same_prompt", "score")
        rows.append([f"{leak:g}", f"{gap.n if gap else 0}", *means, with_test(gap)])
    return table(["leak strength", "bases", "base", "OPSD, same prompt", "ViGOS", "ViGOS minus OPSD"], rows)


def claims_table(records: Records) -> str:
    """The claims with their verdicts."""
    return table(["", "", "by"], [[c.text, f"**{c.verdict}**", with_test(c.evidence)] for c in claims(records)])


def report(records: Records) -> str:
    """All tables, with titles."""
    return "\n\n".join(
        [
            "# The paper in miniature",
            f"## Methods, leak strength {LEAKY:g}",
            methods_table(records),
            "## Within seeds",
            differences_table(records),
            "## With and without the leak: Score",
            leak_table(records),
            "## Claims",
            claims_table(records),
        ]
    )
