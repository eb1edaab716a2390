"""Rollouts by this package's sampler and by a vLLM server on the same two cores: tokens a second of one tiny model."""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.distillation_task import SCALES, Task, make_task
from benchmarks.harness import Result, race_of
from configs import base
from tests.vllm_server import server as vllm
from vigos_jax import session
from vigos_jax.method.rows import Row
from vigos_jax.models.families import tensor_table
from vigos_jax.rollouts.engines import engine_of
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.weights import writing

ROWS, LONGEST, ROUNDS = 32, 192, 5
# With a small head a random model does not repeat itself, and these of its 1024 tokens end completions of all lengths.
HEAD, ENDS = 0.3, tuple(range(0, 1024, 80))


def engines() -> Result:
    if why := vllm.missing():
        return Result("engines", f"not measured: {why}", None, None)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        (folder / "model").mkdir()
        task = make_task(folder / "model", scale=SCALES["small"], rows=ROWS, completion=LONGEST)
        params = task.variables["params"] | {"embedding": HEAD * task.variables["params"]["embedding"]}
        tensors = writing.file_tensors(params, tensor_table(task.config), task.config, dtype=np.float32)
        task.settings.architectures = ["Qwen2_5_VLForConditionalGeneration"]  # or vLLM takes it for an encoder
        task.settings.save_pretrained(folder / "model")
        writing.save_sharded(folder / "model", tensors, max_shard_bytes=2**30)
        server = stack.enter_context(vllm.serving(folder / "model", logs=folder))
        loaded, config = _session(folder / "model", server.url)
        sampling, rows = Sampling(max_tokens=LONGEST), _rows(task)
        turns = {}
        for kind in ("vllm", "native"):
            config.rollout.engine = kind
            engine = stack.enter_context(contextlib.closing(engine_of(config, folder)(loaded, sampling)))
            turns[kind] = engine, engine.prepare(rows)
        rounds = [{kind: _round(*turns[kind], loaded, n) for kind in turns} for n in range(ROUNDS + 2)][2:]
    return _result(rounds)


@dataclasses.dataclass(frozen=True)
class _Round:
    """A batch: its completions' lengths, seconds of a new student and of sampling."""

    lengths: tuple[int, ...]
    sync: float
    seconds: float

    @property
    def per_token(self) -> float:
        return self.seconds / sum(self.lengths)


def _round(engine: Any, prepared: Any, loaded: session.Session, number: int) -> _Round:
    """One turn, as a step of training has it: the student is new, and no server has cached its prompts."""
    start = time.perf_counter()
    engine.sync(loaded.trained, step=number)
    middle = time.perf_counter()
    done = engine.sample(prepared, row_keys(0, number, ROWS)).completions
    assert not any(done.failed), done.failed
    return _Round(tuple(map(len, done.ids)), middle - start, time.perf_counter() - middle)


def _result(rounds: list[dict[str, _Round]]) -> Result:
    r = race_of([(one["vllm"].per_token, one["native"].per_token) for one in rounds])
    detail = []
    for kind, seconds in (("vllm", r.baseline), ("native", r.ours)):
        lengths = [n for one in rounds for n in one[kind].lengths]
        sync = np.median([one[kind].sync for one in rounds])
        text = (
            f"{1 / seconds:.0f} tokens/s, completions of {min(lengths)} to {max(lengths)}, mean {np.mean(lengths):.0f}"
        )
        detail.append((kind, f"{text}; a new adapter in {1e3 * sync:.0f} ms"))
    what = f"tokens per second, native / vLLM on this CPU, one tiny model, B = {ROWS}, mixed lengths"
    return Result("engines", what, r.ratio, None, r.spread, tuple(detail))


def _session(model: pathlib.Path, url: str) -> tuple[session.Session, Any]:
    config = base.get_config()
    config.model.path, config.rollout.urls = str(model), (url,)
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.buckets.patches, config.buckets.completion = (128,), (48, 96, 144, 192)
    loaded = session.load(config, for_training=True)
    processor = dataclasses.replace(loaded.processor, eos_ids=(*loaded.processor.eos_ids, *ENDS))
    return dataclasses.replace(loaded, processor=processor), config


def _rows(task: Task) -> list[Row]:
    """Distinct images and questions."""
    rows = []
    for image, question in zip(task.images, task.questions, strict=True):
        encoded = task.processor.encode_image(image)
        turn = task.processor.encode_turn(user_text=question, grids=[encoded.grid], assistant_prefill="")
        rows.append(Row((encoded,), turn))
    return rows
