"""Multi-process runs: joining the processes, and exchanging values between them on the host.

Every process runs the same programs in the same order; each reads, parses and packs its own rows. If a program or its
shapes depend on those rows (the size of an array, too many bad rows), the processes first agree with `exchange`. It
uses the key-value store of jax's coordinator, not the devices: it does not wait for a running step, a slow host only
delays it, and a process that stops reports the reason, so that the others do not wait for it.
"""

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# The store has no public name; orbax's checkpoints use it by this one too.
from jax._src import distributed as jax_distributed

from vigos_jax.errors import InputError, Stopped

_JOIN_SECONDS = 300  # for all processes to be there
_PATIENCE_MS = 24 * 60 * 60 * 1000  # a process that died is noticed by its heartbeats; this is for one that is slow
_FAREWELL_MS = 30 * 1000  # for the other processes to read why this one stops
_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_rounds = itertools.count()
_has_ended = False  # some process stops, and all have been told


@contextlib.contextmanager
def joined(mode: str) -> Iterator[None]:
    """Joins the processes of a run; inside, none waits for one that has stopped, and all exit together.

    Args:
      mode: `config.distributed`: "off" for one process, "auto" for jax's cluster detection, "env" for environment
        variables.

    Raises:
      InputError: variables are missing or contradict each other; no cluster was detected; or, in all processes, the
        error that stopped one of them.
    """
    global _has_ended
    _initialize(mode, os.environ)
    _has_ended = False
    try:
        yield
        exchange(None)
    except BaseException as e:
        _say_why(e)
        raise


def process() -> int:
    """This process's number, from 0."""
    return jax_distributed.global_state.process_id


def is_first() -> bool:
    """Whether this process writes the files and talks: always, if it is the only one."""
    return process() == 0


def several() -> bool:
    """Whether the program runs in more than one process."""
    return jax_distributed.global_state.num_processes > 1


def exchange(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process. All must call it, at the same place.

    Args:
      value: what JSON can hold; tuples come back as lists.

    Raises:
      InputError: a process has stopped, and what it says.
      Stopped: a process was asked to stop.
    """
    return _round({"value": value})


def total(counts: Mapping[str, float]) -> dict[str, float]:
    """The sum over all processes, name by name; those without rows of their own to count give {}."""
    out: dict[str, float] = {}
    for part in exchange(counts):
        for name, count in part.items():
            out[name] = out.get(name, 0) + count
    return out


def largest(n: int) -> int:
    """The largest of all processes' numbers."""
    return max(exchange(n))


def first_decides(decide: Callable[[], Any]) -> Any:
    """Calls `decide` in the first process and returns its result in all, so that they agree, e.g. on files."""
    return exchange(decide() if is_first() else None)[0]


def _round(message: dict[str, Any]) -> list[Any]:
    global _has_ended
    message = json.loads(json.dumps(message))
    if not several():
        return [message["value"]]
    state: Any = jax_distributed.global_state  # with several processes it has a client
    number = next(_rounds)
    patience = _PATIENCE_MS if "value" in message else _FAREWELL_MS
    state.client.key_value_set(_key(number, state.process_id), json.dumps(message))
    try:
        state.client.wait_at_barrier("vigos_jax", patience)
        barrier_error = None
    except jax.errors.JaxRuntimeError as e:  # out of patience, or another was
        barrier_error = e
    said = {int(k.rpartition("/")[2]): json.loads(v) for k, v in state.client.key_value_dir_get(_key(number, ""))}
    if "value" not in message:
        if barrier_error:
            raise barrier_error
        return []
    if reasons := [m["stopped"] for m in said.values() if "stopped" in m]:
        _has_ended = True
        raise Stopped(reasons[0])
    if failures := [f"process {i} stopped: {m['failure']}" for i, m in sorted(said.items()) if "failure" in m]:
        _has_ended = True
        raise InputError("; ".join(failures))
    if barrier_error:
        raise barrier_error
    # All are past this round's barrier, so all have read the last round.
    if number:
        state.client.key_value_delete(_key(number - 1, state.process_id))
    return [said[i]["value"] for i in range(state.num_processes)]


def _key(number: int, process: int | str) -> str:
    return f"vigos_jax/{number}/{process}"


def _say_why(error: BaseException) -> None:
    """Stops the other processes at their next exchange. If none comes in time, exits at once; jax then ends them.

    A normal exit would wait for them and lose the exit code.
    """
    global _has_ended
    if not several() or _has_ended:
        return
    _has_ended = True
    is_known = isinstance(error, InputError | Stopped)
    kind = "stopped" if isinstance(error, Stopped) else "failure"
    try:
        _round({kind: str(error) if is_known else f"{type(error).__name__}: {error}"})
    except jax.errors.JaxRuntimeError:
        if is_known:
            print(f"vigos_jax: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        print("vigos_jax: the other processes do not answer; jax will end them", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit({"stopped": 0, "failure": 2}[kind] if is_known else 1)


# -- joining ----------------------------------------------------------------------------------------------------


def _initialize(mode: str, environment: Mapping[str, str]) -> None:
    if mode == "off":
        if _number(environment, "WORLD_SIZE", default=1) > 1:
            raise InputError(
                f"the environment has WORLD_SIZE={environment['WORLD_SIZE']} and config.distributed=off: every process "
                "would train alone; choices: config.distributed=env, or unset WORLD_SIZE"
            )
        return
    if jax.distributed.is_initialized():
        return
    arguments = _from_variables(environment) if mode == "env" else _to_find_out(environment)
    # Without this jax catches SIGTERM, and a process that is told to end does not.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=_JOIN_SECONDS)
    except (ValueError, RuntimeError) as e:
        choices = "off, or env with " + ", ".join(_NEEDED) if mode == "auto" else "another MASTER_PORT, off"
        reason = f"{' '.join(str(e).split())}; choices: {choices}"
        raise InputError(f"config.distributed={mode}: jax cannot join the processes, which it needs: {reason}") from e


def _from_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` from variables as torchrun names them."""
    missing = [name for name in _NEEDED if not environment.get(name)]
    if missing:
        raise InputError(f"config.distributed=env needs {', '.join(_NEEDED)}; missing: {', '.join(missing)}")
    rank, size, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if size < 1 or rank >= size:
        raise InputError(f"RANK={rank} must be from 0 to WORLD_SIZE - 1, and WORLD_SIZE={size} at least 1")
    if not 0 < port < 2**16:
        raise InputError(f"MASTER_PORT={port} must be from 1 to 65535")
    local, local_size = (_number(environment, name, default=None) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if local is not None and (local > rank or local >= (local_size or size)):
        raise InputError(
            f"LOCAL_RANK={local} must go with RANK={rank}, WORLD_SIZE={size} and LOCAL_WORLD_SIZE={local_size}"
        )
    # An empty list is all of the host's devices, and keeps jax from finding something else out.
    alone = local is None or local_size == 1
    return {
        "coordinator_address": f"{environment['MASTER_ADDR']}:{port}",
        "num_processes": size,
        "process_id": rank,
        "local_device_ids": [] if alone else [local],
        "cluster_detection_method": "deactivate",
    }


def _to_find_out(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments that go with jax's cluster detection: a process alone on its host gets all of the host's devices.

    By default jax gives each SLURM or Open MPI process a single GPU.
    """
    one_each = environment.get("SLURM_NTASKS", "") == environment.get("SLURM_STEP_NUM_NODES")
    one_each |= environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return {"local_device_ids": []} if one_each and "JAX_LOCAL_DEVICE_IDS" not in environment else {}


def _number(environment: Mapping[str, str], name: str, **default: Any) -> Any:
    """A variable as a whole number of at least 0; `default` where it is not set."""
    text = environment.get(name)
    if not text and default:
        return default["default"]
    if not text or not text.isdecimal():
        raise InputError(f"{name}={text!r} must be a whole number")
    return int(text)
