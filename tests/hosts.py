"""Runs of the command line in several processes, as on several hosts: launched from a test, watched from inside.

    jobs = [{"name": "a", "args": ["--config=mine.py", "--workdir=..."]}]
    results = hosts.launch(folder, jobs, processes=2, devices=4)
    results[1]["a"]["code"]  # of the second process; "error" where it raised one

A process runs the jobs one after the other and writes down what it read, parsed, sampled and packed in each.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import compiled

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = f"{compiled.QUICK} --xla_force_host_platform_device_count="


def environment(*, process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """Of one process. Where there is only one, no variable says that there could be more."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAGS}{devices}"}
    own |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if processes > 1:
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(process)}
        own |= {"WORLD_SIZE": str(processes)}
    return own


def start(command: list[str], *, processes: int, devices: int, folder: pathlib.Path) -> list[int]:
    """Runs the command in every process, with output in files of `folder`; returns the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for i in range(processes):
        with (folder / f"output-{i}.txt").open("w") as output:
            own = environment(process=i, processes=processes, devices=devices, port=port)
            started.append(
                subprocess.Popen([sys.executable, *command], cwd=ROOT, env=own, stdout=output, stderr=output)
            )
    try:
        return [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()


def launch(folder: pathlib.Path, jobs: list[dict[str, Any]], *, processes: int, devices: int) -> list[dict[str, Any]]:
    """What each process wrote down, by job. A job:

    name, args: of the command line.
    rollouts: texts of completions by row id, instead of sampled ones.
    end_below: every token id below this ends a completion, instead of the model's own.
    interleaved: the mesh takes devices two by two from the processes in turn.
    fails: number of a process that cannot read its second batch.
    signalled: number of a process that gets SIGTERM in its second step.
    """
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    codes = start(["tests/hosts.py", str(folder)], processes=processes, devices=devices, folder=folder)
    said = "\n".join(file.read_text() for file in sorted(folder.glob("output-*.txt")))
    assert codes == [0] * processes, f"exit codes {codes}\n{said}"
    return [json.loads((folder / f"result-{i}.json").read_text()) for i in range(processes)]


# -- inside a process -------------------------------------------------------------------------------------------


def work(folder: pathlib.Path) -> None:
    process, results = int(os.environ.get("RANK", "0")), {}
    for job in json.loads((folder / "jobs.json").read_text()):
        results[job["name"]] = run(job, process)
        (folder / f"result-{process}.json").write_text(json.dumps(results))


def run(job: dict[str, Any], process: int) -> dict[str, Any]:
    # jax reads the environment when it is imported, and the launcher must not import it with a process's.
    import jax

    from vigos_jax import main, session
    from vigos_jax.rollouts.sampler import Completions, Sampler
    from vigos_jax.training import batches, loop

    seen: dict[str, Any] = {name: [] for name in ("read", "parsed", "ids", "logps", "shapes", "decoded")}
    waiting: list[Any] = []  # batches that are read and not yet sampled
    processors: list[Any] = []

    def on_load(loaded: Any, *_: Any) -> Any:
        processors.append(loaded.processor)
        if "end_below" in job:
            ends = dataclasses.replace(loaded.processor, eos_ids=tuple(range(job["end_below"])))
            return dataclasses.replace(loaded, processor=ends)
        return loaded

    def on_batch(batch: Any, *_: Any) -> Any:
        if job.get("fails") == process and seen["read"]:
            raise OSError("a disk that broke")
        seen["read"].append([e.id for e in batch.examples])
        seen["shapes"].append([list(x.shape) for x in jax.tree.leaves(batch.prompts) if hasattr(x, "shape")])
        waiting.append(batch)
        return batch

    def on_advance(state: Any, *_: Any) -> Any:
        seen["decoded"].append([int(state.step), state.visible.shape[1]])
        return state

    def on_sampled(sampled: Any, *_: Any) -> Any:
        del waiting[:1]  # a benchmark's answers were read elsewhere
        return sampled

    def on_parse(rollouts: Any, loaded: Any, rows: Any, sampled: Completions) -> Any:
        if job.get("signalled") == process and len(seen["parsed"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seen["parsed"].append(len(rows))
        seen["ids"].append(sampled.ids)
        seen["logps"].append(sampled.logps)
        return rollouts

    def on_packed(micro_batches: Any, *_: Any) -> Any:
        seen["shapes"] += [[list(x.shape) for x in jax.tree.leaves(b)] for b in micro_batches]
        return micro_batches

    def stored(self: Sampler, *_: Any) -> Completions:
        texts = [job["rollouts"].get(e.id, "") for e in waiting[0].examples]
        ids = tuple(tuple(processors[-1].encode_text(text)) for text in texts)
        return Completions(ids, tuple((-1.0,) * len(x) for x in ids))

    def interleaved(**axes: int) -> Any:
        devices = jax.devices()
        return make_mesh(**axes, devices=[devices[i] for i in (0, 1, 4, 5, 2, 3, 6, 7)])

    make_mesh = session.make_mesh
    with contextlib.ExitStack() as patches:
        if "rollouts" in job:
            patches.enter_context(mock.patch.object(Sampler, "__call__", stored))
        if job.get("interleaved"):
            patches.enter_context(mock.patch.object(session, "make_mesh", interleaved))
        for owner, name, hook in (
            (loop, "load", on_load),
            (batches.Batches, "next", on_batch),
            (Sampler, "advance", on_advance),
            (Sampler, "__call__", on_sampled),
            (loop, "parse", on_parse),
            (batches.Batches, "micro_batches", on_packed),
        ):
            patches.enter_context(mock.patch.object(owner, name, hooked(getattr(owner, name), hook)))
        how = "env" if "RANK" in os.environ else "off"
        try:
            seen["code"] = main.main(["vigos_jax", *job["args"], f"--config.distributed={how}"])
        except OSError as e:
            seen["error"] = str(e)
    return seen


def hooked(function: Callable, hook: Callable) -> Callable:
    """The function, with `hook(result, *arguments)` for its result."""
    return lambda *args, **kwargs: hook(function(*args, **kwargs), *args)


if __name__ == "__main__":
    work(pathlib.Path(sys.argv[1]))
