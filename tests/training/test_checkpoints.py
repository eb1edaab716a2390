"""Checkpoints: bits that changed are noticed, a broken newest one is no end, and what cannot be written is said."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest
import tiny_runs as runs
from cases import others_slow

from vigos_jax.errors import InputError
from vigos_jax.training.checkpoints import Checkpoints, _short
from vigos_jax.training.step import TrainState


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A workdir of the finished run that a test may break."""
    shutil.copytree(undisturbed.workdir, tmp_path / "run")
    return tmp_path / "run"


# -- broken ones ------------------------------------------------------------------------------------------------


def cut(folder: pathlib.Path) -> None:
    """Every file of the weights loses its second half."""
    for path in (folder / "trained").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder: pathlib.Path) -> None:
    """One bit in the middle of the weights, in both copies that orbax keeps of small ones."""
    for part in (folder / "trained" / "d", folder / "trained" / "ocdbt.process_0" / "d"):
        path = max(part.iterdir(), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)


def lose_data(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "data")


def lose_optimizer(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "opt_state")


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("harm", others_slow([cut, lose_data, flip, lose_optimizer, empty], quick=2))
def test_a_broken_newest_checkpoint_falls_back(world, undisturbed, copied, capsys, harm):
    harm(copied / "checkpoints" / str(runs.STEPS))
    assert world.run(f"--workdir={copied}") == 0
    said = capsys.readouterr().err
    assert f"warning: the checkpoint of step {runs.STEPS} is broken" in said
    assert f"going back to step {runs.STEPS - 1}" in said and f"resuming from step {runs.STEPS - 1}" in said
    assert (copied / "checkpoints-broken" / str(runs.STEPS)).is_dir()
    runs.assert_same_trees(runs.saved_state(copied, runs.STEPS), runs.saved_state(undisturbed.workdir, runs.STEPS))
    assert [row["step"] for row in runs.read_rows(copied / "metrics.jsonl")] == list(range(1, runs.STEPS + 1))


def test_all_broken_is_an_end(world, copied, capsys):
    for folder in (copied / "checkpoints").iterdir():
        flip(folder)
    assert world.run(f"--workdir={copied}") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint of step 1 is broken" in said and "no older one is left" in said


def test_other_modes_do_not_use_a_broken_one(world, copied, capsys):
    flip(copied / "checkpoints" / str(runs.STEPS))
    arguments = ["--mode=export", f"--workdir={copied}", f"--config.export.output={copied / 'out'}"]
    assert world.run(*arguments) == 2
    said = capsys.readouterr().err
    assert "is broken: " in said and "config.export.step" in said and not (copied / "out").exists()
    assert world.run(*arguments, "--config.export.step=2") == 0


def test_an_unfinished_save_is_no_checkpoint(world, copied):
    """What a kill inside a save leaves: a folder of a temporary name, which orbax clears away."""
    newest = copied / "checkpoints" / str(runs.STEPS)
    newest.rename(copied / "checkpoints" / f"{runs.STEPS}.orbax-checkpoint-tmp")
    assert world.run(f"--workdir={copied}") == 0
    assert sorted(p.name for p in (copied / "checkpoints").iterdir()) == [str(n) for n in range(1, runs.STEPS + 1)]
    assert not (copied / "checkpoints-broken").exists()


# -- what cannot be written -------------------------------------------------------------------------------------


def test_a_save_that_fails_is_said_and_older_ones_stay(undisturbed, tmp_path, monkeypatch):
    """With one checkpoint kept, the old one goes only when the new one is there."""
    shutil.copytree(undisturbed.workdir / "checkpoints" / "1", tmp_path / "checkpoints" / "1")
    tree = {"lora": jnp.ones((4, 4))}
    state = train_state(tree, 2)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    message = "cannot write a checkpoint into .*; whole ones are of steps: 1$"
    with pytest.raises(InputError, match=message), Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
        checkpoints.save(state, {"next_batch": 2})
    assert (tmp_path / "checkpoints" / "1").is_dir()


def train_state(tree, step):
    return TrainState(jnp.int32(step), tree, {"m": jnp.zeros(3)}, {})


def test_the_reason_stands_at_the_end():
    """tensorstore writes a page of settings behind it."""
    text = (
        "RESOURCE_EXHAUSTED: Error writing "
        + "x" * 500
        + ': No space left on device [tensorstore_spec=\'{"a":'
        + "y" * 500
    )
    assert _short(text).startswith("RESOURCE_EXHAUSTED") and _short(text).endswith(": No space left on device")
    assert len(_short(text)) <= 300 and "\n" not in _short("a\nb")


def test_an_old_checkpoint_goes_when_the_new_one_is_there(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(train_state({"lora": jnp.full((4, 4), float(step))}, step), {"next_batch": step})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step, state, data = checkpoints.restore_newest(train_state({"lora": jnp.zeros((4, 4))}, 0))
    assert step == 3 and data == {"next_batch": 3} and float(state.trained["lora"][0, 0]) == 3.0


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="cannot use the folder .*checkpoints: File exists; choose a writable one"):
        Checkpoints(tmp_path, keep=1)
