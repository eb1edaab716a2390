"""Qwen3.5 in and out: sharded bfloat16 with float32 islands and layers that nothing here runs."""

import json
import pathlib
import warnings

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import tiny_runs as runs
import torch
import torch_models as tm
from cases import others_slow
from helpers import make_processor_folder
from parity import NOTICEABLE, load_pair, make_run, pack
from transformers import AutoConfig, AutoModelForImageTextToText

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.variables import cast_floats
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.weights import adapters, reading

ISLANDS = (".A_log", ".linear_attn.norm.weight")
SPEC = LoraSpec(rank=2, scale=3.0, language=frozenset(FAMILIES["qwen3_5"].language_adapters))
_LAYER = (
    *("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
)
FURTHER = [f"mtp.layers.0.{n}.weight" for n in _LAYER]
FURTHER += [f"mtp.{n}.weight" for n in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


def tensors_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    return {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}


def write_model(folder: pathlib.Path, *, islands: bool) -> pathlib.Path:
    """As the hub has it. islands: the decay and the gated norm are float32, as in 3.5 and not in 3.6."""
    make_processor_folder(folder, family="qwen3_5", text={"tie_word_embeddings": False, "torch_dtype": "bfloat16"})
    model = tm.tiny_model_of(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(5)
    tensors = model.state_dict() | {n: torch.randn(3, 5, generator=generator) for n in FURTHER}
    tensors = {k: v if islands and k.endswith(ISLANDS) else v.bfloat16() for k, v in tensors.items()}
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::3]}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module", params=others_slow([True, False]), ids=["islands", "all bfloat16"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hub") / "model", islands=request.param)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return runs.write_adapter(tmp_path_factory.mktemp("peft") / "adapter", folder, SPEC)


def sample_of(config: ModelConfig) -> tm.Sample:
    """An image in text that is longer than a chunk."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(16, config.vision.patch_dim)).astype(np.float32)
    ids = (*rng.integers(5, 200, 4), *[config.image_token_id] * 4, *rng.integers(5, 200, 70))
    return tm.Sample(tuple(int(i) for i in ids), (tm.EncodedImage(patches, (1, 4, 4)),))


@torch.no_grad()
def their_logits(model: torch.nn.Module, config: ModelConfig) -> np.ndarray:
    sample = sample_of(config)
    types = (torch.tensor([sample.ids]) == config.image_token_id).int()
    return model(**sample.torch_inputs() | {"mm_token_type_ids": types}).logits.float().numpy()


def our_logits(model: VisionLanguageModel, variables) -> np.ndarray:
    sample = sample_of(model.config)
    batch = pack([sample], model.config, length=len(sample.ids))
    return np.asarray(make_run(model)(variables, batch.vision, batch.text)[1])


def check_both_read(folder: pathlib.Path) -> np.ndarray:
    """Our logits are transformers', both read from the folder; returns them."""
    reference = in_torch(folder)
    pair = load_pair(reference, folder)
    theirs = their_logits(reference, pair.config)
    assert tm.max_difference(our_logits(pair.model, {"params": pair.base}), theirs) <= tm.TOLERANCE
    return theirs


def in_torch(folder: pathlib.Path) -> torch.nn.Module:
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def test_what_is_on_disk_is_loaded(folder):
    """In float32 every bit; in bfloat16 all but the islands is rounded; what nothing runs is left alone."""
    check_both_read(folder)
    config = ModelConfig.load(folder)
    abstract = abstract_variables(VisionLanguageModel(config))["params"]
    wide = reading.load_params(folder, config, abstract, dtype=np.float32)
    narrow = reading.load_params(folder, config, abstract, dtype=jnp.bfloat16)
    runs.assert_same_trees(narrow, cast_floats(wide, jnp.bfloat16))
    assert narrow["layers"]["linear_0"]["mixer"]["A_log"].dtype == jnp.float32
    assert narrow["layers"]["linear_0"]["mixer"]["dt_bias"].dtype == jnp.bfloat16
    log_rate = tensors_of(folder)["model.language_model.layers.0.linear_attn.A_log"].float().numpy()
    np.testing.assert_array_equal(narrow["layers"]["linear_0"]["mixer"]["A_log"][0], log_rate)


def test_export_of_the_base_is_the_base_bit_by_bit(folder, world, tmp_path):
    arguments = ["--mode=export", f"--config.model.path={folder}", "--config.model.dtype=bfloat16"]
    arguments += ["--config.export.dtype=bfloat16", "--config.export.max_shard_gb=0.0001"]
    assert world.run(*arguments, f"--config.export.output={tmp_path / 'out'}") == 0
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and len(set(FURTHER)) == 15 and set(FURTHER) <= after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype and torch.equal(x, after[name]), name
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.slow
def test_a_merged_export_is_the_student_in_transformers(folder, adapter, world, tmp_path):
    """Merged into float32; what is not adapted keeps its bits."""
    out = tmp_path / "out"
    arguments = ["--mode=export", f"--config.model.path={folder}", f"--config.model.adapter={adapter}"]
    arguments += [f"--config.export.output={out}", "--config.export.dtype=float32", "--config.export.check=True"]
    assert world.run(*arguments) == 0
    merged, base = check_both_read(out), check_both_read(folder)
    assert "\nlicense: apache-2.0\n" in (out / "README.md").read_text()  # the family's: the base has no card
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's use of transformers, not ours
        in_peft = peft.PeftModel.from_pretrained(in_torch(folder), adapter).eval()
    assert tm.max_difference(merged, their_logits(in_peft, ModelConfig.load(folder))) <= tm.TOLERANCE
    assert tm.max_difference(merged, base) > NOTICEABLE
    before, after = tensors_of(folder), tensors_of(out)
    kept = [n for n in before if not n.endswith(tuple(f".{name}.weight" for name in SPEC.language)) or "mtp." in n]
    assert all(torch.equal(before[n].float(), after[n].float()) for n in kept) and len(kept) > 30


@pytest.mark.slow
def test_an_adapter_export_is_the_student_in_peft(folder, adapter, world, tmp_path):
    out = tmp_path / "out"
    arguments = ["--mode=export", f"--config.model.path={folder}", f"--config.model.adapter={adapter}"]
    assert world.run(*arguments, f"--config.export.output={out}", "--config.export.kind=adapter") == 0
    before = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    after = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_peft = peft.PeftModel.from_pretrained(in_torch(folder), out).eval()
    adapted = {n.rsplit(".", 3)[0] for n, _ in in_peft.named_parameters() if ".lora_A." in n}
    assert len(adapted) == 6 + 7  # one layer of each kind
    config = ModelConfig.load(folder)
    spec = adapters.adapter_spec(out, dropout=0.0)
    assert spec.language == SPEC.language and spec.scale == SPEC.scale
    model = VisionLanguageModel(config, lora=spec)
    lora = adapters.load_adapter(out, config, spec, abstract_variables(model)["lora"])
    base = reading.load_params(folder, config, abstract_variables(model)["params"], dtype=np.float32)
    ours = our_logits(model, {"params": base, "lora": lora})
    assert tm.max_difference(ours, their_logits(in_peft, config)) <= tm.TOLERANCE


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("model.language_model.layers.0.linear_attn.A_log"), "missing .*linear_attn.A_log"),
        (lambda t: t.update({"model.mtp.fc.weight": torch.zeros(2)}), "unexpected model.mtp.fc.weight"),
        (
            lambda t: t.update({"model.language_model.layers.0.linear_attn.conv1d.weight": torch.zeros(64, 1, 3)}),
            r"conv1d.weight has shape \[64, 3\], expected \[64, 4\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, named):
    folder = write_model(tmp_path / "model", islands=True)
    tensors = tensors_of(folder)
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig.load(folder)
    abstract = abstract_variables(VisionLanguageModel(config))["params"]
    with pytest.raises(InputError, match=named):
        reading.load_params(folder, config, abstract, dtype=np.float32)
