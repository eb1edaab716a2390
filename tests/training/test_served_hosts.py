"""Two processes whose rollouts come from servers: each asks for its own rows, and the numbers are one process's."""

import hosts
import pytest
import tiny_runs as runs
from PIL import Image
from policy_server import FakePolicy, ModelPolicy, refused, serving

from vigos_jax.data.processor import Processor
from vigos_jax.rollouts.server_images import png_uri

pytestmark = pytest.mark.slow

BATCH, GENERATE, LOAD = 4, "/inference/v1/generate", "/v1/load_lora_adapter"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def policy(world):
    return ModelPolicy.of_config(world.config, batch=BATCH)


def command(world, workdir, *servers, **fields):
    """Of a run on two or more devices, without the tensor axis: a process must hold whole rows."""
    fields = {"engine": "vllm", "urls": str(tuple(s.url for s in servers)), "model": "base", "timeout": 100} | fields
    mesh = [f"--config.mesh.{k}={v}" for k, v in {"data": 2, "fsdp": 1, "tensor": 1}.items()]
    rest = [f"--config={world.config}", f"--workdir={workdir}", "--config.lora.dropout=0.0", *mesh]
    return [*rest, *(f"--config.rollout.{k}={v}" for k, v in fields.items())]


def launch(folder, name, args, *, processes):
    return hosts.launch(folder, [{"name": name, "args": args}], processes=processes, devices=2 // processes)


def images(server):
    return [body["content_parts"][0]["url"] for body in server.bodies(GENERATE)]


def test_each_process_asks_its_server_for_its_rows_and_the_numbers_are_those_of_one(world, policy, tmp_path):
    with serving(policy) as alone:
        (one,) = launch(tmp_path / "one", "run", command(world, tmp_path / "a", alone), processes=1)
        assert one["run"]["code"] == 0
        asked = images(alone)
    with serving(policy) as first, serving(policy) as second:
        several = launch(tmp_path / "two", "run", command(world, tmp_path / "b", first, second), processes=2)
        assert [p["run"]["code"] for p in several] == [0, 0]
        shares = images(first), images(second)
        # Every update reaches both servers, and nothing stays there.
        assert len(first.bodies(LOAD)) == len(second.bodies(LOAD)) and not first.adapters and not second.adapters
    assert len(asked) == runs.STEPS * BATCH
    processor = Processor.load(world.model)
    pictures = [Image.open(world.folder / "pictures" / f"{i}.png") for i in range(10)]
    row_of = {png_uri(processor.encode_image(picture), processor): f"row{i}" for i, picture in enumerate(pictures)}
    for share, process in zip(shares, several, strict=True):
        own = [row for batch in process["run"]["read"][: runs.STEPS] for row in batch]
        assert len(own) == len(asked) // 2 and sorted(row_of[uri] for uri in share) == sorted(own)
    assert sorted(shares[0] + shares[1]) == sorted(asked)
    rows, expected = runs.metrics_of(tmp_path / "b"), runs.metrics_of(tmp_path / "a")
    assert len(rows) == len(expected) == runs.STEPS
    for row, other in zip(rows, expected, strict=True):
        assert row["sampler_logp_gap"] < 1e-4, "a server had another adapter"
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_row_that_fails_at_one_process_is_counted_for_all(world, tmp_path):
    fake = FakePolicy(Processor.load(world.model))
    limit = {"steps": 2, "guards.sampler_gap": 100.0}
    with serving(fake) as first, serving(fake, refused(400, "odd")) as second:
        args = command(world, tmp_path / "run", first, second)
        args += [f"--config.{k}={v}" for k, v in limit.items()]
        several = launch(tmp_path / "hosts", "run", args, processes=2)
        assert [p["run"]["code"] for p in several] == [1, 1], "1 of 8 rows is more than the tenth that may be bad"
    assert [row["rollout_failed"] for row in runs.metrics_of(tmp_path / "run")] == [1, 1]


def test_a_process_whose_server_is_lost_ends_all_and_the_same_command_goes_on(world, policy, tmp_path):
    def lose(handler, right):
        second.stop()
        handler.connection.close()

    workdir, later = tmp_path / "run", {"checkpoint_every": 100}
    with serving(policy) as first, serving(policy, *[lambda handler, right: right()] * BATCH, lose) as second:
        args = command(world, workdir, first, second, retries=1) + [f"--config.{k}={v}" for k, v in later.items()]
        several = launch(tmp_path / "lost", "run", args, processes=2)
    assert [p["run"]["code"] for p in several] == [2, 2]
    said = (tmp_path / "lost" / "output-0.txt").read_text()
    assert "saved at step 2 of 4" in said and second.url in said
    with serving(policy) as first, serving(policy) as again:
        args = command(world, workdir, first, again) + [f"--config.{k}={v}" for k, v in later.items()]
        assert [p["run"]["code"] for p in launch(tmp_path / "again", "run", args, processes=2)] == [0, 0]
    assert [row["step"] for row in runs.metrics_of(workdir)] == [1, 2, 3, 4]
