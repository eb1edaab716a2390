"""Random input: an InputError or a result, never another exception. Longer forms are in tests/stress."""

import json
import types

import pytest
from fuzz import ANSWERS, JSON, SCALARS, check_spans, fuzz_spans
from helpers import make_processor_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_rows import picture_bytes

from configs import base
from vigos_jax.config import differences, read_json, to_json, validate
from vigos_jax.data.examples import Example
from vigos_jax.data.processor import Processor
from vigos_jax.data.sources import JsonlSource
from vigos_jax.errors import InputError
from vigos_jax.grading.answer_text import (
    answer_kind,
    last_boxed,
    mentions,
    normalize_answer,
)
from vigos_jax.grading.choice import option_index
from vigos_jax.grading.options import parse_options
from vigos_jax.grading.reading import agree, read
from vigos_jax.grading.rules import GRADERS, grade
from vigos_jax.method.packing import Buckets, pack_scores
from vigos_jax.method.roles import TeacherRole, role_table
from vigos_jax.models.config import ModelConfig
from vigos_jax.rollouts.parse import read_cases
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime.sharding import make_mesh, parse_rules
from vigos_jax.training.step import make_optimizer

LONG = settings(max_examples=600, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("model")))


# The span finder.


def test_random_completions(processor):
    counts = fuzz_spans(processor, 5000)
    print(counts)
    assert counts["completions"] == 5000 and 800 < counts["valid"] < 4200  # of both kinds


def test_the_check_of_spans_can_fail(monkeypatch):
    tokens = [b"d", b"</description>", b"<think>", b"r", b"</think>", b"\\boxed{", b"a", b"}"]
    assert check_spans(tokens)
    monkeypatch.setattr("fuzz.parse", lambda tokens: None)
    with pytest.raises(AssertionError):
        check_spans(tokens)


# The graders.


@pytest.mark.slow
@LONG
@given(ANSWERS, ANSWERS, st.lists(ANSWERS, max_size=5), st.none() | st.integers(0, 4))
@example("\\text{" * 400, "\\frac{1}{0}", ["", " "], 2)
@example("-1e99", "1e-99", [], 3)
def test_graders(prediction, reference, options, precision):
    for answer in (prediction, reference):
        boxed = last_boxed(answer)
        assert boxed is None or boxed in answer
        assert (answer_kind(answer) == "") == (normalize_answer(answer) == "")
        assert grade(answer, answer).is_correct == (normalize_answer(answer) != "")
        assert parse_options(answer) is None or all(isinstance(o, str) for o in parse_options(answer))
    assert agree(read(prediction), read(reference)) == agree(read(reference), read(prediction))
    assert mentions(prediction, reference) in (None, False, True)
    index = option_index(prediction, options)
    assert index is None or 0 <= index < len(options)
    assert grade(prediction, reference, options=options, precision=precision).grader in GRADERS


# The rollout reader.

ROLES = (
    TeacherRole("perception", "", "<description>", ("description",), "valid", "forward_kl", 1.0, 0.0),
    TeacherRole("reasoning", "{problem} {reference} {caption}", "", ("reasoning",), "valid", "forward_kl", 1.0, 0.0),
    TeacherRole("reference", "{reference}", "", ("completion",), "invalid", "reverse_kl", 1.0, 0.0),
)
BUCKETS = Buckets(patches=(64,), prompt=(200,), completion=(64,), sequence=(800,))
GOOD = {"images": "a.png", "problem": "Q?", "answer": "a", "caption": "c", "completion": "d</description><think>r"}
ROWS = st.fixed_dictionaries(
    {}, optional={name: JSON | st.just(value) for name, value in GOOD.items()} | {"id": JSON, "completion_ids": JSON}
)
PICTURES = JSON | st.fixed_dictionaries({"frames": JSON, "fps": SCALARS}) | st.fixed_dictionaries({"bytes": JSON})


@pytest.mark.slow
@LONG
@given(rows=st.lists(ROWS | PICTURES.map(lambda x: GOOD | {"images": x}) | JSON | st.binary(max_size=20), max_size=4))
def test_rollout_reader(processor, tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "rollouts"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(picture_bytes())
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in [GOOD, *rows]]
    (folder / "r.jsonl").write_bytes(b"\n".join(line.replace(b"\n", b" ") for line in lines))
    model = ModelConfig.load(processor.folder)
    loaded = types.SimpleNamespace(processor=processor, config=model, roles=ROLES, buckets=BUCKETS, span_rule="paper")
    config = base.get_config()
    config.data.fields = ("caption",)
    source = JsonlSource(folder / "r.jsonl", fields=("caption",))
    cases = list(read_cases(source, loaded, config))
    assert [case.index for case in cases] == list(range(len(source))) and cases[0].bad_reason is None
    for case in cases:
        assert isinstance(case.example, Example) and isinstance(case.example.id, str)
        if case.bad_reason is None:
            pack_scores([case.row], [case.rollout], roles=ROLES, config=model, buckets=BUCKETS)
        else:
            assert case.rollout is None and case.bad_reason.isprintable()


# Configs.


def fields_of(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from fields_of(value, (*path, key))


BASE = to_json(base.get_config())
FIELDS = sorted(fields_of(json.loads(BASE)))


def check_config(path, raw) -> bool:
    """Reads and checks a config as `--mode score --workdir` would, down to the device mesh; whether it can be used."""
    path.write_text(json.dumps(raw))
    try:
        config = read_json(path)
        validate(config)
        role_table(config.roles, config.prompts, data_fields=tuple(config.data.fields))
        Buckets(**{kind: tuple(sizes) for kind, sizes in config.buckets.items()})
        Sampling(**config.sampling)
        parse_rules(config.mesh.rules)
        make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
        make_optimizer(config.optimizer, steps=config.steps)
        assert differences(config, config) == []
    except InputError as e:
        assert str(e).isprintable()
        return False
    return True


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@example(
    changes=[(("gradient_accumulation_steps",), float("nan"), True)]
)  # a field that nothing reads, and no value but itself
@given(changes=st.lists(st.tuples(st.sampled_from(FIELDS), JSON, st.booleans()), min_size=1, max_size=2))
def test_configs(tmp_path_factory, changes):
    raw = json.loads(BASE)
    for path, value, adds in changes:
        node = raw
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node["stranger" if adds else path[-1]] = value
    check_config(tmp_path_factory.getbasetemp() / "config.json", raw)


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_every_field_of_a_config(tmp_path, field):
    """Each of a few wrong values in each field."""
    for value in (None, True, -1, 2.5, "text", [], [1], {}, {"a": 1}, float("nan"), 10**400):
        raw = json.loads(BASE)
        node = raw
        for key in field[:-1]:
            node = node[key]
        node[field[-1]] = value
        check_config(tmp_path / "config.json", raw)


def test_the_base_config_passes_the_same_check(tmp_path):
    assert check_config(tmp_path / "config.json", json.loads(BASE))
