"""Draws the attention masks of a role table's packed sequences: the figures of docs/roles.md.

    python -m vigos_jax.explain.masks docs/masks opsd vision_opd

A toy sample is packed as training packs one, and the masks are those that the models get.
"""

import dataclasses
import html
import importlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vigos_jax.data.processor import EncodedImage, Turn
from vigos_jax.method.packing import Buckets, pack_scores
from vigos_jax.method.roles import TeacherRole, branches_of, prefixes_of, role_table
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.spans import Spans
from vigos_jax.models.attention_masks import Branches
from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.inputs import TextInputs

_CELL = 6  # pixels
_LEFT, _TOP, _GAP, _WIDTH = 184, 40, 24, 530
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind
_GREY = "#8a8a8a"
_IMAGE, _SIDE = 1, {"original": 6, "other": 6, "shuffled": 6, "blank": 6, "resized": 4, "crop": 4}  # patches a side
_PROMPT, _SPANS = 3, Spans(True, (0, 4), (4, 8), (8, 10), None)  # tokens of a prompt, and of the completion's parts
_BUCKETS = Buckets(patches=(64,), prompt=(64,), completion=(64,), sequence=(1024,))
_MODEL = ModelConfig(
    family="qwen2_5_vl", hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8,
    vocab_size=8, rope_theta=1e4, mrope_section=(1, 1, 2), rms_eps=1e-6, tie_embeddings=True, image_token_id=_IMAGE,
    video_token_id=2, vision=VisionConfig(1, 8, 1, 8, 8),
)  # fmt: skip


class _Part(NamedTuple):
    """Tokens in a row that stand for the same thing."""

    label: str
    length: int
    colour: str


class _Sequence(NamedTuple):
    """One packed sequence: its title, its parts, its mask, and the queries whose states predict scored tokens."""

    title: str
    parts: list[_Part]
    mask: np.ndarray
    scored: set[int]


def drawing(roles: tuple[TeacherRole, ...]) -> str:
    """The SVG of a table: the student's sequence and every packed one, for a rollout that all roles score.

    A row is a query, a column a key. A dark row is a state that predicts a scored token.
    """
    sequences = [*_sequences(roles)]
    width = max(_WIDTH, *(_LEFT + _CELL * len(s.mask) + _GAP for s in sequences))
    parts, top = [], 8
    for sequence in sequences:
        parts.append(f'<g transform="translate(0 {top})">{_drawn(sequence)}</g>')
        top += _TOP + _CELL * len(sequence.mask) + _GAP
    style = "font-family:sans-serif;font-size:11px"
    size = f'viewBox="0 0 {width} {top}" width="{width}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">'
    return f'{head}<rect width="{width}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n'


def _sequences(roles: tuple[TeacherRole, ...]) -> Iterator[_Sequence]:
    row, rollout = _sample(roles), Rollout(tuple([3] * 11), _SPANS)
    # Roles that score invalid rollouts alone are drawn too, over what they would score.
    shown = tuple(_always(role) for role in roles)
    batch = pack_scores([row], [rollout], roles=shown, config=_MODEL, buckets=_BUCKETS)
    supervised = batch.supervised
    used = supervised.role[0] >= 0
    prompt, completion = len(row.prompt.ids), len(rollout.ids)
    own = [*_prefix_parts(row.prompt), _Part("prompt", _PROMPT, _GREY), _Part("completion", completion, "#000")]
    at = set(supervised.student_at[0][used].tolist())
    yield _Sequence("student", own, _mask(batch.student, prompt + completion), at)
    for i, prefix in enumerate(prefixes := prefixes_of(shown)):
        start = 1024 * sum(p.model == prefix.model for p in prefixes[:i])
        first = prefixes[0] == ("", prefix.view) and batch.teacher is not None
        text = batch.teacher if i == 0 and first else batch.others[i - (batch.teacher is not None)].text
        assert text is not None  # the first prefix is the student's own where batch.teacher is there
        parts, scored, is_named = [], set(), False
        length = int((np.asarray(text.segment_ids[0]) > 0).sum())
        for k, (r, is_control) in enumerate(branches_of(prefix, shown)):
            turn = row.turn(r, is_control=is_control)
            if not is_named:
                parts, is_named = [*_prefix_parts(turn)], True
            places = supervised.control_at if is_control else supervised.teacher_at
            assert places is not None
            mine = places[0][used & (supervised.role[0] == r)] - start
            scored |= set(mine.tolist())
            end = int(mine.max()) + 1
            where = ", if invalid" if roles[r].when == "invalid" else ""
            name = f"{shown[r].name}{' without image' if is_control else where}"
            colour = _COLOURS[k % len(_COLOURS)]
            done = sum(part.length for part in parts)
            parts += [_Part(f"{name}: prompt", _PROMPT, colour), _Part("completion", end - done - _PROMPT, colour)]
        seen = "no image" if prefix.view.kind == "none" else f"image: {prefix.view.kind}"
        yield _Sequence(f"{prefix.model or 'base weights'}, {seen}", parts, _mask(text, length), scored)


def _always(role: TeacherRole) -> TeacherRole:
    scores = ("completion",) if role.when == "invalid" else role.scores
    return dataclasses.replace(role, when="always", scores=scores)


def _prefix_parts(turn: Turn) -> list[_Part]:
    images = turn.prefix_ids.count(_IMAGE)
    header = _Part("header", len(turn.prefix_ids) - images, "#555")
    return [header, _Part("image", images, "#555")] if images else [header]


def _sample(roles: tuple[TeacherRole, ...]) -> Row:
    def image(side: int) -> EncodedImage:
        return EncodedImage(np.zeros((side * side, _MODEL.vision.patch_dim), np.float32), (1, side, side))

    def turn(side: int) -> Turn:
        return Turn((0, *[_IMAGE] * (side * side // _MODEL.vision.merge_unit)), (3,) * _PROMPT)

    sides = [0 if role.view.kind == "none" else _SIDE[role.view.kind] for role in roles]
    views: Mapping = {r.view: (image(s),) for r, s in zip(roles, sides, strict=True) if r.view.is_read}
    controls = tuple(turn(0) if role.has_control else None for role in roles)
    return Row((image(6),), turn(6), tuple(map(turn, sides)), controls if any(controls) else (), views)


def _mask(text: TextInputs, length: int) -> np.ndarray:
    segments = np.asarray(text.segment_ids)[:, :length]
    return np.asarray(Branches(segments).dense(length))[0]


def _drawn(sequence: _Sequence) -> str:
    n = len(sequence.mask)
    out = [f'<text x="8" y="12" font-weight="bold">{html.escape(sequence.title)}</text>']
    at = 0
    for part in sequence.parts:
        y = _TOP + _CELL * at
        middle = y + _CELL * part.length / 2 + 4
        out.append(f'<text x="{_LEFT - 8}" y="{middle:g}" text-anchor="end" fill="{part.colour}">')
        out.append(f"{html.escape(part.label)}</text>")
        for q in range(at, at + part.length):
            seen = np.flatnonzero(sequence.mask[q])
            runs = np.split(seen, np.flatnonzero(np.diff(seen) > 1) + 1)
            strength = 1 if q in sequence.scored else 0.35
            for run in runs:
                box = f'x="{_LEFT + _CELL * run[0]}" y="{_TOP + _CELL * q}" width="{_CELL * len(run)}"'
                out.append(f'<rect {box} height="{_CELL - 1}" fill="{part.colour}" opacity="{strength}"/>')
        at += part.length
    size = _CELL * n
    out.append(f'<rect x="{_LEFT}" y="{_TOP}" width="{size}" height="{size}" fill="none" stroke="#bbb"/>')
    out.append(
        f'<text x="{_LEFT}" y="{_TOP - 6}" fill="#555">what each token attends to; dark: predicts a scored one</text>'
    )
    return "".join(out)


def main(folder: str, *names: str) -> None:
    """Writes NAME.svg of the shipped configs into a folder."""
    for name in names:
        config = importlib.import_module(f"configs.{name}").get_config()
        table = role_table(config.roles, config.prompts, data_fields=tuple(config.data.fields))
        pathlib.Path(folder, f"{name}.svg").write_text(drawing(table), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
