"""The paper's run of Qwen2.5-VL-3B-Instruct (Tables A.IV and A.V): ViGOS on Vision-SR1-47K, one epoch.

    python -m vigos_jax.main --config configs/qwen2_5_vl_3b.py

Batch 32, AdamW 5e-6 without warm-up and linearly down to 0, LoRA of rank 64, 47,628 rows in 1,488 steps. The paper
reports, base to ViGOS: mean Avg@5 over eight benchmarks 27.91 to 41.35 (Pass@5 60.86 to 71.97), ViLP-F Score 59.50 to
70.17, and PALR of reasoning and answer 6.33 % where OPSD has 17.26 %. This repository has not run it.
`--mode plan` says what it takes.
"""

from ml_collections import ConfigDict

from configs import base, paper


def get_config() -> ConfigDict:
    return of_the_paper("Qwen/Qwen2.5-VL-3B-Instruct")


def of_the_paper(model: str) -> ConfigDict:
    """The paper's settings for a model of the hub."""
    config = paper.get_config()
    config.model.path = model
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.source = "LMMs-Lab-Turtle/Vision-SR1-47K"
    config.data.window = 8  # not the paper's: batches of similar sizes, for less padding
    config.steps = 1488  # one epoch
    config.batch_size = 32
    config.gradient_accumulation_steps = 4
    config.checkpoint_every = 100
    config.report.rows, config.report.every = 8, 100

    config.lora.rank = 64
    config.lora.alpha = 128.0
    config.lora.dropout = 0.05

    config.optimizer.learning_rate = 5e-6
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.max_grad_norm = 0.1

    config.sampling.max_tokens = 4096
    config.sampling.temperature = 1.1
    config.sampling.top_p = 0.95
    config.sampling.top_k = 20

    config.eval.tasks = tuple(name for name in config.eval.sources if not name.startswith("demo"))
    config.eval.max_tokens = 4096  # the rest of Table A.V is configs/base.py's

    # An image of 0.8 megapixels, a question, and an answer of the length that trained models give.
    config.plan.patches, config.plan.prompt, config.plan.completion = 4096, 1280, 1024

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.buckets.prompt = base.sizes(64, 32768)
    config.buckets.completion = base.sizes(64, 4096)
    return config
