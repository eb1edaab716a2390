"""The fields of a config, read from the comments of configs/base.py, from config_limits.py and `TeacherRole`."""

import ast
import dataclasses
import functools
import inspect
import io
import re
import runpy
import tokenize
from typing import Any

from ml_collections import ConfigDict

from vigos_jax import config as config_lib
from vigos_jax import config_limits
from vigos_jax.data.views import KINDS
from vigos_jax.demo.world import WORLDS
from vigos_jax.explain.advice import ADVICE
from vigos_jax.method.divergences import DIVERGENCES
from vigos_jax.method.roles import CLIP_PER, CONDITIONS, ENTRY_FIELDS, READS, SPANS, TOKEN_WEIGHTS, TeacherRole

# Entries that users name stand under NAME, whatever the shipped ones are called.
NAMED = {
    "roles": ENTRY_FIELDS,
    "prompts": ("user", "assistant_prefill"),
}
_ROLE_CHOICES = {
    "scores": SPANS,
    "when": CONDITIONS,
    "divergence": tuple(DIVERGENCES),
    "clip_per": CLIP_PER,
    "reads": READS,
    "image": KINDS,
    "token_weights": TOKEN_WEIGHTS,
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config, or a section.

    Attributes:
      name: dotted, without "config."; the fields of a role or a prompt are those of "roles.NAME" and "prompts.NAME".
      meaning: what its comment says; Markdown.
      is_section: whether it holds other fields.
      default: as Python writes it; "" for a section, "required" where an entry has to say it.
      type: in words; "" for a section.
      allowed: bounds or choices, in words; "" for no further limit.
      advice: when to change it.
    """

    name: str
    meaning: str
    is_section: bool = False
    default: str = ""
    type: str = ""
    allowed: str = ""
    advice: str = ""


@functools.cache
def all_fields() -> tuple[Field, ...]:
    """Every section and field in the order of configs/base.py, a section in front of what it holds."""
    module = runpy.run_path(str(config_lib.DEFAULTS_FILE))
    comments = _comments(config_lib.DEFAULTS_FILE.read_text(encoding="utf-8"))
    out: list[Field] = []
    _walk(module["get_config"](), "", comments, out)
    signature = inspect.signature(module["role"]).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    places = {section: [f.name for f in out].index(section) + 1 for section in NAMED}
    for section in sorted(places, key=lambda s: -places[s]):
        out[places[section] : places[section]] = _named(section, defaults)
    return tuple(out)


def _walk(node: ConfigDict, prefix: str, comments: dict[str, str], out: list[Field]) -> None:
    for key in _written_order(node, prefix, comments):
        name, value = prefix + key, node[key]
        meaning, advice = comments.get(name, ""), ADVICE.get(name, "")
        if isinstance(value, ConfigDict):
            out.append(Field(name, meaning, is_section=True, advice=advice))
            if name not in NAMED:
                _walk(value, f"{name}.", comments, out)
        else:
            if name not in comments:  # made with its section, whose comment is its own
                section = prefix.rstrip(".")
                meaning, advice = comments[section], ADVICE.get(section, "")
            shown = {"default": _written(value), "type": config_limits.TYPES[type(value)], "allowed": _allowed(name)}
            out.append(Field(name, meaning, advice=advice, **shown))


def _written_order(node: ConfigDict, prefix: str, comments: dict[str, str]) -> list[str]:
    """The keys of a section in the order of the file; those that it was made with come first."""
    places = {name: place for place, name in enumerate(comments)}
    return sorted(node, key=lambda key: places.get(prefix + key, -1))


def _written(value: Any) -> str:
    """A default as Python writes it; of a long list the two first entries and the last."""
    text = repr(value)
    if isinstance(value, tuple) and len(value) > 4:
        text = f"({value[0]!r}, {value[1]!r}, ..., {value[-1]!r})"
    return text


def _allowed(name: str) -> str:
    if name in config_limits.RANGES:
        return str(config_limits.RANGES[name])
    if name in config_limits.CHOICES:
        return ", ".join(config_limits.CHOICES[name])
    return "ascending, at least 1" if name.startswith("buckets.") else ""


def _named(section: str, defaults: dict[str, Any]) -> list[Field]:
    """The fields of an entry of `config.roles` or `config.prompts`; their meanings stand at `TeacherRole`."""
    meanings = _attributes(TeacherRole)
    types: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(TeacherRole)}
    out = []
    for field in NAMED[section]:
        kind = config_limits.TYPES.get(types[field], "a list of names")
        default = repr(defaults[field]) if field in defaults else "required"
        number = "above 0 and below 1" if field == "beta" else "at least 0" if types[field] is float else ""
        allowed = ", ".join(_ROLE_CHOICES.get(field, ())) or number
        name = f"{section}.NAME.{field}"
        out.append(Field(name, meanings[field], False, default, kind, allowed, ADVICE.get(name, "")))
    return out


def _attributes(cls: type) -> dict[str, str]:
    """What the Attributes of a class's docstring say of each."""
    text = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    out: dict[str, str] = {}
    for names, words in re.findall(r"^ {2}(\w+(?:, \w+)*): (.*(?:\n {4}.*)*)", text, re.M):
        out |= dict.fromkeys(names.split(", "), _sentence(" ".join(words.split()), names))
    return out


def _comments(source: str) -> dict[str, str]:
    """What is said of each field that the file sets: the comment lines above it, and the one after it."""
    notes: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# noqa"):
            notes[token.start[0]] = token.string.removeprefix("#")
            if token.line.lstrip().startswith("#"):
                alone.add(token.start[0])
    out = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not ast.unparse(node.targets[0]).startswith("config."):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        above = _joined([notes[line] for line in range(first, node.lineno)])
        behind = notes.get(node.end_lineno or 0, "")
        out[name] = " ".join(_sentence(text.strip(), name) for text in (above, behind) if text.strip())
    return out


def _joined(lines: list[str]) -> str:
    """Comment lines as one text; lines that are indented further stay lines of a list."""
    out = ""
    for line in lines:
        if line.startswith("   "):
            out += ("\n" if "\n- " in out else "\n\n") + f"- `{line.split()[0]}`: {' '.join(line.split()[1:])}"
        else:
            out += ("\n\n" if "\n" in out.rsplit("\n\n", 1)[-1] else " ") + line.strip()
    return out.strip()


def _sentence(text: str, name: str) -> str:
    """Capitalises a text, unless it begins with a value of the field `name`, and adds a full stop if needed."""
    first = text.split(maxsplit=1)[0]
    if first.isalpha() and first not in (*WORLDS, *config_limits.CHOICES.get(name, ())):
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."
