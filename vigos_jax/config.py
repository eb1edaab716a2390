"""Checks of a config before anything is loaded, and its JSON form in a workdir. The fields are in configs/base.py."""

import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from vigos_jax.errors import InputError
from vigos_jax.health import GUARDED

# (field, smallest, largest or None). What other rooms check for themselves (roles, sampling, mesh) is not here.
_RANGES = (
    ("seed", 0, 2**31 - 1),
    ("steps", 1, None),
    ("batch_size", 1, None),
    ("accumulation", 1, None),
    ("checkpoint_every", 1, None),
    ("keep_checkpoints", 1, None),
    ("log_every", 1, None),
    ("eval_every", 0, None),
    ("report.rows", 0, None),
    ("report.every", 1, None),
    ("lora.rank", 0, None),
    ("lora.alpha", 0, None),
    ("lora.dropout", 0, 0.999),
    ("data.workers", 0, None),
    ("data.window", 1, None),
    ("data.max_images", 1, None),
    ("data.max_bad_fraction", 0, 1),
    ("optimizer.learning_rate", 0, None),
    ("optimizer.warmup_steps", 0, None),
    ("optimizer.b1", 0, 0.999999),
    ("optimizer.b2", 0, 0.999999),
    ("optimizer.eps", 0, None),
    ("optimizer.weight_decay", 0, None),
    ("optimizer.max_grad_norm", 1e-12, None),
    ("teacher.ema_rate", 0, 1),
    ("loss.temperature", 1e-6, None),
    ("loss.chunk", 1, None),
    ("evaluate.questions", 0, None),
    ("evaluate.batch_size", 1, None),
    ("evaluate.seed", 0, 2**31 - 1),
    ("eval.limit", 0, None),
    ("eval.samples", 1, None),
    ("eval.max_tokens", 1, None),
    ("eval.seed", 0, 2**31 - 1),
    ("eval.demo_questions", 1, None),
    ("eval.batch_size", 1, None),
    ("eval.judge.batch", 1, None),
    ("eval.judge.concurrency", 1, None),
    ("eval.judge.timeout", 0.1, None),
    ("eval.judge.retries", 0, None),
    ("score.batch_size", 1, None),
    ("diagnose.rows", 2, None),
    ("diagnose.wrong_answers", 1, None),
    ("diagnose.batch_size", 1, None),
    ("diagnose.seed", 0, 2**31 - 1),
    ("guards.max_skipped", 1, None),
    ("guards.window", 1, None),
    ("export.step", 0, None),
    ("export.max_shard_gb", 1e-9, None),
)
CHOICES = {
    "distributed": ("off", "auto", "env"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "lora.scope": ("language", "official"),
    "span_rule": ("paper", "released"),
    "teacher.weights": ("frozen", "ema", "live"),
    "loss.reduction": ("tokens", "sequences"),
    "optimizer.schedule": ("constant", "linear"),
    "eval.prompt": ("structured", "plain"),
    "eval.judge.mode": ("off", "on_failure", "always"),
    "export.kind": ("merged", "adapter"),
    "export.dtype": ("float32", "bfloat16"),
}
_PROMPT_FIELDS = ("user", "assistant_prefill")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# They say what to do with a run, or where, not what the run is.
_MODE_SECTIONS = (
    *("eval", "eval_every", "score", "diagnose", "generate", "export", "guards"),
    *("compilation_cache", "mesh", "distributed", "report", "log"),
)


def get(config: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field."""
    for part in field.split("."):
        config = config[part]
    return config


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for the first field that is missing, out of range or not among its choices."""
    try:
        for field, low, high in _RANGES:
            value = get(config, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"config.{field}={value!r} must be a finite number")
            if value < low or (high is not None and value > high):
                bound = f"at least {low}" if high is None else f"from {low} to {high}"
                raise InputError(f"config.{field}={value!r} must be {bound}")
        for field, choices in CHOICES.items():
            if get(config, field) not in choices:
                raise InputError(f"config.{field}={get(config, field)!r} is unknown; choices: {', '.join(choices)}")
        for kind, sizes in config.buckets.items():
            if not sizes or list(sizes) != sorted(set(sizes)) or not all(isinstance(s, int) and s > 0 for s in sizes):
                raise InputError(f"config.buckets.{kind}={sizes!r} must be ascending positive integers")
        if config.sampling.max_tokens > max(config.buckets.completion):
            raise InputError(
                f"config.sampling.max_tokens={config.sampling.max_tokens} must be at most the largest "
                f"config.buckets.completion, {max(config.buckets.completion)}"
            )
        for name in GUARDED:
            low_high = config.guards[name]
            numbers = [x for x in low_high if isinstance(x, int | float)] if hasattr(low_high, "__len__") else []
            if len(numbers) != 2 or len(low_high) != 2 or not numbers[0] <= numbers[1]:
                raise InputError(f"config.guards.{name}={low_high!r} must be a lowest and a highest value: (0.2, 1.0)")
        if not isinstance(config.eval.plain_prompt, str) or "{problem}" not in config.eval.plain_prompt:
            raise InputError(f"config.eval.plain_prompt={config.eval.plain_prompt!r} must be a text with {{problem}}")
        for name, entry in config.prompts.items():
            if set(entry) != set(_PROMPT_FIELDS):
                fields = ", ".join(entry) or "none"
                raise InputError(f"config.prompts.{name} has the fields {fields}; it needs user and assistant_prefill")
            for field in _PROMPT_FIELDS:
                if not isinstance(entry[field], str):
                    raise InputError(f"config.prompts.{name}.{field}={entry[field]!r} must be a text")
        if not isinstance(config.log.wandb, str) or not isinstance(config.log.tensorboard, bool):
            values = f"tensorboard={config.log.tensorboard!r}, wandb={config.log.wandb!r}"
            raise InputError(f"config.log with {values} must be True or False, and the name of a project or ''")
        push_to = config.export.push_to
        if not isinstance(push_to, str) or (push_to and not _REPOSITORY.fullmatch(push_to)):
            raise InputError(f"config.export.push_to={push_to!r} must be owner/name on the hub, or empty")
        for name in config.data.fields:
            if not isinstance(name, str) or not name.isidentifier() or name in ("problem", "reference"):
                fields = tuple(config.data.fields)
                raise InputError(f"config.data.fields={fields!r} must be names of further columns, like ('caption',)")
        if "student" not in config.prompts or "{reference}" in config.prompts.student.user:
            raise InputError("config.prompts.student must exist, and must not show {reference} to the student")
    except (KeyError, AttributeError) as e:
        raise InputError(f"the config lacks a field that configs/base.py has: {e}".replace("\n", " ")) from e


def to_json(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list)


def read_json(path: pathlib.Path) -> ml_collections.ConfigDict:
    """The config a run wrote into its workdir."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}")
        return ml_collections.ConfigDict(raw)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; a run's workdir holds its config.json") from e
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} is not a run's config: {e}") from e


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; two roles of one name would silently become the second."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return dict(pairs)


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """What makes two configs different runs, as "field: old -> new" lines."""
    a, b = (dict(flatten(json.loads(to_json(c)))) for c in (old, new))
    fields = [f for f in sorted(a.keys() | b.keys()) if f.split(".")[0] not in _MODE_SECTIONS]
    return [f"{f}: {a.get(f)!r} -> {b.get(f)!r}" for f in fields if a.get(f) != b.get(f)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of all leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
