"""A folder as transformers saves it today: it loads, trains two steps, is exported, and loads again in both."""

import json
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
import tiny_runs as runs
import torch
import torch_models as tm
from helpers import CHAT_TEMPLATE, make_processor_folder
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)

from vigos_jax.data.processor import Processor
from vigos_jax.export import verify
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.weights import reading

PROCESSORS = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
THINKING = CHAT_TEMPLATE.replace(
    "assistant\\n' }}{%- endif -%}",
    "assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}{%- endif -%}",
)
assert THINKING != CHAT_TEMPLATE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


def save_with_transformers(folder: pathlib.Path, *, family: str, template=CHAT_TEMPLATE) -> pathlib.Path:
    """Model and processor by `save_pretrained`: nothing in it is written by these tests."""
    parts = make_processor_folder(folder.with_name(folder.name + "-parts"), family=family)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(parts))
    tm.save(model, folder, max_shard_size="50KB")
    tokenizer, images = AutoTokenizer.from_pretrained(parts), AutoImageProcessor.from_pretrained(parts, backend="pil")
    # A video processor needs torchvision; what stands in for it is of no interest here.
    with mock.patch.object(PROCESSORS[family], "check_argument_for_proper_class"):
        named = {"default": template, "rag": "{{ 'of another use' }}"}
        processor = PROCESSORS[family](images, tokenizer, images, chat_template=named)
    processor.save_pretrained(folder)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    assert {"processor_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"} <= names
    assert not {"preprocessor_config.json", "chat_template.json"} & names
    assert "hidden_size" not in json.loads((folder / "config.json").read_text())  # the nested layout
    return folder


@torch.no_grad()
def logits_of_both(folder: pathlib.Path, student) -> tuple[np.ndarray, np.ndarray]:
    """Ours and transformers' logits of the text behind an image, both read from the folder: [tokens, V]."""
    processor, config = Processor.load(folder), reading.load_config(folder)
    model = VisionLanguageModel(config)
    params = reading.load_params(folder, config, abstract_variables(model)["params"], dtype=np.float32)
    rows = verify.prompt_rows(processor, student)[:1]
    batch, mask = verify.pack(rows, config)

    @jax.jit
    def run(params):
        images = model.apply({"params": params}, batch.vision, method="encode_images")
        hidden, _ = model.apply({"params": params}, jax.tree.map(np.asarray, batch.text), images)
        return model.apply({"params": params}, hidden, method="logits")[0]

    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([rows[0].prompt.ids])
    theirs = reference.eval()(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(rows[0].images[0].patches),
        image_grid_thw=torch.tensor([rows[0].images[0].grid]),
        mm_token_type_ids=(ids == config.image_token_id).int(),
    ).logits[0]
    n = mask.shape[1]
    return np.asarray(run(params))[-n:], theirs[-n:].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("family", PROCESSORS)
def test_a_folder_of_transformers_5_trains_and_comes_back(world, tmp_path, family, capsys):
    folder = save_with_transformers(tmp_path / "saved", family=family)
    workdir, out = tmp_path / "run", tmp_path / "out"
    flags = [f"--config.model.path={folder}", "--config.steps=2", f"--workdir={workdir}"]
    assert world.run(*flags) == 0
    rows = runs.read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows)
    export = ["--mode=export", f"--workdir={workdir}", f"--config.export.output={out}", "--config.export.check=True"]
    assert world.run(*export) == 0
    capsys.readouterr()

    prompt = type("Prompt", (), {"user": "{problem}", "assistant_prefill": "<description>"})
    ours, theirs = logits_of_both(out, prompt)
    before, _ = logits_of_both(folder, prompt)
    assert tm.max_difference(ours, theirs) <= tm.TOLERANCE
    assert tm.max_difference(before, theirs) > 10 * tm.TOLERANCE  # two steps were taken
    # What is not weights is as it was, for transformers too.
    text = "a red <|im_end|> cat"
    assert (
        AutoTokenizer.from_pretrained(out)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    )
    assert AutoTokenizer.from_pretrained(out).chat_template["default"] == CHAT_TEMPLATE
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    theirs = AutoImageProcessor.from_pretrained(out, backend="pil")(images=image, return_tensors="np")
    np.testing.assert_array_equal(Processor.load(out).encode_image(image).patches, theirs["pixel_values"])
    again = ["--config.steps=2", f"--config.model.path={out}", f"--workdir={tmp_path / 'again'}"]
    assert world.run(*again) == 0


@pytest.mark.slow
def test_a_thinking_template_is_switched_and_said(world, tmp_path, capsys):
    """Off by itself and said once; on, and a thought would swallow the format: refused before a workdir is made."""
    folder = save_with_transformers(tmp_path / "saved", family="qwen3_vl", template=THINKING)
    flags = [f"--config.model.path={folder}", "--config.steps=1", "--config.buckets.prompt=(96,)"]
    assert world.run(*flags, f"--workdir={tmp_path / 'run'}") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "chat template" in line]
    assert len(said) == 1 and repr("<think>\n\n</think>\n\n") in said[0] and "enable_thinking=False" in said[0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["chat_template_kwargs"] == {}
    switch = "--config.model.chat_template_kwargs.enable_thinking=True"
    assert world.run(*flags, f"--workdir={tmp_path / 'run'}", switch) == 2  # another run
    assert "chat_template_kwargs.enable_thinking: None -> True" in capsys.readouterr().err

    opens = THINKING.replace("enable_thinking is defined and enable_thinking is false", "enable_thinking")
    opens = opens.replace("<think>\\n\\n</think>\\n\\n", "<think>\\n")
    folder = save_with_transformers(tmp_path / "opens", family="qwen3_vl", template=opens)
    flags = [f"--config.model.path={folder}", f"--workdir={tmp_path / 'other'}", switch]
    assert world.run(*flags) == 2
    assert "chat_template_kwargs.enable_thinking=False" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_relative_paths_can_be_used_from_elsewhere(world, tmp_path, monkeypatch, capsys):
    """The run's own config.json, and the base that an adapter names; through a link that keeps its name."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "my_model").symlink_to(world.model)
    (tmp_path / "home" / "rows").symlink_to(world.data.parent)
    monkeypatch.chdir(tmp_path / "home")
    flags = ["--config.model.path=my_model", "--config.data.source=rows/data.jsonl", "--config.steps=1"]
    assert world.run(*flags, f"--workdir={tmp_path / 'run'}") == 0
    assert world.run(*flags, f"--workdir={tmp_path / 'run'}") == 0  # it is the same run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export = ["--mode=export", f"--workdir={tmp_path / 'run'}", "--config.export.kind=adapter"]
    assert world.run(*export, "--config.export.output=adapter") == 0
    base = json.loads(pathlib.Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "home" / "my_model")
    card = pathlib.Path("adapter/README.md").read_text()
    assert "my_model" in card and str(tmp_path) not in card  # local paths are not published
