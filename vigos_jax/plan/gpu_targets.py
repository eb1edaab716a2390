"""NVIDIA GPUs to plan for: their specifications, and the target config that lets XLA compile without the GPU.

Specifications are from NVIDIA's data sheets, architecture white papers and the CUDA programming guide's table of
compute capabilities. The target config is a text proto of XLA's GpuTargetConfigProto.
"""

import dataclasses
import re

from vigos_jax.errors import InputError

_CUDNN = (9, 10, 0)  # the least version that is assumed on the machine that runs the program
_CUDA = "13.0.0"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
      title: as the driver names it.
      capability: CUDA's compute capability, (major, minor).
      multiprocessors: streaming multiprocessors (SMs).
      fp32_units: float32 units of one SM.
      threads: maximum number of resident threads per SM.
      shared_kib: shared memory of one SM.
      shared_block_kib: maximum shared memory per block (opt-in).
      l2_mib: L2 cache.
      clock_ghz: boost clock.
      memory_mib: as the driver reports it.
      usable_gb: memory left after CUDA context, libraries and fragmentation (6 to 8 %), in 1e9 bytes.
      bandwidth_gbs: memory bandwidth, in 1e9 bytes per second; the other bandwidths have the same unit.
      tflops: dense 16-bit matrix products with float32 accumulation, in 1e12 operations per second.
      interconnect_gbs: received from other GPUs of the host, over NVLink, or over PCIe without NVLink.
      pcie_gbs: received from the host.
      network_gbs: received by each GPU from other hosts; 0 if several hosts are not supported.
      has_ecc: error-correcting memory.
    """

    title: str
    capability: tuple[int, int]
    multiprocessors: int
    fp32_units: int
    threads: int
    shared_kib: int
    shared_block_kib: int
    l2_mib: int
    clock_ghz: float
    memory_mib: int
    usable_gb: float
    bandwidth_gbs: float
    tflops: float
    interconnect_gbs: float
    pcie_gbs: float
    network_gbs: float = 0.0
    has_ecc: bool = True

    @property
    def has_bfloat16(self) -> bool:
        """Whether matrix products of bfloat16 have units of their own: from Ampere on."""
        return self.capability >= (8, 0)

    @property
    def has_fused_attention(self) -> bool:
        """Whether cuDNN's fused attention runs: from Ampere on."""
        return self.capability >= (8, 0)


GPUS = {
    "h100": Gpu(
        title="NVIDIA H100 80GB HBM3", capability=(9, 0), multiprocessors=132, fp32_units=128, threads=2048,
        shared_kib=228, shared_block_kib=227, l2_mib=50, clock_ghz=1.98, memory_mib=81559, usable_gb=80.0,
        bandwidth_gbs=3350.0, tflops=989.0, interconnect_gbs=450.0, pcie_gbs=64.0, network_gbs=50.0,
    ),
    "h200": Gpu(
        title="NVIDIA H200", capability=(9, 0), multiprocessors=132, fp32_units=128, threads=2048,
        shared_kib=228, shared_block_kib=227, l2_mib=50, clock_ghz=1.98, memory_mib=143771, usable_gb=141.0,
        bandwidth_gbs=4800.0, tflops=989.0, interconnect_gbs=450.0, pcie_gbs=64.0, network_gbs=50.0,
    ),
    "a100": Gpu(
        title="NVIDIA A100-SXM4-80GB", capability=(8, 0), multiprocessors=108, fp32_units=64, threads=2048,
        shared_kib=164, shared_block_kib=163, l2_mib=40, clock_ghz=1.41, memory_mib=81920, usable_gb=80.0,
        bandwidth_gbs=2039.0, tflops=312.0, interconnect_gbs=300.0, pcie_gbs=32.0, network_gbs=25.0,
    ),
    "b200": Gpu(
        title="NVIDIA B200", capability=(10, 0), multiprocessors=148, fp32_units=128, threads=2048,
        shared_kib=228, shared_block_kib=227, l2_mib=126, clock_ghz=1.965, memory_mib=183359, usable_gb=180.0,
        bandwidth_gbs=7700.0, tflops=2250.0, interconnect_gbs=900.0, pcie_gbs=64.0, network_gbs=50.0,
    ),
    "l4": Gpu(
        title="NVIDIA L4", capability=(8, 9), multiprocessors=58, fp32_units=128, threads=1536,
        shared_kib=100, shared_block_kib=99, l2_mib=48, clock_ghz=2.04, memory_mib=23034, usable_gb=22.7,
        bandwidth_gbs=300.0, tflops=121.0, interconnect_gbs=32.0, pcie_gbs=32.0,
    ),
    "rtx4090": Gpu(
        title="NVIDIA GeForce RTX 4090", capability=(8, 9), multiprocessors=128, fp32_units=128, threads=1536,
        shared_kib=100, shared_block_kib=99, l2_mib=72, clock_ghz=2.52, memory_mib=24564, usable_gb=24.2,
        bandwidth_gbs=1008.0, tflops=165.0, interconnect_gbs=32.0, pcie_gbs=32.0, has_ecc=False,
    ),
    "t4": Gpu(
        title="Tesla T4", capability=(7, 5), multiprocessors=40, fp32_units=64, threads=1024,
        shared_kib=64, shared_block_kib=64, l2_mib=4, clock_ghz=1.59, memory_mib=15360, usable_gb=15.1,
        bandwidth_gbs=320.0, tflops=65.0, interconnect_gbs=16.0, pcie_gbs=16.0,
    ),
}  # fmt: skip

_MOST_ON_A_HOST = 8
_MOST_HOSTS = 128


def shape_of(name: str) -> tuple[int, int]:
    """(hosts, cards on each) of "h100:8" or "h100:2x8".

    Raises:
      InputError: a shape that no such host has, or several hosts of cards without a network rate.
    """
    kind, _, shape = name.partition(":")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    hosts, cards = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not (1 <= hosts <= _MOST_HOSTS and 1 <= cards <= _MOST_ON_A_HOST):
        raise InputError(
            f"config.plan.topology={name!r} must be {kind}:N with N from 1 to {_MOST_ON_A_HOST} cards of one host, or "
            f"{kind}:HxN on H hosts, H to {_MOST_HOSTS}"
        )
    if hosts > 1 and not GPUS[kind].network_gbs:
        several = ", ".join(k for k, gpu in GPUS.items() if gpu.network_gbs)
        one_host = f"{kind}:1 to {kind}:{_MOST_ON_A_HOST}"
        raise InputError(f"config.plan.topology={name!r}: choices: {one_host}, or several hosts of {several}")
    return hosts, cards


def target_config(gpu: Gpu) -> str:
    """The card as XLA's text proto. What all CUDA cards share (warps, grid limits, registers) is written out here."""
    major, minor = gpu.capability
    feature = "a" if major >= 9 else ""  # instructions of that architecture alone, like Hopper's wgmma
    extension = " feature_extension: ACCELERATED_FEATURES" if feature else ""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": gpu.shared_kib * 2**10,
        "shared_memory_per_block_optin": gpu.shared_block_kib * 2**10,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.fp32_units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(gpu.bandwidth_gbs * 1e9),
        "pcie_bandwidth": int(gpu.pcie_gbs * 1e9),
        "l2_cache_size": gpu.l2_mib * 2**20,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_mib * 2**20,
        "device_address_bits": 64,
        "ecc_enabled": gpu.has_ecc,
        "device_vendor": "NVIDIA Corporation",
        "name": gpu.title,
        "platform_version": f"Compute Capability {major}.{minor}{feature}",
        "driver_version": _CUDA,
        "runtime_version": _CUDA,
        "compile_time_toolkit_version": _CUDA,
        "dnn_version": ".".join(map(str, _CUDNN)),
    }
    lines = [f"  {field}: {_scalar(value)}" for field, value in device.items()]
    dnn = " ".join(f"{part}: {n}" for part, n in zip(("major", "minor", "patch"), _CUDNN, strict=True))
    return "\n".join(
        [
            "gpu_device_info {",
            f"  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {dnn} }}",
            f'device_description_str: "{gpu.title}"',
            "",
        ]
    )


def _scalar(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
