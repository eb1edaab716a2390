"""Who else gets a run's rows besides metrics.jsonl: TensorBoard, Weights & Biases. The first process's alone."""

import importlib
import json
import math
import pathlib
import secrets
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

from vigos_jax.errors import InputError


class Logger(Protocol):
    """Takes the rows of a run, one per step, in order."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row; it has `step`. Numbers may be None or not finite: they are left out."""

    def close(self) -> None:
        """Hands over all that was taken."""


class TensorBoard:
    """Event files in WORKDIR/tensorboard, one per start of the run.

    A step that is done again is shown once: a file says from which step on it takes the place of the earlier ones.
    What a killed process had not written yet is lost only together with its checkpoint, so it comes again.

    Args:
      next_step: the first step that will be written.
    """

    def __init__(self, workdir: pathlib.Path, *, next_step: int):
        package = _import("tensorboard", "tensorboard.summary.writer.event_file_writer", field="tensorboard")
        proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._event = proto.Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = package.EventFileWriter(str(workdir / "tensorboard"))
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=next_step, session_log=start))

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the row's numbers as scalars of its step."""
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in _numbers(row).items()]
        event = self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of Weights & Biases per workdir, also when it is started again; its id is in WORKDIR/wandb-id.

    No step is sent twice: rows up to `last_step` are left out, as they were sent when they were first done. What a
    killed process had taken but not sent yet is missing there; metrics.jsonl has it.

    Args:
      config: shown beside the run.
      last_step: the newest step that an earlier start wrote; 0 for none.
    """

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], *, project: str, last_step: int):
        wandb = _import("wandb", "wandb", field="wandb")
        id_file = workdir / "wandb-id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.absolute().name,
                id=id_file.read_text(encoding="ascii").strip(),
                resume="allow",
                dir=str(workdir),
                config=dict(config),
                # Our own words go to the terminal, not to it.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as e:
            reason = " ".join(str(e).split())[:300]
            choices = "choices: `wandb login`, the environment's WANDB_MODE=offline, or config.log.wandb=''"
            raise InputError(f"config.log.wandb={project!r}: {reason}; {choices}") from e
        self._last = last_step

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs the row, unless its step was logged before a kill."""
        if row["step"] > self._last:
            self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def check_installed(config: Mapping[str, Any]) -> None:
    """Raises InputError if `config.log` names what is not installed."""
    if config["log"]["tensorboard"]:
        _import("tensorboard", "tensorboard.summary.writer.event_file_writer", field="tensorboard")
    if config["log"]["wandb"]:
        _import("wandb", "wandb", field="wandb")


def open_loggers(config: Mapping[str, Any], workdir: pathlib.Path, *, first: int, last_step: int) -> list[Logger]:
    """The loggers of `config.log`.

    Args:
      first: steps that are in the checkpoint this start goes on from.
      last_step: the newest step that an earlier start wrote into metrics.jsonl.

    Raises:
      InputError: one is not installed or cannot be reached.
    """
    out: list[Logger] = []
    if config["log"]["tensorboard"]:
        out.append(TensorBoard(workdir, next_step=first + 1))
    if project := config["log"]["wandb"]:
        shown = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        out.append(WeightsAndBiases(workdir, shown, project=project, last_step=last_step))
    return out


def _import(package: str, module: str, *, field: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"config.log.{field} needs {package}: pip install 'vigos-jax[tracking]' ({e})") from e


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    values = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    return {k: v for k, v in values.items() if math.isfinite(v)}
