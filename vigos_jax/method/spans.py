r"""Find the three parts of a completion: description, reasoning, answer.

A completion continues the forced `<description>`, so it should read

    d </description> <think> r </think> \boxed{a}

The grammar is matched against the bytes of the *sampled* tokens, never re-tokenised text: a sampled sequence
need not be the tokenizer's own encoding of its text, and byte-pair merges cross tag boundaries.

    grammar  the first `</description>`, the first `<think>` after it, the first `</think>` after that, the
             first `\boxed{` after that and the brace that balances it (every brace counts, `\{` and `\}` too)
    valid    all are there; d and r hold something other than white space; the box holds at least one byte (a
             space is something); only white space stands between the parts. Anything may follow the box.

White space means the six ASCII bytes of `bytes.isspace()`. Unicode spaces are multi-byte characters and count
as text: the grammar is one of bytes, and a sampled sequence may not be valid UTF-8 at all.

    text     ...  cat  .</  description  ><  think  >The  cat  </  think  >\  boxed  {cat  }.  <|im_end|>
    part     d    d    -    -            -   -      -     r    -   -      -   -      a     -   -

A token that overlaps a byte of one of the three matched tags is a delimiter and belongs to no part, whatever
else it overlaps. A second `<think>` inside the reasoning matched nothing and is plain content.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vigos_jax.grading.braces import closing_brace

_DESCRIPTION_CLOSE = b"</description>"
_THINK_OPEN = b"<think>"
_THINK_CLOSE = b"</think>"
_BOX_OPEN = b"\\boxed{"


@dataclass(frozen=True)
class Spans:
    """Where the parts of one completion lie.

    is_valid: whether the completion follows the grammar; says nothing about the answer being right.
    description, reasoning, answer: half-open token ranges [start, end), in this order, disjoint; (0, 0) when
        invalid. A valid part can still be an empty range, when every token it touches is a delimiter.
    invalid_reason: None when valid, else the first rule broken, in this order: no_description_close,
        no_think_open, no_think_close, no_box, unclosed_box, empty_description, empty_reasoning, empty_answer,
        text_between_parts.
    """

    is_valid: bool
    description: tuple[int, int]
    reasoning: tuple[int, int]
    answer: tuple[int, int]
    invalid_reason: str | None


def find_spans(token_bytes: Sequence[bytes], *, rule: str = "paper") -> Spans:
    """The parts of a completion, given the bytes of each of its sampled tokens (EOS: its literal text).

    Linear in the bytes. A token without bytes (an id outside the tokenizer's vocabulary) overlaps nothing;
    it belongs to the part whose tokens stand around it.

    Args:
      rule: "paper" is the grammar above. "released" is how the authors' code reads a completion whose
        ids are the tokenizer's own: text between the parts, a white-space description and an empty reasoning or box
        are valid; a token that runs into `</description>` belongs to the description; and the reasoning reaches
        from after `<think>` to the brace that closes the box, `</think>` included, so the answer is part of it.
    """
    text = b"".join(token_bytes)
    found = _find_tags(text)
    if isinstance(found, str):
        return _invalid(found)
    ends = list(accumulate(map(len, token_bytes)))  # [T] byte offset just after each token

    def token_of(byte: int) -> int:  # the one token that holds this byte
        return bisect_right(ends, byte)

    if rule == "released":
        if not found.description_end:
            return _invalid("empty_description")
        return Spans(
            is_valid=True,
            description=(0, token_of(found.description_end - 1) + 1),
            reasoning=(token_of(found.reasoning_start - 1) + 1, token_of(found.answer_end) + 1),
            answer=(0, 0),
            invalid_reason=None,
        )

    if not text[: found.description_end].strip():
        return _invalid("empty_description")
    if not text[found.reasoning_start : found.reasoning_end].strip():
        return _invalid("empty_reasoning")
    if found.answer_end == found.answer_start:
        return _invalid("empty_answer")
    description_gap = found.description_end + len(_DESCRIPTION_CLOSE)
    reasoning_gap = found.reasoning_end + len(_THINK_CLOSE)
    if text[description_gap : found.think_open].strip() or text[reasoning_gap : found.box_open].strip():
        return _invalid("text_between_parts")
    after_think_open = token_of(found.reasoning_start - 1) + 1
    after_think_close = token_of(reasoning_gap - 1) + 1
    # Tags win: a token that holds the end of a tag and the start of a part stays outside the part. So a part
    # starts after the tag before it at the earliest, and an end never falls before its start.
    answer_first = max(token_of(found.answer_start), after_think_close)
    return Spans(
        is_valid=True,
        description=(0, token_of(found.description_end)),
        reasoning=(after_think_open, max(token_of(found.reasoning_end), after_think_open)),
        answer=(answer_first, max(token_of(found.answer_end - 1) + 1, answer_first)),
        invalid_reason=None,
    )


@dataclass(frozen=True)
class _Tags:
    """Byte offsets; a part reaches from its start to its end, excluded."""

    description_end: int
    think_open: int
    reasoning_start: int
    reasoning_end: int
    box_open: int
    answer_start: int
    answer_end: int


def _find_tags(text: bytes) -> _Tags | str:
    """Where the tags are, in order, or which one is missing."""
    description_end = text.find(_DESCRIPTION_CLOSE)
    if description_end < 0:
        return "no_description_close"
    think_open = text.find(_THINK_OPEN, description_end + len(_DESCRIPTION_CLOSE))
    if think_open < 0:
        return "no_think_open"
    reasoning_start = think_open + len(_THINK_OPEN)
    reasoning_end = text.find(_THINK_CLOSE, reasoning_start)
    if reasoning_end < 0:
        return "no_think_close"
    box_open = text.find(_BOX_OPEN, reasoning_end + len(_THINK_CLOSE))
    if box_open < 0:
        return "no_box"
    answer_start = box_open + len(_BOX_OPEN)
    answer_end = closing_brace(text, answer_start)
    if answer_end is None:
        return "unclosed_box"
    return _Tags(description_end, think_open, reasoning_start, reasoning_end, box_open, answer_start, answer_end)


def _invalid(reason: str) -> Spans:
    return Spans(is_valid=False, description=(0, 0), reasoning=(0, 0), answer=(0, 0), invalid_reason=reason)
