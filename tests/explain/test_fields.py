"""Every field of a config is explained from one source: the comments of configs/base.py and the checks of config.py."""

import re

import pytest

from configs import base
from vigos_jax import config as config_lib
from vigos_jax.explain import fields as fields_lib
from vigos_jax.explain.advice import ADVICE
from vigos_jax.explain.fields import all_fields
from vigos_jax.method.roles import ENTRY_FIELDS

FIELDS = {field.name: field for field in all_fields()}


def test_every_field_of_the_config_is_there_and_no_other():
    leaves = [f for f, _ in config_lib.flatten(base.get_config().to_dict())]
    named = {f"roles.NAME.{f}" for f in ENTRY_FIELDS} | {"prompts.NAME.user", "prompts.NAME.assistant_prefill"}
    wanted = {f for f in leaves if not f.startswith(("roles.", "prompts."))} | named
    assert {f.name for f in FIELDS.values() if not f.is_section} == wanted
    assert len(all_fields()) == len(FIELDS)


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda f: f.name)
def test_a_field_says_what_it_means_and_when_to_change_it(field):
    assert field.meaning[:-1] and field.meaning.rstrip("`").endswith((".", "?", "!")), "configs/base.py has no comment"
    if not field.is_section:
        assert field.advice, "vigos_jax/explain/advice.py has no line"
        assert field.type and field.default


def test_advice_is_about_fields():
    assert set(ADVICE) <= set(FIELDS)


def test_a_field_has_default_type_and_limits():
    field = FIELDS["sampling.max_tokens"]
    assert (field.default, field.type, field.allowed) == ("48", "a whole number", "at least 1")
    assert FIELDS["model.dtype"].allowed == "float32, bfloat16" and FIELDS["model.dtype"].default == "'float32'"
    assert FIELDS["sampling.top_p"].allowed == "above 0 and at most 1"
    assert FIELDS["roles.NAME.divergence"].allowed == "forward_kl, reverse_kl, jsd"
    assert FIELDS["roles.NAME.weight"].default == "required" and FIELDS["roles.NAME.clip"].default == "0.05"
    assert "..." in FIELDS["mesh.rules"].default  # not all sixteen


def test_entries_that_a_section_is_made_with_have_its_meaning():
    assert FIELDS["eval.sources.mmmu"].meaning == FIELDS["eval.sources"].meaning
    assert FIELDS["data.columns.answer"].advice == ADVICE["data.columns"]


@pytest.mark.parametrize(
    "lines, meaning",
    [
        (["config.a = 1  # steps of a run"], "Steps of a run."),
        (["# Above it.", "config.a = 1"], "Above it."),
        (["# above it", "config.a = 1  # and behind"], "Above it. And behind."),
        (["# Not of a.", "", "config.a = 1  # of a"], "Of a."),
        (["config.b = 2  # of b", "config.a = 1"], ""),
        (['config.a = "#"  # a mark'], "A mark."),
        (["# Two", "# lines.", "config.a = (", "    1,", ")"], "Two lines."),
        (
            ["# A list:", "#   x  first", "#   y  second", "# and more", "config.a = 1"],
            "A list:\n\n- `x`: first\n- `y`: second\n\nand more.",
        ),
        (["config.a = 1  # WORKDIR/a"], "WORKDIR/a."),
    ],
)
def test_a_comment_is_read(lines, meaning):
    assert fields_lib._comments("\n".join(lines) + "\n")["a"] == meaning


def test_a_value_of_a_field_keeps_its_spelling():
    assert re.match(r"structured: ", FIELDS["eval.prompt"].meaning)
    assert re.match(r"auto \(", FIELDS["model.attention"].meaning)
