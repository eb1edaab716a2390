"""The role table: built from a config, checked, and nothing in it but data."""

import copy

import pytest

from vigos_jax.errors import InputError
from vigos_jax.roles import CONDITIONS, DIVERGENCES, SPANS, TeacherRole, role_table, roles_per_token


def entry(scores, when, divergence="forward_kl", weight=1.0, clip=0.05):
    return {"scores": scores, "when": when, "divergence": divergence, "weight": weight, "clip": clip}


ROLES = {
    "perception": entry(["description"], "valid"),
    "reasoning": entry(["reasoning", "answer"], "valid"),
    "reference": entry(["completion"], "invalid", "reverse_kl", 2),
}
PROMPTS = {
    "student": {"user": "{problem}", "assistant_prefill": "<description>"},
    "perception": {"user": "", "assistant_prefill": "<description>"},
    "reasoning": {"user": "{problem} {reference}", "assistant_prefill": "<description>"},
    "reference": {"user": "{reference}", "assistant_prefill": ""},
}


def test_table():
    table = role_table(ROLES, PROMPTS)
    assert table == (
        TeacherRole("perception", "", "<description>", ("description",), "valid", "forward_kl", 1.0, 0.05),
        TeacherRole(
            name="reasoning",
            user="{problem} {reference}",
            assistant_prefill="<description>",
            scores=("reasoning", "answer"),
            when="valid",
            divergence="forward_kl",
            weight=1.0,
            clip=0.05,
        ),
        TeacherRole("reference", "{reference}", "", ("completion",), "invalid", "reverse_kl", 2.0, 0.05),
    )
    hash(table)  # static to jit


def test_weight_zero_leaves_a_role_out():
    roles = copy.deepcopy(ROLES)
    roles["perception"]["weight"] = 0
    assert [r.name for r in role_table(roles, PROMPTS)] == ["reasoning", "reference"]


def test_clip_zero_is_kept():
    roles = copy.deepcopy(ROLES)
    roles["perception"]["clip"] = 0
    assert role_table(roles, PROMPTS)[0].clip == 0.0


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("scores", ["description", "thoughts"], ["'thoughts'", *SPANS]),
        ("scores", [], ["scores", *SPANS]),
        ("when", "sometimes", ["'sometimes'", *CONDITIONS]),
        ("divergence", "js", ["'js'", *DIVERGENCES]),
        ("weight", -1.0, ["weight=-1.0", "at least 0"]),
        ("weight", float("nan"), ["weight=nan", "finite"]),
        ("weight", float("inf"), ["weight=inf", "finite"]),
        ("clip", -0.05, ["clip=-0.05", "at least 0"]),
        ("clip", float("nan"), ["clip=nan", "finite"]),
    ],
)
def test_bad_entries(field, value, message):
    roles = copy.deepcopy(ROLES)
    roles["reasoning"][field] = value
    with pytest.raises(InputError) as e:
        role_table(roles, PROMPTS)
    text = str(e.value)
    assert "\n" not in text and "reasoning" in text and all(part in text for part in message), text


def test_a_role_needs_a_prompt():
    with pytest.raises(InputError, match="config.prompts.reference; choices: student, perception, reasoning"):
        role_table(ROLES, {name: p for name, p in PROMPTS.items() if name != "reference"})


def test_a_table_needs_a_role():
    with pytest.raises(InputError, match="at least one teacher"):
        role_table({}, PROMPTS)
    with pytest.raises(InputError, match="at least one teacher"):
        role_table({"perception": entry(["description"], "valid", weight=0)}, PROMPTS)


@pytest.mark.parametrize(
    "when, expected", [("valid", (True, False)), ("invalid", (False, True)), ("always", (True, True))]
)
def test_applies(when, expected):
    role = role_table({"perception": entry(["description"], when)}, PROMPTS)[0]
    assert (role.applies(True), role.applies(False)) == expected


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([(["description"], "valid"), (["reasoning", "answer"], "valid"), (["completion"], "invalid")], 1),
        ([(["completion"], "always")], 1),  # one teacher for everything
        ([(["completion"], "valid"), (["completion"], "invalid")], 1),
        ([(["completion"], "invalid"), (["completion"], "invalid")], 2),
        ([(["description"], "valid"), (["completion"], "always")], 2),
        ([(["description"], "valid"), (["description", "answer"], "always"), (["completion"], "always")], 3),
        ([(["description"], "valid"), (["answer"], "valid"), (["reasoning"], "always")], 1),
    ],
)
def test_roles_per_token(entries, expected):
    roles = {f"r{i}": entry(*e) for i, e in enumerate(entries)}
    table = role_table(roles, {name: PROMPTS["student"] for name in roles})
    assert roles_per_token(table) == expected
