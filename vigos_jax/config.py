"""Checks of a config before anything is loaded, and its JSON form in a workdir. The fields are in configs/base.py."""

import functools
import json
import pathlib
import re
import runpy
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vigos_jax.config_limits import CHOICES, RANGES, TYPES
from vigos_jax.demo.world import WORLDS
from vigos_jax.errors import InputError
from vigos_jax.runtime.files import unique_keys
from vigos_jax.runtime.hub import REPOSITORY
from vigos_jax.runtime.paths import absolute, absolute_if_local, same_place

DEFAULTS_FILE = pathlib.Path(__file__).resolve().parents[1] / "configs" / "base.py"


_PATHS = (  # texts in which ~ is a home; or names on the hub
    *("compilation_cache", "model.path", "model.adapter", "data.source", "data.image_folder", "score.rollouts"),
    *("score.output", "diagnose.rollouts", "diagnose.wrong_answers_file", "diagnose.output", "eval.output"),
    *("preview.output", "generate.image", "export.output", "plan.output", "plan.programs", "rollout.adapter_dir"),
)
_MAY_BE_NAMES = ("model.path", "data.source", "eval.sources.")  # of the hub, or of a demo
# Sections that are handed on whole, so that a field too many would be an argument too many.
_NO_OTHERS = ("sampling", "optimizer", "buckets", "mesh", "data.columns")
TEMPLATE_SWITCHES = "model.chat_template_kwargs"  # the one section to which a command line may add fields
_NAMED_BY_USERS = ("prompts.", "roles.", "eval.sources.", f"{TEMPLATE_SWITCHES}.")
# What this program itself tells a chat template.
_TEMPLATE_ARGUMENTS = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)
# Names of earlier versions.
RENAMED = {"accumulation": "gradient_accumulation_steps", "evaluate": "demo_eval"}
_PROMPT_FIELDS = ("user", "assistant_prefill")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# Sections that say what to do with a run, or where; a change in them does not make it a different run.
_MODE_SECTIONS = (
    *("eval", "eval_every", "score", "diagnose", "preview", "generate", "export", "guards", "plan", "rollout"),
    *("compilation_cache", "mesh", "distributed", "report", "log"),
)
# Of `rollout`, only the staleness fields define the run; the others say what samples, and where.
# The values are those of runs saved by versions without these fields.
_OF_THE_RUN = {"rollout.sync_every": 1, "rollout.max_staleness": 0}


# Likewise for fields of roles that earlier versions did not have.
_OF_ROLES = {"image": "original", "image_column": "", "image_margin": 0.0, "image_pixels": 0}
_OF_ROLES |= {"token_weights": "uniform", "token_top_k": 0, "model": ""}


def get(config: ConfigDict, field: str) -> Any:
    """The value of a dotted field; KeyError if it, or a section on the way, is not there."""
    for part in field.split("."):
        if not hasattr(config, "items"):
            raise KeyError(field)
        config = config[part]
    return config


def default_config() -> ConfigDict:
    """The config of configs/base.py beside this package, even if the working directory has its own `configs`."""
    return runpy.run_path(str(DEFAULTS_FILE))["get_config"]()


@functools.cache
def _defaults() -> dict[str, Any]:
    """Every field of configs/base.py that it names itself, with its default."""
    return {f: v for f, v in flatten(default_config().to_dict()) if not f.startswith(_NAMED_BY_USERS)}


def _section(config: ConfigDict, field: str) -> ConfigDict:
    value = get(config, field)
    if not hasattr(value, "items"):
        raise InputError(f"config.{field}={value!r} must be a table")
    return value


def validate(config: ConfigDict) -> None:
    """Raises InputError for the first field that is missing, of a wrong type, out of range or not among its choices.

    What other modules check (roles, mesh) has the right types afterwards.
    """
    try:
        for check in (_check_renamed, _check_fields, _check_sections, _check_buckets, _check_prompts, _check_guards):
            check(config)
        _check_eval(config)
        _check_rollout(config)
        _check_data(config)
        _check_template(config)
    except (KeyError, AttributeError) as e:
        raise InputError(
            f"the config lacks a field that configs/base.py has, and it needs: {e}".replace("\n", " ")
        ) from e


def renamed(field: str) -> str | None:
    """Today's name of a field that has an earlier version's name, else None."""
    for old, new in RENAMED.items():
        if field == old or field.startswith(f"{old}."):
            return new + field.removeprefix(old)
    return None


def _check_renamed(config: ConfigDict) -> None:
    for old, new in RENAMED.items():
        if old in config:
            raise InputError(f"config.{old} is now config.{new}")


def _check_fields(config: ConfigDict) -> None:
    for field, default in _defaults().items():
        _check_type(field, get(config, field), default)
    for field, allowed in RANGES.items():
        if get(config, field) not in allowed:
            raise InputError(f"config.{field}={get(config, field)!r} must be {allowed}")
    for field, choices in CHOICES.items():
        if get(config, field) not in choices:
            raise InputError(f"config.{field}={get(config, field)!r} is unknown; choices: {', '.join(choices)}")
    for field in _PATHS:
        _check_home(field, get(config, field))
    for field, model in _models_of_roles(config).items():
        _check_home(field, model)


def _check_sections(config: ConfigDict) -> None:
    for section in _NO_OTHERS:
        known = [f.removeprefix(f"{section}.") for f in _defaults() if f.startswith(f"{section}.")]
        if strangers := [str(name) for name in _section(config, section) if name not in known]:
            raise InputError(f"config.{section} has no field {strangers[0]!r}; choices: {', '.join(known)}")


def _check_eval(config: ConfigDict) -> None:
    e, push_to = config["eval"], get(config, "export.push_to")
    if not _VARIABLE.fullmatch(e["judge"]["key_env"]):  # not shown: it may be the key itself
        raise InputError("config.eval.judge.key_env must be the name of an environment variable, like JUDGE_KEY")
    if "{problem}" not in e["plain_prompt"]:
        raise InputError(f"config.eval.plain_prompt={e['plain_prompt']!r} must be a text with {{problem}}")
    if push_to and not REPOSITORY.fullmatch(push_to):
        raise InputError(f"config.export.push_to={push_to!r} must be owner/name on the hub, or empty")
    if not all(isinstance(task, str) for task in e["tasks"]):
        raise InputError(f"config.eval.tasks={e['tasks']!r} must be names, like ('vilp_f', 'cv_bench')")
    for task, source in _section(config, "eval.sources").items():
        _check_type(f"eval.sources.{task}", source, "")
        _check_home(f"eval.sources.{task}", source)


def _check_rollout(config: ConfigDict) -> None:
    r = config["rollout"]
    if r["key_env"] and not _VARIABLE.fullmatch(r["key_env"]):  # not shown: it may be the key itself
        raise InputError("config.rollout.key_env must be the name of an environment variable, like VLLM_KEY")
    if not all(isinstance(url, str) for url in r["urls"]):
        raise InputError(f"config.rollout.urls={r['urls']!r} must be addresses, like ('http://localhost:8000',)")
    if r["engine"] == "native" and (r["sync_every"], r["max_staleness"]) != (1, 0):
        raise InputError(
            f"config.rollout.sync_every={r['sync_every']} and .max_staleness={r['max_staleness']} must be 1 and 0 for "
            "config.rollout.engine=native: it samples with the run's own weights, on the run's own devices"
        )
    if r["sync_every"] > r["max_staleness"] + 1:
        raise InputError(
            f"config.rollout.sync_every={r['sync_every']} must be at most config.rollout.max_staleness + 1 = "
            f"{r['max_staleness'] + 1}: rollouts would lag behind by {r['sync_every'] - 1} steps"
        )


def _check_data(config: ConfigDict) -> None:
    least, most = get(config, "data.min_pixels"), get(config, "data.max_pixels")
    if most and least > most:
        raise InputError(f"config.data.min_pixels={least} must be at most config.data.max_pixels={most}")
    fields, template = get(config, "data.fields"), get(config, "data.options_template")
    if template and "{option}" not in template:
        raise InputError(
            f"config.data.options_template={template!r} must have {{option}}, like '{{letter}}. {{option}}'"
        )
    for name in fields:
        if not isinstance(name, str) or not name.isidentifier() or name in ("problem", "reference"):
            raise InputError(f"config.data.fields={fields!r} must be names of further columns, like ('caption',)")


def _check_template(config: ConfigDict) -> None:
    section = TEMPLATE_SWITCHES
    for name, value in _section(config, section).items():
        if not isinstance(name, str) or not name.isidentifier() or name in _TEMPLATE_ARGUMENTS:
            raise InputError(f"config.{section} has the field {name!r}; it must be a variable of the chat template")
        is_number = isinstance(value, int | float) and abs(value) < 1e300  # not for NaN
        # To a template every text but the empty one is true, "false" too.
        is_text = isinstance(value, str) and value.lower() not in ("true", "false")
        if not (is_number or is_text):
            raise InputError(f"config.{section}.{name}={value!r} must be True, False, a number or a text")


def _check_type(field: str, value: Any, default: Any) -> None:
    """A field has the type of its default; a whole number will do where the default is a fraction."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not for NaN
    is_good = {
        bool: isinstance(value, bool),
        int: is_number and isinstance(value, int),
        float: is_number,
        str: isinstance(value, str),
        tuple: isinstance(value, list | tuple),
    }[type(default)]
    if not is_good:
        raise InputError(f"config.{field}={value!r} must be {TYPES[type(default)]}")


def _check_home(field: str, value: str) -> None:
    try:
        pathlib.Path(value).expanduser()
    except RuntimeError as e:
        raise InputError(
            f"config.{field}={value!r} begins with the home of a user that does not exist; write the path instead of ~"
        ) from e


def _check_buckets(config: ConfigDict) -> None:
    for kind, sizes in _section(config, "buckets").items():
        is_list = isinstance(sizes, list | tuple) and bool(sizes) and all(type(s) is int and s > 0 for s in sizes)
        if not is_list or list(sizes) != sorted(set(sizes)):
            raise InputError(f"config.buckets.{kind}={sizes!r} must be ascending positive integers")
    tokens, largest = get(config, "sampling.max_tokens"), max(get(config, "buckets.completion"))
    if tokens > largest:
        raise InputError(
            f"config.sampling.max_tokens={tokens} must be at most the largest config.buckets.completion, {largest}"
        )


def guarded(guards: ConfigDict) -> list[str]:
    """The metrics that `config.guards` bounds: its fields that are a lowest and a highest value."""
    return [name for name, bounds in guards.items() if isinstance(bounds, list | tuple)]


def _check_guards(config: ConfigDict) -> None:
    for name in guarded(config["guards"]):
        low_high = config["guards"][name]
        numbers = [x for x in low_high if type(x) in (int, float)]
        if len(numbers) != 2 or len(low_high) != 2 or not numbers[0] <= numbers[1]:
            raise InputError(f"config.guards.{name}={low_high!r} must be a lowest and a highest value, like (0.2, 1.0)")


def _check_prompts(config: ConfigDict) -> None:
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


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy with absolute paths (~ is kept), so that a saved config can be used from any folder."""
    copy = ConfigDict(config.to_dict())
    models = _models_of_roles(copy)
    for field in (*_PATHS, *(f"eval.sources.{task}" for task in get(copy, "eval.sources")), *models):
        section, _, name = field.rpartition(".")
        holder = get(copy, section) if section else copy
        value = holder[name]
        if value not in ("", *WORLDS) and not value.startswith("~"):
            may_be_name = field.startswith(_MAY_BE_NAMES) or field in models
            holder[name] = absolute_if_local(value) if may_be_name else absolute(value)
    return copy


def _models_of_roles(config: ConfigDict) -> dict[str, str]:
    """The models that roles name: {field: path}. A config of other tables, or of none, names no model."""
    roles = config.get("roles")
    tables = roles.items() if hasattr(roles, "items") else ()
    entries = {name: entry for name, entry in tables if hasattr(entry, "items")}
    models = {f"roles.{name}.model": entry.get("model", "") for name, entry in entries.items()}
    return {field: model for field, model in models.items() if isinstance(model, str)}


def to_json(config: ConfigDict) -> str:
    """The config as JSON."""
    return json.dumps(config.to_dict(), indent=2, default=list)


def read_json(path: pathlib.Path) -> ConfigDict:
    """The config a run wrote into its workdir."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}")
        return ConfigDict(raw)
    except OSError as e:
        raise InputError(
            f"cannot read {path}: {e.strerror}; --workdir must be that of a run, which holds its config.json"
        ) from e
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{path} must hold a run's config: {e}") from e


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What makes two configs different runs, as "field: old -> new" lines."""
    a, b = (_OF_THE_RUN | _of_roles(c) | dict(flatten(json.loads(to_json(c)))) for c in (old, new))
    fields = [f for f in sorted(a.keys() | b.keys()) if f.split(".")[0] not in _MODE_SECTIONS or f in _OF_THE_RUN]
    # By value and by text: 1 is 1.0, and a nan in the file equals itself.
    differ = [f for f in fields if a.get(f) != b.get(f) and repr(a.get(f)) != repr(b.get(f))]
    paths = (*_PATHS, *_models_of_roles(old), *_models_of_roles(new))
    differ = [f for f in differ if f not in paths or not same_place(str(a.get(f)), str(b.get(f)))]
    return [f"{f}: {a.get(f)!r} -> {b.get(f)!r}" for f in differ]


def _of_roles(config: ConfigDict) -> dict[str, Any]:
    roles = config.get("roles") or {}
    return {f"roles.{role}.{name}": value for role in roles for name, value in _OF_ROLES.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of all leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
