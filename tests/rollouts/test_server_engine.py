"""The engine whose rollouts come from servers: what is sent, what is refused, and the adapters on the servers."""

import contextlib
import math
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
from policy_server import FakePolicy, changed, refused, server_error, serving

from configs import base
from vigos_jax import session
from vigos_jax.config import validate
from vigos_jax.data.processor import EncodedImage
from vigos_jax.errors import InputError
from vigos_jax.method.rows import Row
from vigos_jax.models.families import adapter_table
from vigos_jax.rollouts import server_client
from vigos_jax.rollouts.engine import EngineFailed, NativeEngine
from vigos_jax.rollouts.engines import check_engine, engine_of
from vigos_jax.rollouts.parse import Reader, parse
from vigos_jax.rollouts.sample_rows import sample_rows
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.rollouts.server_client import ServersLost
from vigos_jax.rollouts.server_engine import ServerEngine, one_pad_each, row_seeds, share_of
from vigos_jax.weights import writing

GENERATE = {"vllm": "/inference/v1/generate", "sglang": "/generate"}
LOAD = {"vllm": "/v1/load_lora_adapter", "sglang": "/load_lora_adapter"}
SAMPLING = Sampling(max_tokens=8, temperature=1.1, top_k=20, top_p=0.95)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_client, "_FIRST_WAIT", 0.01)


def demo_config(*servers, engine="vllm"):
    config = base.get_config()
    config.batch_size, config.lora.rank, config.sampling.max_tokens = 8, 4, 8
    config.rollout.engine, config.rollout.model = engine, "base"
    config.rollout.urls = tuple(s if isinstance(s, str) else s.url for s in servers)
    config.rollout.retries, config.rollout.timeout = 2, 10.0
    return config


@pytest.fixture(scope="module")
def loaded():
    return session.load(demo_config(), for_training=True)


@pytest.fixture(scope="module")
def rows(loaded):
    config = demo_config()
    source, reader = session.open_source(config), Reader.of(loaded, config)
    return [*(reader.row(reader.example(source, i)) for i in range(5)), *[Row()] * 3]


@pytest.fixture
def policy(loaded):
    return FakePolicy(loaded.processor)


KEYS = row_keys(0, 0, 8)


@contextlib.contextmanager
def engine_on(loaded, *servers, workdir=None, engine="vllm", **options):
    config = demo_config(*servers, engine=engine)
    config.rollout.update(options)
    validate(config)
    made = ServerEngine(loaded, SAMPLING, config=config, workdir=workdir)
    with contextlib.closing(made):
        yield made


def sampled_by(loaded, rows, *servers, **options):
    with engine_on(loaded, *servers, **options) as engine:
        return engine.sample(engine.prepare(rows), KEYS)


# -- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_completions_come_in_the_rows_order(loaded, rows, policy, engine):
    with serving(policy) as a, serving(policy) as b:
        sampled = sampled_by(loaded, rows, a, b, engine=engine)
        bodies = a.bodies(GENERATE[engine]) + b.bodies(GENERATE[engine])
    seeds = row_seeds(KEYS)
    completions = sampled.completions
    assert [ids[0] for ids in completions.ids[:5]] == [seed % 97 for seed in seeds[:5]]
    assert all(ids[-1] == loaded.processor.eos_ids[0] and len(ids) == 4 for ids in completions.ids[:5])
    assert completions.logps[0] == (-0.5,) * 4
    assert completions.ids[5:] == ((),) * 3 and len(bodies) == 5  # bad rows are not sent
    assert completions.failed == (None,) * 8 and sampled.step == 0 and sampled.images is None
    assert [r is None for r in parse(loaded, rows, completions)] == [False] * 5 + [True] * 3


def test_every_sampling_field_is_sent(loaded, rows, policy):
    with serving(policy) as server:
        sampled_by(loaded, rows[:1] + [Row()] * 7, server)
        (body,) = server.bodies(GENERATE["vllm"])
    pad, sent = loaded.processor.image_token_id, rows[0].prompt.ids
    assert body["token_ids"].count(pad) == 1 and sent.count(pad) > 1
    assert [i for i in body["token_ids"] if i != pad] == [i for i in sent if i != pad]
    assert len(body["content_parts"]) == 1 and body["model"] == "base" and body["return_token_ids"] is True
    fields = {"n": 1, "max_tokens": 8, "min_tokens": 0, "temperature": 1.1, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    fields |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": []}
    fields |= {"stop_token_ids": list(loaded.processor.eos_ids), "ignore_eos": True, "logprobs": 0}
    fields |= {"detokenize": False, "skip_special_tokens": False, "seed": int(row_seeds(KEYS)[0])}
    assert body["sampling_params"] == fields


def test_top_k_of_all(loaded, rows, policy):
    with serving(policy) as server, engine_on(loaded, server) as engine:
        engine._sampling = Sampling(max_tokens=8)
        engine.sample(engine.prepare(rows), KEYS)
        assert {b["sampling_params"]["top_k"] for b in server.bodies(GENERATE["vllm"])} == {-1}


def test_seeds_are_the_keys():
    seeds = row_seeds(KEYS)
    assert seeds.dtype == np.int32 and (seeds >= 0).all() and len(set(seeds.tolist())) == 8
    np.testing.assert_array_equal(seeds, row_seeds(row_keys(0, 0, 8)))
    np.testing.assert_array_equal(seeds[3:5], row_seeds(KEYS[3:5]))
    assert not np.any(seeds == row_seeds(row_keys(0, 1, 8)))


def test_one_pad_each():
    assert one_pad_each((7, 9, 9, 9, 7, 9, 9, 5), [3, 2], pad=9) == (7, 9, 7, 9, 5)
    assert one_pad_each((9, 9, 5), [2], pad=9) == (9, 5)
    assert one_pad_each((1, 2), [], pad=9) == (1, 2)


def test_processes_share_the_servers():
    assert share_of(list("abcde"), number=1, count=2) == ["b", "d"]
    assert share_of(["a"], number=3, count=4) == ["a"]
    assert [share_of(list("abc"), number=i, count=3) for i in range(3)] == [["a"], ["b"], ["c"]]


def test_it_streams_once_and_answers_any_number_of_rows(loaded, rows, policy):
    with serving(policy) as server, engine_on(loaded, server) as engine:
        (whole,) = engine.stream(engine.prepare(rows), KEYS)
        some = sample_rows(engine, loaded, rows[:3], KEYS)
        assert some.ids == whole.ids[:3] and some.failed == (None,) * 3


# -- what is refused ---------------------------------------------------------------------------------------------

WRONG = {
    "another prompt": ({"prompt": [5, 6, 7]}, "read another prompt: 3 tokens"),
    "no log-probability": ({"logps": []}, "4 tokens and 0 finite"),
    "too few": ({"logps": [-0.5]}, "4 tokens and 1 finite"),
    "not a number": ({"logps": [-0.5, math.nan, -0.5, -0.5]}, "4 tokens and 3 finite"),
    "vLLM's number for it": ({"logps": [-0.5, -9999.0, -0.5, -0.5]}, "4 tokens and 3 finite"),
    "no such token": ({"ids": [1, 10**7, 3, 4]}, "token id 10000000"),
    "a short one": ({"reason": "length"}, "ended a completion after 4 tokens"),
    "another end": ({"ids": [1, 2, 3, 4]}, "with the token 4"),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", WRONG)
def test_a_reply_of_something_else_ends_the_run(loaded, rows, policy, name, engine):
    fields, message = WRONG[name]
    with serving(policy, changed(**fields)) as server, pytest.raises(EngineFailed, match=message) as e:
        sampled_by(loaded, rows, server, engine=engine)
    assert server.url in str(e.value) and not isinstance(e.value, ServersLost)


def test_the_first_difference_is_named(loaded, rows, policy):
    sent = list(rows[0].prompt.ids)
    other = [*sent[:-2], sent[-2] + 1, sent[-1]]
    with serving(policy, *[changed(prompt=other)]) as server, pytest.raises(EngineFailed) as e:
        sampled_by(loaded, rows[:1] + [Row()] * 7, server)
    place = f"position {len(sent) - 2}: sent {sent[-2]}, received {sent[-2] + 1}"
    assert place in str(e.value)


def test_another_model_is_refused_and_an_alias_is_not(loaded, rows, policy):
    with serving(policy, names=("first", "base")) as server:
        assert sampled_by(loaded, rows, server).completions.ids[0]
    with serving(policy, changed(model="another")) as server, pytest.raises(EngineFailed, match="'another'.*base"):
        sampled_by(loaded, rows, server)


@pytest.mark.parametrize("step", [changed(reason="abort"), changed(ids=[]), refused(400, "odd")])
def test_a_row_may_fail_alone(loaded, rows, policy, step):
    with serving(policy, step) as server:
        completions = sampled_by(loaded, rows, server).completions
    failed = [i for i in range(8) if completions.failure(i)]
    assert len(failed) == 1 and completions.ids[failed[0]] == () and server.url in completions.failure(failed[0])
    assert sum(r is not None for r in parse(loaded, rows, completions)) == 4


def test_a_batch_that_fails_is_lost(loaded, rows, policy):
    with serving(policy, *[server_error] * 99) as server, pytest.raises(ServersLost, match="all 5 rows.*503: oops"):
        sampled_by(loaded, rows, server)


def test_a_video_and_a_long_prompt_are_refused_before_anything_is_sampled(loaded, rows, policy):
    frames = EncodedImage(rows[0].images[0].patches, rows[0].images[0].grid, label="")
    video = Row((frames,), rows[0].student)
    with serving(policy) as server, pytest.raises(EngineFailed, match="video.*native"):
        sampled_by(loaded, [rows[1], video, *[Row()] * 6], server)
    assert not server.bodies(GENERATE["vllm"])
    context = len(rows[0].prompt.ids) + SAMPLING.max_tokens - 1
    with serving(policy, context=context) as server, pytest.raises(EngineFailed, match="--max-model-len"):
        sampled_by(loaded, rows[:1] + [Row()] * 7, server)
    assert not server.bodies(GENERATE["vllm"])


# -- adapters ----------------------------------------------------------------------------------------------------


def moved(loaded, by):
    return {"lora": jax.tree.map(lambda x: x + by, loaded.trained["lora"])}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_update_has_a_name_and_a_folder_of_its_own(loaded, rows, policy, tmp_path, engine):
    written = []
    with serving(policy) as a, serving(policy) as b:
        a.on_load = lambda folder: written.append(safetensors.numpy.load_file(folder / "adapter_model.safetensors"))
        with engine_on(loaded, a, b, engine=engine, workdir=tmp_path) as made:
            for step, by in enumerate((0.0, 0.25, 0.25)):
                trained = moved(loaded, by)
                made.sync(trained, step=step)
                sampled = made.sample(made.prepare(rows), KEYS)
                assert sampled.step == step
                assert len(a.adapters) == 1 and a.adapters == b.adapters
                (name, folder) = next(iter(a.adapters.items()))
                assert name.endswith(f"-step-{step}") and folder.parent == tmp_path / "adapters"
                assert [p.name for p in folder.parent.iterdir()] == [name]  # the former one is gone
                table = adapter_table(loaded.config, loaded.model.lora)
                wanted = dict(writing.file_tensors(trained["lora"], table, loaded.config, dtype=np.float32))
                assert wanted.keys() == written[-1].keys()
                assert all(np.array_equal(wanted[k], written[-1][k]) for k in wanted)
            names = [body["lora_name"] for body in a.bodies(LOAD[engine])]
            assert len(set(names)) == 3
            field = {"vllm": "model", "sglang": "lora_path"}[engine]
            asked = [body.get(field) for body in a.bodies(GENERATE[engine]) + b.bodies(GENERATE[engine])]
            assert sorted(asked) == sorted(names * 5)
            made.sync({})  # the base again
            made.sample(made.prepare(rows), KEYS)
            assert not a.adapters and {"vllm": "base"}.get(engine) == a.bodies(GENERATE[engine])[-1].get(field)
            made.sync(moved(loaded, 1.0), step=9)
        assert not a.adapters and not b.adapters and not list((tmp_path / "adapters").iterdir())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_that_was_restarted_gets_the_adapter_again(loaded, rows, policy, tmp_path, engine):
    with serving(policy) as server, engine_on(loaded, server, engine=engine, workdir=tmp_path) as made:
        made.sync(moved(loaded, 0.1), step=3)
        server.adapters.clear()
        completions = made.sample(made.prepare(rows), KEYS).completions
        assert completions.failed == (None,) * 8 and len(server.adapters) == 1


def test_an_adapter_that_a_server_refuses_ends_the_run(loaded, policy, tmp_path):
    with serving(policy, most_rank=2) as server, engine_on(loaded, server, workdir=tmp_path) as made:
        with pytest.raises(EngineFailed, match="rank 4 is greater than max_lora_rank 2.*--max-lora-rank"):
            made.sync(loaded.trained, step=0)
        assert len(server.bodies(LOAD["vllm"])) == 1  # it is not asked again
    with serving(policy) as server, engine_on(loaded, server, workdir=tmp_path) as made:
        unseen = mock.patch.object(pathlib.Path, "rename", lambda *_: None)
        with unseen, pytest.raises(EngineFailed, match=r"404.*config\.rollout\.adapter_dir"):
            made.sync(loaded.trained, step=0)


def test_an_adapter_needs_a_folder_and_all_weights_are_refused(loaded, policy, tmp_path):
    with serving(policy) as server:
        with engine_on(loaded, server) as made, pytest.raises(InputError, match=r"adapter_dir='' needs a --workdir"):
            made.sync(loaded.trained)
        with engine_on(loaded, server, adapter_dir=str(tmp_path / "shared")) as made:
            made.sync(loaded.trained)
            assert [f.parent for f in server.adapters.values()] == [tmp_path / "shared"]
            with pytest.raises(EngineFailed, match="all weights trained.*native"):
                made.sync({"params": loaded.base})


class SeeingPolicy(FakePolicy):
    """Answers by what the tower's adapter is, if it applies it."""

    def __init__(self, processor, *, applies):
        super().__init__(processor)
        self._applies = applies

    def answer(self, row, adapter, sampling, seed, ends):
        strength = 0.0
        if adapter is not None and self._applies:
            tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
            own = [np.abs(x).mean() for name, x in tensors.items() if ".visual." in name and ".lora_B." in name]
            others = [np.abs(x).max() for name, x in tensors.items() if ".visual." not in name and ".lora_B." in name]
            strength = float(np.mean(own)) if max(others) == 0 else 0.0
        if sampling.max_tokens == 1:
            assert sampling.temperature == 0.0 and row.images
            return [5], [-0.5 - strength]
        return super().answer(row, adapter, sampling, seed, ends)


@pytest.mark.slow
def test_servers_must_apply_adapters_of_the_vision_tower(rows, tmp_path):
    config = demo_config()
    config.lora.scope = "official"
    official = session.load(config, for_training=True)
    sees, is_blind = (SeeingPolicy(official.processor, applies=applies) for applies in (True, False))
    with serving(sees) as server, engine_on(official, server, workdir=tmp_path) as made:
        made.sync(official.trained, step=0)
        made.sample(made.prepare([Row()] * 8), KEYS)  # no image, no proof
        assert len(server.bodies(LOAD["vllm"])) == 1
        for _ in range(2):
            assert made.sample(made.prepare(rows), KEYS).completions.failed == (None,) * 8
        assert len(server.bodies(LOAD["vllm"])) == 2  # once
        assert len(server.adapters) == len(list((tmp_path / "adapters").iterdir())) == 1
    with serving(is_blind) as server, engine_on(official, server, workdir=tmp_path) as made:
        made.sync(official.trained, step=0)
        with pytest.raises(EngineFailed, match="--enable-tower-connector-lora"):
            made.sample(made.prepare(rows), KEYS)
        assert len(server.adapters) == 1  # the probe is gone


# -- the start ---------------------------------------------------------------------------------------------------


def refuse(message, *servers, trains=True, engine="vllm", **fields):
    config = demo_config(*servers, engine=engine)
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=message):
        validate(config)
        check_engine(config, trains=trains)


def test_servers_are_looked_at_before_anything_is_loaded(policy, capsys):
    with serving(policy) as server:
        check_engine(demo_config(server), trains=True)
        check_engine(demo_config(server, engine="sglang"), trains=True)
        assert "1 sglang server(s)" in capsys.readouterr().err and not server.adapters
        refuse("needs config.rollout.urls")
        refuse("does not serve config.rollout.model='mine'; choices: 'base'", server, **{"rollout.model": "mine"})
        refuse("config.lora.rank=0 trains all weights", server, **{"lora.rank": 0})
        refuse("config.model.quantization=nf4", server, **{"model.quantization": "nf4"})
        penalty = {"sampling.repetition_penalty": 1.2}
        refuse("sampling.repetition_penalty=1.2 must be 1", server, engine="sglang", **penalty)
        refuse("must be the name of an environment variable", server, **{"rollout.key_env": "my key"})
        refuse("NOT_THERE", server, **{"rollout.key_env": "NOT_THERE"})
        refuse("unknown; choices: native, vllm, sglang", server, engine="tgi")
        refuse("must be 1 and 0", engine="native", **{"rollout.max_staleness": 2})
        refuse("sync_every=3 must be at most .* = 2", server, **{"rollout.sync_every": 3, "rollout.max_staleness": 1})
        refuse("must be addresses", server, **{"rollout.urls": (1,)})
        url = server.url
    refuse("must be servers that are well.*refused", url)
    with serving(policy, has_tokens=False) as server:
        refuse("/inference/v1/generate: start it with --enable-scale-out", server)
        refuse("--enable-scale-out", server, trains=False)
    with serving(policy, has_lora=False) as server:
        refuse("VLLM_ALLOW_RUNTIME_LORA_UPDATING", server)
        check_engine(demo_config(server), trains=False)
    with serving(policy, key="k") as server:
        refuse("401.*key_env", server)


def test_a_config_names_its_engine(policy, tmp_path):
    config = demo_config("http://localhost:1")
    assert engine_of(config, tmp_path).func is ServerEngine
    assert engine_of(config, None, for_evaluation=True) is NativeEngine
    config.eval.engine = "rollout"
    assert engine_of(config, None, for_evaluation=True).func is ServerEngine
    assert engine_of(base.get_config(), None) is NativeEngine
    check_engine(base.get_config(), trains=True)
