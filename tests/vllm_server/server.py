"""A real vLLM server on this machine's CPU, as a process of its own, from the venv that `make vllm` makes.

    with serving(model_folder, logs=folder) as server:
        server.post("/inference/v1/generate", {...})
        server.kill()
        server.start()  # at the same address, without what it had loaded

It takes half a minute or more to start, three processes and three GB.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-vllm"
START_SECONDS, STOP_SECONDS = 600, 20
# What its kernels for attention on a CPU have: no tiny model with smaller heads.
LEAST_HEAD_DIM = 32
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
FLAGS = (
    *("--host", "127.0.0.1", "--max-model-len", "512", "--enforce-eager", "--dtype", "float32"),
    *("--generation-config", "vllm", "--enable-scale-out"),
    # 32 prompts of any length at once: a seeded request whose prompt is read in pieces ends vLLM 0.32 on a CPU.
    *("--max-num-batched-tokens", "16384"),
    *("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--max-cpu-loras", "8"),
)
TOWER = ("--enable-tower-connector-lora",)  # adapters of the vision tower, which are dropped without a word otherwise


def missing() -> str | None:
    """One line that says what to do, or None where vLLM is installed."""
    return None if (VENV / "installed").is_file() else "there is no vLLM in .venv-vllm: make vllm"


@dataclasses.dataclass
class Server:
    """A vLLM server of one model folder, running or not.

    Attributes:
      model: the folder, and the name that the base is served under.
      log: what it writes; a further start goes on behind it.
      flags: beside `FLAGS`.
      port: on 127.0.0.1, the same in all its lives.
    """

    model: pathlib.Path
    log: pathlib.Path
    flags: tuple[str, ...] = TOWER
    port: int = 0
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it answers; RuntimeError with the end of its log if it does not."""
        self.port = self.port or free_port()
        # Not from this folder's parent: a folder named vllm there would be imported instead.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_", "JAX_", "VLLM_"))}
        command = ["setpriv", "--pdeathsig", "TERM"]  # no server outlives a test run that was killed
        command += [VENV / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self.model, "--port", str(self.port), *FLAGS, *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.log.parent,
                env=own | ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its processes end together
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.is_well():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"vLLM did not start, see {self.log}:\n{tail(self.log)}")
            time.sleep(0.5)

    def is_well(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """Ends it at once, as a crash does."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ends it as its owner does."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children too
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = 120) -> tuple[int, Any]:
        """(status, reply); the reply is JSON where it can be read as such, else text."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                status, text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as e:
            status, text = e.code, e.read().decode()
        with contextlib.suppress(ValueError):
            return status, json.loads(text)
        return status, text

    def names(self) -> list[str]:
        """Of the base and of the adapters that it has loaded."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as reply:
            return [card["id"] for card in json.load(reply)["data"]]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tail(log: pathlib.Path, *, lines: int = 40) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def serving(model: pathlib.Path, *, logs: pathlib.Path, flags: tuple[str, ...] = TOWER) -> Iterator[Server]:
    """A server that answers, and is gone afterwards.

    Args:
      logs: folder for its log, which stays.
    """
    server = Server(model, logs / f"vllm-{model.name}.log", flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()
