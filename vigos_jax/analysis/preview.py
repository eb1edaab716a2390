"""`--mode data`: shows how a run will read its rows, before it is started. No weights are read.

The rows are those of the run's first batches, encoded as in the run, so the reported padding and bad rows apply to it.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vigos_jax.data.bad_rows import BadRows
from vigos_jax.data.examples import Example
from vigos_jax.data.images import BadImage, read_image
from vigos_jax.data.loader import order_of, row_numbers
from vigos_jax.data.sources import Source
from vigos_jax.data.views import ORIGINAL, ImageView
from vigos_jax.data.visuals import images_of_row
from vigos_jax.method.packing import slot_count
from vigos_jax.method.rows import Row
from vigos_jax.report import page
from vigos_jax.rollouts.parse import Reader
from vigos_jax.rollouts.server_images import png_uri
from vigos_jax.runtime.progress import bar
from vigos_jax.session import open_source


@dataclasses.dataclass(frozen=True)
class _Read:
    """A row that was read: its number in the source, and what the model gets."""

    index: int
    example: Example
    row: Row


def preview(config, output: pathlib.Path | None) -> tuple[str, int]:
    """Reads the first `config.preview.rows` rows of a run, in its order.

    Args:
      output: folder for data.html; None for no page.

    Returns:
      (what there is to say, how many rows are bad).

    Raises:
      InputError: the source, the model's folder or a prompt is wrong; nothing is loaded then.
    """
    source = open_source(config)
    reader = Reader.of_folder(config)
    batches = _read(source, reader, config)
    rows = [row for batch in batches for row in batch]
    bad = BadRows()
    for read in rows:
        reason = read.example.bad_reason
        bad.update(1, {reason: 1} if reason else {}, {reason: read.example.complaint} if reason else {})
    usable = [read for read in rows if read.example.bad_reason is None]
    lines = _lines(source, rows, usable, bad, config)
    tables = [_sizes(usable, reader), _padding(batches, reader)] if usable else []
    shown = usable[: config.preview.shown]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        rollouts = [_shown_row(source, read, reader) for read in shown]
        page.write_page(output / "data.html", f"Data of {config.data.source}", [page.Text(lines), *tables, *rollouts])
        lines = [*lines, f"page: {output / 'data.html'}"]
    texts = ["\n".join(lines), *(table.text() for table in tables)]
    texts += [f"{_title(read)}\n{_prompts(read, reader)}" for read in shown]
    return "\n\n".join(texts), bad.bad


def _read(source: Any, reader: Reader, config) -> list[list[_Read]]:
    """The batches; of a source that has fewer rows than are asked for, one epoch."""
    encoder = reader.encoder(max_completion=config.sampling.max_tokens)
    count = min(config.preview.rows, len(source))
    numbers = row_numbers(source, encoder, order_of(config))
    wanted = [numbers[i] for i in range(-(-count // config.batch_size))]
    order = list(itertools.islice((int(n) for batch in wanted for n in batch), count))
    read = []
    for index in bar(order, title="data"):
        example = encoder(source, index)
        read.append(_Read(index, example, reader.row(example)))
    return [read[i : i + config.batch_size] for i in range(0, len(read), config.batch_size)]


def _lines(source: Any, rows: Sequence[_Read], usable: Sequence[_Read], bad: BadRows, config) -> list[str]:
    name = config.data.source
    columns = source.columns.describe(always=True) if isinstance(source, Source) else "the demo's own"
    lines = [f"{name}: {len(source)} rows; {columns}"]
    lines += [f"{len(rows)} read, as a run with seed {config.seed} reads them first; {len(usable)} usable"]
    lines += [f"{count} bad: {kind}; {bad.examples[kind]}" for kind, count in bad.reasons.most_common()]
    if shrunk := sum(read.example.shrunk for read in usable):
        lines += [f"{shrunk} with images made smaller to fit config.buckets (config.data.max_pixels sets a limit)"]
    chosen = sum(bool(read.example.options) for read in usable)
    if chosen and isinstance(source, Source) and not config.data.options_template:
        lines += [f"{chosen} with options, which are not appended to the question (config.data.options_template)"]
    if fields := ", ".join(config.data.fields):
        lines += [f"further columns that prompts may show: {fields}"]
    return lines


def _sizes(usable: Sequence[_Read], reader: Reader) -> page.Table:
    merge = reader.processor.merge_size**2
    numbers = {
        "images": [len(r.example.images) for r in usable],
        "visual tokens": [sum(t * h * w for t, h, w in (i.grid for i in r.example.images)) // merge for r in usable],
        "student's prompt, tokens": [len(r.row.prompt.ids) for r in usable],
        "question, characters": [len(r.example.problem) for r in usable],
        "reference, characters": [len(r.example.reference) for r in usable],
    }
    for i, role in enumerate(reader.roles):
        numbers[f"{role.name}'s prompt, tokens"] = [len(r.row.teachers[i].ids) for r in usable]
    rows = [[name, *(f"{f(n):.0f}" for f in (np.min, np.median, np.max))] for name, n in numbers.items()]
    return page.Table("sizes", ["of usable rows", "least", "median", "most"], rows)


def _padding(batches: Sequence[Sequence[_Read]], reader: Reader) -> page.Table:
    """Share of padding in the arrays of these batches: each row takes the bucket of its batch's longest."""
    rows = []
    for kind, size_of in (
        ("prompt", lambda r: len(r.row.prompt.ids)),
        ("patches", lambda r: slot_count(r.row, reader.config)),
    ):
        filled, held, sizes = 0, 0, set()
        for batch in batches:
            lengths = [size_of(r) if r.row.student else 0 for r in batch]
            bucket = reader.buckets.fit(kind, max(lengths))
            filled, held = filled + sum(lengths), held + bucket * len(lengths)
            sizes.add(bucket)
        shares = f"{100 * (1 - filled / held):.0f} %"
        rows.append([f"config.buckets.{kind}", shares, ", ".join(map(str, sorted(sizes)))])
    note = "config.data.window groups rows of about the same size"
    return page.Table("padding", ["buckets", "padding", "sizes used"], rows, note)


def _title(read: _Read) -> str:
    grids = ", ".join(" x ".join(map(str, image.grid)) for image in read.example.images)
    return f"row {read.index}, id {read.example.id}: image grid {grids} patches (time x height x width)"


def _turns(read: _Read, reader: Reader) -> list[tuple[str, str]]:
    """(who, what they read of a row) of the student and every teacher; image tokens are counted."""
    names = [r.name if r.view == ORIGINAL else f"{r.name} (image: {_seen(r.view)})" for r in reader.roles]
    turns = [("student", read.row.prompt), *zip(names, read.row.teachers, strict=True)]
    return [(name, "".join(_runs(turn.ids, reader))) for name, turn in turns]


def _seen(view: ImageView) -> str:
    return f"{view.kind} of {view.column}" if view.column else view.kind


def _prompts(read: _Read, reader: Reader) -> str:
    """The same for a terminal."""
    lines = [f"  reference: {read.example.reference}"]
    return "\n".join(lines + [f"  {name}: " + text.replace("\n", "\n    ") for name, text in _turns(read, reader)])


def _runs(ids: Sequence[int], reader: Reader) -> list[str]:
    out = []
    for is_visual, group in itertools.groupby(ids, key=lambda i: i in reader.processor.visual_ids):
        group = list(group)
        out.append(f"[{len(group)} visual tokens]" if is_visual else reader.processor.decode(group))
    return out


def _shown_row(source: Any, read: _Read, reader: Reader) -> page.Rollout:
    images = []
    roots = tuple(getattr(source, "image_roots", ()))
    for item in images_of_row(source[read.index]):
        with contextlib.suppress(BadImage):
            images.append(page.image_uri(read_image(item, image_roots=roots)))
    views = [images for view, images in read.example.views.items() if view.kind != "blank"]
    images += [png_uri(i, reader.processor) for seen in views for i in seen if i.label is None]
    tokens = []
    for (name, text), color in zip(_turns(read, reader), itertools.cycle(page.PALETTE)):
        tokens += [page.Token(f"{name}\n", color, 0.4), page.Token(f"{text}\n\n", color, 0.1, name)]
    question = f"{read.example.problem}\nreference: {read.example.reference}"
    return page.Rollout(_title(read), question, tokens, images)
