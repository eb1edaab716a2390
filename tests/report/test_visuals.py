"""Rows with several pictures and with videos, through whole runs of both families."""

import json

import numpy as np
import pytest
import tiny_runs as runs
from helpers import make_processor_folder
from PIL import Image
from tiny_rows import GOOD, encode, picture_bytes

from vigos_jax.data.examples import row_size
from vigos_jax.data.processor import Processor

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with runs.compile_once():
        yield


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("model")))


def video(frames=3, size=(56, 56), fps=2.0):
    return {"frames": [picture_bytes(i, size) for i in range(frames)], "fps": fps}


@pytest.mark.parametrize(
    "item, reason",
    [
        (video(), None),
        (video() | {"fps": 2}, None),
        (video() | {"bytes": None, "path": None}, None),  # as a table with both kinds has it
        (video(frames=0), "bad_video"),
        (video(fps=0.0), "bad_video"),
        (video(fps=None), "bad_video"),
        (video(fps="2"), "bad_video"),
        ({"frames": 3, "fps": 1.0}, "bad_video"),
        ({"frames": "a.png", "fps": 1.0}, "bad_video"),
        ({"frames": [picture_bytes(0, (56, 56)), picture_bytes(1, (56, 84))], "fps": 1.0}, "bad_video"),
        ({"frames": [b"no picture"], "fps": 1.0}, "image_unreadable"),
        ({"frames": [picture_bytes(0, (27, 90))], "fps": 1.0}, "image_too_small"),
    ],
)
def test_a_row_with_a_video(processor, item, reason):
    example = encode(GOOD | {"images": [item]}, processor)
    assert example.bad_reason == reason
    if reason is None:
        assert [image.grid for image in example.images] == [(2, 4, 4)]


def test_a_video_counts_as_one_picture(processor):
    row = GOOD | {"images": [picture_bytes(), video()]}
    assert encode(row, processor).bad_reason == "too_many_images"
    assert [i.grid[0] for i in encode(row, processor, max_images=2).images] == [1, 2]


def test_size_of_a_row_with_a_video(processor):
    size = lambda images: row_size(GOOD | {"images": images}, processor=processor, image_roots=())  # noqa: E731
    one = size([picture_bytes(0, (56, 56))])
    assert one > 0 and size([video(frames=4)]) == 2 * one and size([video(frames=5)]) == 3 * one
    assert size([{"frames": 3, "fps": 1.0}]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_pictures_and_videos(tmp_path, family):
    """Rows of one picture, of two, of a video, of both, in one batch; on a mesh that splits everything."""
    runs.write_pictures(tmp_path / "pictures", 6)
    files = [f"pictures/{i}.png" for i in range(6)]
    for file in files[3:]:
        Image.open(tmp_path / file).resize((56, 56)).save(tmp_path / file)
    clip = {"frames": files[3:], "fps": 2.0}
    kinds = [[files[0]], [files[1], files[2]], [clip], [files[0], clip]]
    rows = [{"id": str(i), "images": kinds[i % 4], "problem": f"Why {i}?", "answer": str(i)} for i in range(8)]
    data = runs.write_rows(tmp_path / "data.jsonl", rows)
    model = runs.write_model(tmp_path / "model", family=family)
    config = tmp_path / "mine.py"
    config.write_text(runs.CONFIG.format(model=str(model), data=str(data)))
    world = runs.World(tmp_path, model, tmp_path, data, data, config)
    options = ["--config.data.max_images=2", "--config.steps=2", f"--workdir={tmp_path / 'run'}"]
    assert world.run(*options, "--config.buckets.patches=(128,)", "--config.buckets.prompt=(96,)") == 0
    metrics = runs.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2 and all(row["bad_rows"] == 0 for row in metrics)
    for row in metrics:
        assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
        # Sampled and scored by the same model, pictures, frames and all. (The adapter's dropout is off at first.)
        assert row["sampler_logp_gap"] < (1e-4 if row["step"] == 1 else 1.0), json.dumps(row)
