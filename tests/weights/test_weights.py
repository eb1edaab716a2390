"""Checkpoints and adapters in and out, against what transformers and peft themselves write and read.

That loaded weights give torch's logits is shown in `test_models.py`, whose models are loaded in the same way.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
import torch_models as tm
from cases import others_slow
from transformers import Qwen2_5_VLForConditionalGeneration

from vigos_jax.errors import InputError
from vigos_jax.method.packing import Buckets, pack_prompts
from vigos_jax.method.rows import Row
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import adapter_table, tensor_table
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.weights import adapters, reading, writing

SAMPLE = tm.make_sample([4, tm.TALL, 7], seed=1)
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["gate_proj", "up_proj", "down_proj"]
LANGUAGE_ONLY = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def flat_config(nested: dict) -> dict:
    """What published checkpoints have: text fields at the top, rope theta and sections apart, `in_chans`."""
    text, vision = dict(nested["text_config"]), dict(nested["vision_config"])
    rope = text.pop("rope_parameters")
    vision["in_chans"] = vision.pop("in_channels")
    vision.pop("rope_parameters", None)
    return {
        **text,
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": vision,
        **{k: v for k, v in nested.items() if k.endswith("_id") or k == "tie_word_embeddings"},
    }


def torch_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by another path than ours."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in safetensors.torch.load_file(f).items()}


def bits(x) -> np.ndarray:
    """The bytes of a torch, numpy or jax array, with its shape; so that bfloat16 compares exactly."""
    if isinstance(x, torch.Tensor):
        x = x.contiguous().view(torch.uint8).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    x = np.ascontiguousarray(x)
    return np.frombuffer(x.tobytes(), np.uint8)


def assert_same_tensors(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert tuple(ours[name].shape) == tuple(theirs[name].shape), name
        np.testing.assert_array_equal(bits(ours[name]), bits(theirs[name]), err_msg=name)


def load(folder: pathlib.Path, *, dtype=np.float32, shardings=None) -> tuple[ModelConfig, dict]:
    config = reading.load_config(folder)
    abstract = abstract_variables(VisionLanguageModel(config))["params"]
    return config, reading.load_params(folder, config, abstract, dtype=dtype, shardings=shardings)


def by_name(params, config: ModelConfig, *, dtype) -> dict[str, np.ndarray]:
    return dict(writing.file_tensors(params, tensor_table(config), config, dtype=dtype))


def our_logits(model: VisionLanguageModel, variables, sample: tm.Sample = SAMPLE) -> np.ndarray:
    n = len(sample.ids)
    buckets = Buckets(patches=(128,), prompt=(n,), completion=(1,), sequence=(1,))
    batch = pack_prompts([Row(sample.images, sample.turn)], config=model.config, buckets=buckets)

    @jax.jit
    def run(variables):
        images = model.apply(variables, batch.vision, method="encode_images")
        hidden, _ = model.apply(variables, batch.text, images)
        return model.apply(variables, hidden, method="logits")

    return np.asarray(run(variables)[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Float32 checkpoints as transformers writes them. Not to be changed: copy them."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {h: tm.save(tm.cached_model(tied=h == "tied"), root / h) for h in ("tied", "untied")}


@pytest.fixture
def folder(folders, tmp_path) -> pathlib.Path:
    """A private copy of the untied checkpoint."""
    return pathlib.Path(shutil.copytree(folders["untied"], tmp_path / "model"))


def rewrite(folder: pathlib.Path, change) -> None:
    """Applies `change` to the dict of a folder's tensors."""
    tensors = torch_tensors(folder)
    change(tensors)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


# -- config.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_flat_and_nested_config_say_the_same(folders, head):
    nested = json.loads((folders[head] / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested
    config = ModelConfig.from_hf(nested)
    assert ModelConfig.from_hf(flat_config(nested)) == config
    assert config.tie_embeddings == (head == "tied")
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 2, 16, 5e3)
    assert config.mrope_section == (2, 3, 3) and config.image_token_id == tm.IMAGE
    v = config.vision
    assert (v.full_attention_blocks, v.window_patches, v.window_side, v.patch_dim) == ((1, 3), 64, 4, 1176)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "llama"}, ["'llama'", "qwen2_5_vl"]),
        ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, ["mrope_section", "(2, 3, 4)", "16"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "false"]),
        ({"hidden_size": None}, ["config.json"]),
        ({"vision_config": {}}, ["out_hidden_size 3584"]),
    ],
)
def test_a_config_that_cannot_be_used(folders, tmp_path, change, named):
    raw = flat_config(json.loads((folders["tied"] / "config.json").read_text())) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as error:
        ModelConfig.load(tmp_path)
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {}}, "unnamed"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_a_quantised_checkpoint_is_refused_before_its_tensors_are_listed(folder, change, named):
    """Merged from one, full precision at last, it would be exported with a config.json that nothing loads."""
    rewrite(folder, lambda t: t.update({"model.norm.weight.absmax": torch.ones(1)}))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": None}))
    assert ModelConfig.load(folder)
    change = {k: raw[k] | v if k == "text_config" else v for k, v in change.items()}
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(InputError, match=rf"quantised \({named}\), .*; choices: .*config\.json without") as e:
        load(folder)
    assert "absmax" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_config_that_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


# -- weights in -------------------------------------------------------------------------------------------------


def as_saved(folder):
    assert (folder / "model.safetensors").exists()


def as_published(folder):
    nested = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(flat_config(nested)))
    assert {"visual.patch_embed.proj.weight", "model.layers.0.self_attn.q_proj.weight"} <= torch_tensors(folder).keys()


def with_module_names(folder):
    """The names of the modules in memory, as other tools write them."""
    state = tm.cached_model(tied=not (folder / "untied").exists()).state_dict()
    state = {k: v for k, v in state.items() if k != "lm_head.weight" or (folder / "untied").exists()}
    assert {"model.visual.merger.ln_q.weight", "model.language_model.norm.weight"} <= state.keys()
    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, folder / "model.safetensors")


def sharded(folder):
    (folder / "model.safetensors").unlink()
    tm.save(tm.cached_model(tied=not (folder / "untied").exists()), folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3 and (folder / "model.safetensors.index.json").exists()


def with_wrappers_names(folder):
    """As a model is saved inside torch.compile and data-parallel wrappers."""
    tensors = torch_tensors(folder)
    wrapped = {
        f"module._orig_mod.{k.replace('mlp.', '_checkpoint_wrapped_module.mlp.')}": v for k, v in tensors.items()
    }
    safetensors.torch.save_file(wrapped, folder / "model.safetensors")


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("layout", [as_saved, as_published, with_module_names, with_wrappers_names, sharded])
def test_every_layout_loads_to_the_same_tensors(folders, tmp_path, head, layout):
    folder = shutil.copytree(folders[head], tmp_path / "model")
    if head == "untied":
        (folder / "untied").touch()
    layout(folder)
    config, params = load(folder)
    assert_same_tensors(by_name(params, config, dtype=np.float32), torch_tensors(folders[head]))


def test_bfloat16_is_kept_to_the_bit(folders, tmp_path):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders["tied"], dtype=torch.bfloat16)
    folder = tm.save(model, tmp_path / "model")
    on_disk = torch_tensors(folder)
    assert {x.dtype for x in on_disk.values()} == {torch.bfloat16}
    config, params = load(folder, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_tensors(by_name(params, config, dtype=jnp.bfloat16), on_disk)
    _, wide = load(folder, dtype=np.float32)  # widening is exact
    assert_same_tensors(by_name(wide, config, dtype=np.float32), {k: x.float() for k, x in on_disk.items()})


def test_float32_and_float16_files_round_to_the_dtype_asked(folders, folder):
    on_disk = torch_tensors(folder)
    config, params = load(folder, dtype=jnp.bfloat16)
    assert_same_tensors(by_name(params, config, dtype=jnp.bfloat16), {k: x.bfloat16() for k, x in on_disk.items()})
    rewrite(folder, lambda t: t.update({k: v.half() for k, v in t.items()}))
    _, params = load(folder)
    assert_same_tensors(by_name(params, config, dtype=np.float32), {k: x.half().float() for k, x in on_disk.items()})


def test_leaves_go_where_the_shardings_say(folders):
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    abstract = abstract_variables(VisionLanguageModel(ModelConfig.load(folders["tied"])))["params"]
    spec = jax.sharding.PartitionSpec
    shardings = jax.tree.map(
        lambda x: jax.sharding.NamedSharding(mesh, spec(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else spec()),
        abstract,
    )
    config, params = load(folders["tied"], shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    kernel = params["layers"]["q_proj"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 64, 32)}
    assert_same_tensors(by_name(params, config, dtype=np.float32), torch_tensors(folders["tied"]))


def test_an_untied_checkpoint_without_its_head_is_refused(folder):
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"missing lm_head\.weight \(.*tie_word_embeddings=true"):
        load(folder)


def test_one_error_lists_all_that_is_wrong(folder):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["visual.merger.mlp.0.bias"]
        tensors["model.layers.5.input_layernorm.weight"] = torch.ones(64)
        tensors["visual.extra"] = torch.ones(1)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 63)
        tensors["visual.patch_embed.proj.weight"] = torch.ones(32, 3, 2, 14, 13)
        tensors["model.layers.2.self_attn.k_proj.bias"] = torch.ones(32, 1)
        tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)

    rewrite(folder, spoil)
    with pytest.raises(InputError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and "8 problem" in message
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "missing visual.merger.mlp.0.bias",
        "unexpected model.layers.5.input_layernorm.weight",
        "unexpected visual.extra",
        "model.layers.0.self_attn.q_proj.weight has shape [64, 63], expected [64, 64]",
        "visual.patch_embed.proj.weight has shape",
        "model.layers.2.self_attn.k_proj.bias has shape [32, 1], expected [32]",
        "model.norm.weight has dtype I32",
        "BF16",
    ):
        assert part in message


def test_a_square_kernel_is_not_taken_the_wrong_way_round(folders):
    """[64, 64] fits both ways, so no shape check can see it: our kernel must be the file's transpose."""
    _, params = load(folders["untied"])
    q = torch_tensors(folders["untied"])["model.layers.2.self_attn.q_proj.weight"].numpy()
    assert q.shape == (64, 64)
    np.testing.assert_array_equal(params["layers"]["q_proj"]["kernel"][2], q.T)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.bool])
def test_other_dtypes_are_refused(folder, dtype):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=dtype)}))
    with pytest.raises(InputError, match=r"model\.norm\.weight has dtype \w+, not one of F32, BF16, F16"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000, 0.5, -1])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"model\.safetensors.*complete"):
        load(folder)


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "holds no weights"


def pickled_weights_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.ones(1)}, folder / "pytorch_model.bin")
    return "holds no weights"


def index_names_a_missing_shard(folder):
    weight_map = {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "model-00002-of-00002.safetensors"


def index_is_no_json(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return "must be a safetensors index"


def index_has_no_map(folder):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return "must be a safetensors index"


def index_is_a_list(folder):
    (folder / "model.safetensors.index.json").write_text("[]")
    return "must be a safetensors index"


def index_names_no_file(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "model.safetensors"}}')
    return "must be a safetensors index"


def index_leaves_a_shard_out(folder):
    (folder / "model.safetensors").unlink()
    tm.save(tm.cached_model(tied=False), folder, max_shard_size="100KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != lost}
    path.write_text(json.dumps(index))
    return "missing model.norm.weight"


@pytest.mark.parametrize(
    "spoil",
    [
        no_weights,
        pickled_weights_only,
        index_names_a_missing_shard,
        index_is_no_json,
        index_has_no_map,
        index_is_a_list,
        index_names_no_file,
        index_leaves_a_shard_out,
    ],
)
def test_a_folder_that_is_not_whole(folder, spoil):
    expected = spoil(folder)
    with pytest.raises(InputError) as error:
        load(folder)
    assert expected in str(error.value) and "\n" not in str(error.value)


# -- adapters ---------------------------------------------------------------------------------------------------


def save_adapter(path: pathlib.Path, **config) -> tuple[peft.PeftModel, pathlib.Path]:
    model = tm.with_adapter(tm.cached_model(tied=False), **config)
    return model, tm.save(model, path)


def edit_json(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "config, rank, scale, language, vision",
    others_slow(
        [
            ({"r": 4, "lora_alpha": 6, "target_modules": LANGUAGE}, 4, 1.5, LANGUAGE, VISION),
            ({"r": 2, "lora_alpha": 8, "target_modules": LANGUAGE_ONLY}, 2, 4.0, LANGUAGE, []),
            (
                {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
                4,
                1.5,
                ["q_proj", "up_proj"],
                ["up_proj"],
            ),
        ]
    ),
    ids=["list", "regex", "rslora"],
)
def test_adapters_give_pefts_logits(folders, tmp_path, config, rank, scale, language, vision):
    reference, path = save_adapter(tmp_path, **config)
    spec = adapters.adapter_spec(path, dropout=0.1)
    assert (spec.rank, spec.scale, spec.dropout) == (rank, scale, 0.1)
    assert spec.language == set(language) and spec.vision == set(vision)

    model_config, base = load(folders["untied"])
    model = VisionLanguageModel(model_config, lora=spec)
    lora = adapters.load_adapter(path, model_config, spec, abstract_variables(model)["lora"])
    assert {x.dtype for x in jax.tree.leaves(lora)} == {np.dtype(np.float32)}
    expected = tm.torch_logits(reference, [SAMPLE])[0]
    assert tm.max_difference(expected, tm.torch_logits(tm.cached_model(tied=False), [SAMPLE])[0]) > 0.1
    assert tm.max_difference(our_logits(model, {"params": base, "lora": lora}), expected) <= tm.TOLERANCE

    # What we would write is what peft wrote: the same names, the same bits.
    tensors = dict(writing.file_tensors(lora, adapter_table(model_config, spec), model_config, dtype=np.float32))
    assert_same_tensors(tensors, safetensors.torch.load_file(path / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory) -> pathlib.Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), r=4, lora_alpha=8, target_modules=LANGUAGE_ONLY)[1]


@pytest.fixture
def adapter(adapter_folder, tmp_path) -> pathlib.Path:
    """A private copy of an adapter of the decoder."""
    return pathlib.Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))


def load_adapter(folders, path: pathlib.Path):
    config = ModelConfig.load(folders["untied"])
    spec = adapters.adapter_spec(path, dropout=0.0)
    abstract = abstract_variables(VisionLanguageModel(config, lora=spec))["lora"]
    return adapters.load_adapter(path, config, spec, abstract)


def test_a_bfloat16_adapter_becomes_float32(folders, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = {k: v.bfloat16() for k, v in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    lora = load_adapter(folders, adapter)
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
    np.testing.assert_array_equal(lora["layers"]["mlp"]["up_proj"]["a"][1], tensors[name].float().numpy().T)


@pytest.mark.parametrize(
    "spelling",
    others_slow(
        [
            lambda k: k.replace("model.model.language_model.", "model.model."),
            lambda k: k.replace(".weight", ".default.weight"),
            lambda k: k.replace(".weight", ".my_adapter.weight"),
            lambda k: "module." + k,
            lambda k: "_orig_mod." + k,
            lambda k: k.replace("layers.", "layers._orig_mod."),
            lambda k: (
                "module." + k.replace("self_attn", "_fsdp_wrapped_module.self_attn").replace(".wei", ".default.wei")
            ),
        ],
        quick=2,
    ),
    ids=["older", "default", "named", "module", "_orig_mod", "inside", "together"],
)
def test_other_names_of_an_adapter_load_too(folders, adapter, spelling):
    expected = load_adapter(folders, adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    others = {spelling(k): v for k, v in tensors.items()}
    assert others.keys() != tensors.keys()
    safetensors.torch.save_file(others, file)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folders, adapter), expected)


def test_two_adapters_in_a_file_are_refused(folders, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    both = {k.replace(".weight", f".{name}.weight"): v.clone() for k, v in tensors.items() for name in ("a", "b")}
    safetensors.torch.save_file(both, file)
    with pytest.raises(InputError, match="must be there once"):
        load_adapter(folders, adapter)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"alora_invocation_tokens": [5, 6]},  # switches the adapter on in the middle of a sequence
        {"init_lora_weights": "pissa"},  # these change the base weights when peft loads them
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "OLoRA"},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"r": 0},
    ],
    ids=str,
)
def test_options_that_would_be_ignored_are_refused(adapter, option):
    (field,) = option
    raw = json.loads((adapter / "adapter_config.json").read_text())
    assert field in raw, "peft calls it something else now"
    edit_json(adapter / "adapter_config.json", **option)
    with pytest.raises(InputError, match=rf"\b{field}\b"):
        adapters.adapter_spec(adapter, dropout=0.0)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_how_an_adapter_was_initialised_does_not_matter(folders, adapter, init):
    expected = load_adapter(folders, adapter)
    edit_json(adapter / "adapter_config.json", init_lora_weights=init)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folders, adapter), expected)


def test_an_adapter_without_tensors_is_refused(adapter):
    safetensors.torch.save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no adapter tensor"):
        adapters.adapter_spec(adapter, dropout=0.0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [["qkv"], ["q_proj", "proj"], ["lm_head"], ["q_proj", "embed_tokens"]])
def test_modules_that_carry_no_adapter_here_are_refused(tmp_path, targets):
    _, path = save_adapter(tmp_path, r=2, lora_alpha=2, target_modules=targets)
    with pytest.raises(InputError, match=r"adapter tensor base_model\.model\.\S+ "):
        adapters.adapter_spec(path, dropout=0.0)


def test_an_adapter_on_some_layers_is_refused(folders, tmp_path):
    targets = r".*language_model\.layers\.[01]\.self_attn\.q_proj"
    _, path = save_adapter(tmp_path, r=2, lora_alpha=2, target_modules=targets)
    with pytest.raises(InputError, match=r"missing \S+layers\.2\.self_attn\.q_proj\.lora_A\.weight"):
        load_adapter(folders, path)


def test_an_adapter_whose_rank_is_not_its_tensors(folders, adapter):
    edit_json(adapter / "adapter_config.json", r=8)
    with pytest.raises(InputError, match=r"lora_A\.weight has shape \[4, 64\], expected \[8, 64\]"):
        load_adapter(folders, adapter)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("keep", [None, 0, 100])
def test_an_adapter_folder_that_is_not_whole(folders, adapter, file, keep):
    path = adapter / file
    data = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[:keep])
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        load_adapter(folders, adapter)


def test_a_pickled_adapter_is_not_read(folders, adapter):
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_adapter(folders, adapter)


# -- weights out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_what_is_written_loads_in_transformers_to_the_bit(folders, tmp_path, head, dtype):
    config, params = load(folders[head])
    numpy_dtype, torch_dtype = jnp.dtype(dtype), getattr(torch, dtype)
    limit = 60_000
    tensors = by_name(params, config, dtype=numpy_dtype)
    writing.save_sharded(tmp_path, iter(tensors.items()), max_shard_bytes=limit)
    shutil.copy(folders[head] / "config.json", tmp_path)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    n = len(shards)
    assert n > 3 and shards == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*shards, "config.json", "model.safetensors.index.json"]
    )
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for shard in shards:
        held = safetensors.torch.load_file(tmp_path / shard)
        assert {name for name, where in index["weight_map"].items() if where == shard} == held.keys()
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= limit
        with safetensors.safe_open(tmp_path / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}

    reloaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch_dtype, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = tm.cached_model(tied=head == "tied").state_dict()
    assert_same_tensors(reloaded.state_dict(), {k: v.to(torch_dtype) for k, v in original.items()})


def test_one_shard_needs_no_index(folders, tmp_path):
    config, params = load(folders["untied"])
    tensors = by_name(params, config, dtype=np.float32)
    size = sum(x.nbytes for x in tensors.values())
    writing.save_sharded(tmp_path, iter(tensors.items()), max_shard_bytes=size)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same_tensors(torch_tensors(tmp_path), torch_tensors(folders["untied"]))


@pytest.mark.parametrize(
    "sizes, limit, expected",
    [
        ({"a": 2, "b": 100, "c": 2}, 16, [["a"], ["b"], ["c"]]),  # one larger than a shard gets its own
        ({"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}, 16, [["a", "b"], ["c", "d"], ["e"]]),
        ({"a": 4, "b": 1, "c": 3, "d": 1}, 16, [["a"], ["b", "c"], ["d"]]),
    ],
)
def test_shards_are_filled_in_order(tmp_path, sizes, limit, expected):
    tensors = ((name, np.ones(n, np.float32)) for name, n in sizes.items())
    writing.save_sharded(tmp_path, tensors, max_shard_bytes=limit)
    held = [sorted(safetensors.torch.load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert held == expected
