"""ViGOS of Qwen2.5-VL-3B-Instruct on one card of 12 GB, as an RTX 3060 or 4070: an nf4 base under the adapter.

    python -m vigos_jax.main --config configs/one_device_qwen2_5_vl_3b_12gb.py

The paper's settings but for the base, the adapter's rank, and images, prompts and completions that are shorter. The
decoder's projections take 1.5 GB instead of 5.5, and everything else stays in bfloat16. `quantization = "int8"` takes
2.8 GB and decodes faster; see docs/one_device.md. Not evaluated.

| `--mode plan`, GB at the peak of | encode | prefill | decode | gradient | of | a step, s at least |
|---|---|---|---|---|---|---|
| rtx4090:1, which computes faster | 5.0 | 6.7 | 7.7 | 5.5 | 12 | 16 |
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import of_the_paper


def get_config() -> ConfigDict:
    return on_one_device("Qwen/Qwen2.5-VL-3B-Instruct", quantization="nf4", memory_gb=12.0, topology="rtx4090:1")


def on_one_device(model: str, *, quantization: str, topology: str, memory_gb: float = 0.0) -> ConfigDict:
    """The paper's settings, sized for one small device.

    Args:
      topology: that `--mode plan` compiles for.
      memory_gb: of the planned device; 0 for what is known of the topology.
    """
    config = of_the_paper(model)
    config.model.quantization = quantization
    config.lora.rank, config.lora.alpha = 16, 32.0

    config.gradient_accumulation_steps = 32  # one row at a time
    config.data.max_pixels = 401_408  # 512 visual tokens
    config.sampling.max_tokens = 1024
    config.eval.max_tokens = 1024
    config.loss.chunk = 32

    config.mesh.fsdp = 1
    config.plan.topology, config.plan.memory_gb = topology, memory_gb
    config.plan.patches, config.plan.prompt, config.plan.completion = 2048, 768, 512
    return config
