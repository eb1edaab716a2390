"""An export's folder: empty ones are used, mount points too; foreign ones never; a killed export is begun anew."""

import errno
import json
import os
import pathlib

import pytest

from vigos_jax.errors import InputError
from vigos_jax.export import folder as lib
from vigos_jax.export.folder import Record, check_free, prepare, publish

FACTS = {"kind": "merged", "dtype": "float32", "step": 4}
NAMES = ["additional_chat_templates/tool.jinja", "config.json", "model.safetensors", "tokenizer.json"]


def write(temporary: pathlib.Path) -> None:
    for i, name in enumerate(NAMES):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(bytes(10 + i))


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def export(output: pathlib.Path, record: pathlib.Path | None = None) -> None:
    temporary = prepare(output, size=1)
    write(temporary)
    publish(temporary, output, record=record, facts=FACTS)


def make(kind: str, output: pathlib.Path) -> None:
    if kind != "nothing":
        output.mkdir()
    if kind == "lost+found":  # what a file system has at its root
        (output / "lost+found").mkdir()


@pytest.mark.parametrize("kind", ["nothing", "empty", "lost+found"])
def test_what_is_free(tmp_path, kind):
    output, record = tmp_path / "out", tmp_path / "exported.json"
    make(kind, output)
    export(output, record)
    assert names(output) == NAMES and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert Record.of(record).is_there(output) and Record.of(record).step == 4
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        prepare(output, size=1)
    assert names(output) == NAMES


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EXDEV])
@pytest.mark.parametrize("kind", ["nothing", "empty"])
def test_a_folder_that_cannot_be_renamed(tmp_path, monkeypatch, kind, error):
    """A mount point, or another file system: what is written gets there file by file, the config last."""
    rename, moved = os.rename, []

    def fails(a, b, **_):
        moved.append(pathlib.Path(b).name)
        if error == errno.EXDEV or pathlib.Path(a).is_dir():
            raise OSError(error, os.strerror(error))
        rename(a, b)

    make(kind, tmp_path / "out")
    temporary = prepare(tmp_path / "out", size=1)
    write(temporary)
    monkeypatch.setattr(os, "rename", fails)
    publish(temporary, tmp_path / "out", record=None, facts=FACTS)
    assert names(tmp_path / "out") == NAMES and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert moved[-1] == "config.json"


@pytest.mark.parametrize("foreign", ["model.safetensors", "mine.txt", ".hidden"])
def test_a_foreign_folder_is_left_alone(tmp_path, foreign):
    output = tmp_path / "out"
    output.mkdir()
    (output / foreign).write_text("mine")
    for function in (check_free, lambda output: prepare(output, size=1)):
        with pytest.raises(InputError, match="out' exists and is not an empty folder; choose another"):
            function(output)
    assert names(output) == [foreign]
    with pytest.raises(InputError, match="is not an empty folder"):
        check_free(output / foreign)


class Killed(BaseException):
    """Not an error that anything could handle."""


def dies_after(function, times: int):
    """The function, but for its call number `times`, counted from 0."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > times:
            raise Killed
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("moved", range(4))
def test_killed_while_files_are_moved_it_is_begun_anew(tmp_path, monkeypatch, moved):
    output, record = tmp_path / "out", tmp_path / "exported.json"
    output.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lib.shutil, "move", dies_after(lib.shutil.move, moved))
        export(output, record)
    assert len([p for p in output.iterdir() if not p.name.startswith(".")]) == moved
    assert not (output / "config.json").exists()  # no program takes it for a model
    assert not Record.of(record).is_there(output)
    (output / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not an empty folder"):
        export(output, record)
    (output / "mine.txt").unlink()
    export(output, record)
    assert names(output) == NAMES and Record.of(record).is_there(output)


def test_killed_before_it_has_its_name_it_is_begun_anew(tmp_path, monkeypatch):
    output, record = tmp_path / "out", tmp_path / "exported.json"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", dies_after(os.rename, 0))
        export(output, record)
    assert not output.exists() and not Record.of(record).is_there(output)
    export(output, record)
    assert names(output) == NAMES and Record.of(record).is_there(output)


def test_what_cannot_be_put_there_stays_where_it_is(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out").mkdir()
    temporary = prepare(tmp_path / "out", size=1)
    write(temporary)
    monkeypatch.setattr(lib.shutil, "move", full)
    with pytest.raises(
        InputError, match="cannot put the export .* No space left on device; move it, it is complete in "
    ):
        publish(temporary, tmp_path / "out", record=None, facts=FACTS)
    assert names(temporary)[-4:] == NAMES


def test_a_record_knows_its_folder_and_no_other(tmp_path):
    record = tmp_path / "exported.json"
    export(tmp_path / "out", record)
    found = Record.of(record)
    assert found.is_there(tmp_path / "out") and found.files["config.json"] == 11
    export(tmp_path / "other")
    assert not found.is_there(tmp_path / "other")  # the same files elsewhere
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert found.is_there(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"others")
    assert not found.is_there(tmp_path / "out")
    for text in ("", "{}", "[]", json.dumps({"output": "x"})):
        record.write_text(text)
        assert Record.of(record) is None
    assert Record.of(tmp_path / "none.json") is None
