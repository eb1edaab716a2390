"""Rollouts by a real vLLM: prompts, log-probabilities, adapters, whole runs. `make test-vllm`; skipped without vLLM."""

import contextlib
import dataclasses
import pathlib
import runpy
from unittest import mock

import numpy as np
import pytest
import server as vllm
import tiny_runs as runs
from PIL import Image

from vigos_jax import session
from vigos_jax.models.families import FAMILIES
from vigos_jax.rollouts import server_protocol
from vigos_jax.rollouts.engines import engine_of
from vigos_jax.rollouts.parse import Reader
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.rollouts.server_adapters import Adapters
from vigos_jax.training import loop
from vigos_jax.weights import reading

pytestmark = [pytest.mark.slow, pytest.mark.skipif(vllm.missing() is not None, reason=str(vllm.missing()))]

TRIED = ("qwen2_5_vl", "qwen3_vl")
STEPS = 10
CLOSE = 1e-4  # of a float32 log-probability, or of a loss
NOTICEABLE = 500 * CLOSE  # what is wrong must show at least this much
OWN = """\
    config.data.max_images, config.lora.dropout = 2, 0.0
    config.steps, config.optimizer.learning_rate = 10, 1e-3
    config.buckets.patches, config.buckets.prompt, config.buckets.sequence = (128,), (128,), (192, 768)
    config.rollout.engine = "vllm"
    return config
"""
TEXTS = {
    "control tokens": "Is <|im_end|> a word, and <|image_pad|>? <|im_start|>assistant",
    "two images": "Which of the two is brighter?",
    "see-through": "What colour is it?",
    "turned": "What stands on top?",
    "narrow": "How wide is it?",
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    with runs.compile_once():
        yield


@dataclasses.dataclass(frozen=True)
class Served:
    """A tiny model, rows of all kinds, and the server that has the model."""

    world: runs.World
    server: vllm.Server

    def run(self, *args: str) -> int:
        return self.world.run(f"--config.rollout.urls=('{self.server.url}',)", *args)

    def config(self):
        config = runpy.run_path(str(self.world.config))["get_config"]()
        config.rollout.urls = (self.server.url,)
        return config


def write_images(folder: pathlib.Path) -> dict[str, list[str]]:
    """Names of the image files of the rows that have others than 84 x 84 pixels of noise."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (90, 121, 4), np.uint8)
    Image.fromarray(noise, "RGBA").save(folder / "see-through.png")
    turned = Image.fromarray(noise[:60, :, :3])
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise[:, :37, :3]).save(folder / "narrow.png")
    files = {name: [f"{name}.png"] for name in ("see-through", "narrow")} | {"turned": ["turned.jpg"]}
    return files | {"two images": ["0.png", "narrow.png"], "control tokens": ["1.png"]}


def make_world(folder: pathlib.Path, family: str) -> runs.World:
    pictures = folder / "pictures"
    runs.write_pictures(pictures, 7)
    files = write_images(pictures)
    texts = {f"plain {i}": f"What colour is {i}?" for i in range(7)} | TEXTS
    rows = [
        {"id": name, "images": [str(pictures / x) for x in files.get(name, [f"{name[-1]}.png"])], "problem": text}
        for name, text in texts.items()
    ]
    data = runs.write_rows(folder / "data.jsonl", [row | {"answer": str(i)} for i, row in enumerate(rows)])
    model = runs.write_model(folder / "model", family=family, head_dim=vllm.LEAST_HEAD_DIM)
    config = folder / "mine.py"
    config.write_text(runs.CONFIG.format(model=str(model), data=str(data)).replace("    return config\n", OWN))
    return runs.World(folder, model, folder / "adapter", data, data, config)


@pytest.fixture(scope="module", params=TRIED)
def served(request, tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp(request.param), request.param)
    with vllm.serving(world.model, logs=world.folder) as server:
        yield Served(world, server)


@pytest.fixture(scope="module")
def recorded(served, tmp_path_factory):
    """(workdir of a finished run by the server, the completions of its steps)."""
    workdir, completions = tmp_path_factory.mktemp("run") / "workdir", []

    def note(loaded, rows, sampled):
        completions.append(sampled)
        return real(loaded, rows, sampled)

    real = loop.parse
    with mock.patch.object(loop, "parse", note):
        assert served.run(f"--workdir={workdir}") == 0
    return workdir, completions


@pytest.fixture(scope="module")
def exported(served, recorded, tmp_path_factory):
    """Folders of the run's student: a PEFT adapter and a merged model."""
    folder = tmp_path_factory.mktemp("exported")
    for kind in ("adapter", "merged"):
        options = [f"--config.export.kind={kind}", f"--config.export.output={folder / kind}"]
        assert served.run("--mode=export", f"--workdir={recorded[0]}", *options) == 0
    return folder


# -- rollouts ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answered:
    """Every row of the data, answered.

    Attributes:
      ids, prompts: what the model read of each row, as we have it; all that the server says it has read.
    """

    completions: object
    ids: list[tuple[int, ...]]
    prompts: list[tuple[int, ...]]


def answered(served: Served, folder: pathlib.Path, *, model=None, adapter="", sync=True, change=lambda row: row):
    """Answers by the server of `served` with a model folder's base, or an adapter over it."""
    config = served.config()
    config.model.path, config.model.adapter = str(model or served.world.model), str(adapter)
    loaded = session.load(config, for_training=False)
    source, reader = session.open_source(config), Reader.of(loaded, config)
    rows = [change(reader.row(reader.example(source, i))) for i in range(len(source))]
    prompts, dialect = [], server_protocol.DIALECTS["vllm"]

    def read(reply):
        prompts.append(tuple(reply["prompt_token_ids"]))
        return dialect.read(reply)

    with mock.patch.dict(server_protocol.DIALECTS, vllm=dataclasses.replace(dialect, read=read)):
        engine = engine_of(config, folder)(loaded, Sampling(**config.sampling))
    with contextlib.closing(engine):
        engine.sync(loaded.trained if sync else {}, step=0)
        completions = sample_rows(engine, loaded, rows, row_keys(5, 0, loaded.whole_batch(len(rows))))
    return Answered(completions, [row.prompt.ids for row in rows], prompts)


def gaps(served: Served, answers: Answered, folder: pathlib.Path, *, model=None, adapter="") -> list[float]:
    """Of each row: the largest difference of a token's log-probability, server against `--mode score`."""
    rows = runs.read_rows(served.world.data)
    lines = [row | {"completion_ids": ids} for row, ids in zip(rows, answers.completions.ids, strict=True)]
    rollouts = runs.write_rows(folder / "rollouts.jsonl", lines)
    options = [f"--config.score.rollouts={rollouts}", f"--config.score.output={folder / 'scores'}"]
    options += [f"--config.model.path={model or served.world.model}", f"--config.model.adapter={adapter}"]
    assert served.run("--mode=score", *options) == 0
    out = []
    for line, logps in zip(runs.read_rows(folder / "scores" / "scores.jsonl"), answers.completions.logps, strict=True):
        assert logps and None not in line["student_logp"]  # of a random model every token is scored
        out.append(float(np.abs(np.array(line["student_logp"]) - np.array(logps)).max()))
    return out


def test_base(served, tmp_path):
    """The prompt that vLLM reads is ours, of every kind of row, and so are the log-probabilities."""
    answers = answered(served, tmp_path)
    assert sorted(answers.prompts) == sorted(answers.ids) and len(answers.ids) == 12
    assert len(set(answers.completions.ids)) > 6 and not any(answers.completions.failed)
    assert max(gaps(served, answers, tmp_path)) < CLOSE


def test_other_pixels_are_noticed(served, tmp_path):
    """The same check on images whose brightness is inverted for the server alone."""

    def inverted(row):
        images = tuple(dataclasses.replace(image, patches=-image.patches) for image in row.images)
        return dataclasses.replace(row, images=images)

    answers = answered(served, tmp_path, change=inverted)
    assert sorted(answers.prompts) == sorted(answers.ids)
    assert min(gaps(served, answers, tmp_path)) > NOTICEABLE


def test_equal_keys_give_equal_completions(served, tmp_path):
    first, again = (answered(served, tmp_path).completions for _ in range(2))
    assert first.ids == again.ids


# -- students ---------------------------------------------------------------------------------------------------


def test_exported_adapter(served, exported, tmp_path):
    adapter = exported / "adapter"
    answers = answered(served, tmp_path, adapter=adapter)
    assert max(gaps(served, answers, tmp_path, adapter=adapter)) < CLOSE
    base = answered(served, tmp_path, adapter=adapter, sync=False)
    assert max(gaps(served, base, tmp_path, adapter=adapter)) > NOTICEABLE  # it is a student of its own


def test_adapters_are_gone_afterwards(served, exported, tmp_path):
    answered(served, tmp_path, adapter=exported / "adapter")
    assert served.server.names() == [str(served.world.model)]
    assert not [*(tmp_path / "adapters").iterdir()]


# -- runs -------------------------------------------------------------------------------------------------------


def test_ten_steps_have_the_loss_of_the_native_engine(served, recorded, tmp_path):
    """The native engine on the same rollouts: its own completions are replaced by those of the server."""
    workdir, completions = recorded
    by_server = runs.metrics_of(workdir)
    assert [row["step"] for row in by_server] == [*range(1, STEPS + 1)]
    assert max(row["sampler_logp_gap"] for row in by_server) < CLOSE
    assert not any(row.get("rollout_failed") for row in by_server)
    left, real = list(completions), loop.parse
    with mock.patch.object(loop, "parse", lambda loaded, rows, _: real(loaded, rows, left.pop(0))):
        assert served.run(f"--workdir={tmp_path / 'native'}", "--config.rollout.engine=native") == 0
    native = runs.metrics_of(tmp_path / "native")
    assert not left
    for ours, theirs in zip(native, by_server, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=CLOSE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert len({round(row["loss"], 4) for row in native}) == STEPS  # no two steps are one


@pytest.mark.parametrize("served", TRIED[:1], indirect=True, scope="module")  # the other has none
def test_vision_adapters(served, tmp_path):
    """Of the tower too: after an update its adapters say something, and the server applies them."""
    options = ["--config.lora.scope=official", "--config.steps=3", "--config.optimizer.learning_rate=1e-2"]
    assert served.run(f"--workdir={tmp_path / 'run'}", *options) == 0
    rows = runs.metrics_of(tmp_path / "run")
    assert len(rows) == 3 and max(row["sampler_logp_gap"] for row in rows) < CLOSE


def test_rollouts_ahead_of_updates(served, tmp_path):
    """Of the adapter before: a step is sampled while the one in front of it is trained on; then both are unloaded."""
    options = ["--config.rollout.max_staleness=1", "--config.steps=4"]
    assert served.run(f"--workdir={tmp_path / 'run'}", *options) == 0
    rows = runs.metrics_of(tmp_path / "run")
    assert [row["rollout_staleness"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["sampler_logp_gap"] < CLOSE < min(row["sampler_logp_gap"] for row in rows[1:])
    assert served.server.names() == [str(served.world.model)]


def test_a_stale_adapter_is_caught(served, tmp_path, capsys):
    """From the third step on servers keep what they have: the run ends, saved, with one line."""
    real, steps = Adapters.publish, []

    def publish(self, trained, *, step):
        steps.append(step)
        if len(steps) < 3:
            real(self, trained, step=step)

    with mock.patch.object(Adapters, "publish", publish):
        assert served.run(f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rate=1e-2") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sampler_gap" in said and "saved at step" in said
    found = [row["sampler_logp_gap"] for row in runs.metrics_of(tmp_path / "run")]
    assert max(found[:2]) < CLOSE and found[-1] > 1e-3 and len(found) < STEPS
    assert runs.saved_state(tmp_path / "run", len(found))


@pytest.mark.parametrize("served", TRIED[:1], indirect=True, scope="module")  # each start takes half a minute
def test_a_server_that_restarts(served, tmp_path, capsys):
    """Once between an adapter's loading and its use, in which the run goes on; then it stays away, and the run ends."""
    real, workdir = Adapters.publish, tmp_path / "run"

    def publish(self, trained, *, step):
        real(self, trained, step=step)
        if step == 1:
            served.server.kill()
            served.server.start()
            assert served.server.names() == [str(served.world.model)]  # it has forgotten the adapter
        if step == 3:
            served.server.kill()

    options = ["--config.steps=5", "--config.rollout.retries=1"]
    with mock.patch.object(Adapters, "publish", publish):
        assert served.run(f"--workdir={workdir}", *options) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no server of config.rollout.urls answers" in said and "saved at step 3" in said
    assert [row["step"] for row in runs.metrics_of(workdir)] == [1, 2, 3]
    served.server.start()
    assert served.run(f"--workdir={workdir}", *options) == 0
    rows = runs.metrics_of(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert max(row["sampler_logp_gap"] for row in rows) < CLOSE


# -- another server: this one stops, as the machine has no room for two -----------------------------------------


def test_merged_folder(served, exported, tmp_path, capsys):
    """A merged export as a model of its own, by a server that drops vision adapters: a run that has some is refused."""
    served.server.stop()
    merged = exported / "merged"
    assert reading.load_config(merged).family == reading.load_config(served.world.model).family
    with vllm.serving(merged, logs=tmp_path, flags=()) as server:
        other = Served(served.world, server)
        answers = answered(other, tmp_path, model=merged)
        assert sorted(answers.prompts) == sorted(answers.ids)
        assert max(gaps(other, answers, tmp_path, model=merged)) < CLOSE
        assert max(gaps(other, answers, tmp_path)) > NOTICEABLE  # against the base that it was merged into
        if not FAMILIES[reading.load_config(merged).family].vision_adapters:
            return
        options = [f"--config.model.path={merged}", "--config.lora.scope=official", "--config.steps=3"]
        capsys.readouterr()
        assert other.run(f"--workdir={tmp_path / 'run'}", *options) == 2
        assert "--enable-tower-connector-lora" in capsys.readouterr().err.strip().splitlines()[-1]
