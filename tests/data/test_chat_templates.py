"""Which chat template a folder has, its switches, and what it writes in front of an answer."""

import copy
import json
import pickle

import pytest
from helpers import CHAT_TEMPLATE, make_processor_folder

from vigos_jax.data.processor import Processor
from vigos_jax.errors import InputError

ASSISTANT = "{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
HEADER = "<|im_start|>assistant\n"
OTHER = "{{ 'of another use' }}"


def template(behind: str) -> str:
    """The chat template with Jinja behind the assistant's header."""
    changed = CHAT_TEMPLATE.replace(ASSISTANT, ASSISTANT.replace("{%- endif", behind + "{%- endif"))
    assert changed != CHAT_TEMPLATE
    return changed


ALWAYS = template("{{ '<think>\\n' }}")
SWITCHED = template(
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
)
OPENS_UNLESS = template("{%- if enable_thinking -%}{{ '<think>\\n' }}{%- endif -%}{{ effort or '' }}")
# Qwen3.5: a closed thought unless it is asked for one, small sizes; an open one unless it is told not to, large ones.
_CLOSED, _OPEN = "{{ '<think>\\n\\n</think>\\n\\n' }}", "{{ '<think>\\n' }}"
SMALL = template(
    f"{{%- if enable_thinking is defined and enable_thinking -%}}{_OPEN}{{%- else -%}}{_CLOSED}{{%- endif -%}}"
)
LARGE = template(
    f"{{%- if enable_thinking is defined and not enable_thinking -%}}{_CLOSED}{{%- else -%}}{_OPEN}{{%- endif -%}}"
)


def load(tmp_path, source, **switches) -> Processor:
    return Processor.load(make_processor_folder(tmp_path, chat_template=source), chat_template_kwargs=switches)


def prompt(processor, prefill="<description>"):
    return processor.decode(processor.encode_turn(user_text="Why?", grids=(), assistant_prefill=prefill).ids)


@pytest.mark.parametrize(
    "source, switches, behind",
    [
        (CHAT_TEMPLATE, {}, ""),
        (ALWAYS, {}, "<think>\n"),
        (SWITCHED, {}, "<think>\n\n</think>\n\n"),
        (SWITCHED, {"enable_thinking": True}, ""),
        (OPENS_UNLESS, {}, ""),
        (OPENS_UNLESS, {"enable_thinking": True}, "<think>\n"),
        (OPENS_UNLESS, {"effort": "low"}, "low"),
        (SMALL, {}, "<think>\n\n</think>\n\n"),
        (SMALL, {"enable_thinking": True}, "<think>\n"),
        (LARGE, {}, "<think>\n\n</think>\n\n"),
        (LARGE, {"enable_thinking": True}, "<think>\n"),
    ],
)
def test_what_stands_in_front_of_an_answer(tmp_path, source, switches, behind):
    processor = load(tmp_path, source, **switches)
    assert processor.behind_header == behind
    assert prompt(processor, "").endswith(HEADER + behind)
    for other in (copy.copy(processor), pickle.loads(pickle.dumps(processor))):  # as data workers get it
        assert other.behind_header == behind and prompt(other, "") == prompt(processor, "")


def test_a_prefill_inside_a_thought_is_refused_with_the_switch(tmp_path):
    with pytest.raises(InputError, match="config.model.chat_template_kwargs.enable_thinking=False") as e:
        prompt(load(tmp_path / "a", OPENS_UNLESS, enable_thinking=True))
    assert "'<think>\\n'" in str(e.value) and "'<description>'" in str(e.value)
    with pytest.raises(InputError, match="opens a thought") as e:  # there is no switch to name
        prompt(load(tmp_path / "b", ALWAYS))
    assert "enable_thinking" not in str(e.value) and "'</think><description>'" in str(e.value)


def test_a_thought_that_is_closed_or_wanted_is_fine(tmp_path):
    assert prompt(load(tmp_path / "a", SWITCHED)).endswith(HEADER + "<think>\n\n</think>\n\n<description>")
    thinking = load(tmp_path / "b", ALWAYS)
    assert prompt(thinking, "").endswith("<think>\n")
    assert prompt(thinking, "</think>\n<description>").endswith("<think>\n</think>\n<description>")


@pytest.mark.parametrize("name", ["enable_thinkin", "thinking", "effort"])
def test_a_switch_that_the_template_lacks_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"config.model.chat_template_kwargs.{name} is not a switch"):
        load(tmp_path, SWITCHED, **{name: True})


# -- where the template lies ------------------------------------------------------------------------------------


def as_jinja(folder):
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def as_jinja_beside_others(folder):
    as_jinja(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OTHER}))  # an old one, left behind
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(OTHER)


def as_list_of_the_tokenizer(folder):
    named = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": CHAT_TEMPLATE}]
    edit(folder / "tokenizer_config.json", chat_template=named)


def as_list_of_the_processor(folder):
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": OTHER}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))


def as_table_of_the_processor(folder):
    named = {"default": CHAT_TEMPLATE, "tool_use": OTHER}
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "layout",
    [
        *(as_jinja, as_jinja_beside_others, as_list_of_the_tokenizer),
        *(as_list_of_the_processor, as_table_of_the_processor),
    ],
)
def test_the_default_template_of_every_layout(tmp_path, layout):
    whole = prompt(load(tmp_path / "a", CHAT_TEMPLATE))
    folder = make_processor_folder(tmp_path / "b")
    (folder / "chat_template.json").unlink()
    layout(folder)
    assert prompt(Processor.load(folder)) == whole


def test_named_templates_without_a_default_are_named(tmp_path):
    folder = make_processor_folder(tmp_path)
    (folder / "chat_template.json").unlink()
    edit(folder / "tokenizer_config.json", chat_template=[{"name": n, "template": OTHER} for n in ("rag", "tool_use")])
    with pytest.raises(InputError, match="the chat templates rag, tool_use; it needs one of the name default"):
        Processor.load(folder)
