"""What the fields of a config may be: bounds of numbers, choices of names. `config.validate` applies them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number may be: from `least`, or above `above`, and up to `most`; None for no bound."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        is_low = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        return not is_low and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        low = f"at least {self.least}" if self.least is not None else f"above {self.above}"
        return low if self.most is None else f"{low} and at most {self.most}"


_NOT_NEGATIVE, _AT_LEAST_1 = Range(least=0), Range(least=1)
_SEED, _FRACTION = Range(least=0, most=2**31 - 1), Range(least=0, most=1)
# A field's type is that of its default in configs/base.py.
TYPES = {bool: "True or False", int: "a whole number", float: "a finite number"}
TYPES |= {str: "a text", tuple: "a list, like (1, 2)"}
# Numbers that have bounds; the mesh's sizes are checked against its devices. In the order of configs/base.py.
RANGES = {
    "seed": _SEED,
    "steps": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "checkpoint_every": _AT_LEAST_1,
    "keep_checkpoints": _AT_LEAST_1,
    "eval_every": _NOT_NEGATIVE,
    "log_every": _AT_LEAST_1,
    "report.rows": _NOT_NEGATIVE,
    "report.every": _AT_LEAST_1,
    "lora.rank": _NOT_NEGATIVE,
    "lora.alpha": _NOT_NEGATIVE,
    "lora.dropout": Range(least=0, most=0.999),
    "data.workers": _NOT_NEGATIVE,
    "data.window": _AT_LEAST_1,
    "data.max_pixels": _NOT_NEGATIVE,
    "data.min_pixels": _NOT_NEGATIVE,
    "data.max_images": _AT_LEAST_1,
    "data.max_bad_fraction": _FRACTION,
    "teacher.ema_rate": _FRACTION,
    "sampling.max_tokens": _AT_LEAST_1,
    "sampling.temperature": _NOT_NEGATIVE,
    "sampling.top_k": _NOT_NEGATIVE,
    "sampling.top_p": Range(above=0, most=1),
    "sampling.min_p": _FRACTION,
    "sampling.repetition_penalty": Range(above=0),
    "sampling.micro_batch": _NOT_NEGATIVE,
    "sampling.decode_batch": _NOT_NEGATIVE,
    "rollout.concurrency": _AT_LEAST_1,
    "rollout.timeout": Range(least=0.1),
    "rollout.retries": _NOT_NEGATIVE,
    "rollout.max_staleness": _NOT_NEGATIVE,
    "rollout.sync_every": _AT_LEAST_1,
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.b1": Range(least=0, most=0.999999),
    "optimizer.b2": Range(least=0, most=0.999999),
    "optimizer.eps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.max_grad_norm": Range(above=0),
    "loss.temperature": Range(least=1e-6),
    "loss.chunk": _AT_LEAST_1,
    "guards.max_skipped": _AT_LEAST_1,
    "guards.window": _AT_LEAST_1,
    "guards.sampler_gap": _NOT_NEGATIVE,
    "demo_eval.questions": _NOT_NEGATIVE,
    "demo_eval.batch_size": _AT_LEAST_1,
    "demo_eval.seed": _SEED,
    "eval.limit": _NOT_NEGATIVE,
    "eval.samples": _AT_LEAST_1,
    "eval.temperature": _NOT_NEGATIVE,
    "eval.top_p": Range(above=0, most=1),
    "eval.top_k": _NOT_NEGATIVE,
    "eval.max_tokens": _AT_LEAST_1,
    "eval.seed": _SEED,
    "eval.demo_questions": _AT_LEAST_1,
    "eval.batch_size": _AT_LEAST_1,
    "eval.judge.batch": _AT_LEAST_1,
    "eval.judge.concurrency": _AT_LEAST_1,
    "eval.judge.timeout": Range(least=0.1),
    "eval.judge.retries": _NOT_NEGATIVE,
    "score.batch_size": _AT_LEAST_1,
    "diagnose.rows": Range(least=2),
    "diagnose.wrong_answers": _AT_LEAST_1,
    "diagnose.batch_size": _AT_LEAST_1,
    "diagnose.seed": _SEED,
    "preview.rows": _AT_LEAST_1,
    "preview.shown": _NOT_NEGATIVE,
    "export.step": _NOT_NEGATIVE,
    "export.max_shard_gb": Range(above=0),
    "plan.memory_gb": _NOT_NEGATIVE,
    "plan.tflops": _NOT_NEGATIVE,
    "plan.bandwidth_gbs": _NOT_NEGATIVE,
    "plan.interconnect_gbs": _NOT_NEGATIVE,
    "plan.patches": _AT_LEAST_1,
    "plan.prompt": _AT_LEAST_1,
    "plan.completion": _AT_LEAST_1,
    "plan.effort": Range(least=-1, most=1),
}
CHOICES = {
    "distributed": ("off", "auto", "env"),
    "model.dtype": ("float32", "bfloat16"),
    "model.quantization": ("none", "int8", "nf4"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "lora.scope": ("language", "official"),
    "span_rule": ("paper", "released"),
    "teacher.weights": ("frozen", "ema", "live"),
    "loss.reduction": ("tokens", "sequences"),
    "optimizer.schedule": ("constant", "linear"),
    "rollout.engine": ("native", "vllm", "sglang"),
    "eval.engine": ("native", "rollout"),
    "eval.prompt": ("structured", "plain"),
    "eval.judge.mode": ("off", "on_failure", "always"),
    "export.kind": ("merged", "adapter"),
    "export.dtype": ("float32", "bfloat16"),
}
