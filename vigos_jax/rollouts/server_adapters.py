"""The student on inference servers: an adapter folder per update, loaded, used, unloaded and deleted.

Servers cache results by an adapter's name and path, even after unloading it, so every update gets a new name and
folder. With several processes the first writes the adapter and each loads it on its own servers; all must call every
method but `ensure` and `close`.
"""

import dataclasses
import pathlib
import secrets
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

from vigos_jax.errors import InputError, Stopped
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import EngineFailed
from vigos_jax.rollouts.server_client import Rejected, Server, ServerPool, ServersLost, Unwell
from vigos_jax.rollouts.server_protocol import Dialect
from vigos_jax.runtime.distributed import exchange, first_decides
from vigos_jax.session import Session
from vigos_jax.weights.adapters import write_adapter

T = TypeVar("T")
_KINDS = {kind.__name__: kind for kind in (EngineFailed, ServersLost, Stopped)}


@dataclasses.dataclass
class Student:
    """What servers answer with.

    Attributes:
      name: that requests give.
      folder: of its adapter; None for the base.
      step: optimizer steps it has taken.
      users: batches under way that use it.
    """

    name: str
    folder: pathlib.Path | None
    step: int
    users: int = 0

    @property
    def is_adapter(self) -> bool:
        """Whether it is more than the base."""
        return self.folder is not None


class Adapters:
    """The students of one engine.

    Args:
      folder: for adapters, seen by the servers under the same path; None where there will be none.
      base: the name that the servers serve the base under.

    Attributes:
      current: the newest student.
    """

    def __init__(self, session: Session, dialect: Dialect, pool: ServerPool, *, folder: pathlib.Path | None, base: str):
        self._session, self._dialect, self._pool = session, dialect, pool
        self._folder, self._base = folder, base
        self._run = first_decides(lambda: secrets.token_hex(4))
        self._count = 0
        self._students: list[Student] = []
        self.current = Student(base, None, 0)

    def publish(self, trained: Variables, *, step: int) -> None:
        """Makes these weights the current student on all servers; the former ones go when no batch uses them."""
        if "params" in trained:
            raise EngineFailed(
                "config.rollout.engine: servers take adapters, and this student has all weights trained; choices: "
                "config.lora.rank above 0, config.rollout.engine=native (for config.eval: config.eval.engine=native)"
            )
        self.current = self.add(trained["lora"], step=step) if "lora" in trained else self.base(step=step)
        for student in [s for s in self._students if s is not self.current and not s.users]:
            self.remove(student)

    def base(self, *, step: int = 0) -> Student:
        """The base without an adapter."""
        return Student(self._base, None, step)

    def add(self, lora: Any, *, step: int) -> Student:
        """An adapter on every server of every process."""
        student = self._write(lora, step)
        self._students.append(student)

        def load_all() -> None:
            for server in self._pool.servers:
                self._pool.retried(lambda s: self.ensure(s, student), server)

        together(load_all)
        return student

    def ensure(self, server: Server, student: Student) -> None:
        """Loads a student on one server, where it may be already; Unwell if the server is."""
        body = {"lora_name": student.name, "lora_path": str(student.folder)}
        try:
            server.request("POST", self._dialect.load, body)
        except Rejected as e:
            if "already" not in e.message:
                raise EngineFailed(self._why(server, student, str(e))) from e
        except Unwell as e:
            if e.status == 500:  # what is wrong with the adapter will not pass
                raise EngineFailed(self._why(server, student, str(e))) from e
            raise

    def remove(self, student: Student) -> None:
        """Takes it from the servers, then deletes its folder; a server that does not answer forgets it by itself."""
        self._students.remove(student)
        for server in self._pool.servers:
            try:
                server.request("POST", self._dialect.unload, {"lora_name": student.name})
            except (Rejected, Unwell, EngineFailed):
                continue
        exchange(None)  # no process's servers have it any more
        first_decides(lambda: shutil.rmtree(str(student.folder), ignore_errors=True))

    def close(self) -> None:
        """Unloads and deletes all. Not all processes need to come here: none waits for another."""
        for student in self._students:
            for server in self._pool.servers:
                try:
                    server.request("POST", self._dialect.unload, {"lora_name": student.name}, timeout=5.0)
                except (Rejected, Unwell, EngineFailed):
                    break
            shutil.rmtree(str(student.folder), ignore_errors=True)
        self._students = []

    def _write(self, lora: Any, step: int) -> Student:
        """Writes an adapter's folder: whole or not there."""
        if self._folder is None:
            raise InputError(
                "config.rollout.adapter_dir='' needs a --workdir to put the student's adapter into; choices: a folder "
                "that the servers see under the same path"
            )
        spec = self._session.model.lora
        if spec is None:
            raise ValueError("the model has no adapters")
        self._count += 1
        name = f"{self._run}-{self._count}-step-{step}"
        folder = self._folder / name
        temporary = self._folder / f".{name}"
        try:
            first_decides(lambda: temporary.mkdir(parents=True))
            write_adapter(temporary, lora, self._session.config, spec, base=self._session.name)
            first_decides(lambda: temporary.rename(folder) and None)
        except OSError as e:
            raise EngineFailed(f"cannot write config.rollout.adapter_dir={str(self._folder)!r}: {e.strerror}") from e
        return Student(name, folder, step)

    def _why(self, server: Server, student: Student, reason: str) -> str:
        return (
            f"{server.url} does not load the adapter {student.folder}: {reason}; it must see this path "
            "(config.rollout.adapter_dir), and allow config.lora.rank (vLLM: --enable-lora --max-lora-rank)"
        )


def together(call: Callable[[], T]) -> T:
    """Returns `call()`; if it raises EngineFailed or Stopped in one process, the same error is raised in all."""
    value: Any = None
    said: list[str] | None = None
    try:
        value = call()
    except (EngineFailed, Stopped) as e:
        said = [type(e).__name__, str(e)]
    for outcome in exchange(said):
        if outcome is not None:
            kind, text = outcome
            raise _KINDS[kind](text)
    return value
