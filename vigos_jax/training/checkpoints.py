"""Orbax checkpoints of the training state: trained weights, optimizer state, step, and position in the data.

The frozen base is not saved: the run's config names it. Random keys are functions of seed and step, so no other random
state is saved. Each array is saved with a digest: a file system may return corrupt data, and a run must not resume
from it.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vigos_jax.errors import InputError
from vigos_jax.models.variables import Variables, teacher_params_of
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.digest import digests
from vigos_jax.runtime.distributed import is_first, several
from vigos_jax.runtime.progress import say
from vigos_jax.session import Session, load, trained_shapes
from vigos_jax.teachers import check_teachers, with_teachers
from vigos_jax.training.step import TrainState


class _Broken(Exception):
    """A checkpoint that is there under its final name and cannot be read, or not as it was written."""


class Checkpoints:
    """The checkpoints of a workdir. Use as a context manager; leaving it waits for the last save.

    A checkpoint has its final name when it is complete, and only then an older one is removed.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        # Rooted at an absolute path: orbax refuses relative ones.
        self._folder = (workdir / files.CHECKPOINTS).absolute()
        self._aside = (workdir / files.BROKEN_CHECKPOINTS).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as e:
            raise InputError(f"cannot use the folder {self._folder}: {e.strerror or e}; choose a writable one") from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._manager.close()
        except Exception as e:
            if error is None:
                raise self._unwritten(e) from e
            say(str(self._unwritten(e)))  # keep the original exception

    @property
    def folder(self) -> pathlib.Path:
        """Where the checkpoints lie."""
        return self._folder

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Starts saving; the files appear under their final name when complete.

        Raises:
          InputError: this, or what was started before it, cannot be written. Older checkpoints stay.
        """
        parts = {"trained": state.trained, "opt_state": state.opt_state}
        if state.average:
            parts["average"] = state.average
        sums = {item: digests(tree) for item, tree in parts.items()}
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in parts.items()}
        items["data"] = ocp.args.JsonSave({**data, "digests": sums})
        try:
            self._manager.save(int(state.step), args=ocp.args.Composite(**items))
        except Exception as e:
            raise self._unwritten(e) from e

    def _unwritten(self, error: Exception) -> InputError:
        reason = _short(str(error))
        steps = ", ".join(str(s) for s in sorted(self._manager.all_steps(read=True))) or "none"
        return InputError(
            f"cannot write a checkpoint into {self._folder}: {reason}; make room; whole ones are of steps: {steps}"
        )

    def restore_newest(self, like: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, data) of the newest intact checkpoint; None if there are no checkpoints.

        Broken ones are moved to checkpoints-broken/, with a warning.

        Args:
          like: shapes and shardings; the shardings may differ from those of the run that saved.

        Raises:
          InputError: all checkpoints are broken; or, with several processes, the newest one is.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, older in zip(steps, [*steps, None][1:], strict=True):
            try:
                return step, *self._restore(step, like)
            except _Broken as e:
                aside = f"the checkpoint of step {step} is broken and now in {self._aside}: {e}"
                self._put_aside(step)
                if older is None:
                    raise InputError(f"{aside}; no older one is left; choose another --workdir") from e
                if several():  # others may still be waiting inside the restore
                    raise InputError(f"{aside}; the same command resumes from step {older}") from e
                say(f"warning: {aside}; going back to step {older}")
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        trees = {"trained": like.trained, "opt_state": like.opt_state}
        if like.average:
            trees["average"] = like.average
        found, data = self._read(step, trees)
        step_array = jax.device_put(jnp.int32(step), like.step.sharding)
        return TrainState(step_array, found["trained"], found["opt_state"], found.get("average", {})), data

    def restore_trained(self, like: Any, *, item: str = "trained", step: int = 0) -> tuple[int, Any]:
        """(step, weights) of a checkpoint.

        Args:
          like: shapes and shardings, as arrays or `jax.ShapeDtypeStruct`; those of the run that saved may differ.
          item: "trained", or "average" for the weights of a run's "ema" teachers.
          step: 0 for the newest.

        Raises:
          InputError: there is none, none of that step, or it is broken.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise InputError(f"{self._folder} holds no checkpoint; train first, or give no --workdir to use the base")
        if step and step not in steps:
            choices = ", ".join(str(s) for s in steps)
            raise InputError(f"{self._folder} holds no checkpoint of step {step}; choices: {choices}")
        step = step or steps[-1]
        try:
            return step, self._read(step, {item: like})[0][item]
        except _Broken as e:
            raise InputError(
                f"the checkpoint {self._folder / str(step)} is broken: {e}; training on in this workdir goes back to "
                "one that is whole, --mode export takes an older one by config.export.step"
            ) from e

    def _read(self, step: int, trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores items onto the shapes and shardings of `trees`, compares digests; returns them and the JSON."""
        items = {item: ocp.args.StandardRestore(_abstract(tree)) for item, tree in trees.items()}
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
            found, data = {item: read[item] for item in trees}, dict(read["data"])
            expected = data.pop("digests")
            wrong = [
                f"{item}/{name}"
                for item, tree in found.items()
                for name, value in digests(tree).items()
                if expected[item].get(name) != value
            ]
        except Exception as e:
            raise _Broken(_short(f"{type(e).__name__}: {e}")) from e
        if wrong:
            raise _Broken(f"{len(wrong)} array(s) are not what was saved, {wrong[0]} among them")
        return found, data

    def _put_aside(self, step: int) -> None:
        if is_first():
            target = self._aside / str(step)
            shutil.rmtree(target, ignore_errors=True)
            self._aside.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        self._manager.reload()


@dataclasses.dataclass(frozen=True)
class Student:
    """A student outside of training.

    Attributes:
      trained, teacher_params: what lies over the base for the student and for its teachers.
      step: optimizer steps that it has taken, 0 for the config's own model.
    """

    session: Session
    trained: Variables
    teacher_params: Variables
    step: int


def load_student(config, workdir: pathlib.Path | None, *, step: int = 0, teaches: bool = False) -> Student:
    """The student of a run's checkpoint; without a workdir, the config's model with its adapter.

    Args:
      step: of the checkpoint, 0 for the newest.
      teaches: read the weights that roles name too.
    """
    if teaches:
        check_teachers(config)
    session = load(config, for_training=False)
    session = with_teachers(session, config) if teaches else session
    trained = average = session.trained
    if workdir is None:
        step = 0
    else:
        like = trained_shapes(session, rules=config.mesh.rules)
        with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
            found, trained = checkpoints.restore_trained(like, step=step)
            if config.teacher.weights == "ema":
                _, average = checkpoints.restore_trained(like, item="average", step=step)
        step = found
    teacher_params = teacher_params_of(config.teacher.weights, trained=trained, average=average)
    return Student(session, trained, teacher_params, step)


def _short(text: str) -> str:
    """One line, cut in the middle: what failed comes first and the cause last. Tensorstore's settings are removed."""
    text = " ".join(text.split()).partition(" [tensorstore_spec=")[0]
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
