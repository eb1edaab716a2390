"""Experiment trackers: what gets a run's rows besides metrics.jsonl. They run in the first process alone."""

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
from vigos_jax.runtime import workdir as files


class Tracker(Protocol):
    """Logs the rows of a run, one per step, in order.

    A class is constructed with (workdir, its value in `config.log`, first=step of the checkpoint that this start
    resumes from, last_step=the newest step that an earlier start wrote). Its static `import_package` raises InputError
    if a package it needs is not installed.
    """

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row; it has `step`. Numbers may be None or not finite: they are left out."""

    def close(self) -> None:
        """Hands over all that was taken."""


class TensorBoard:
    """Event files in WORKDIR/tensorboard, one per start of the run.

    A repeated step is shown once: each file records the step from which it replaces the earlier ones. Rows that a
    killed process did not write are later than its last checkpoint, so the resumed run writes them.
    """

    def __init__(self, workdir: pathlib.Path, asked: bool, *, first: int, last_step: int):
        package = self.import_package()
        proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._event = proto.Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = package.EventFileWriter(str(workdir / files.TENSORBOARD))
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first + 1, session_log=start))

    @staticmethod
    def import_package() -> ModuleType:
        """What it needs; InputError where that is not installed."""
        return _import("tensorboard", "tensorboard.summary.writer.event_file_writer", field="tensorboard")

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the row's numbers as scalars of its step."""
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in _numbers(row).items()]
        event = self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """One Weights & Biases run per workdir, also across restarts; its id is in WORKDIR/wandb-id.

    No step is sent twice: rows up to `last_step` are left out, as an earlier start sent them. Rows that a killed
    process had not sent yet are missing there; metrics.jsonl has them.
    """

    def __init__(self, workdir: pathlib.Path, project: str, *, first: int, last_step: int):
        wandb = self.import_package()
        config = json.loads((workdir / files.CONFIG).read_text(encoding="utf-8"))
        id_file = workdir / files.WANDB_ID
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.absolute().name,
                id=id_file.read_text(encoding="ascii").strip(),
                resume="allow",
                dir=str(workdir),
                config=config,
                # Our own words go to the terminal, not to it.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as e:
            reason = " ".join(str(e).split())[:300]
            choices = "choices: `wandb login`, the environment's WANDB_MODE=offline, or config.log.wandb=''"
            raise InputError(f"config.log.wandb={project!r}: {reason}; {choices}") from e
        self._last = last_step

    @staticmethod
    def import_package() -> ModuleType:
        """What it needs; InputError where that is not installed."""
        return _import("wandb", "wandb", field="wandb")

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs the row, unless its step was logged before a kill."""
        if row["step"] > self._last:
            self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


# By name in `config.log`, where a non-empty value enables one. A new one needs a class, an entry and a field.
TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def _asked(log: Mapping[str, Any]) -> dict[str, Any]:
    return {name: log[name] for name in TRACKERS if log[name]}


def check_installed(log: Mapping[str, Any]) -> None:
    """Raises InputError if `config.log` names what is not installed."""
    for name in _asked(log):
        TRACKERS[name].import_package()


def open_trackers(log: Mapping[str, Any], workdir: pathlib.Path, *, first: int, last_step: int) -> list[Tracker]:
    """The trackers of `config.log`.

    Args:
      first: steps that are in the checkpoint that this start resumes from.
      last_step: the newest step that an earlier start wrote into metrics.jsonl.

    Raises:
      InputError: one is not installed or cannot be reached.
    """
    return [TRACKERS[name](workdir, asked, first=first, last_step=last_step) for name, asked in _asked(log).items()]


def _import(package: str, module: str, *, field: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"config.log.{field} needs {package}: pip install 'vigos-jax[tracking]' ({e})") from e


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    values = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    return {k: v for k, v in values.items() if math.isfinite(v)}
