"""Topologies: what they are made of, what they say of themselves, and mistakes. Only names and numbers: no compiler."""

import dataclasses
import importlib.util

import jax
import pytest

from configs import base
from vigos_jax.errors import InputError
from vigos_jax.plan import devices
from vigos_jax.plan.abstract_run import describe
from vigos_jax.plan.devices import topology
from vigos_jax.plan.gpu_targets import GPUS, shape_of, target_config


def config_of(name="cpu:1", **changes):
    config = base.get_config()
    config.update_from_flattened_dict({"plan.topology": name, "mesh.data": 1} | changes)
    return config


def mistake(name):
    with pytest.raises(InputError) as e:
        topology(config_of(name).plan)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "name, shape", [("h100:8", (1, 8)), ("h100:2x8", (2, 8)), ("t4:1", (1, 1)), ("a100:16x4", (16, 4))]
)
def test_shapes_of_gpus(name, shape):
    assert shape_of(name) == shape


@pytest.mark.parametrize("shape", ["", "0", "9", "8x", "x8", "0x8", "2x9", "2x2x2", "129x8", "many", "-1", "1.5", "08"])
def test_shapes_that_no_host_has(shape):
    said = mistake(f"h100:{shape}")
    assert f"'h100:{shape}'" in said and "from 1 to 8" in said and "h100:HxN" in said


def test_unknown_cards_come_with_the_choices():
    said = mistake("h900:8")
    assert "'h900:8' is unknown" in said
    for choice in ("v5e:1x1", "v5p:2x2x2", "h100:2x8", "cpu:N", *GPUS):
        assert choice in said


def test_cards_without_a_network_rate_are_on_one_host():
    said = mistake("l4:2x8")
    assert "choices: l4:1 to l4:8, or several hosts of h100, h200, a100, b200" in said


@pytest.mark.parametrize("missing", ["jax_plugins", "jax_plugins.xla_cuda13"])
def test_a_missing_gpu_compiler_is_named(monkeypatch, missing):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None if name == missing else object())
    said = mistake("h100:8")
    assert "'h100:8'" in said and "pip install 'vigos-jax[plan-gpu]'" in said and "cpu:N" in said


def test_a_missing_tpu_compiler_is_named(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    said = mistake("v6e:1x1")
    assert "'v6e:1x1'" in said and "pip install 'vigos-jax[plan]'" in said


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'vigos-jax[plan]'",
)
@pytest.mark.parametrize("name, memory", [("v5e:1x1", 16.9), ("v6e:1x1", 33.5)])
def test_single_tpu_chips(name, memory):
    target = topology(config_of(name).plan)
    assert (target.platform, len(target.devices), target.rates.memory_gb) == ("tpu", 1, memory)
    assert target.has_bfloat16 and target.has_fused_attention


# What the compiler is told of a card.

L4 = """\
gpu_device_info {
  cuda_compute_capability { major: 8 minor: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 102400
  shared_memory_per_block_optin: 101376
  threads_per_core_limit: 1536
  core_count: 58
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 300000000000
  pcie_bandwidth: 32000000000
  l2_cache_size: 50331648
  clock_rate_ghz: 2.04
  device_memory_size: 24152899584
  device_address_bits: 64
  ecc_enabled: true
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA L4"
  platform_version: "Compute Capability 8.9"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA L4"
"""


def test_a_card_as_text():
    assert target_config(GPUS["l4"]) == L4


def test_what_differs_between_cards():
    """From Hopper on an architecture has instructions of its own; a GeForce has no error correction."""
    accelerated = {name for name, gpu in GPUS.items() if "ACCELERATED_FEATURES" in target_config(gpu)}
    assert accelerated == {"h100", "h200", "b200"}
    assert 'platform_version: "Compute Capability 9.0a"' in target_config(GPUS["h100"])
    assert {name for name, gpu in GPUS.items() if "ecc_enabled: false" in target_config(gpu)} == {"rtx4090"}
    assert {name for name, gpu in GPUS.items() if not gpu.has_bfloat16} == {"t4"}
    assert {name for name, gpu in GPUS.items() if not gpu.has_fused_attention} == {"t4"}


@pytest.mark.parametrize("name", GPUS)
def test_programs_get_less_than_the_card_has(name):
    gpu = GPUS[name]
    assert 0.9 < gpu.usable_gb * 1e9 / (gpu.memory_mib * 2**20) < 0.95
    assert gpu.shared_block_kib <= gpu.shared_kib


# What a topology says of itself decides how attention is computed.


def on(platform, **facts):
    """The CPU's device, said to be another."""
    return dataclasses.replace(topology(config_of().plan), name="t4:1", platform=platform, **facts)


def test_cards_without_fused_attention_have_xlas():
    config = config_of(**{"model.dtype": "bfloat16"})
    assert describe(config, on("gpu")).model.attention == "cudnn"
    assert describe(config, on("gpu", has_fused_attention=False)).model.attention == "xla"
    config.model.attention = "cudnn"
    assert describe(config, on("gpu")).model.attention == "cudnn"
    with pytest.raises(InputError, match="config.model.attention='cudnn' does not run on t4:1; choices: auto, xla"):
        describe(config, on("gpu", has_fused_attention=False))


def test_rates_can_be_given():
    rates = topology(config_of("cpu:1", **{"plan.memory_gb": 24.0}).plan).rates
    assert (rates.memory_gb, rates.tflops) == (24.0, 312.0)
    assert jax.devices()[0].platform == "cpu"
