"""The role table: built from a config, checked, and nothing in it but data."""

import copy

import pytest

from vigos_jax.data.views import ImageView
from vigos_jax.errors import InputError
from vigos_jax.method.roles import (
    CLIP_PER,
    CONDITIONS,
    DIVERGENCES,
    ENTRY_FIELDS,
    OWN,
    READS,
    REQUIRED_FIELDS,
    SPANS,
    Prefix,
    TeacherRole,
    branches_of,
    branches_per_rollout,
    models_of,
    prefixes_of,
    role_table,
    roles_per_token,
    views_of,
)


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


def refusal(roles, prompts=PROMPTS, **options) -> str:
    """The one line that refuses a table."""
    with pytest.raises(InputError) as e:
        role_table(roles, prompts, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def changed(**fields):
    return ROLES | {"reasoning": ROLES["reasoning"] | fields}


@pytest.mark.parametrize(
    "field, choices", [("when", CONDITIONS), ("divergence", DIVERGENCES), ("clip_per", CLIP_PER), ("reads", READS)]
)
def test_choices(field, choices):
    for choice in choices:
        assert getattr(role_table(changed(**{field: choice}), PROMPTS)[1], field) == choice
    for value in ("sometimes", "", None, 1):
        text = refusal(changed(**{field: value}))
        assert text == f"config.roles.reasoning.{field}={value!r} is unknown; choices: {', '.join(choices)}"


@pytest.mark.parametrize(
    "value, message",
    [
        (["description", "thoughts"], "scores='thoughts' is unknown"),
        ([], "scores=[] must be a list"),
        ("description", "scores='description' must be a list"),  # eleven spans of one letter
        ("", "scores='' must be a list"),
    ],
)
def test_scores_is_a_list_of_spans(value, message):
    text = refusal(changed(scores=value))
    assert message in text and text.endswith("choices: " + ", ".join(SPANS)), text


NUMBERS = ("weight", "clip", "first_clip", "last_clip", "beta")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [-1.0, -1e-9, float("nan"), float("inf"), -float("inf"), True, False, "0.5", None])
def test_numbers(field, value):
    text = refusal(changed(**{field: value}))
    assert f"config.roles.reasoning.{field}={value!r} must be a finite number of at least 0" == text


@pytest.mark.parametrize("field", NUMBERS[:-1])
@pytest.mark.parametrize("value", [1, 0.25, 3e4])
def test_numbers_are_floats(field, value):
    number = getattr(role_table(changed(**{field: value}), PROMPTS)[1], field)
    assert number == value and type(number) is float


def test_beta_lies_between_the_named_limits():
    for beta in (1e-6, 0.5, 0.999):
        assert role_table(changed(divergence="jsd", beta=beta), PROMPTS)[1].beta == beta
    for beta in (0, 0.0, 1, 1.0, 1.5):
        text = refusal(changed(divergence="jsd", beta=beta))
        assert f"beta={float(beta)} must be between 0 and 1" in text
        assert "forward_kl is KL(teacher || student)" in text and "reverse_kl is KL(student || teacher)" in text


def test_optional_fields():
    assert set(REQUIRED_FIELDS) == set(ROLES["reasoning"])
    role = role_table(ROLES, PROMPTS)[1]
    optional = {"clip_per": "token", "first_clip": 0.0, "last_clip": 0.0, "beta": 0.5, "reads": "completion"}
    optional |= {"image": "original", "image_column": "", "image_margin": 0.0, "image_pixels": 0}
    optional |= {"token_weights": "uniform", "token_top_k": 0, "model": ""}
    assert {f: getattr(role, f) for f in ENTRY_FIELDS if f not in REQUIRED_FIELDS} == optional
    other = {"clip_per": "entry", "first_clip": 0.1, "last_clip": 0.2, "beta": 0.3, "reads": "scored"}
    other |= {"image": "crop", "image_column": "box", "image_margin": 0.5}
    other |= {"token_weights": "teacher_top_k", "token_top_k": 3, "model": "big"}
    role = role_table(changed(**other), PROMPTS)[1]
    assert {f: getattr(role, f) for f in other} == other


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_a_missing_field_is_named(field):
    entry = {k: v for k, v in ROLES["reasoning"].items() if k != field}
    text = refusal(ROLES | {"reasoning": entry})
    assert text == f"config.roles.reasoning lacks {field}; its fields are {', '.join(ENTRY_FIELDS)}"


@pytest.mark.parametrize("field", ["clipp", "user", "name", "assistant_prefill"])
def test_an_unknown_field_is_named(field):
    text = refusal(changed(**{field: 0.0}))
    assert text == f"config.roles.reasoning has an unknown field {field!r}; its fields are {', '.join(ENTRY_FIELDS)}"


def test_a_role_of_weight_zero_is_checked_too():
    assert "'never'" in refusal(changed(weight=0, when="never"))


def test_no_role_is_the_student():
    text = refusal(ROLES | {"student": entry(["completion"], "always")})
    assert "config.roles.student" in text and "the student's own prompt" in text


@pytest.mark.parametrize(
    "template, unknown",
    [
        ("{caption}", "caption"),
        ("{problem} {reference} {Problem}", "Problem"),
        ("see {hint}: {problem}", "hint"),
        ("{problem}{answer}", None),  # behind a brace, as in LaTeX: not by itself
        (r"\boxed{answer}", None),
        (r"$x_{max}$ and $2^{n}$ and \frac{a}{b} and f{x}", None),
        ("{} {0} { problem } {a b}", None),
    ],
)
def test_a_template_names_fields_that_rows_have(template, unknown):
    prompts = PROMPTS | {"reasoning": {"user": template, "assistant_prefill": ""}}
    if unknown is None:
        assert role_table(ROLES, prompts)[1].user == template
        return
    text = refusal(ROLES, prompts)
    assert f"config.roles.reasoning needs {{{unknown}}} in config.prompts.reasoning.user, which no row has" in text
    assert "choices: problem, reference, or" in text
    assert role_table(ROLES, prompts, data_fields=("other", unknown))[1].user == template
    assert "choices: problem, reference, other, or" in refusal(ROLES, prompts, data_fields=("other",))


def test_prompts_of_roles_that_are_not_there_are_not_read():
    prompts = PROMPTS | {"nobody": {"user": "{caption}", "assistant_prefill": ""}}
    assert len(role_table(ROLES, prompts)) == 3


@pytest.mark.parametrize("user, shows", [("", False), ("{problem}", False), ("<{reference}>", True), ("{ref}", False)])
def test_shows_reference(user, shows):
    role = TeacherRole("a", user, "", ("answer",), "valid", "forward_kl", 1.0, 0.0)
    assert role.shows_reference == shows


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
        # an invalid rollout is scored whole by all that apply to it
        ([(["description"], "always"), (["reasoning", "answer"], "always")], 2),
        ([(["description"], "always"), (["answer"], "invalid"), (["completion"], "invalid")], 3),
        ([(["description"], "always"), (["reasoning"], "always"), (["completion"], "valid")], 2),
    ],
)
def test_roles_per_token(entries, expected):
    roles = {f"r{i}": entry(*e) for i, e in enumerate(entries)}
    table = role_table(roles, dict.fromkeys(roles, PROMPTS["student"]))
    assert roles_per_token(table) == expected


@pytest.mark.parametrize("value", [3, None, "perception", ["description"]])
def test_a_role_is_a_table(value):
    with pytest.raises(InputError, match="config.roles.mine=.* must be a table; its fields are scores, when"):
        role_table(ROLES | {"mine": value}, PROMPTS)


def test_the_student_sees_the_problem_alone():
    for text in ("{problem} {caption}", "{Problem}"):
        prompts = PROMPTS | {"student": {"user": text, "assistant_prefill": ""}}
        with pytest.raises(InputError, match="config.prompts.student.user names .* it must show {problem} alone"):
            role_table(ROLES, prompts, data_fields=("caption",))


@pytest.mark.parametrize("scores", [5, None, "description", ()])
def test_scores_are_a_list(scores):
    with pytest.raises(InputError, match="config.roles.perception.scores=.* must be a list of spans"):
        role_table(ROLES | {"perception": ROLES["perception"] | {"scores": scores}}, PROMPTS)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"image": "cropped"},
            "image='cropped' is unknown; choices: original, none, blank, crop, resized, other, shuffled",
        ),
        ({"image": "crop"}, "image_column='' must be a column of the data"),
        ({"image": "other", "image_column": 3}, "image_column=3 must be a column of the data"),
        ({"image_column": "box"}, "image_column='box' must be '', as image='original' reads no column"),
        ({"image": "crop", "image_column": "box", "image_margin": -0.1}, "image_margin=-0.1 must be from 0 to 100"),
        ({"image": "crop", "image_column": "box", "image_margin": float("nan")}, "image_margin=nan must be"),
        ({"image": "blank", "image_margin": 0.1}, "image_margin=0.1 must be from 0 to 100, and 0 without a crop"),
        ({"image": "resized"}, "image_pixels=0 must be a whole number above 0"),
        ({"image": "resized", "image_pixels": 10.5}, "image_pixels=10.5 must be a whole number above 0"),
        ({"image": "resized", "image_pixels": True}, "image_pixels=True must be"),
        ({"image_pixels": 100}, "image_pixels=100 must be 0, as image='original' keeps the run's own limits"),
    ],
)
def test_images_of_a_role(fields, message):
    assert refusal(changed(**fields)).startswith(f"config.roles.reasoning.{message}")


def test_roles_that_see_the_same_share_a_view():
    table = role_table(changed(image="crop", image_column="box", image_margin=1), PROMPTS)
    crop = ImageView("crop", "box", 1.0)
    assert views_of(table) == (ImageView(), crop) and views_of(table[1:2]) == (crop,)
    behind_crop = Prefix(view=crop)
    assert prefixes_of((table[1], table[1], table[0])) == (OWN, behind_crop), "the row's own images first"
    assert branches_per_rollout(behind_crop, table) == 1


def test_another_model_has_a_prefix_of_its_own():
    table = role_table(changed(model="big", token_weights="image_dependence"), PROMPTS)
    assert prefixes_of(table) == (OWN, Prefix("big"), Prefix("big", ImageView("none"))) and OWN == Prefix()
    assert [branches_of(p, table) for p in prefixes_of(table)[1:]] == [((1, False),), ((1, True),)]
    assert models_of(table) == {"big": "reasoning"} and models_of(table[:1]) == {}
    assert refusal(changed(model=7)).startswith("config.roles.reasoning.model=7 must be a text")
