"""The config: checked before anything is loaded, written into a workdir and read back, compared."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import ml_collections
import pytest

from configs import base
from vigos_jax import config as config_lib
from vigos_jax import config_limits
from vigos_jax.config import differences, read_json, to_json, validate, with_absolute_paths
from vigos_jax.errors import InputError
from vigos_jax.method.roles import ENTRY_FIELDS, role_table

ROOT = pathlib.Path(__file__).resolve().parent.parent


def changed(**fields) -> ml_collections.ConfigDict:
    """The base config with fields replaced, whatever their types; `a__b` stands for a.b."""
    values = base.get_config().to_dict()
    for field, value in fields.items():
        *parents, last = field.split("__")
        get(values, ".".join(parents))[last] = value
    return ml_collections.ConfigDict(values)


def get(tree, field: str):
    """The value of a dotted field; "" is the tree itself."""
    return config_lib.get(tree, field) if field else tree


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


RUNS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__" and not path.stem.endswith("_base")
)


@pytest.mark.parametrize("name", RUNS)
def test_shipped_config_is_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    validate(config)
    role_table(config.roles, config.prompts)
    assert config.is_locked


def test_the_shipped_configs_were_found():
    assert {"base", "opsd", "paper"} <= set(RUNS)


def test_every_field_is_read_somewhere():
    source = "\n".join(path.read_text() for path in (ROOT / "vigos_jax").rglob("*.py"))
    for field in leaves(base.get_config()):
        assert re.search(rf"\b{field.split('.')[-1]}\b", source), f"nothing reads config.{field}"


DEFAULTS = {field: get(base.get_config(), field) for field in leaves(base.get_config())}
NAMED_BY_USERS = ("roles.", "prompts.", "eval.sources.")
OF_A_WRONG_TYPE = {
    bool: (1, "yes", None),
    int: (1.5, "1", None, True),
    float: ("1", None, True, float("nan"), float("inf")),
    str: (1, None, ("a",)),
    tuple: ("a", 1, None),
}


@pytest.mark.parametrize("field", [f for f in DEFAULTS if not f.startswith(NAMED_BY_USERS)])
def test_a_field_has_the_type_of_its_default(field):
    """No field is listed for it: a new one in configs/base.py is checked without a word elsewhere."""
    for value in OF_A_WRONG_TYPE[type(DEFAULTS[field])]:
        with pytest.raises(InputError, match=rf"config\.{re.escape(field)}={re.escape(repr(value))} must be "):
            validate(changed(**{field.replace(".", "__"): value}))


def test_the_defaults_are_those_of_this_repository(tmp_path):
    """Also where the current folder has a `configs` of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    code = "from vigos_jax.config import _defaults; print(_defaults()['steps'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{base.get_config().steps}\n", done.stderr


def test_ranges_and_choices_are_of_fields():
    assert set(config_limits.RANGES) <= {f for f, v in DEFAULTS.items() if type(v) in (int, float)}
    assert set(config_limits.CHOICES) | set(config_lib._PATHS) <= {f for f, v in DEFAULTS.items() if type(v) is str}


@pytest.mark.parametrize("field, allowed", config_limits.RANGES.items())
def test_range(field, allowed):
    step = 1 if isinstance(DEFAULTS[field], int) else 1e-6
    name = field.replace(".", "__")
    bad = [allowed.above] if allowed.least is None else [allowed.least - step]
    if allowed.least is not None and field != "sampling.max_tokens":
        validate(changed(**{name: allowed.least}))
    if allowed.most is not None:
        validate(changed(**{name: allowed.most}))
        bad.append(allowed.most + step)
    for value in bad:
        said = re.escape(f"config.{field}={value!r} must be {allowed}")
        with pytest.raises(InputError, match=f"^{said}$"):
            validate(changed(**{name: value}))


@pytest.mark.parametrize(
    "range_, words",
    [
        (config_limits.Range(least=0), "at least 0"),
        (config_limits.Range(above=0, most=1), "above 0 and at most 1"),
        (config_limits.Range(least=-1, most=1), "from -1 to 1"),
    ],
)
def test_a_range_in_words(range_, words):
    assert str(range_) == words


@pytest.mark.parametrize("field, choices", config_limits.CHOICES.items())
def test_choices(field, choices):
    for choice in choices:
        validate(changed(**{field.replace(".", "__"): choice}))
    with pytest.raises(InputError, match=f"config.{field}='float64' is unknown; choices: {', '.join(choices)}"):
        validate(changed(**{field.replace(".", "__"): "float64"}))


@pytest.mark.parametrize("sizes", [(), (64, 32), (32, 32), (0, 32), (-1,), (32, 64.0), ("32",)])
def test_buckets_ascend(sizes):
    validate(changed(buckets__sequence=(256,)))
    with pytest.raises(InputError, match=r"config\.buckets\.sequence=.* must be ascending positive integers"):
        validate(changed(buckets__sequence=sizes))


def test_a_completion_must_fit_its_bucket():
    validate(changed(sampling__max_tokens=64, buckets__completion=(64,)))
    with pytest.raises(InputError, match="config.sampling.max_tokens=64 must be at most .*, 63"):
        validate(changed(sampling__max_tokens=64, buckets__completion=(32, 63)))


def test_the_student_never_sees_the_reference():
    with pytest.raises(InputError, match="must not show {reference} to the student"):
        validate(changed(prompts__student__user="{problem} {reference}"))
    config = base.get_config()
    del config.prompts.student
    with pytest.raises(InputError, match="config.prompts.student must exist"):
        validate(config)


@pytest.mark.parametrize("fields", [("problem",), ("reference",), ("a b",), ("",), (3,), ("caption", "2nd")])
def test_names_of_further_columns(fields):
    validate(changed(data__fields=("caption", "scene_2")))
    with pytest.raises(InputError, match=r"config\.data\.fields=\(.* must be names of further columns"):
        validate(changed(data__fields=fields))


@pytest.mark.parametrize("old, new", config_lib.RENAMED.items())
def test_a_renamed_field_is_refused_by_its_new_name(old, new):
    config = base.get_config().unlock()  # as the config.json of an earlier version's run is
    assert new in config
    config[old] = config[new]
    with pytest.raises(InputError, match=rf"^config\.{old} is now config\.{new}$"):
        validate(config)
    assert config_lib.renamed(old) == new and config_lib.renamed(new) is None
    assert config_lib.renamed(f"{old}.x") == f"{new}.x" and config_lib.renamed(f"{old}x") is None


@pytest.mark.parametrize("field", ["steps", "export.dtype", "buckets", "teacher.ema_rate", "data.fields"])
def test_a_missing_field_is_named(field):
    config = base.get_config().unlock()
    *parents, last = field.split(".")
    del get(config, ".".join(parents))[last]
    with pytest.raises(InputError, match=f"lacks .*{last}") as e:
        validate(config)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["student", "reasoning"])
def test_a_prompt_has_its_two_fields(name):
    config = base.get_config()
    config.prompts[name]["clipp"] = 0.0
    with pytest.raises(InputError, match=rf"config\.prompts\.{name} has the fields .*clipp.* it needs user and assi"):
        validate(config)
    config = base.get_config()
    del config.prompts[name]["user"]
    with pytest.raises(InputError, match=rf"config\.prompts\.{name} has the fields assistant_prefill; it needs user "):
        validate(config)


def test_json_gives_the_same_run_back(tmp_path):
    config = base.get_config()
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    saved = read_json(path)
    validate(saved)
    assert differences(saved, config) == []  # tuples came back as lists, and that is no difference
    assert saved.optimizer.learning_rate == config.optimizer.learning_rate
    assert saved.prompts.to_dict() == config.prompts.to_dict()


@pytest.mark.parametrize("text", [None, "{", "[1, 2]", "3"])
def test_what_is_no_config_json(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        read_json(path)


def test_two_roles_of_one_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(base.get_config()).replace('"reasoning": {', '"perception": {'))
    with pytest.raises(InputError, match="'perception' is there twice"):
        read_json(path)


def test_differences_name_every_field():
    one = changed(seed=0, lora__rank=0, buckets__prompt=(64, 128))
    other = changed(seed=1, lora__rank=8, buckets__prompt=(64,))
    assert differences(one, one) == []
    assert differences(one, other) == ["buckets.prompt: [64, 128] -> [64]", "lora.rank: 0 -> 8", "seed: 0 -> 1"]


def test_paths_in_a_file_lead_from_the_root(tmp_path, monkeypatch):
    """A hub id is no path; a link keeps its name; what begins at a home does already."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "demo").mkdir()  # not what the word stands for
    monkeypatch.chdir(tmp_path)
    one = changed(model__path="link", data__source="owner/name", model__adapter="a/../b", compilation_cache="~/x")
    one.eval.sources.mmmu, one.eval.sources.vilp_f = "./real", "owner/other"
    kept = with_absolute_paths(one)
    assert kept.model.path == str(tmp_path / "link") and kept.model.adapter == str(tmp_path / "b")
    assert (kept.data.source, kept.compilation_cache) == ("owner/name", "~/x")
    assert (kept.eval.sources.mmmu, kept.eval.sources.vilp_f) == (str(tmp_path / "real"), "owner/other")
    assert kept.score.rollouts == "" and one.model.path == "link"
    assert with_absolute_paths(base.get_config()).model.path == "demo"


def test_a_run_is_recognised_by_its_paths_from_other_folders(tmp_path, monkeypatch):
    for name in ("here/models/a", "here/models/b", "there/models/a", "there/models/c"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    kept = with_absolute_paths(changed(model__path="models/a", data__source="rows.jsonl"))
    same = ("models/a", "./models/a", str(tmp_path / "here/models/a"), "../here/models/a")
    for path in same:
        assert differences(kept, changed(model__path=path, data__source="rows.jsonl")) == []
    (line,) = differences(kept, changed(model__path="models/b", data__source="rows.jsonl"))
    assert line == f"model.path: {str(tmp_path / 'here/models/a')!r} -> 'models/b'"
    monkeypatch.chdir(tmp_path / "there")  # the project under another mount
    for path, count in (("models/a", 0), ("../here/models/a", 0), ("models/c", 1), ("owner/models/a", 1), ("a", 1)):
        assert len(differences(kept, changed(model__path=path, data__source="rows.jsonl"))) == count, path


def test_the_models_of_roles_are_paths_as_the_students_is(tmp_path, monkeypatch):
    def taught_by(model):
        config = base.get_config()
        config.roles.reasoning.model = model
        return config

    (tmp_path / "here/models/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    kept = with_absolute_paths(taught_by("models/a"))
    assert kept.roles.reasoning.model == str(tmp_path / "here/models/a") and kept.roles.perception.model == ""
    assert with_absolute_paths(taught_by("owner/name")).roles.reasoning.model == "owner/name"
    for path in ("models/a", "../here/models/a"):
        assert differences(kept, taught_by(path)) == []
    (line,) = differences(kept, taught_by("owner/name"))
    assert line.startswith("roles.reasoning.model: ") and line.endswith("-> 'owner/name'")
    with pytest.raises(InputError, match="config.roles.reasoning.model='~nobody-here/x' begins with the home"):
        validate(taught_by("~nobody-here/x"))


def test_differences_of_role_tables():
    other = base.get_config()
    del other.roles.perception
    names = [line.split(":")[0] for line in differences(base.get_config(), other)]
    assert names == [f"roles.perception.{f}" for f in sorted(ENTRY_FIELDS)]


def test_what_is_done_with_a_run_is_no_difference():
    other = changed(export__output="/x", export__kind="adapter", score__rollouts="/y", generate__question="?")
    assert differences(base.get_config(), other) == []


def test_switches_of_a_chat_template():
    def with_switch(name, value):
        config = base.get_config()
        config.model.chat_template_kwargs[name] = value
        return config

    for value in (True, False, 3, 0.5, "low", ""):
        validate(with_switch("effort", value))
    for value in (None, [1], float("nan"), "False", "true", {"a": 1}):
        with pytest.raises(InputError, match=r"config.model.chat_template_kwargs.*effort.* must be "):
            validate(with_switch("effort", value))
    for name in ("messages", "tokenize", "add_generation_prompt", "not a name"):
        with pytest.raises(InputError, match=f"chat_template_kwargs has the field '{name}'; it must be a variable"):
            validate(with_switch(name, True))
    assert differences(base.get_config(), with_switch("enable_thinking", False)) == [
        "model.chat_template_kwargs.enable_thinking: None -> False"
    ]


def test_a_prompt_is_a_text():
    with pytest.raises(InputError, match="config.prompts.reasoning.user=3 must be a text"):
        validate(changed(prompts__reasoning__user=3))


def test_who_samples_is_not_what_a_run_is_but_how_far_behind_is(tmp_path):
    config = base.get_config()
    (tmp_path / "config.json").write_text(to_json(config))
    saved = read_json(tmp_path / "config.json")
    del saved["rollout"]  # of a version that had no servers
    config.rollout.engine, config.rollout.urls = "vllm", ("http://localhost:8000",)
    assert differences(saved, config) == []
    config.rollout.max_staleness = 2
    assert differences(saved, config) == ["rollout.max_staleness: 0 -> 2"]
