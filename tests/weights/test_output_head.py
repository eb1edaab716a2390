"""The output head: what config.json says of it, what the weights hold, and what transformers makes of the two."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
import tiny_runs as runs
import torch
import torch_models as tm
from parity import NOTICEABLE, load_pair, pack, worst
from transformers import AutoModelForImageTextToText

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.plan.abstract_run import model_config_of
from vigos_jax.weights import reading

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
EMBEDDINGS = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path) -> pathlib.Path:
    """A tied checkpoint."""
    return tm.save(tm.cached_model(tied=True, family=request.param), tmp_path / "model")


def rewrite(folder: pathlib.Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors, next(n for n in EMBEDDINGS if n in tensors))
    tensors = {k: v.clone() for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: pathlib.Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_text(folder: pathlib.Path, **values) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | values)


def other_head(tensors, embedding) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = 0.5 * torch.randn(tensors[embedding].shape, generator=generator)
    tensors["lm_head.weight"] = tensors[embedding] + noise


def differences(folder: pathlib.Path) -> tuple[float, float]:
    """Ours from transformers' logits at all positions; and those from logits of a head that is the embedding."""
    reference = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    pair = load_pair(reference, folder)
    sample = tm.make_sample([4, tm.SMALL, 9], seed=8, family=pair.config.family)
    batch = pack([sample], pair.config, length=len(sample.ids))
    _, logits = pair.run({"params": pair.base}, batch.vision, batch.text)
    expected = tm.torch_logits(reference, [sample])
    tied = tm.torch_logits(tm.cached_model(tied=True, family=pair.config.family), [sample])
    return max(worst(logits, expected)), tm.max_difference(expected, tied)


def shard(folder: pathlib.Path) -> None:
    """The file's tensors in three files and an index; head and embedding lie apart."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[i::3]}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_shards(folder):
    shard(folder)


def under_other_names(folder):
    rewrite(folder, lambda t, _: t.update({f"module.{k}": t.pop(k) for k in list(t)}))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, in_shards])
def test_a_head_of_its_own_is_used_as_in_transformers(folder, layout, capsys):
    rewrite(folder, other_head)
    if layout:
        layout(folder)
    assert ModelConfig.load(folder).tie_embeddings and not reading.load_config(folder).tie_embeddings
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "tie_word_embeddings=true" in said[0] and "lm_head.weight" in said[0]
    ours, of_the_tied = differences(folder)
    assert ours <= tm.TOLERANCE and of_the_tied > NOTICEABLE
    assert model_config_of(str(folder)) == reading.load_config(folder)  # a plan has the same parameters


def test_a_head_of_its_own_under_other_names(folder):
    rewrite(folder, other_head)
    under_other_names(folder)
    assert not reading.load_config(folder).tie_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_embedding_changes_nothing(folder, capsys, dtype):
    """Another dtype of the copy is another copy only if it holds other numbers."""
    if dtype == torch.bfloat16:
        rewrite(folder, lambda t, e: t.update({e: t[e].to(dtype).float()}))
    rewrite(folder, lambda t, e: t.update({"lm_head.weight": t[e].to(dtype)}))
    assert reading.load_config(folder) == ModelConfig.load(folder) and ModelConfig.load(folder).tie_embeddings
    assert capsys.readouterr().err == ""
    assert differences(folder)[0] <= tm.TOLERANCE


def test_one_number_makes_it_another_head(folder):
    def change(tensors, embedding):
        tensors["lm_head.weight"] = tensors[embedding].clone()
        tensors["lm_head.weight"][-1, -1] += 1e-6

    rewrite(folder, change)
    assert not reading.load_config(folder).tie_embeddings


@pytest.mark.slow
def test_the_embedding_under_the_heads_name_alone(folder):
    """As tools write it that keep one name of two that share memory."""
    rewrite(folder, lambda t, e: t.update({"lm_head.weight": t.pop(e)}))
    ours, of_the_tied = differences(folder)
    assert ours <= tm.TOLERANCE and of_the_tied == 0


@pytest.mark.slow
@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("nested", [True, False, None])
def test_the_flag_at_either_place(folder, top, nested):
    """The head is the embedding exactly where transformers ties them; where it would draw one, ours is refused."""
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("tie_word_embeddings", None), raw["text_config"].pop("tie_word_embeddings", None)
    raw |= {} if top is None else {"tie_word_embeddings": top}
    raw["text_config"] |= {} if nested is None else {"tie_word_embeddings": nested}
    (folder / "config.json").write_text(json.dumps(raw))
    reference, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    is_tied = reference.lm_head.weight is reference.get_input_embeddings().weight
    assert is_tied != bool(report["missing_keys"])
    assert reading.load_config(folder).tie_embeddings == is_tied
    if is_tied:
        assert differences(folder)[0] <= tm.TOLERANCE
    else:
        with pytest.raises(InputError, match=r"missing lm_head\.weight \(.*tie_word_embeddings=true in config\.json"):
            load_pair(reference, folder)


def test_a_head_of_another_shape_is_refused_by_name(folder):
    rewrite(folder, lambda t, e: t.update({"lm_head.weight": t[e][:-1]}))
    with pytest.raises(InputError, match=r"lm_head\.weight has shape"):
        load_pair(None, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_keeps_the_head(tmp_path, tmp_path_factory, kind):
    """Flat and nested flag are put right: transformers loads the numbers that were trained with."""
    world = runs.make_world(tmp_path_factory)
    model = runs.write_model(tmp_path / "model")  # untied; the config is made to say otherwise
    edit(model, tie_word_embeddings=True)
    with runs.compile_once():
        flags = [f"--config.model.path={model}", f"--config.export.output={tmp_path / 'out'}", "--mode=export"]
        flags += [f"--config.model.adapter={world.adapter}"] if kind == "adapter" else []
        assert world.run(*flags, f"--config.export.kind={kind}", "--config.export.check=True") == 0
    if kind == "adapter":
        return
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weights = [safetensors.torch.load_file(f) for f in sorted(model.glob("*.safetensors"))]
    head = next(w["lm_head.weight"] for w in weights if "lm_head.weight" in w)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), head.numpy())
