"""A world's three figures, as SVG: rates by method, PALR by group of tokens, and ViGOS's lead against the leak."""

import pathlib
from typing import Any

from vigos_jax.errors import InputError
from vigos_jax.miniature.tables import LEAKY, Records, by_seed, difference, estimate, titles, within, worlds

COLORS = {"base": "#8a8f98", "opsd_same_prompt": "#c8553d", "opsd": "#e09f5a", "vigos": "#2a6fbb"}
OTHER = "#7c9cc2"  # ablations


def check() -> None:
    """Raises InputError where figures cannot be drawn, before hours are spent."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise InputError("figures need matplotlib: pip install 'vigos-jax[study]'") from e


def draw(records: Records, folder: pathlib.Path) -> None:
    """Writes WORLD_methods.svg, WORLD_palr.svg and WORLD_leak.svg for each world."""
    for world, found in worlds(records).items():
        for name, figure in (("methods", _methods), ("palr", _palr), ("leak", _leak)):
            _save(figure(found), folder / f"{world}_{name}.svg")


def _figure(width: float, height: float, *, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: pathlib.Path) -> None:
    import matplotlib

    # The same bytes for the same numbers.
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _methods(records: Records) -> Any:
    """Every method's rates, a point per seed; the bar is the mean, the line its interval."""
    figure, axes = _figure(13, 5.2, columns=4)
    panels = {
        "score": "Score: right although\nit contradicts the prior",
        "prior": "Prior: right, and\nas expected",
        "leak": "leak: descriptions that\nstate the prior",
        "reasoned": "reasoned: right, where what\nwas asked is described right",
    }
    there = {r["method"] for r in records if r["leak_strength"] == LEAKY}
    names = {m: title.strip("*") for m, title in titles(records).items() if m in there}
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for y, method in enumerate(names):
            values = list(by_seed(records, LEAKY, method, metric).values())
            if not values:
                continue
            color, e = COLORS.get(method.removesuffix("_free_form"), OTHER), estimate(values)
            axis.errorbar(e.mean, y, xerr=e.half, color=color, marker="|", markersize=14, capsize=3)
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.45, markersize=4)
        axis.set_yticks(range(len(names)), names.values() if axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1)
        axis.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    return figure


def _palr(records: Records) -> Any:
    """PALR of OPSD and ViGOS by group of tokens: bars are means, points are seeds."""
    figure, (axis,) = _figure(6, 3.4)
    groups = {"palr_d": "description", "palr_ra": "reasoning and answer", "palr_y": "all tokens"}
    for i, method in enumerate(("opsd_same_prompt", "vigos")):
        for x, metric in enumerate(groups):
            values = list(by_seed(records, LEAKY, method, metric).values())
            if not values:
                continue
            at, e = x + 0.36 * (i - 0.5), estimate(values)
            label = titles(records)[method].strip("*") if x == 0 else None
            axis.bar(at, e.mean, 0.34, yerr=e.half, capsize=4, color=COLORS[method], alpha=0.75, label=label)
            axis.plot([at] * len(values), values, "o", color="#30343b", alpha=0.5, markersize=3)
    axis.set_xticks(range(len(groups)), groups.values())
    axis.set_ylabel("PALR")
    axis.set_ylim(0, None)
    axis.set_title("How much of the correction hangs on the answer that was shown", fontsize=10)
    axis.legend(frameon=False)
    return figure


def _leak(records: Records) -> Any:
    """Score of ViGOS minus that of OPSD, against the leak that was planted in the base."""
    figure, (axis,) = _figure(6, 3.4)
    strengths = sorted({r["leak_strength"] for r in records})
    means = []
    for leak in strengths:
        gaps = list(within(records, leak, "score", {"vigos": 1, "opsd_same_prompt": -1}).values())
        axis.plot([leak] * len(gaps), gaps, "o", color=COLORS["vigos"], alpha=0.45, markersize=5)
        gap = difference(records, leak, "vigos", "opsd_same_prompt", "score")
        means.append(gap.mean if gap else float("nan"))
        if gap:
            axis.errorbar(leak, gap.mean, yerr=gap.half, color=COLORS["vigos"], capsize=5)
    axis.plot(strengths, means, "-", color=COLORS["vigos"])
    axis.axhline(0, color="#30343b", linewidth=0.8)
    axis.set_xticks(strengths)
    axis.set_xlabel("leak strength of the base: text-driven share of its privileged rows")
    axis.set_ylabel("Score, ViGOS minus OPSD")
    axis.set_title("ViGOS's lead, by the leak that was planted in the base", fontsize=10)
    return figure
