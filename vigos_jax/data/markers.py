r"""Image markers in a question: `<image>`, `<image 2>`, `<image_2>`, `<|image_2|>`, `<video>` and what else is in use.

Every role reads the images first and the question after them (roles share that prefix), so a marker cannot place an
image inside the text. Markers grouped before or after the question only announce the images and are removed. Others
are part of a sentence and become words: "the image", or "image 2" if the row has several. Of a model's control tokens,
only the sequence of three that a template writes for an image counts as a marker; others (`<|image_pad|>` alone) stay
text in a question, like any control token.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

_MARKER = re.compile(
    r"<(?:\|vision_start\|><\|(?P<pad>image|video)_pad\|><\|vision_end\||ImageHere|start_of_image"
    r"|\|?(?P<kind>image|video)[ _:-]?(?P<number>[0-9]{0,3})(?:\||/|><(?:/image|/video))?)>|\[IMG\]",
    re.IGNORECASE,
)
_SENTENCE_ENDS = re.compile(r"(?:^|[\n.:;?!)])\s*$")
_NOUN = re.compile(r"\b(?:image|picture|photo|figure|diagram|video|clip)[ \t]*$", re.IGNORECASE)
_DETERMINER = re.compile(r"\b(?:the|this|that|an?|each|your|my)[ \t]*$", re.IGNORECASE)


class MarkerMismatch(ValueError):
    """The markers of a text do not go with the images it comes with."""


def count_markers(text: str) -> int:
    """How many markers a text holds."""
    return sum(1 for _ in _MARKER.finditer(text))


def numbers_as_words(text: str) -> str:
    """Another text, such as an option: `<image 2>` becomes "image 2", a marker without a number is removed."""
    words = lambda m: f"{(m['kind'] or 'image').lower()} {m['number']}" if m["number"] else ""  # noqa: E731
    return _MARKER.sub(words, text).strip()


def without_markers(text: str, *, images: int, videos: int = 0) -> str:
    """The question as it is asked after its images, stripped.

    Args:
      images, videos: how many come with it. A text without markers goes with any number of them.

    Raises:
      MarkerMismatch: markers without a number are not as many as the images, or a number has no image.
    """
    places = [_Marker.of(m) for m in _MARKER.finditer(text)]
    if not places:
        return text.strip()
    counts = {"image": images, "video": videos}
    numbers = _numbers(places, counts)
    lead, tail = text[: places[0].start], text[places[-1].end :]
    between = [text[a.end : b.start] for a, b in zip(places, places[1:], strict=False)]
    if _are_all(places, numbers, counts) and not any(piece.strip() for piece in between):
        if not lead.strip():
            return tail.strip()
        if not tail.strip(" \t\n.,:;?!") and _SENTENCE_ENDS.search(lead):
            return (lead.rstrip() + tail.strip()).strip()
    out = ""
    for place, before, behind, number in zip(places, [lead, *between], [*between, tail], numbers, strict=True):
        out += before
        words = _words(out, behind, place.kind, number if counts[place.kind] > 1 else 0)
        if not words:
            out = out.rstrip()
        out += (" " if words and out and not out[-1].isspace() and out[-1] not in "([{\"'" else "") + words
        if words and behind[:1].isalnum() and not (behind[0] == "s" and not behind[1:2].isalnum()):  # "the <image>s"
            out += " "
    return (out + tail).strip()


@dataclasses.dataclass(frozen=True)
class _Marker:
    """A marker's place in the text, and what it says; `number` is None if it has none."""

    start: int
    end: int
    kind: str
    number: int | None

    @classmethod
    def of(cls, match: re.Match[str]) -> "_Marker":
        kind, number = match["kind"] or match["pad"] or "image", match["number"]
        return cls(match.start(), match.end(), kind.lower(), int(number) if number else None)


def _numbers(places: Sequence[_Marker], counts: Mapping[str, int]) -> list[int]:
    """Which image or video each marker means, counted from 1; MarkerMismatch where there is none."""
    named = {kind: [m.number for m in places if m.kind == kind and m.number is not None] for kind in counts}
    bare = {kind: sum(1 for m in places if m.kind == kind and m.number is None) for kind in counts}
    base = {kind: int(0 in named[kind]) for kind in counts}  # some count from 0
    for kind, count in counts.items():
        if bare[kind] not in (0, count):
            raise MarkerMismatch(f"the question has {bare[kind]} <{kind}>, the row {count} {kind}(s)")
        if named[kind] and max(named[kind]) > count - base[kind]:
            raise MarkerMismatch(f"the question has <{kind} {max(named[kind])}>, the row {count} {kind}(s)")
    numbers, seen = [], dict.fromkeys(counts, 0)
    for m in places:
        seen[m.kind] += m.number is None
        numbers.append(seen[m.kind] if m.number is None else m.number + base[m.kind])
    return numbers


def _are_all(places: Sequence[_Marker], numbers: Sequence[int], counts: Mapping[str, int]) -> bool:
    """Whether the markers are those of all images (or videos), one after the other."""
    seen = dict.fromkeys(counts, 0)
    for place, number in zip(places, numbers, strict=True):
        seen[place.kind] += 1
        if number != seen[place.kind]:
            return False
    return all(n in (0, counts[kind]) for kind, n in seen.items())


def _words(before: str, behind: str, kind: str, number: int) -> str:
    """What a marker between these texts says; number 0 where there is one image alone."""
    before = before[-32:]  # longer than any word below
    if number:
        return str(number) if _NOUN.search(before) else f"{kind} {number}"
    has_line = (not before or before.endswith("\n")) and (not behind or behind.startswith("\n"))
    if has_line or _NOUN.search(before):
        return ""
    return kind if _DETERMINER.search(before) else f"the {kind}"
