"""What a run writes down and shows."""

import io
import json
import re

import pytest

from vigos_jax.runtime.files import write_json
from vigos_jax.runtime.progress import Progress, bar, say
from vigos_jax.training import run_log
from vigos_jax.training.run_log import MetricsFile


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watch(monkeypatch) -> Terminal:
    """Puts a terminal in place of stderr. Not a fixture: pytest replaces stderr between set-up and test."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    return screen


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, next_step=1)
    file.write({"step": 1, "loss": 0.1 + 0.2})
    assert path.read_text() == '{"step": 1, "loss": 0.30000000000000004}\n'
    file.write({"step": 2, "loss": 0.0})
    assert steps(path) == [1, 2]
    file.close()


@pytest.mark.parametrize("next_step, kept", [(1, []), (3, [1, 2]), (4, [1, 2, 3]), (9, [1, 2, 3])])
def test_rows_that_will_be_written_again_are_dropped(tmp_path, next_step, kept):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i},  "loss": {i / 3}}}\n' for i in (1, 2, 3)]
    path.write_text("".join(lines))
    file = MetricsFile(path, next_step=next_step)
    assert path.read_text() == "".join(lines[: len(kept)])  # and those that stay are not touched
    file.write({"step": next_step})
    assert steps(path) == [*kept, next_step]
    file.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3', "\x00\x00", '{"step": 2, "loss": 0}'])
def test_a_torn_last_line_is_mended(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n'[: 12 if '"step": 2' in torn else None] + torn)
    file = MetricsFile(path, next_step=3)
    file.write({"step": 3})
    assert steps(path) == [1, 2, 3]
    file.close()


def test_a_torn_line_before_whole_rows_is_said(tmp_path, monkeypatch):
    """As a power cut leaves them: what follows is kept, and the line is named."""
    path, screen = tmp_path / "metrics.jsonl", watch(monkeypatch)
    path.write_bytes(b'{"step": 1}\n{"loss": 2}\n{"step": 3, "x": "\xff"}\n{"step": 4}\n{"step": 5, "x": "\xff')
    file = MetricsFile(path, next_step=5)
    assert file.last_step == 4
    file.write({"step": 5})
    assert steps(path) == [1, 4, 5]
    file.close()
    assert screen.getvalue().count("warning") == 1 and "lines 2, 3 cannot be read" in screen.getvalue()
    path.write_bytes(b'{"step": 1}\n\xff')
    MetricsFile(path, next_step=2).close()
    assert screen.getvalue().count("warning") == 1  # the end of a killed run's file is what it always is


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"score": 0.5})
    assert json.loads(path.read_text()) == {"score": 0.5}
    with pytest.raises(TypeError):
        write_json(path, {"score": object()})
    assert json.loads(path.read_text()) == {"score": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_progress_says_how_much_time_is_left(capsys, monkeypatch):
    now = iter((40.0, 100.0, 700.0))  # one of 12 steps was done before; the next one compiles
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(now))
    progress = Progress(total=12, start=1, title="train", every=4)
    progress.update(2, {})
    assert capsys.readouterr().err == "train 2/12  the first took 60.0 s\n"
    progress.update(4, {})
    assert capsys.readouterr().err.endswith("300.00 s/step, 40:00 left\n")


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys):
    progress = Progress(total=5, start=0, title="train", every=2)
    progress.note("compiling")
    for step in range(1, 6):
        progress.update(step, {"loss": 1 / step, "valid": 0.25})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r" ([\d.]+ s/step, 00:00 left|the first took [\d.]+ s)", "", line) for line in lines] == [
        "train 1/5  loss 1 valid 0.25 ",  # the first one always: until then nobody knows whether anything happens
        "train 2/5  loss 0.5 valid 0.25 ",
        "train 4/5  loss 0.25 valid 0.25 ",
        "train 5/5  loss 0.2 valid 0.25 ",  # the last one always
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = watch(monkeypatch)
    progress = Progress(total=5, start=3, title="train", every=1)
    progress.note("compiling")
    progress.update(4, {"loss": 0.5})
    progress.update(5, {"loss": 0.25})
    progress.close()
    shown = terminal.getvalue()
    assert "compiling" in shown and "5/5" in shown and "loss 0.25" in shown
    assert re.search(r"5/5 \[\d\d:\d\d<\d\d:\d\d, .*(it/s|s/it), loss 0.25\]", shown)  # time left and rate
    assert "s/step" not in shown


def test_bar_is_silent_without_a_terminal(capsys):
    assert list(bar(range(3), title="score")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(monkeypatch):
    terminal = watch(monkeypatch)
    assert list(bar(range(3), title="score")) == [0, 1, 2]
    assert "score" in terminal.getvalue()


def test_say_goes_to_the_person_watching(capsys):
    say("resuming from step 2")
    assert capsys.readouterr() == ("", "resuming from step 2\n")
