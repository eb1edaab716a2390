"""Pages to look at: one self-contained HTML file, no network, everything that comes from models and data escaped.

A page is a title and a list of sections, each a frozen dataclass below or a row of `charts.Chart`; `page.html.j2` and
`chart.html.j2` draw them. The one script, `page.js`, is there for a browser of snapshots alone, and the page lets no
other one run.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from vigos_jax.report import charts
from vigos_jax.report.charts import Chart, Color

# One colour each for roles, and for whatever else is told apart by colour.
PALETTE: tuple[Color, ...] = (
    *((47, 106, 200), (214, 111, 20), (130, 80, 180)),
    *((20, 140, 110), (190, 60, 95), (110, 110, 40)),
)


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs, one per line, under a heading if there is a title."""

    lines: Sequence[str]
    title: str = ""

    kind = "text"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; cells are texts, numbers are written out by whoever makes it."""

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
        """The colour behind the token as a style sheet writes it."""
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
      strengths: per token, how strong its colour is, 0-1.
      hovers: per token, what shows on hover behind the role's name.
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


Section = Text | Table | Rollout | Charts | Folded | Browser


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
    """The colour `share` of the way from a to b."""
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
    # As they are, so that what cannot be written is replaced in them too; a NaN would be no JSON.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    sizes = ("width", "height", "left", "right", "top", "bottom")
    environment.globals |= {name: getattr(charts, name.upper()) for name in sizes}
    # It defines no macro: Jinja makes a reference cycle of a macro and its context, which holds all that a page shows.
    # A macro that it imports belongs to the other file's context, of which there is one.
    return environment.get_template("page.html.j2")


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    script = _file("page.js") if any(s.kind == "browser" for s in sections) else ""
    # By its hash: a script that came out of a data set would not run even if it were not escaped.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = markupsafe.Markup(f"'sha256-{digest}'" if script else "'none'")
    return _template().render(title=title, sections=sections, script=markupsafe.Markup(script), script_policy=policy)


def write_page(path: pathlib.Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    # Half a surrogate pair cannot be written; a model can produce one.
    temporary.write_text(render(title, sections), encoding="utf-8", errors="replace")
    temporary.replace(path)
