"""Pages to look at: one self-contained HTML file, no network, everything that comes from models and data escaped.

A page is a title and a list of sections, each a frozen dataclass below; `page.html.j2` draws them.
"""

import base64
import dataclasses
import functools
import io
import pathlib
from collections.abc import Sequence

import jinja2
from PIL import Image


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
        r, g, b = (int(min(max(x, 0), 255)) for x in self.color)
        return f"rgba({r},{g},{b},{min(max(self.strength, 0.0), 1.0):.3f})"


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Pictures (data URIs), what was asked, and the tokens of a response; `mark` is "right", "wrong" or ""."""

    title: str
    question: str
    tokens: Sequence[Token]
    pictures: Sequence[str] = ()
    mark: str = ""

    kind = "rollout"


def picture_uri(image: Image.Image, *, size: int = 160) -> str:
    """A thumbnail as a data URI."""
    image = image.convert("RGB")
    image.thumbnail((size, size))
    if max(image.size) < size:  # tiny pictures are shown pixel by pixel
        factor = size // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mix(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """The colour `share` of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


@functools.cache
def _template() -> jinja2.Template:
    # StrictUndefined: a section that lacks a field is an error, not an empty cell.
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(autoescape=True, **options)
    source = (pathlib.Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def render(title: str, sections: Sequence[Text | Table | Rollout]) -> str:
    """The page as text."""
    return _template().render(title=title, sections=sections)


def write_page(path: pathlib.Path, title: str, sections: Sequence[Text | Table | Rollout]) -> None:
    """Writes the page under a temporary name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    # Half a surrogate pair cannot be written; a model can produce one.
    temporary.write_text(render(title, sections), encoding="utf-8", errors="replace")
    temporary.replace(path)
