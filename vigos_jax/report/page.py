"""Pages to look at: one self-contained HTML file, no network, everything that comes from models and data escaped.

A page is a title and a list of sections, each a frozen dataclass below or a row of `charts.Chart`; `page.html.j2` and
`chart.html.j2` draw them. A page has at most one script, `page.js` for a browser of snapshots and the numbers of charts
or `compare.js` for a comparison of runs, and lets no other one run.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from vigos_jax.report import charts
from vigos_jax.report.charts import Chart, Color

# One color each for roles, and for whatever else is told apart by color: blue, orange, green, magenta, maroon, slate.
# Each is seen on white, and told from all others with any kind of color blindness.
PALETTE: tuple[Color, ...] = (
    *((0, 90, 181), (220, 120, 0), (0, 150, 120)),
    *((200, 80, 170), (110, 20, 20), (60, 66, 74)),
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs, one per line, under a heading if there is a title."""

    lines: Sequence[str]
    title: str = ""

    kind = "text"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells; the caller formats numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    kind = "table"

    def __post_init__(self):
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"table {self.title!r}: a row has not {len(self.head)} cells")

    def text(self) -> str:
        """The same for a terminal."""
        cells = [list(self.head), *[list(row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.head))]

        def line(row: list[str]) -> str:
            first, *rest = zip(row, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])

        return "\n".join([self.title, *(line(row).rstrip() for row in cells), *([self.note] if self.note else [])])


@dataclasses.dataclass(frozen=True)
class Token:
    """A piece of text with a background: red, green, blue 0-255, strength 0-1; `title` shows on hover."""

    text: str
    color: tuple[int, int, int] = (0, 0, 0)
    strength: float = 0.0
    title: str = ""

    @property
    def background(self) -> str:
        """The color behind the token as a style sheet writes it."""
        r, g, b = (int(min(max(x, 0), 255)) for x in self.color)
        return f"rgba({r},{g},{b},{min(max(self.strength, 0.0), 1.0):.3f})"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Images (data URIs), what was asked, and the tokens of a response; `mark` is "right", "wrong" or ""."""

    title: str
    question: str
    tokens: Sequence[Token]
    images: Sequence[str] = ()
    mark: str = ""

    kind = "rollout"


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    title: str
    charts: Sequence[Chart]
    note: str = ""

    kind = "charts"


@dataclasses.dataclass(frozen=True)
class Folded:
    """Plain text that is shown when its title is clicked."""

    title: str
    text: str

    kind = "folded"


@dataclasses.dataclass(frozen=True)
class Shot:
    """A response at some moment.

    Attributes:
      tags: "valid", "invalid", "right", "wrong", "leaky"; they are what can be filtered by.
      note: a line about it.
      tokens: pieces of text, in order.
      roles: per token, which of the browser's roles scores it; -1 for none.
      strengths: per token, how strong its color is, 0-1.
      hovers: per token, what shows on hover after the role's name.
    """

    tags: Sequence[str]
    note: str
    tokens: Sequence[str]
    roles: Sequence[int]
    strengths: Sequence[float]
    hovers: Sequence[str]

    def __post_init__(self):
        if not len(self.tokens) == len(self.roles) == len(self.strengths) == len(self.hovers):
            raise ValueError("a shot's lists must have one entry per token")


@dataclasses.dataclass(frozen=True)
class Probe:
    """A question that is asked again and again: its response at each of the browser's steps, None without one."""

    title: str
    question: str
    picture: str
    shots: Sequence[Shot | None]


@dataclasses.dataclass(frozen=True)
class Browser:
    """Responses to the same questions at several steps: the first beside the chosen one, filtered by tags.

    Attributes:
      first: what to call the student of the first step.
    """

    title: str
    note: str
    roles: Sequence[tuple[str, Color]]
    steps: Sequence[int]
    probes: Sequence[Probe]
    first: str

    kind = "browser"

    def data(self) -> dict[str, Any]:
        """What `page.js` reads."""
        roles = [{"name": name, "color": list(color)} for name, color in self.roles]
        probes = [dataclasses.asdict(probe) for probe in self.probes]
        return {"roles": roles, "steps": list(self.steps), "probes": probes, "first": self.first}


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A run in a comparison.

    Attributes:
      href: its own page; "" for none.
      cells: what the table says of it, as texts.
      fields: its config, field -> value as text.
      curves: title -> (step, number, moving mean) by ascending step; units: title -> unit of y.
    """

    name: str
    href: str
    cells: Sequence[str]
    fields: Mapping[str, str]
    curves: Mapping[str, Sequence[tuple[float, float | None, float | None]]]
    units: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs in a table; of those that are chosen, at most as many as there are colors, `compare.js` draws the curves."""

    title: str
    note: str
    colors: Sequence[Color]
    head: Sequence[str]
    runs: Sequence[ComparedRun]

    kind = "comparison"

    def __post_init__(self):
        if any(len(run.cells) != len(self.head) for run in self.runs):
            raise ValueError(f"comparison {self.title!r}: a run has not {len(self.head)} cells")

    def data(self) -> dict[str, Any]:
        """What `compare.js` reads: numbers that are not finite are gaps."""
        finite = lambda y: None if y is None or not math.isfinite(y) else y  # noqa: E731
        runs = [
            {
                "name": run.name,
                "fields": dict(run.fields),
                "units": dict(run.units),
                "curves": {t: [(x, finite(y), finite(m)) for x, y, m in points] for t, points in run.curves.items()},
            }
            for run in self.runs
        ]
        sizes = {name: getattr(charts, name.upper()) for name in ("width", "height", "left", "right", "top", "bottom")}
        return {"colors": [list(color) for color in self.colors], "runs": runs, "sizes": sizes}


Section = Text | Table | Rollout | Charts | Folded | Browser | Comparison


def image_uri(image: Image.Image, *, size: int = 160) -> str:
    """A thumbnail as a data URI."""
    image = image.convert("RGB")
    image.thumbnail((size, size))
    if max(image.size) < size:  # tiny images are shown pixel by pixel
        factor = size // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mix(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """The color `share` of the way from a to b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


@functools.cache
def _file(name: str) -> str:
    return (pathlib.Path(__file__).parent / name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    # StrictUndefined: a section that lacks a field is an error, not an empty cell.
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, loader=loader, **options)
    # Not ASCII-escaped, so that `write_page` replaces lone surrogates here too; NaN is not valid JSON.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    sizes = ("width", "height", "left", "right", "top", "bottom")
    environment.globals |= {name: getattr(charts, name.upper()) for name in sizes}
    # This template defines no macros: Jinja makes a reference cycle of a macro and its context, which holds the page's
    # data. An imported macro belongs to the imported file's context, which exists only once.
    return environment.get_template("page.html.j2")


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    kinds = {s.kind for s in sections}
    script = _file("compare.js") if "comparison" in kinds else _file("page.js") if kinds & {"browser", "charts"} else ""
    # Allowed by its hash: a script injected by a data set would not run even if it were not escaped.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = markupsafe.Markup(f"'sha256-{digest}'" if script else "'none'")
    return _template().render(title=title, sections=sections, script=markupsafe.Markup(script), script_policy=policy)


def write_page(path: pathlib.Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page under a temporary name and renames it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a run may draw its own page at the same time
    # Half a surrogate pair cannot be written; a model can produce one.
    temporary.write_text(render(title, sections), encoding="utf-8", errors="replace")
    temporary.replace(path)
