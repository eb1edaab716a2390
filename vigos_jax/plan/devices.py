"""Devices to plan for that need not be here, and how fast they are: TPU slices, GPUs, and the CPU in N parts."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from vigos_jax.errors import InputError
from vigos_jax.plan.gpu_targets import GPUS, shape_of, target_config


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak rates of one device, as stated by its vendor.

    Attributes:
      memory_gb: memory available to programs, in 1e9 bytes.
      tflops: 16-bit matrix products, in 1e12 operations per second.
      bandwidth_gbs: memory bandwidth, in 1e9 bytes per second.
      interconnect_gbs: receive bandwidth from other devices over all links, in 1e9 bytes per second.
    """

    memory_gb: float
    tflops: float
    bandwidth_gbs: float
    interconnect_gbs: float


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      platform: "gpu", "tpu" or "cpu".
      has_fused_attention: whether the platform's attention kernels run on this kind.
      has_bfloat16: whether it multiplies bfloat16 in units of its own.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    rates: Rates
    has_fused_attention: bool = True
    has_bfloat16: bool = True


# TPUs: Google's documentation (memory minus what the runtime reserves). _HOST: an NVIDIA A100 80GB SXM.
_TPUS = {
    "v5e": Rates(16.9, 197.0, 819.0, 200.0),
    "v5p": Rates(102.2, 459.0, 2765.0, 600.0),
    "v6e": Rates(33.5, 918.0, 1640.0, 448.0),
}
_HOST = Rates(80.0, 312.0, 2039.0, 300.0)
_HINT = (
    "choices: v5e:1x1, v5e:2x4, v5p:2x2x2, v6e:2x4 and other slices of these TPUs; h100:8, h100:2x8 for two hosts, and "
    f"other counts of {', '.join(GPUS)}; cpu:N for N host devices"
)


def topology(plan: Any) -> Topology:
    """The devices of `config.plan`; its rates, where they are not 0, replace the known ones.

    Raises:
      InputError: there is no such slice or card, its compiler is not installed, or jax already runs on other devices.
    """
    name = plan.topology
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        target = Topology(name, "cpu", tuple(_host_devices(name, shape)), _HOST)
    elif kind in _TPUS and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        target = Topology(name, "tpu", tuple(_tpu_devices(name, shape)), _TPUS[kind])
    elif kind in GPUS:
        target = _gpu_topology(name, kind)
    else:
        raise InputError(f"config.plan.topology={name!r} is unknown; {_HINT}")
    given = {f.name: getattr(plan, f.name) for f in dataclasses.fields(Rates)}
    given = {field: float(value) for field, value in given.items() if value}
    return dataclasses.replace(target, rates=dataclasses.replace(target.rates, **given))


def _host_devices(name: str, count: str) -> list[Any]:
    if not count.isdecimal() or not 1 <= int(count) <= 1024:
        raise InputError(f"config.plan.topology={name!r} must be cpu:N with N from 1 to 1024; {_HINT}")
    try:  # the device count can only be set before jax initialises its backends
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(count))
    except RuntimeError:  # already initialised: the existing devices may be enough
        pass
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise InputError(
            f"config.plan.topology={name!r}: jax runs on {len(devices)} host device(s) already; choices: a process of "
            f"its own, or XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[: int(count)]


def _tpu_devices(name: str, shape: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"config.plan.topology={name!r} needs the compiler for TPUs: pip install 'vigos-jax[plan]'; or cpu:N"
        )
    # Only the compiler is used: no TPU discovery, no query for host names, no exclusive lock on libtpu.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        jax.config.update("jax_platforms", "cpu")  # what is computed here and now
        # A host of a slice has four chips or more; a single chip has a host of its own.
        single = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **single).devices
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"config.plan.topology={name!r}: {reason}; {_HINT}") from e


def _gpu_topology(name: str, kind: str) -> Topology:
    gpu, (hosts, cards) = GPUS[kind], shape_of(name)
    if any(importlib.util.find_spec(part) is None for part in ("jax_plugins", "jax_plugins.xla_cuda13")):
        raise InputError(
            f"config.plan.topology={name!r} needs the compiler for GPUs: pip install 'vigos-jax[plan-gpu]'; or cpu:N"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to ask for its version
    from jax.experimental import topologies

    try:
        jax.config.update("jax_platforms", "cpu")  # what is computed here and now
        jax.devices()  # plugins are registered when the first backend starts
        shape = f"{hosts}x1x{cards}"  # NVLink domains, hosts of each, cards of each host
        described = topologies.get_topology_desc(name, "cuda", target_config=target_config(gpu), topology=shape)
    except (RuntimeError, ValueError, NotImplementedError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"config.plan.topology={name!r}: {reason}; {_HINT}") from e
    rate = gpu.interconnect_gbs if hosts == 1 else gpu.network_gbs
    return Topology(
        name,
        "gpu",
        tuple(described.devices),
        Rates(gpu.usable_gb, gpu.tflops, gpu.bandwidth_gbs, rate),
        has_fused_attention=gpu.has_fused_attention,
        has_bfloat16=gpu.has_bfloat16,
    )
