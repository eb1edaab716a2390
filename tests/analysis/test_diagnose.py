"""`--mode diagnose`: PALR against the same numbers put together from `--mode score`; its files; its bad input."""

import json

import numpy as np
import pytest
import tiny_runs as runs
from browser import dump, needs_browser

VALID = " a red square </description> <think> it is red </think> \\boxed{red}"
OTHER = " three blue squares </description> <think> it is three </think> \\boxed{3}"
WRONG = {"a": ["blue", "dark green"], "b": ["four"], "script": ["seven", "eight"]}
SCRIPT = "<script>x()</script>"


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three good rollouts, an invalid one, two bad rows; a blank line in front of the last."""
    folder = tmp_path_factory.mktemp("rollouts")
    runs.write_pictures(folder / "pictures", 3)
    picture = lambda i: {"images": [str(folder / "pictures" / f"{i}.png")]}  # noqa: E731
    return [
        {"id": "a", "problem": "What colour?", "answer": "red", "completion": VALID} | picture(0),
        {"id": "invalid", "problem": "What colour?", "answer": "red", "completion": " no format"} | picture(1),
        {"id": "b", "problem": "How many squares?", "answer": "three", "completion": OTHER} | picture(1),
        {"id": "lost", "problem": "How many?", "answer": "three", "completion": OTHER} | picture(9),
        {"id": "script", "problem": SCRIPT, "answer": "three", "completion": OTHER} | picture(2),
        {"id": "mute", "problem": "How many?", "answer": "three"} | picture(2),
    ]


GOOD = {"a": 0, "b": 2, "script": 4}
NEXT_IMAGE = {"a": "b", "b": "script", "script": "a"}
OPSD = """\
import importlib.util

from configs import base


def get_config():
    spec = importlib.util.spec_from_file_location("mine", {config!r})
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    config = mine.get_config()
    config.roles = type(config)()
    config.roles.reference = base.role(("completion",), "always", "forward_kl", weight=1.0, clip=0.0)
    return config
"""


def diagnose(world, rollouts, output, *flags, code=1):
    arguments = [f"--config.diagnose.rollouts={rollouts}", f"--config.diagnose.output={output}"]
    assert world.run("--mode=diagnose", f"--config.model.adapter={world.adapter}", *arguments, *flags) == code
    summary = json.loads((output / "summary.json").read_text())
    return runs.read_rows(output / "palr.jsonl"), summary


def write(path, rows):
    """The rows, with a blank line in front of the last."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:-1], "", lines[-1]]) + "\n")
    return path


def wrong_file(folder):
    return runs.write_rows(folder / "wrong.jsonl", [{"id": k, "wrong_answers": v} for k, v in WRONG.items()])


@pytest.fixture(scope="module")
def found(world, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("palr")
    rollouts = write(folder / "rollouts.jsonl", rows)
    flags = [f"--config.diagnose.wrong_answers_file={wrong_file(folder)}", "--config.diagnose.batch_size=2"]
    lines, summary = diagnose(world, rollouts, folder / "out", *flags)
    return lines, summary, folder / "out"


@pytest.fixture(scope="module")
def expected(world, rows, tmp_path_factory):
    """{id: {"role", "s", "c_answer", "c_image"}} by the formulas, from the teachers' numbers of `--mode score`."""

    def teacher(changes):
        folder = tmp_path_factory.mktemp("score")
        changed = [rows[i] | changes(name) for name, i in GOOD.items()]
        arguments = [f"--config.score.rollouts={runs.write_rows(folder / 'r.jsonl', changed)}"]
        arguments += [f"--config.score.output={folder / 'out'}", f"--config.model.adapter={world.adapter}"]
        assert world.run("--mode=score", *arguments) == 0
        lines = runs.read_rows(folder / "out" / "scores.jsonl")
        return {line["id"]: line for line in lines}

    own = teacher(lambda name: {})
    wrong = [teacher(lambda name: {"answer": (WRONG[name] * 2)[k]}) for k in range(2)]  # noqa: B023
    image = teacher(lambda name: {"images": rows[GOOD[NEXT_IMAGE[name]]]["images"]})
    out = {}
    for name in GOOD:
        numbers = {"role": own[name]["role"], "s": [], "c_answer": [], "c_image": []}
        for j, role in enumerate(own[name]["role"]):
            if role is None:
                for key in ("s", "c_answer", "c_image"):
                    numbers[key].append(None)
                continue
            q = own[name]["teacher_logp"][j]
            mixed = np.log(np.mean([np.exp(w[name]["teacher_logp"][j]) for w in wrong[: len(WRONG[name])]]))
            numbers["s"].append(abs(q - own[name]["student_logp"][j]))
            numbers["c_answer"].append(max(0.0, q - mixed) if role != "perception" else 0.0)
            numbers["c_image"].append(max(0.0, q - image[name]["teacher_logp"][j]))
        out[name] = numbers | {"spans": own[name]["spans"]}
    return out


def test_every_token_is_as_the_formulas_say(found, expected):
    lines, _, _ = found
    assert [line["id"] for line in lines] == list(GOOD)
    for line in lines:
        want = expected[line["id"]]
        assert line["role"] == want["role"]
        assert line["wrong_answers"] and set(line["wrong_answers"]) == set(WRONG[line["id"]])
        for key in ("s", "c_answer", "c_image"):
            got = np.array(line[key], float)
            np.testing.assert_allclose(got, np.array(want[key], float), atol=2e-5)
            assert np.nanmax(got) > 0.03  # not all zero
        assert "".join(line["tokens"]).startswith((VALID if line["id"] == "a" else OTHER)[:20])


def test_ratios_are_of_sums_over_all_rollouts(found, expected):
    _, summary, _ = found
    for group, roles in (("T_d", ("perception",)), ("T_ra", ("reasoning",)), ("T_y", ("perception", "reasoning"))):
        answer = image = tokens = 0.0
        for numbers in expected.values():
            for j, role in enumerate(numbers["role"]):
                if role in roles:
                    answer += numbers["s"][j] * numbers["c_answer"][j]
                    image += numbers["s"][j] * numbers["c_image"][j]
                    tokens += 1
        assert summary[group]["palr"] == pytest.approx(answer / (answer + image + 1e-8), abs=1e-4)
        assert summary[group]["tokens"] == tokens > 0
    assert summary["counts"] == {
        "rows": 6, "invalid rollouts": 1, "bad rows": 2, "wrong answers from given": 3, "scored": 3
    }  # fmt: skip


@pytest.mark.slow
def test_the_description_hangs_on_no_answer_in_vigos_and_on_it_in_opsd(world, rows, found, tmp_path):
    """By construction: the perception teacher is shown none."""
    lines, summary, _ = found
    assert summary["T_d"]["palr"] == 0.0 and summary["T_ra"]["palr"] > 0.0
    config = tmp_path / "opsd.py"
    config.write_text(OPSD.format(config=str(world.config)))
    rollouts = write(tmp_path / "rollouts.jsonl", rows)
    flags = [f"--config={config}", f"--config.diagnose.wrong_answers_file={wrong_file(tmp_path)}"]
    lines, summary = diagnose(world, rollouts, tmp_path / "out", *flags)
    assert summary["T_d"]["palr"] > 1e-3
    start, end = lines[0]["spans"]["description"][0]
    assert max(lines[0]["c_answer"][start:end]) > 1e-3
    assert all(role == "reference" for role in lines[0]["role"])  # delimiters too
    assert summary["T_y"]["tokens"] > summary["T_d"]["tokens"] + summary["T_ra"]["tokens"]


@pytest.mark.slow
def test_bad_rows_are_named_by_their_line(world, rows, tmp_path, capsys):
    rollouts = write(tmp_path / "rollouts.jsonl", rows)
    diagnose(world, rollouts, tmp_path / "out")
    out, err = capsys.readouterr()
    assert f"{rollouts}:4: id lost: image_missing" in err
    assert f"{rollouts}:7: id mute: no_completion" in err  # behind the blank line
    assert "PALR" in out and "T_ra" in out and "rows 6" in out


@pytest.mark.slow
def test_other_rows_give_wrong_answers(world, rows, tmp_path):
    """Without a file: `red` and `three` are the other's, both being words."""
    lines, summary = diagnose(world, write(tmp_path / "rollouts.jsonl", rows), tmp_path / "out")
    assert [line["wrong_answers"] for line in lines] == [["three"], ["red"], ["red"]]
    assert summary["counts"]["wrong answers from rows"] == 3


@pytest.mark.slow
def test_rollouts_are_sampled_where_none_are_given(world, tmp_path):
    """A random student never keeps the format: everything is counted, and nothing is left."""
    arguments = [f"--config.diagnose.output={tmp_path / 'out'}", "--config.diagnose.rows=10"]
    assert world.run("--mode=diagnose", *arguments) == 2


def test_no_usable_row(world, rows, tmp_path, capsys):
    def refused(part, *flags):
        rollouts = runs.write_rows(tmp_path / "rollouts.jsonl", part)
        arguments = [f"--config.diagnose.rollouts={rollouts}", f"--config.diagnose.output={tmp_path / 'out'}"]
        assert world.run("--mode=diagnose", *arguments, *flags) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert not list((tmp_path / "out").glob("*"))
        return said

    assert "invalid rollouts 1" in refused([rows[1]])
    assert "bad rows 1" in refused([rows[3]])
    assert "no wrong answer 1" in refused([rows[0]])
    alone = rows[0] | {"wrong_answers": ["blue"]}
    assert "no other image 2" in refused([alone, alone])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.diagnose.wrong_answers=0", "config.diagnose.wrong_answers=0 must be at least 1"),
        ("--config.diagnose.rollouts=none.jsonl", "config.diagnose.rollouts='none.jsonl' must be a .jsonl file"),
        ("--config.diagnose.wrong_answers_file=none.jsonl", "cannot read config.diagnose.wrong_answers_file"),
        ("--config.roles.perception.divergence=kl", "choices: forward_kl, reverse_kl, jsd"),
    ],
)
def test_bad_flags(world, tmp_path, capsys, flag, message):
    assert world.run("--mode=diagnose", f"--config.diagnose.output={tmp_path}", flag) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_an_output_is_needed(world, capsys):
    assert world.run("--mode=diagnose") == 2
    assert "--config.diagnose.output" in capsys.readouterr().err


@needs_browser
def test_the_page_in_a_browser(found, tmp_path):
    document, said = dump(found[2] / "palr.html", tmp_path / "profile")
    assert said == "" and "<title>What the teachers" in document
    assert "&lt;script&gt;x()" in document and "<script" not in document
    assert document.count("<img") == 3 and document.count("perception: s ") > 3
