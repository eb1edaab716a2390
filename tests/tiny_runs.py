"""What a run needs, tiny and from nothing: a model folder, a data set, rollouts, and a config file of a user's own.

Everything lies outside the repository, as a user's own things do. What takes long is made once a session; tests
write into folders of their own, never into these.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint
import safetensors.numpy
import tiny
from helpers import make_processor_folder
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from vigos_jax import main
from vigos_jax.data.processor import Processor
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import adapter_table, tensor_table
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.tensor_names import LANGUAGE_PROJECTIONS
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.session import Session
from vigos_jax.training import loop
from vigos_jax.training.step import make_optimizer
from vigos_jax.weights import writing

# The mesh splits rows, parameters and heads: every mode runs on sharded arrays, on the 8 devices of the tests.
# Clips are off, or a random model, which differs from itself everywhere, would have no gradient.
CONFIG = '''\
"""A user's own config."""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = {model!r}
    config.data.source = {data!r}
    config.data.max_bad_fraction = 0.1
    config.steps, config.batch_size, config.checkpoint_every, config.keep_checkpoints = 4, 4, 1, 10
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.lora.rank, config.lora.alpha, config.lora.dropout = 4, 8.0, 0.1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 0
    config.prompts.student.user = "{{problem}}"
    config.prompts.reasoning.user = "{{problem}} {{reference}}"
    config.prompts.reference.user = "{{reference}} {{problem}}"
    config.roles.perception.clip = config.roles.reasoning.clip = config.roles.reference.clip = 0.0
    config.sampling.max_tokens = 12
    config.buckets.patches, config.buckets.prompt = (64,), (64,)
    config.buckets.completion, config.buckets.sequence = (16, 64), (128, 384)
    config.loss.chunk = 16
    config.score.batch_size = 4
    config.export.after_training = False
    config.report.rows = 0
    return config
'''
STEPS = 4
BAD = {2: "image_missing", 7: "empty_answer"}  # rows of `World.bad_data` that cannot be used
SPEC = LoraSpec(rank=2, scale=3.0, language=frozenset(LANGUAGE_PROJECTIONS))  # unlike the config's


@dataclasses.dataclass(frozen=True)
class World:
    """Paths, and a command line that names the config file among them."""

    folder: pathlib.Path
    model: pathlib.Path  # float32, untied, several shards; random weights, logits differ by several units
    adapter: pathlib.Path  # PEFT LoRA of SPEC, A and B random
    data: pathlib.Path  # .jsonl of 10 rows
    bad_data: pathlib.Path  # the same, but that those of BAD cannot be used
    config: pathlib.Path

    def run(self, *args: str) -> int:
        """Runs the command line in this process; returns the exit code."""
        return main.main(["vigos_jax", f"--config={self.config}", *args])


def once(function: Callable) -> Callable:
    """Calls `function(tmp_path_factory, *args)` once a session for each args."""
    made = {}

    @functools.wraps(function)
    def get(tmp_path_factory, *args: str):
        if args not in made:
            made[args] = function(tmp_path_factory, *args)
        return made[args]

    return get


@once
def make_world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_pictures(folder / "pictures", 10)
    rows = [
        {"id": f"row{i}", "images": [f"pictures/{i}.png"], "problem": f"What colour is {i}?", "answer": str(i)}
        for i in range(10)
    ]
    data = write_rows(folder / "data.jsonl", rows)
    rows[2]["images"], rows[7]["answer"] = ["pictures/none.png"], ""
    bad_data = write_rows(folder / "bad.jsonl", rows)
    model = write_model(folder / "model")
    adapter = write_adapter(folder / "adapter", model, SPEC)
    config = folder / "mine.py"
    config.write_text(CONFIG.format(model=str(model), data=str(data)))
    return World(folder, model, adapter, data, bad_data, config)


@contextlib.contextmanager
def compile_once() -> Iterator[None]:
    """Runs share what is read, traced and compiled alike."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(jax, "jit", _shared_jit))
        for name, function in _SHARED.items():
            stack.enter_context(mock.patch(name, function))
        yield


def _shared_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit`, or what it returned before for an equal function: a run makes its programs anew."""
    leaves, structure = jax.tree.flatten(options)
    key = (_parts(function), structure, tuple(leaves))
    if key not in _JITTED:
        _JITTED[key] = _JIT(function, **options)
    return _JITTED[key]


def _parts(function: Any) -> Any:
    """What is equal for equal partial functions and methods; a function is equal to itself alone."""
    if isinstance(function, functools.partial):
        return functools.partial, _parts(function.func), function.args, tuple(function.keywords.items())
    if inspect.ismethod(function):
        return inspect.ismethod, function.__func__, function.__self__
    return function


def _shared(function: Callable, key_of: Callable) -> Callable:
    """`function`, called once for each `key_of` of its arguments."""
    made = {}

    def get(*args: Any, **kwargs: Any) -> Any:
        key = key_of(*args, **kwargs)
        if key not in made:
            made[key] = function(*args, **kwargs)
        return made[key]

    return get


def _folder_key(folder: pathlib.Path, **options: Any) -> Any:
    """What tells a folder from what it was before a test changed a file in it, and how it is read."""
    return (
        folder,
        repr(options),
        tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())),
    )


_JIT = jax.jit  # which compile_once replaces
_JITTED: dict[Any, Callable] = {}
_SHARED = {
    "vigos_jax.session.abstract_variables": _shared(abstract_variables, lambda model: model),
    "vigos_jax.session.Processor.load": _shared(Processor.load, _folder_key),
    "vigos_jax.training.loop.make_optimizer": _shared(make_optimizer, lambda o, steps: (repr(o.to_dict()), steps)),
}


@contextlib.contextmanager
def configured(options: dict[str, Any]) -> Iterator[None]:
    """jax's options of compilation and its cache, for as long as the context lasts."""
    before = {name: getattr(jax.config, name) for name in options}

    def configure(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    configure(options)
    try:
        yield
    finally:
        configure(before)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    workdir: pathlib.Path
    session: Session  # what it trained on


@once
def finished_run(tmp_path_factory, *args: str) -> FinishedRun:
    """A run of the world's config with `args`, never disturbed. Call it under `compile_once`."""
    world, workdir = make_world(tmp_path_factory), tmp_path_factory.mktemp("run") / "workdir"
    with mock.patch.object(loop, "load", side_effect=loop.load) as load, capture(load) as session:
        assert world.run(f"--workdir={workdir}", *args) == int(any(str(world.bad_data) in arg for arg in args))
    return FinishedRun(workdir, session[0])


@contextlib.contextmanager
def capture(function: mock.Mock) -> Iterator[list[Any]]:
    """What a mock with a side effect returns, call by call."""
    results, real = [], function.side_effect
    function.side_effect = lambda *args, **kwargs: results.append(real(*args, **kwargs)) or results[-1]
    yield results


def write_pictures(folder: pathlib.Path, n: int) -> None:
    """`0.png` and so on: noise, 84 x 84 pixels."""
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (84, 84, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_rows(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock, or on what this process has compiled already."""
    clock = ("seconds/", "compilations", "tokens_per_second")
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def write_model(
    folder: pathlib.Path,
    *,
    family: str = "qwen2_5_vl",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    head_dim: int = 16,
) -> pathlib.Path:
    """A Hugging Face folder with processor and float32 weights in several shards.

    Args:
      text, vision: fields of its config.
      head_dim: of both.
    """
    text = {"tie_word_embeddings": False, "torch_dtype": "bfloat16"} | (text or {})
    make_processor_folder(folder, text=text, vision=vision, family=family, head_dim=head_dim)
    config = ModelConfig.load(folder)
    params = tiny.random_variables(VisionLanguageModel(config))["params"]
    tensors = writing.file_tensors(params, tensor_table(config), config, dtype=np.float32)
    writing.save_sharded(folder, tensors, max_shard_bytes=2**17)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def write_adapter(folder: pathlib.Path, model: pathlib.Path, spec: LoraSpec) -> pathlib.Path:
    """A PEFT LoRA folder whose B is not zero."""
    folder.mkdir()
    config = ModelConfig.load(model)
    lora = tiny.random_variables(VisionLanguageModel(config, lora=spec))["lora"]
    tensors = dict(writing.file_tensors(lora, adapter_table(config, spec), config, dtype=np.float32))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.scale * spec.rank, "lora_dropout": 0.2}
    values |= {"target_modules": sorted(spec.language | spec.vision), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@functools.cache
def processor(folder: pathlib.Path) -> Processor:
    return Processor.load(folder)


def saved_state(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """The arrays of a checkpoint as they are in its files; `average` is there if teachers follow one."""
    folder = workdir.absolute() / "checkpoints" / str(step)
    items = [item for item in ("trained", "opt_state", "average") if (folder / item).is_dir()]
    with orbax.checkpoint.StandardCheckpointer() as reader:
        return {item: reader.restore(folder / item) for item in items}


def bytes_of(folder: pathlib.Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_trees(a: Any, b: Any) -> None:
    """Bitwise equality of two trees of arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)
