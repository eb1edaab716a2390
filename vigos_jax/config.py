"""Checks of a config before anything is loaded, and its JSON form in a workdir. The fields are in configs/base.py."""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from vigos_jax.errors import InputError

# (field, smallest, largest or None).
_WHOLE = (
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
    ("data.workers", 0, None),
    ("data.window", 1, None),
    ("data.max_images", 1, None),
    ("optimizer.warmup_steps", 0, None),
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
    ("eval.judge.retries", 0, None),
    ("score.batch_size", 1, None),
    ("diagnose.rows", 2, None),
    ("diagnose.wrong_answers", 1, None),
    ("diagnose.batch_size", 1, None),
    ("diagnose.seed", 0, 2**31 - 1),
    ("guards.max_skipped", 1, None),
    ("guards.window", 1, None),
    ("export.step", 0, None),
    ("plan.patches", 1, None),
    ("plan.prompt", 1, None),
    ("plan.completion", 1, None),
    ("sampling.max_tokens", 1, None),
    ("sampling.top_k", 0, None),
    ("eval.top_k", 0, None),
)
_REAL = (
    ("lora.alpha", 0, None),
    ("lora.dropout", 0, 0.999),
    ("data.max_bad_fraction", 0, 1),
    ("optimizer.learning_rate", 0, None),
    ("optimizer.b1", 0, 0.999999),
    ("optimizer.b2", 0, 0.999999),
    ("optimizer.eps", 0, None),
    ("optimizer.weight_decay", 0, None),
    ("optimizer.max_grad_norm", 1e-12, None),
    ("teacher.ema_rate", 0, 1),
    ("loss.temperature", 1e-6, None),
    ("eval.judge.timeout", 0.1, None),
    ("export.max_shard_gb", 1e-9, None),
    ("plan.memory_gb", 0, None),
    ("plan.tflops", 0, None),
    ("plan.bandwidth_gbs", 0, None),
    ("plan.interconnect_gbs", 0, None),
    ("plan.effort", -1, 1),
    ("sampling.temperature", 0, None),
    ("sampling.top_p", 1e-9, 1),
    ("sampling.min_p", 0, 1),
    ("sampling.repetition_penalty", 1e-9, None),
    ("sampling.presence_penalty", -1e6, 1e6),
    ("eval.temperature", 0, None),
    ("eval.top_p", 1e-9, 1),
)
# Numbers whose ranges the mesh knows: here they only have to be numbers.
_WHOLE_ELSEWHERE = ("mesh.data", "mesh.fsdp", "mesh.tensor")
_FLAGS = (
    *("data.shuffle", "data.blank_images", "export.check", "export.after_training", "guards.stop", "plan.advise"),
    "log.tensorboard",
)
_PATHS = (  # or names on the hub
    *("compilation_cache", "model.path", "model.adapter", "data.source", "score.rollouts", "score.output"),
    *("diagnose.rollouts", "diagnose.wrong_answers_file", "diagnose.output", "eval.output", "generate.image"),
    *("export.output", "plan.output", "plan.programs"),
)
_TEXTS = (
    *(*_PATHS, "data.split", "eval.plain_prompt", "eval.judge.url", "eval.judge.model", "eval.judge.key_env"),
    *("generate.question", "export.push_to", "plan.topology", "log.wandb"),
)
_NO_OTHERS = {  # sections that are handed on whole, so that a field too many would be an argument too many
    "sampling": ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    "optimizer": ("learning_rate", "schedule", "warmup_steps", "b1", "b2", "eps", "weight_decay", "max_grad_norm"),
    "buckets": ("patches", "prompt", "completion", "sequence"),
    "mesh": ("data", "fsdp", "tensor", "rules"),
}
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
GUARDED = ("valid_rate", "completion_tokens", "entropy")  # metrics that config.guards can bound
_PROMPT_FIELDS = ("user", "assistant_prefill")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# They say what to do with a run, or where, not what the run is.
_MODE_SECTIONS = (
    *("eval", "eval_every", "score", "diagnose", "generate", "export", "guards", "plan"),
    *("compilation_cache", "mesh", "distributed", "report", "log"),
)


def get(config: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field; KeyError if it, or a section on the way, is not there."""
    for part in field.split("."):
        if not hasattr(config, "items"):
            raise KeyError(field)
        config = config[part]
    return config


def _number(config: Mapping[str, Any], field: str, *, whole: bool) -> int | float:
    value = get(config, field)
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e300:  # NaN is neither above nor below
        raise InputError(f"config.{field}={value!r} must be a {'whole' if whole else 'finite'} number")
    return value


def _section(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = get(config, field)
    if not hasattr(value, "items"):
        raise InputError(f"config.{field}={value!r} must be a table")
    return value


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for the first field that is missing, of a wrong type, out of range or not among its choices.

    What other rooms check (roles, mesh) has the right types afterwards.
    """
    try:
        for table, whole in ((_WHOLE, True), (_REAL, False)):
            for field, low, high in table:
                value = _number(config, field, whole=whole)
                if value < low or (high is not None and value > high):
                    bound = f"at least {low}" if high is None else f"from {low} to {high}"
                    raise InputError(f"config.{field}={value!r} must be {bound}")
        for field in _WHOLE_ELSEWHERE:
            _number(config, field, whole=True)
        for field in _FLAGS:
            if not isinstance(get(config, field), bool):
                raise InputError(f"config.{field}={get(config, field)!r} must be True or False")
        for field in _TEXTS:
            _check_text(config, field)
        for field, choices in CHOICES.items():
            if get(config, field) not in choices:
                raise InputError(f"config.{field}={get(config, field)!r} is unknown; choices: {', '.join(choices)}")
        for section, known in _NO_OTHERS.items():
            if strangers := [str(name) for name in _section(config, section) if name not in known]:
                raise InputError(f"config.{section} has no field {strangers[0]!r}; choices: {', '.join(known)}")
        if not _VARIABLE.fullmatch(config.eval.judge.key_env):  # not shown: it may be the key itself
            raise InputError("config.eval.judge.key_env must be the name of an environment variable, like JUDGE_KEY")
        _check_buckets(config)
        _check_prompts(config)
        _check_guards(config)
        if "{problem}" not in config.eval.plain_prompt:
            raise InputError(f"config.eval.plain_prompt={config.eval.plain_prompt!r} must be a text with {{problem}}")
        if config.export.push_to and not _REPOSITORY.fullmatch(config.export.push_to):
            raise InputError(f"config.export.push_to={config.export.push_to!r} must be owner/name on the hub, or empty")
        tasks = get(config, "eval.tasks")  # one text is no list of its letters
        if not isinstance(tasks, list | tuple) or not all(isinstance(task, str) for task in tasks):
            raise InputError(f"config.eval.tasks={tasks!r} must be a list of names, like ('vilp_f', 'cv_bench')")
        for task in _section(config, "eval.sources"):
            _check_text(config, f"eval.sources.{task}")
        fields = get(config, "data.fields")
        for name in fields if isinstance(fields, list | tuple) else (None,):
            if not isinstance(name, str) or not name.isidentifier() or name in ("problem", "reference"):
                raise InputError(f"config.data.fields={fields!r} must be names of further columns, like ('caption',)")
    except (KeyError, AttributeError) as e:
        raise InputError(f"the config lacks a field that configs/base.py has: {e}".replace("\n", " ")) from e


def _check_text(config: Mapping[str, Any], field: str) -> None:
    value = get(config, field)
    if not isinstance(value, str):
        raise InputError(f"config.{field}={value!r} must be a text")
    try:
        if field in _PATHS or field.startswith("eval.sources."):
            pathlib.Path(value).expanduser()
    except RuntimeError as e:
        raise InputError(f"config.{field}={value!r} begins with the home of a user that does not exist") from e


def _check_buckets(config: Mapping[str, Any]) -> None:
    for kind, sizes in _section(config, "buckets").items():
        is_list = isinstance(sizes, list | tuple) and bool(sizes) and all(type(s) is int and s > 0 for s in sizes)
        if not is_list or list(sizes) != sorted(set(sizes)):
            raise InputError(f"config.buckets.{kind}={sizes!r} must be ascending positive integers")
    tokens, largest = get(config, "sampling.max_tokens"), max(get(config, "buckets.completion"))
    if tokens > largest:
        raise InputError(
            f"config.sampling.max_tokens={tokens} must be at most the largest config.buckets.completion, {largest}"
        )


def _check_guards(config: Mapping[str, Any]) -> None:
    for name in GUARDED:
        low_high = get(config, f"guards.{name}")
        numbers = [x for x in low_high if type(x) in (int, float)] if isinstance(low_high, list | tuple) else []
        if len(numbers) != 2 or len(low_high) != 2 or not numbers[0] <= numbers[1]:
            raise InputError(f"config.guards.{name}={low_high!r} must be a lowest and a highest value, like (0.2, 1.0)")


def _check_prompts(config: Mapping[str, Any]) -> None:
    for name, entry in _section(config, "prompts").items():
        fields = list(entry) if hasattr(entry, "items") else []
        if set(fields) != set(_PROMPT_FIELDS):
            named = ", ".join(map(str, fields)) or "none"
            raise InputError(f"config.prompts.{name} has the fields {named}; it needs user and assistant_prefill")
        for field in _PROMPT_FIELDS:
            if not isinstance(entry[field], str):
                raise InputError(f"config.prompts.{name}.{field}={entry[field]!r} must be a text")
    if "student" not in config["prompts"] or "{reference}" in config["prompts"]["student"]["user"]:
        raise InputError("config.prompts.student must exist, and must not show {reference} to the student")
    _section(config, "roles")


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON."""
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
    except (ValueError, TypeError, RecursionError) as e:
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
    # By value and by text: 1 is 1.0, and a nan that somebody wrote into the file is no difference to itself.
    differ = [f for f in fields if a.get(f) != b.get(f) and repr(a.get(f)) != repr(b.get(f))]
    return [f"{f}: {a.get(f)!r} -> {b.get(f)!r}" for f in differ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of all leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
