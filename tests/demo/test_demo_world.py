"""The demo's world: pictures, questions, responses, judges, tokenizer."""

import dataclasses
import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from vigos_jax.demo import scenes, world
from vigos_jax.demo.source import DemoSource
from vigos_jax.miniature import assets, responses

TEMPLATES = ("{problem}\nDescribe the image inside <description> </description>.", "Reference: {reference}")


def _items(setting, n=300, seed=3):
    return [world.item(seed, i, setting=setting) for i in range(n)]


@pytest.fixture(scope="module", params=world.WORLDS)
def assets_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets") / request.param
    assets.write_assets(folder, world=request.param, templates=TEMPLATES)
    return folder


def test_items_depend_on_seed_setting_and_index_only():
    a, b = world.item(1, 2, setting="train"), world.item(1, 2, setting="train")
    assert a == b and np.array_equal(a.image, b.image)
    others = [world.item(*at, setting=name) for at, name in (((1, 3), "train"), ((2, 2), "train"), ((1, 2), "prior"))]
    assert all(not np.array_equal(a.image, other.image) and a.id != other.id for other in others)
    assert a.image.shape == (84, 84, 3) and a.image.dtype == np.uint8
    with pytest.raises(ValueError, match="choices: train, conflict, prior"):
        world.item(0, 0, setting="test")


@pytest.mark.parametrize(("setting", "low", "high"), [("train", 0.04, 0.17), ("conflict", 1, 1), ("prior", 0, 0)])
def test_settings_control_the_asked_attribute(setting, low, high):
    items = _items(setting)
    assert low <= np.mean([it.is_conflict for it in items]) <= high
    assert 0.4 < np.mean([it.states_prior for it in items]) < 0.6
    assert 0.17 < np.mean([len(it.scene.things) == 2 for it in items]) < 0.33
    for it in items:
        assert it.answer == getattr(it.things[it.asks.kind], it.asks.attribute)
        assert it.states_prior == it.question.startswith(f"Usually the {it.asks.kind} are {it.prior_value}. ")
        for n, thing in enumerate(it.scene.things):
            assert it.scene.cells.count(n) == 1 + scenes.ATTRIBUTES["count"].index(thing.count)


def test_every_kind_and_value_can_be_told_apart_in_the_picture():
    seen = {}
    rng = np.random.default_rng(0)
    for kind in scenes.KINDS:
        for size in scenes.ATTRIBUTES["size"]:
            thing = scenes.PRIORS[kind].replace("size", size).replace("color", "black")
            picture = scenes.render(rng, scenes.Scene((thing,), (0,) + (-1,) * 8))
            ink = picture[:28, :28].astype(float).mean(-1) < 60
            assert ink.any() and not (picture[:, 28:].astype(float).mean(-1) < 60).any()
            seen[kind, size] = ink
    names = list(seen)
    for i, a in enumerate(names):
        assert all((seen[a] ^ seen[b]).sum() > 20 for b in names[:i]), a


def test_cell_labels_name_what_is_drawn():
    it = next(it for it in _items("train") if len(it.scene.things) == 2)
    labels = it.scene.cell_labels()
    for cell, (kind, color, size) in zip(it.scene.cells, labels.tolist(), strict=True):
        if cell < 0:
            assert (kind, color, size) == (0, -1, -1)
        else:
            thing = it.scene.things[cell]
            assert scenes.KINDS[kind - 1] == thing.kind
            assert scenes.ATTRIBUTES["color"][color] == thing.color
            assert scenes.ATTRIBUTES["size"][size] == thing.size


def test_source_is_random_access_and_blank_pictures_show_nothing():
    source, blank = DemoSource(length=50, seed=4), DemoSource(length=50, seed=4, blank=True)
    row = source[7]
    assert len(source) == 50 and set(row) == {"id", "problem", "answer", "images", "options"}
    assert row["answer"] in row["options"] and row["options"] == blank[7]["options"]
    assert np.array_equal(np.asarray(row["images"][0]), world.item(4, 7, setting="train").image)
    assert {**blank[7], "images": 0} == {**row, "images": 0}
    assert np.unique(np.asarray(blank[7]["images"][0])).tolist() == [128]
    other = DemoSource(length=50, seed=4, setting="conflict")
    assert np.array_equal(np.asarray(other[7]["images"][0]), world.item(4, 7, setting="conflict").image)
    assert len({repr(source), repr(blank), repr(other)}) == 3
    with pytest.raises(IndexError):
        source[50]


def test_judges_read_descriptions():
    bananas = dataclasses.replace(scenes.PRIORS["bananas"], count="two", size="small", color="blue")
    scene = scenes.Scene((bananas, scenes.PRIORS["trees"]), (-1,) * 9)
    text = "bananas : two small blue, trees : one large green"
    assert scenes.describe(scene.things[::-1]) == text
    assert scenes.description_states(text, "bananas", "color") == "blue"
    assert scenes.description_states(text, "trees", "count") == "one"
    assert scenes.description_states(text, "leaves", "count") is None
    assert scenes.description_states("bananas : blue red", "bananas", "color") is None
    assert scenes.description_states("", "bananas", "color") is None
    assert scenes.is_description_correct(f"  {text} ", scene)
    for wrong in ("", text.split(",")[0], text.replace("blue", "red"), text + ", trees : one large green"):
        assert not scenes.is_description_correct(wrong, scene)


def test_responses_state_what_they_are_made_to_state():
    rng = np.random.default_rng(0)
    for it in _items("conflict", 60):

        def states(response, it=it):
            return scenes.description_states(response.description, it.asks.kind, it.asks.attribute), response.answer

        assert states(responses.faithful(it)) == (it.answer, it.answer)
        assert scenes.is_description_correct(responses.faithful(it).description, it.scene)
        assert states(responses.prior_driven(it, in_description=True)) == (it.prior_value, it.prior_value)
        assert states(responses.prior_driven(it, in_description=False)) == (it.answer, it.prior_value)
        prior_text = responses.prior_driven(it, in_description=True).description
        assert world.description_states_prior(prior_text, it)
        wrong = next(v for v in it.asks.choices if v != it.answer)
        assert states(responses.text_driven(it, wrong)) == (wrong, wrong)
        leaky = responses.privileged_response(rng, it, reference=wrong, leak=1.0)
        assert states(leaky) == (wrong, wrong)
        honest = responses.privileged_response(rng, it, reference=wrong, leak=0.0)
        assert scenes.is_description_correct(honest.description, it.scene)
        assert honest.answer in (wrong, it.answer)


def test_rates_are_the_callers():
    rng = np.random.default_rng(0)
    items = _items("conflict", 400)
    rates = {"stated": 0.4, "unstated": 0.2, "in_description": 0.5, "slips": 0.0}
    drawn = [(it, responses.student_response(rng, it, **rates)) for it in items]
    for states_prior, rate in ((True, 0.4), (False, 0.2)):
        group = [r.answer == it.prior_value for it, r in drawn if it.states_prior == states_prior]
        assert abs(np.mean(group) - rate) < 0.1
    leaks = [world.description_states_prior(r.description, it) for it, r in drawn if r.answer == it.prior_value]
    assert abs(np.mean(leaks) - 0.5) < 0.15
    true = np.mean([responses.draw_reference(rng, it, random_rate=0.0) == it.answer for it in items])
    mixed = np.mean([responses.draw_reference(rng, it, random_rate=1.0) == it.answer for it in items])
    assert true == 1 and 0.2 < mixed < 0.45


def test_malformed_responses_break_the_grammar():
    rng = np.random.default_rng(0)
    it = world.item(0, 0, setting="train")
    good = responses.completion(responses.faithful(it))
    assert good == (
        f" {scenes.describe(it.scene.things)} </description> <think> the {it.asks.kind} are {it.answer} </think>"
        f" \\boxed{{{it.answer}}}"
    )
    bad = {responses.malformed(rng, responses.faithful(it)) for _ in range(100)}
    assert len(bad) == 6 and good not in bad
    parts = (" </description> <think> ", " </think> \\boxed{", "}")
    for text in bad:
        assert not all(part in text for part in parts) or "<think> </think>" in text


def test_words_are_single_tokens_and_tags_are_several(assets_folder):
    tokenizer = Tokenizer.from_file(str(assets_folder / "tokenizer.json"))
    words = [*scenes.KINDS, *(v for values in scenes.ATTRIBUTES.values() for v in values), "Reference"]
    for word in words:
        bare = word[0].isupper()
        assert len(tokenizer.encode(word if bare else f" {word}").ids) == 1, word
    for it in (world.item(3, i, setting="train", world=assets_folder.name) for i in range(60)):
        assert all(len(tokenizer.encode(word).ids) == 1 for word in re.findall(" [a-z]+", it.asks.text))
        for token in tokenizer.encode(responses.completion(responses.faithful(it)).split(" </")[0]).tokens:
            assert token == "," or token[0] == "Ġ" and len(token) > 1, token
    for tag in ("<description>", " </description>", " <think>", " </think>", " \\boxed{"):
        assert len(tokenizer.encode(tag).ids) >= 2, tag
    assert "{red" in tokenizer.encode(" \\boxed{red}").tokens


def test_any_text_round_trips_and_control_tokens_are_single(assets_folder):
    tokenizer = Tokenizer.from_file(str(assets_folder / "tokenizer.json"))
    config = json.loads((assets_folder / "config.json").read_text())
    for text in ("Hällo 日本\n\n {problem} don't  \t\x00é", "1234 </description>\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(len(tokenizer.encode(token).ids) == 1 for token in assets.CONTROL)
    assert config["image_token_id"] == tokenizer.token_to_id("<|image_pad|>")
    assert config["vocab_size"] % 64 == 0 and config["vocab_size"] >= tokenizer.get_vocab_size()


def test_transformers_reads_the_folder_alike(assets_folder):
    import transformers

    fast = transformers.AutoTokenizer.from_pretrained(assets_folder)
    raw = Tokenizer.from_file(str(assets_folder / "tokenizer.json"))
    text = " bananas : two small blue </description> <think> 日本 don't </think> \\boxed{red}"
    assert fast.encode(text) == raw.encode(text).ids
    content = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    messages = [{"role": "user", "content": content}]
    chat = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )
