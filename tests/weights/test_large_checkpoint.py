"""Two gigabytes in and out: how much memory that takes beside the parameters, and that every bit arrives."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import tensor_table
from vigos_jax.models.published_configs import published_config
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables

ROOT = pathlib.Path(__file__).resolve().parents[2]
SLACK = 200_000_000
SHARD = 600_000_000  # bytes of a file


def write_random(folder: pathlib.Path) -> None:
    """A Qwen2.5-VL-3B of 12 layers and a small vocabulary, random bfloat16, written tensor by tensor by plain numpy."""
    raw = published_config("Qwen/Qwen2.5-VL-3B-Instruct") | {"num_hidden_layers": 12, "vocab_size": 32000}
    raw |= {"image_token_id": 31998, "video_token_id": 31999}
    raw["vision_config"] = raw["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_hf(raw)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(VisionLanguageModel(config))["params"])
    shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for row in tensor_table(config):
        shape = shapes[row.path][1:] if row.stacked else shapes[row.path]
        shape = shape if row.layout == "same" else shape[::-1]
        if row.layout == "conv":
            shape = (shape[0], 3, 2, 14, 14)
        for name in row.names():
            if filled > SHARD:
                shards.append({})
                filled = 0
            shards[-1][name] = shape
            filled += 2 * int(np.prod(shape))
    rng, weight_map = np.random.default_rng(0), {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name, shape in tensors.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in tensors.values():
                bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
                out.write((bits & 0x80FF | 0x3C00).data)  # a sign, and numbers below one
        weight_map |= dict.fromkeys(tensors, file)
    assert len(shards) > 2
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def digests(folder: pathlib.Path) -> dict[str, str]:
    """A digest of every tensor's bytes, straight from the files."""
    out = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = value["data_offsets"]
                file.seek(8 + length + begin)
                out[name] = hashlib.blake2b(file.read(end - begin)).hexdigest()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write_random(root / "model")
    yield root / "model"
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [8, 1])
def test_memory_beside_the_parameters_is_one_shard(folder, devices):
    output = folder.parent / f"out{devices}"
    output.mkdir()
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "memory_probe.py", folder, output, str(devices)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    print(used)
    assert used["held"] > 1_900_000_000 and used["leaf"] > 500_000_000
    assert used["shard"] == used["leaf"] // devices
    assert used["load"] <= used["shard"] + SLACK
    # Out: a tensor as the devices give it, and as it is written.
    assert used["save"] <= 2 * used["tensor"] + SLACK
    assert digests(output) == digests(folder)
    shutil.rmtree(output)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 1])
def test_a_quantised_base_is_read_tensor_by_tensor(folder, devices):
    """Beside the codes: one leaf of them in the host's memory, and one tensor in float32, a few times over."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, ROOT / "tests" / "memory_probe.py", folder, folder, str(devices), "nf4"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    print(used)
    files = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    tensor = 4 * 2048 * 11008
    assert files > 1_900_000_000 and used["held"] < 0.4 * files
    assert used["load"] <= used["leaf"] + 5 * tensor + SLACK < 0.5 * files
