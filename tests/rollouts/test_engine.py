"""The seam between whoever needs rollouts and what samples them: an engine of a test's own serves every mode."""

import json

import jax
import numpy as np
import pytest
import tiny_runs as runs

from configs import base
from vigos_jax import session
from vigos_jax.analysis.diagnose import diagnose
from vigos_jax.errors import InputError
from vigos_jax.evaluation.benchmark import Evaluation
from vigos_jax.models.variables import teacher_params_of
from vigos_jax.rollouts.engine import NativeEngine, Sampled
from vigos_jax.rollouts.generate import stream
from vigos_jax.rollouts.parse import Reader
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import Completions, Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.training import loop

TEXT = " one red apple </description> <think> it is red </think> \\boxed{red}"


class FakeEngine:
    """Says the same to everything, without a model, and notes what it is asked."""

    def __init__(self, loaded, sampling):
        self.sampling, self.log = sampling, []
        ids = (*loaded.processor.encode_text(TEXT), loaded.processor.eos_ids[0])
        self._ids, self._logps = ids, (-0.5,) * len(ids)

    def prepare(self, rows):
        self.log.append("prepare")
        return rows

    def sync(self, trained, *, step=0):
        self.log.append(("sync", step))

    def start(self, prepared, keys):
        return prepared, keys

    def finish(self, ticket):
        return self.sample(*ticket)

    def sample(self, prepared, keys):
        self.log.append("sample")
        count = len(prepared)
        return Sampled(Completions((self._ids,) * count, (self._logps,) * count))

    def stream(self, prepared, keys):
        for end in (3, len(self._ids)):
            yield Completions((self._ids[:end],) * len(prepared), (self._logps[:end],) * len(prepared))

    def close(self):
        self.log.append("close")


@pytest.fixture
def engines(monkeypatch):
    """Makes fake engines, and fails where somebody else's sampler runs."""
    monkeypatch.setattr(Sampler, "__init__", lambda *_, **__: pytest.fail("a sampler was made beside the engine"))
    made = []

    def open_engine(loaded, sampling):
        made.append(FakeEngine(loaded, sampling))
        return made[-1]

    return made, open_engine


def demo_config():
    config = base.get_config()
    config.steps, config.batch_size, config.checkpoint_every = 2, 8, 2
    config.report.rows, config.report.every = 3, 1
    config.demo_eval.questions, config.demo_eval.batch_size = 4, 8
    config.eval.demo_questions, config.eval.samples, config.eval.batch_size = 2, 1, 8
    config.eval_every = 2
    config.diagnose.rows, config.diagnose.batch_size = 6, 8
    config.export.after_training = False
    return config


@pytest.mark.slow
def test_training_takes_rollouts_from_its_engine_alone(engines, tmp_path):
    """Rollouts, snapshots, evaluation by steps and the demo's own, in two steps of a run."""
    made, open_engine = engines
    with runs.compile_once():
        loop.train(demo_config(), tmp_path / "run", open_engine=open_engine)
    rows = runs.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["valid_rate"] == 1.0 for row in rows)
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    answers = [row for row in runs.read_rows(tmp_path / "run" / "report.jsonl") if "answer" in json.dumps(row)]
    assert answers
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["trained"]["valid"] == 1.0 and results["trained"]["score"] == results["base"]["score"]
    assert runs.read_rows(tmp_path / "run" / "eval.jsonl")[0]["step"] == 2
    assert len(made) == 4  # the run's, the evaluation's, and two ways of sampling of the demo's
    assert all(engine.log.count("close") == 1 for engine in made)
    of_run = next(e for e in made if ("sync", 1) in e.log)
    assert [e for e in of_run.log if isinstance(e, tuple)] == [("sync", s) for s in (0, 0, 1, 1, 2)]


def test_an_engine_that_fails_is_closed(engines, tmp_path, monkeypatch):
    made, open_engine = engines
    closed = []
    monkeypatch.setattr(loop.RunLog, "__exit__", lambda *_: closed.append("log"))
    monkeypatch.setattr(loop.Batches, "__exit__", lambda *_: closed.append("batches"))
    monkeypatch.setattr(FakeEngine, "sample", lambda *_: (_ for _ in ()).throw(OSError("the server is gone")))
    config = demo_config()
    config.report.rows = config.eval_every = 0
    with runs.compile_once(), pytest.raises(OSError, match="the server is gone"):
        loop.train(config, tmp_path / "run", open_engine=open_engine)
    assert sorted(closed) == ["batches", "log"] and made[0].log[-1] == "close"


@pytest.fixture(scope="module")
def loaded():
    return session.load(demo_config(), for_training=False)


@pytest.mark.slow
def test_the_other_modes_do_too(engines, tmp_path, loaded):
    made, open_engine = engines
    config = demo_config()
    evaluation = Evaluation(loaded, config, open_engine=open_engine)
    (result,) = evaluation.run({}, output=tmp_path / "eval")
    assert result.numbers["format_valid"] == 100.0 and result.numbers["questions"] == 4
    teacher_params = teacher_params_of("frozen", trained={}, average={})
    table, bad = diagnose(
        loaded, {}, config, teacher_params=teacher_params, output=tmp_path / "palr", open_engine=open_engine
    )
    assert "T_ra" in table and not bad
    said = "".join(stream(loaded, {}, config, open_engine=open_engine))
    assert said.count("one red apple") == 2  # the quick look's two questions
    assert len(made) == 4 and made[1].log[-1] == made[2].log[-1] == made[3].log[-1] == "close"


def test_an_answer_that_could_not_be_sampled_is_said(engines, loaded, monkeypatch):
    _, open_engine = engines
    failed = Completions(((),), ((),), ("http://localhost:1 answers 400: too long",))
    monkeypatch.setattr(FakeEngine, "stream", lambda self, prepared, keys: iter([failed]))
    config = demo_config()
    with pytest.raises(InputError, match="could not be sampled: http://localhost:1 answers 400: too long; see"):
        list(stream(loaded, {}, config, open_engine=open_engine))


@pytest.mark.slow
def test_the_native_engine_is_the_sampler(loaded):
    """Sampled, streamed, and by `sample_rows` in a batch with empty rows: the same tokens."""
    config = demo_config()
    source, reader = session.open_source(config), Reader.of(loaded, config)
    rows = [reader.row(reader.example(source, i)) for i in range(5)]
    sampling = Sampling(max_tokens=48, temperature=1.0)
    engine, keys = NativeEngine(loaded, sampling), row_keys(0, 0, 8)
    engine.sync({})
    some = sample_rows(engine, loaded, rows, keys)
    assert len(some.ids) == 5 and len(set(some.ids)) > 1
    prepared = engine.prepare([*rows, *[type(rows[0])()] * 3])
    sampled = engine.sample(prepared, keys)
    assert sampled.completions.ids[:5] == some.ids and set(sampled.completions.ids[5:]) == {()}
    streamed = list(engine.stream(prepared, keys))
    assert streamed[-1].ids == sampled.completions.ids
    assert all(a[: len(b)] == b for a, b in zip(streamed[-1].ids, streamed[0].ids, strict=True))
    sampler = Sampler(loaded.model, sampling, eos_ids=loaded.processor.eos_ids)
    assert sampler(loaded.student({}), prepared, keys).ids == sampled.completions.ids
    assert sampler(loaded.student({}), prepared, jax.random.split(jax.random.key(9), 8)).ids != some.ids
    np.testing.assert_array_equal(sampled.images, sampler.encode(loaded.student({}), prepared))
