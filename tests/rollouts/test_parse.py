"""Rollouts: what a row's roles are shown, what a file of them holds, and what their metrics count."""

import pickle
import types
from collections import Counter

import ml_collections
import numpy as np
import pytest
import tiny_rows
from helpers import make_processor_folder

from vigos_jax.data.examples import Example
from vigos_jax.data.processor import Processor
from vigos_jax.data.sources import JsonlSource
from vigos_jax.method.packing import Buckets
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.spans import find_spans
from vigos_jax.models.config import ModelConfig
from vigos_jax.rollouts.parse import Reader, parse, read_cases, rollout_counts, rollout_metrics, spans_json
from vigos_jax.rollouts.sampler import Completions

VALID = "a red square </description> <think> it is red </think> \\boxed{red}"
BUCKETS = Buckets(patches=(64,), prompt=(96,), completion=(96,), sequence=(400,))
ROLES = (
    TeacherRole("perception", "", "<description>", ("description",), "valid", "forward_kl", 1.0, 0.0),
    TeacherRole("reasoning", "{problem} {reference}", "", ("reasoning",), "valid", "forward_kl", 1.0, 0.0),
    TeacherRole("told", "{caption}|{reference}", "", ("completion",), "invalid", "reverse_kl", 1.0, 0.0),
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What of a `Loaded` is read here: no weights."""
    folder = make_processor_folder(tmp_path_factory.mktemp("model"))
    processor, config = Processor.load(folder), ModelConfig.load(folder)
    return types.SimpleNamespace(processor=processor, config=config, roles=ROLES, buckets=BUCKETS, span_rule="paper")


def config(**fields):
    student = {"user": "{problem}!", "assistant_prefill": "<description>"}
    data = tiny_rows.config("x", **{"fields": ("caption",)} | fields)
    return ml_collections.ConfigDict({"prompts": {"student": student}, "data": data.to_dict()})


def example(loaded, **fields):
    picture = loaded.processor.encode_image(tiny_rows.picture())
    return Example("x", (picture,), "Q?", "red", {"caption": "seen"}, **fields)


# Metrics.


def rollout(loaded, text, *, ends=True, rule="paper"):
    ids = (*loaded.processor.encode_text(text), *(loaded.processor.eos_ids[:1] if ends else ()))
    return Rollout(ids, find_spans(loaded.processor.token_bytes(ids), rule=rule))


def pairs(loaded, *rows, rule="paper"):
    """(examples, rollouts) of (reference, text or None for a bad row, whether it ends) rows."""
    examples = [Example("x", reference=reference) for reference, *_ in rows]
    made = [None if text is None else rollout(loaded, text, ends=ends, rule=rule) for _, text, ends in rows]
    return examples, made


def metrics(loaded, examples, rollouts):
    return rollout_metrics(rollout_counts(loaded, examples, rollouts))


def test_metrics(loaded):
    examples, rollouts = pairs(
        loaded,
        ("red", VALID, True),  # right, and its description says so
        ("red", "a square </description> <think> hm </think> \\boxed{blue}", True),  # wrong, and does not
        ("b", "B or C </description> <think> r </think> \\boxed{C} \\boxed{(B)}", False),  # the last box; a letter
        ("red", None, True),
        ("red", "d </description> <think> r </think> red", True),
        ("red", "\\boxed{red}", True),  # right, invalid
        ("red", "", False),
        ("red", None, True),
    )
    lengths = {part: [] for part in ("description", "reasoning", "answer")}
    for r in rollouts[:3]:
        for part, values in lengths.items():
            start, end = getattr(r.spans, part)
            values.append(end - start)
    assert min(map(min, lengths.values())) > 0
    expected = {
        "valid_rate": 3 / 6,
        "accuracy": 3 / 6,
        "completion_tokens": np.mean([len(r.ids) for r in rollouts if r]),
        "truncated_rate": 2 / 6,
        "invalid/no_box": 1 / 6,
        "invalid/no_description_close": 2 / 6,
        "leak_rate": 1 / 2,  # of those that can be told
    } | {f"length/{part}": np.mean(values) for part, values in lengths.items()}
    got = metrics(loaded, examples, rollouts)
    assert got == pytest.approx(expected)
    assert all(type(x) is float for x in got.values())
    # Those of several processes: the sum of what each counted.
    sums = Counter()
    for part in (slice(0, 1), slice(1, 6), slice(6, 8)):
        sums.update(rollout_counts(loaded, examples[part], rollouts[part]))
    assert rollout_metrics(sums) == got


def test_metrics_of_nothing(loaded):
    assert metrics(loaded, *pairs(loaded, ("red", None, True))) == {}
    assert metrics(loaded, [], []) == {}


def test_metrics_without_a_valid_rollout(loaded):
    got = metrics(loaded, *pairs(loaded, ("red", "red", True), ("red", "no", True)))
    assert got.keys() == {
        "valid_rate", "accuracy", "completion_tokens", "truncated_rate", "invalid/no_description_close",
    }  # fmt: skip
    assert got["valid_rate"] == 0 and got["invalid/no_description_close"] == 1


def test_an_end_token_inside_is_no_end(loaded):
    examples, (whole,) = pairs(loaded, ("red", VALID, True))
    moved = Rollout((whole.ids[-1], *whole.ids[:-1]), whole.spans)
    assert metrics(loaded, examples, [whole])["truncated_rate"] == 0
    assert metrics(loaded, examples, [moved])["truncated_rate"] == 1
    other_end = Rollout((*whole.ids[:-1], loaded.processor.eos_ids[1]), whole.spans)
    assert metrics(loaded, examples, [other_end])["truncated_rate"] == 0


def test_metrics_by_the_released_rule(loaded):
    rows = [("red", "red </description> and <think> r </think> \\boxed{red}", True)]
    assert metrics(loaded, *pairs(loaded, *rows))["invalid/text_between_parts"] == 1
    got = metrics(loaded, *pairs(loaded, *rows, rule="released"))
    assert (got["valid_rate"], got["leak_rate"], got["length/answer"]) == (1, 1, 0)


# From rows to what is read.


def test_a_role_is_shown_what_its_template_names(loaded):
    reader = Reader.of(loaded, config())
    text = lambda turn: loaded.processor.decode(turn.rest_ids)  # noqa: E731
    row = reader.row(example(loaded))
    assert text(row.student).startswith("Q?!<|im_end|>") and text(row.student).endswith("<description>")
    assert [text(t).split("<|im_end|>")[0] for t in row.teachers] == ["", "Q? red", "seen|red"]
    assert reader.row(Example("x", bad_reason="no_image")) == Row()

    other = reader.row(example(loaded), reference="a blue one")
    assert (other.student, other.teachers[0]) == (row.student, row.teachers[0])
    assert [text(t).split("<|im_end|>")[0] for t in other.teachers[1:]] == ["Q? a blue one", "seen|a blue one"]

    picture = loaded.processor.encode_image(tiny_rows.picture(5, size=(120, 30)))
    blank = reader.row(example(loaded), images=Example("other", images=(picture,)))
    assert blank.images == (picture,)
    assert [text(t) for t in blank.teachers] == [text(t) for t in row.teachers]
    assert len(blank.student.prefix_ids) != len(row.student.prefix_ids)


def test_a_reader_that_was_pickled_reads_the_same(loaded):
    """Data workers are handed one."""
    reader = Reader.of(loaded, config())
    twin = pickle.loads(pickle.dumps(reader))
    assert twin.row(example(loaded)).teachers == reader.row(example(loaded)).teachers
    assert twin.too_long(example(loaded), max_completion=10) is None


@pytest.mark.parametrize("kind, size", [("patches", 4), ("prompt", 8), ("sequence", 60)])
def test_too_long(loaded, kind, size):
    small = types.SimpleNamespace(**vars(loaded) | {"buckets": Buckets(**vars(BUCKETS) | {kind: (size,)})})
    assert Reader.of(loaded, config()).too_long(example(loaded), max_completion=40) is None
    reader = Reader.of(small, config())
    assert reader.too_long(example(loaded), max_completion=40) == f"{kind}_too_long"


def test_the_reference_and_the_completion_count_too(loaded):
    reader = Reader.of(loaded, config())
    assert reader.too_long(example(loaded), max_completion=400) == "sequence_too_long"
    assert reader.too_long(example(loaded), max_completion=40, reference="red " * 400) == "sequence_too_long"


def test_sampled_completions_are_parsed(loaded):
    ids = rollout(loaded, VALID).ids
    rows = [Reader.of(loaded, config()).row(example(loaded)), Row()]
    sampled = Completions(ids=[ids, ids], logps=[(-1.0,) * len(ids)] * 2)
    first, second = parse(loaded, rows, sampled)
    assert (first.ids, first.logps, second) == (ids, (-1.0,) * len(ids), None)
    assert first.spans == find_spans(loaded.processor.token_bytes(ids))
    released = types.SimpleNamespace(**vars(loaded) | {"span_rule": "released"})
    assert parse(released, rows, sampled)[0].spans == find_spans(loaded.processor.token_bytes(ids), rule="released")


def test_cases_of_a_file(loaded, tmp_path):
    tiny_rows.picture().save(tmp_path / "a.png")
    good = {"problem": "Q?", "answer": "red", "images": ["a.png"], "caption": "seen", "completion": VALID}
    rows = [
        good | {"id": "text"},
        good | {"id": "ids", "completion_ids": [5, 6, 7]},  # they count, not the text
        good | {"id": "blind", "caption": " "},
        good | {"id": "silent", "completion": None},
        good | {"id": "true", "completion_ids": [True]},
        good | {"id": "long", "completion_ids": [5] * 97},
        good | {"id": "wide", "problem": "Why? " * 60},
        good | {"id": "nothing", "completion": ""},
    ]
    source = JsonlSource(tiny_rows.write_jsonl(tmp_path / "r.jsonl", rows), fields=("caption",))
    cases = list(read_cases(source, loaded, config()))
    assert [(c.index, c.example.id) for c in cases] == [(i, row["id"]) for i, row in enumerate(rows)]
    reasons = [None, None, "no_caption", "no_completion", "bad_completion_ids", "completion_too_long",
               "prompt_too_long", None]  # fmt: skip
    assert [c.bad_reason for c in cases] == reasons
    for case in cases:
        assert (case.rollout is None) == (case.row.student is None) == (case.bad_reason is not None)
    assert loaded.processor.decode(cases[0].rollout.ids) == VALID
    assert cases[1].rollout.ids == (5, 6, 7) and cases[7].rollout.ids == ()
    assert cases[0].row.teachers == Reader.of(loaded, config()).row(example(loaded)).teachers


def test_spans_as_json(loaded):
    spans = rollout(loaded, VALID).spans
    parts = ("description", "reasoning", "answer")
    assert spans_json(rollout(loaded, VALID)) == {part: [list(getattr(spans, part))] for part in parts}
    assert spans_json(rollout(loaded, "red")) == dict.fromkeys(parts, [])


@pytest.mark.parametrize(
    "reference, options, alternatives, said, is_right",
    [
        ("B", ("red", "blue"), (), "blue", True),
        ("blue", ("red", "blue"), (), "B", True),
        ("B", ("red", "blue"), (), "red", False),
        ("B", (), (), "blue", False),
        ("5", (), ("V",), "V", True),
        ("5", (), (), "V", False),
    ],
)
def test_accuracy_knows_options_and_all_references(loaded, reference, options, alternatives, said, is_right):
    example = Example("x", reference=reference, options=options, alternatives=alternatives)
    counts = rollout_counts(loaded, [example], [rollout(loaded, f"so \\boxed{{{said}}}")])
    assert counts["correct"] == is_right
