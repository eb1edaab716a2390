"""`--mode score`: a line for every rollout, token by token, the same numbers as a plain forward pass."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from PIL import Image

from vigos_jax import main
from vigos_jax.method.packing import Buckets, pack_prompts
from vigos_jax.method.roles import role_table
from vigos_jax.method.rows import make_row
from vigos_jax.method.spans import find_spans
from vigos_jax.session import load

VALID = " a red square </description> <think> it is red </think> \\boxed{red}"
LONGER = " a blue circle and" + VALID.replace("it is", "not blue , it is") + " <think>"
INVALID = " a red square </description> it is red"
FIELDS = {
    "id", "is_valid", "completion_ids", "spans", "role", "kl", "kl_clipped", "student_logp", "teacher_logp",
}  # fmt: skip
PER_TOKEN = ("kl", "kl_clipped", "student_logp", "teacher_logp")


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def rollouts(world, tmp_path_factory):
    """Six good rollouts and three bad ones."""
    folder = tmp_path_factory.mktemp("rollouts")
    runs.write_pictures(folder / "pictures", 3)
    ids = runs.processor(world.model).encode_text(VALID) + list(runs.processor(world.model).eos_ids[:1])
    texts = {"problem": "What colour?", "answer": "red"}
    rows = [
        {"id": "relative", "images": ["pictures/0.png"], "completion": VALID} | texts,
        {"id": "absolute", "images": [str(folder / "pictures" / "1.png")], "completion_ids": ids} | texts,
        {"id": "lost", "images": ["pictures/9.png"], "completion": VALID} | texts,
        {"id": "invalid", "images": ["pictures/2.png"], "completion": INVALID} | texts,
        {"id": "empty", "images": ["pictures/0.png"], "completion_ids": []} | texts,
        {"id": "no such id", "images": ["pictures/0.png"], "completion_ids": [10**6]} | texts,
        {"id": "other question", "images": ["pictures/0.png"], "completion": VALID, "problem": "Why?", "answer": 0},
        {"id": "says nothing", "images": ["pictures/0.png"]} | texts,
        {"id": "last", "images": ["pictures/1.png"], "completion": LONGER} | texts,
    ]
    return runs.write_rows(folder / "rollouts.jsonl", rows)


BAD = {"lost": "image_missing", "no such id": "bad_completion_ids", "says nothing": "no_completion"}


def score(world, rollouts, output, *arguments: str) -> tuple[list[dict], dict]:
    flags = [f"--config.score.rollouts={rollouts}", f"--config.score.output={output}"]
    clip = [f"--config.roles.{role}.clip=0.5" for role in ("perception", "reasoning", "reference")]
    adapter = f"--config.model.adapter={world.adapter}"
    assert world.run("--mode=score", adapter, *flags, *clip, *arguments) == 1  # some rows are bad
    return runs.read_rows(output / "scores.jsonl"), json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def scored(world, rollouts, tmp_path_factory):
    return score(world, rollouts, tmp_path_factory.mktemp("scores"))


@pytest.mark.slow
def test_every_row_has_its_line_in_order(scored, rollouts, world):
    lines, _ = scored
    asked = runs.read_rows(rollouts)
    assert [line["id"] for line in lines] == [row["id"] for row in asked]
    for line, row in zip(lines, asked, strict=True):
        if row["id"] in BAD:
            assert line == {"id": row["id"], "error": BAD[row["id"]]}
            continue
        assert line.keys() == FIELDS
        ids = row.get("completion_ids")
        ids = runs.processor(world.model).encode_text(row["completion"]) if ids is None else ids
        assert line["completion_ids"] == ids
        spans = find_spans(runs.processor(world.model).token_bytes(line["completion_ids"]))
        assert line["is_valid"] == spans.is_valid
        for name in ("description", "reasoning", "answer"):
            assert line["spans"][name] == ([list(getattr(spans, name))] if spans.is_valid else [])


def test_roles_and_nulls(scored):
    lines, _ = scored
    seen = set()
    for line in (line for line in lines if "error" not in line):
        n = len(line["completion_ids"])
        expected = [None] * n
        if line["is_valid"]:
            for span, role in (("description", "perception"), ("reasoning", "reasoning"), ("answer", "reasoning")):
                for start, end in line["spans"][span]:
                    expected[start:end] = [role] * (end - start)
        else:
            expected = ["reference"] * n
        assert line["role"] == expected
        for field in PER_TOKEN:
            assert [x is None for x in line[field]] == [role is None for role in expected]
        seen |= set(expected)
    assert seen == {"perception", "reasoning", "reference", None}


def test_the_summary_is_the_mean_of_the_lines(scored):
    lines, summary = scored
    total, any_clipped = 0.0, False
    for role, weight in (("perception", 1.0), ("reasoning", 1.0), ("reference", 2.0)):
        pairs = [
            (kl, clipped)
            for line in lines if "error" not in line
            for kl, clipped, r in zip(line["kl"], line["kl_clipped"], line["role"], strict=True) if r == role
        ]  # fmt: skip
        kls, clipped = np.array(pairs).T
        np.testing.assert_allclose(clipped, np.minimum(kls, 0.5), rtol=1e-6)
        assert summary[role]["tokens"] == len(pairs)
        assert summary[role]["loss"] == pytest.approx(clipped.mean(), rel=1e-5)
        assert summary[role]["clipped_fraction"] == pytest.approx(np.mean(kls > 0.5))
        any_clipped |= bool(np.any(kls > 0.5))
        total += weight * clipped.mean()
    assert any_clipped
    assert summary["loss"] == pytest.approx(total, rel=1e-5)
    assert summary["rows"] == 9 and summary["bad_rows"] == dict.fromkeys(BAD.values(), 1)


@pytest.mark.slow
def test_bad_rows_are_named(world, rollouts, tmp_path, capsys):
    """By their line in the file, blank ones counted."""
    spaced = rollouts.parent / "spaced.jsonl"
    spaced.write_text(rollouts.read_text().replace("\n", "\n\n"))
    for path, lines in ((rollouts, (3, 6, 8)), (spaced, (5, 11, 15))):
        score(world, path, tmp_path / path.stem)
        said = capsys.readouterr().err
        for line, (name, reason) in zip(lines, BAD.items(), strict=True):
            assert f"{path}:{line}: id {name}: {reason}" in said


@pytest.mark.slow
def test_other_clips_and_means(world, rollouts, scored, tmp_path):
    roles = ["perception.first_clip=0.1", "reasoning.clip_per=entry", "reference.last_clip=0.2"]
    options = [f"--config.roles.{x}" for x in roles] + ["--config.loss.reduction=sequences"]
    lines, summary = score(world, rollouts, tmp_path, *options)
    means = {"perception": [], "reasoning": [], "reference": []}
    lengths = set()
    for line, before in zip(lines, scored[0], strict=True):
        if "error" in line:
            continue
        for field in ("student_logp", "teacher_logp"):
            np.testing.assert_allclose(np.array(line[field], float), np.array(before[field], float), atol=1e-5)
        at = {name: [j for j, role in enumerate(line["role"]) if role == name] for name in means}
        for name, where in at.items():
            for place, j in enumerate(where):
                clip = {"perception": 0.5, "reasoning": np.inf, "reference": 0.5}[name]
                clip = 0.1 if name == "perception" and place == 0 else clip
                clip = 0.2 if name == "reference" and place == len(where) - 1 else clip
                assert line["kl_clipped"][j] == pytest.approx(min(line["kl"][j], clip), rel=1e-6)
                if name == "reasoning":  # terms above 0.5 were cut, so the sum is smaller
                    assert line["kl"][j] <= before["kl"][j] + 1e-5
            if where:
                means[name].append(np.mean([line["kl_clipped"][j] for j in where]))
                lengths.add((name, len(where)))
    assert len(lengths) > len(means)  # a mean over tokens is another number
    assert lines[0]["kl"] != pytest.approx(scored[0][0]["kl"], abs=1e-3)
    for name, values in means.items():
        assert summary[name]["loss"] == pytest.approx(np.mean(values), rel=1e-5)
    total = sum(weight * np.mean(means[name]) for name, weight in zip(means, (1, 1, 2), strict=True))
    assert summary["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_temperature_and_teachers(world, rollouts, scored, tmp_path):
    warm, _ = score(world, rollouts, tmp_path / "warm", "--config.loss.temperature=2.0")
    live, _ = score(world, rollouts, tmp_path / "live", "--config.teacher.weights=live")
    numbers = lambda lines, field: np.array([x for line in lines for x in line.get(field, [])], float)  # noqa: E731
    close = lambda a, b, field: np.allclose(numbers(a, field), numbers(b, field), atol=1e-5, equal_nan=True)  # noqa: E731
    before, fields = scored[0], ("kl", "student_logp", "teacher_logp")
    assert [close(warm, before, f) for f in fields] == [False, True, True]
    assert [close(live, before, f) for f in fields] == [False, True, False]


@pytest.mark.slow
def test_the_number_of_rows_at_a_time_changes_nothing(world, rollouts, scored, tmp_path):
    lines, summary = score(world, rollouts, tmp_path, "--config.score.batch_size=8", "--config.loss.chunk=5")
    assert summary["loss"] == pytest.approx(scored[1]["loss"], rel=1e-5)
    for a, b in zip(lines, scored[0], strict=True):
        for field in PER_TOKEN if "error" not in a else ():
            np.testing.assert_allclose(np.array(a[field], float), np.array(b[field], float), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_is_the_divergence_of_plain_forward_passes(world, rollouts, scored):
    """Each role alone, one row, unpacked, all logits: written out here."""
    config = _config(world)
    loaded = load(config, for_training=False)
    table = role_table(config.roles, config.prompts)

    @jax.jit
    def log_probs(variables, batch):
        images = loaded.model.apply(variables, batch.vision, method="encode_images")
        hidden, _ = loaded.model.apply(variables, jax.tree.map(jnp.asarray, batch.text), images)
        return jax.nn.log_softmax(loaded.model.apply(variables, hidden, method="logits"))[0]

    def completion_log_probs(variables, user, prefill, images, line):
        student = {"user": user.replace("{reference}", "red"), "assistant_prefill": prefill}
        row = make_row(images, problem="What colour?", student=student, processor=loaded.processor)
        turn = row.student
        ids = list(line["completion_ids"])
        whole = type(row)(images=images, student=type(turn)(turn.prefix_ids, turn.rest_ids + tuple(ids)))
        batch = pack_prompts([whole] * 1, config=loaded.config, buckets=Buckets((64,), (128,), (64,), (384,)))
        end = len(whole.student.ids) - 1
        return np.asarray(log_probs(variables, batch))[end - len(ids) : end]  # [n, V]: predicts each token

    for line in (scored[0][0], scored[0][3]):
        row = next(r for r in runs.read_rows(rollouts) if r["id"] == line["id"])
        image = Image.open(rollouts.parent / row["images"][0])
        images = (loaded.processor.encode_image(image.convert("RGB")),)
        prompt = config.prompts.student
        student = completion_log_probs(loaded.student(), prompt.user, prompt.assistant_prefill, images, line)
        for role in table:
            teacher = completion_log_probs({"params": loaded.base}, role.user, role.assistant_prefill, images, line)
            for j, name in enumerate(line["role"]):
                if name != role.name:
                    continue
                p, q = (student[j], teacher[j]) if role.divergence == "reverse_kl" else (teacher[j], student[j])
                token = line["completion_ids"][j]
                assert line["kl"][j] == pytest.approx(float(np.sum(np.exp(p) * (p - q))), abs=1e-4)
                assert line["student_logp"][j] == pytest.approx(student[j][token], abs=1e-4)
                assert line["teacher_logp"][j] == pytest.approx(teacher[j][token], abs=1e-4)
                assert line["student_logp"][j] != pytest.approx(line["teacher_logp"][j], abs=1e-6)


def _config(world):
    flags = [f"--config={world.config}", f"--config.model.adapter={world.adapter}"]
    one = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=8"]
    return main._parse(["vigos_jax", *flags, *one])[0]


def test_a_token_scored_twice_shows_both(world, rollouts, tmp_path):
    lines, summary = score(world, rollouts, tmp_path, "--config.roles.reference.when=always")
    line = lines[0]
    assert line["is_valid"] and line["by_role"].keys() == {"perception", "reasoning", "reference"}
    assert None not in line["by_role"]["reference"]["kl"]
    for name in ("perception", "reasoning"):
        scored_here = [x is not None for x in line["by_role"][name]["kl"]]
        assert any(scored_here) and not all(scored_here)
    # Where two roles score, the table's first is shown.
    start, end = line["spans"]["description"][0]
    assert line["role"][start:end] == ["perception"] * (end - start)
    assert summary["reference"]["tokens"] > summary["perception"]["tokens"] + summary["reasoning"]["tokens"]
