"""The config reference as text for a terminal and as a page of the documentation."""

import contextlib
import difflib
import textwrap

from vigos_jax import config as config_lib
from vigos_jax.errors import InputError
from vigos_jax.explain.fields import NAMED, Field, all_fields

_WIDTH = 100  # of a terminal's lines
_INTRO = """\
# Config fields

Every field of a config, with its default in `configs/base.py`, what it may be, and when to change it. A config file
sets it, `config.sampling.max_tokens = 1024`; a command line overrides it, `--config.sampling.max_tokens=1024`; and
`python -m vigos_jax.main --help sampling.max_tokens` prints what stands here, `--help sampling` a section."""


def explain(name: str) -> str:
    """What a field, or a section with all its fields, means: lines for a terminal.

    Args:
      name: dotted, with or without "config."; a role's or prompt's own name stands for NAME.

    Raises:
      InputError: there is no such field; says which are similar.
    """
    name = name.removeprefix("config.")
    fields = {field.name: field for field in all_fields()}
    known = _known(name, fields)
    if known is None:
        similar = [f for f in fields if f.rpartition(".")[2] == name.rpartition(".")[2]]
        similar = similar or difflib.get_close_matches(name, fields, n=3) or [f for f in fields if "." not in f]
        raise InputError(f"--help {name}: there is no such field; choices: {', '.join(similar)}")
    field = fields[known]
    if not field.is_section:
        return _field_text(field, name)
    inside = [f for f in fields.values() if f.name.startswith(f"{known}.")]
    parts = [f"config.{name}", _wrapped(field.meaning)] + ([_wrapped(f"When: {field.advice}")] if field.advice else [])
    if inside:
        parts += ["", *(f"{_title(f)}\n{_wrapped(f.meaning, 8)}" for f in inside)]
    return "\n".join(part for part in parts if part is not None) + "\n"


def _known(name: str, fields: dict[str, Field]) -> str | None:
    """The field or section of the reference that a name of a config belongs to."""
    if name in fields:
        return name
    section, _, rest = name.partition(".")
    if section in NAMED and rest:
        entry = ".".join([section, "NAME", *rest.split(".")[1:]])
        return entry if entry in fields else section if "." not in rest else None
    return config_lib.TEMPLATE_SWITCHES if name.startswith(f"{config_lib.TEMPLATE_SWITCHES}.") else None


def _title(field: Field) -> str:
    return f"    {field.name}" + (f" = {field.default}" if field.default not in ("", "required") else "")


def _wrapped(text: str, indent: int = 4) -> str:
    lines = [line.replace("`", "") for line in text.split("\n") if line.strip()]
    space = " " * indent
    return "\n".join(textwrap.fill(line, _WIDTH, initial_indent=space, subsequent_indent=space) for line in lines)


def _field_text(field: Field, name: str) -> str:
    default = field.default
    with contextlib.suppress(KeyError):  # of a shipped role or prompt, its own
        default = repr(config_lib.get(config_lib.default_config(), name))
    kind = ", ".join(filter(None, (field.type, field.allowed)))
    rows = [("default", default), ("is", kind), ("change", field.advice)]
    lines = [
        textwrap.fill(text, _WIDTH, initial_indent=f"    {label:9}", subsequent_indent=" " * 13)
        for label, text in rows
        if text
    ]
    return "\n".join([f"config.{name}", _wrapped(field.meaning), "", *lines]) + "\n"


def markdown() -> str:
    """The reference as a page: a heading for every section and every field."""
    fields = all_fields()
    run = [f for f in fields if "." not in f.name and not f.is_section]
    out = [_INTRO, "## The run", *map(_field_page, run)]
    for section in (f for f in fields if f.is_section):
        inside = [f for f in fields if f.name.rpartition(".")[0] in (section.name, f"{section.name}.NAME")]
        inside = [f for f in inside if not f.is_section]
        level = "#" * (2 + section.name.count("."))
        out += [f"{level} `{section.name}`", section.meaning]
        if inside and all(f.meaning == section.meaning for f in inside):  # they were made with it
            names = ", ".join(f"`{f.name}`" for f in inside)
            out += [f"{names}: {inside[0].type}, by default `{inside[0].default}`."]
            out += [f"**When to change:** {section.advice}"]
        else:
            out += [f"**When to change:** {section.advice}" if section.advice else "", *map(_field_page, inside)]
    return "\n\n".join(part for part in out if part) + "\n"


def _field_page(field: Field) -> str:
    kind = ": ".join(filter(None, (field.type, field.allowed)))
    default = field.default if field.default == "required" else f"default `{field.default}`"
    lines = [f"### `{field.name}`", field.meaning, f"*{kind}*; {default}"]
    return "\n\n".join(lines + ([f"**When to change:** {field.advice}"] if field.advice else []))
