"""Orbax checkpoints of what training changes: trained weights, optimizer state, step, and the place in the data.

The frozen base is not copied: it is named in the run's config. Every key is a function of seed and step, so the step
is all there is to save of randomness.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from vigos_jax.errors import InputError
from vigos_jax.step import TrainState


class Checkpoints:
    """The checkpoints of a workdir. Use as a context manager; leaving it waits for the last save."""

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        # Rooted at an absolute path: orbax refuses relative ones.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()

    @property
    def folder(self) -> pathlib.Path:
        return self._folder

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Starts saving; the files appear under their final name when complete."""
        items = {
            "trained": ocp.args.StandardSave(state.trained),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "data": ocp.args.JsonSave(dict(data)),
        }
        if state.average:
            items["average"] = ocp.args.StandardSave(state.average)
        self._manager.save(int(state.step), args=ocp.args.Composite(**items))

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint onto the shapes and shardings of `like`."""
        items = {
            "trained": ocp.args.StandardRestore(_abstract(like.trained)),
            "opt_state": ocp.args.StandardRestore(_abstract(like.opt_state)),
            "data": ocp.args.JsonRestore(),
        }
        if like.average:
            items["average"] = ocp.args.StandardRestore(_abstract(like.average))
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        step_array = jax.device_put(jax.numpy.int32(step), like.step.sharding)
        average = restored["average"] if like.average else {}
        return TrainState(step_array, restored["trained"], restored["opt_state"], average), restored["data"]

    def restore_trained(self, like: Any, *, item: str = "trained", step: int = 0) -> tuple[int, Any]:
        """(step, weights) of a checkpoint; raises InputError if there is none, or none of that step.

        Args:
          like: shapes and shardings, as arrays or `jax.ShapeDtypeStruct`; those of the run that saved may differ.
          item: "trained", or "average" for the weights of a run's "ema" teachers.
          step: 0 for the newest.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise InputError(f"{self._folder} holds no checkpoint; train first, or give no --workdir to use the base")
        if step and step not in steps:
            choices = ", ".join(str(s) for s in steps)
            raise InputError(f"{self._folder} holds no checkpoint of step {step}; choices: {choices}")
        step = step or steps[-1]
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(_abstract(like))})
        return step, self._manager.restore(step, args=args)[item]


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
