"""What comes out loads in transformers and peft, and says the same as our student."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_runs as runs
import torch
from torch_models import TOLERANCE, max_difference
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vigos_jax.data.processor import EncodedImage
from vigos_jax.export import export as export_module
from vigos_jax.method.packing import Buckets, pack_prompts
from vigos_jax.method.rows import Row, make_row
from vigos_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory, "--config.lora.rank=0", "--config.optimizer.learning_rate=1e-3")


def sample_row(loaded) -> Row:
    """A picture and a question."""
    patches = np.random.default_rng(0).normal(size=(36, loaded.config.vision.patch_dim)).astype(np.float32)
    return make_row(
        (EncodedImage(patches, (1, 6, 6)),),
        problem="What colour is it?",
        student={"user": "{problem}", "assistant_prefill": "<description>"},
        processor=loaded.processor,
    )


def our_logits(loaded, variables) -> np.ndarray:
    """[T, V] of the sample under the given variables."""
    row = sample_row(loaded)
    n = len(row.student.ids)
    batch = pack_prompts([row], config=loaded.config, buckets=Buckets((64,), (n,), (16,), (128,)))

    @jax.jit
    def run(variables):
        images = loaded.model.apply(variables, batch.vision, method="encode_images")
        hidden, _ = loaded.model.apply(variables, jax.tree.map(jnp.asarray, batch.text), images)
        return loaded.model.apply(variables, hidden, method="logits")[0]

    return np.asarray(run(variables))


@torch.no_grad()
def torch_logits(model, loaded) -> np.ndarray:
    row = sample_row(loaded)
    ids = torch.tensor([row.student.ids])
    return model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(row.images[0].patches),
        image_grid_thw=torch.tensor([row.images[0].grid]),
        mm_token_type_ids=(ids == loaded.config.image_token_id).int(),
    ).logits[0].float().numpy()  # fmt: skip


def trained_weights(run):
    with Checkpoints(run.workdir, keep=10) as checkpoints:
        return checkpoints.restore_trained(run.session.trained)[1]


def load_torch(folder, **kwargs):
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"} | kwargs
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora_run", "full_run"])
def test_a_merged_export_is_the_student(kind, request, world, tmp_path):
    run = request.getfixturevalue(kind)
    folder = tmp_path / "hf"
    arguments = ["--mode=export", f"--workdir={run.workdir}", f"--config.export.output={folder}"]
    assert world.run(*arguments, "--config.export.max_shard_gb=0.0002") == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    theirs = torch_logits(load_torch(folder), run.session)
    student = run.session.student(trained_weights(run))
    assert max_difference(our_logits(run.session, student), theirs) <= TOLERANCE
    # The negative case: without what was trained, the comparison fails.
    assert max_difference(our_logits(run.session, run.session.student({})), theirs) > 100 * TOLERANCE


def test_an_adapter_export_is_the_student(lora_run, world, tmp_path):
    folder = tmp_path / "peft"
    arguments = ["--mode=export", f"--workdir={lora_run.workdir}", f"--config.export.output={folder}"]
    assert world.run(*arguments, "--config.export.kind=adapter") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's use of transformers, not ours
        model = peft.PeftModel.from_pretrained(load_torch(world.model), folder).eval()
    student = lora_run.session.student(trained_weights(lora_run))
    assert max_difference(our_logits(lora_run.session, student), torch_logits(model, lora_run.session)) <= TOLERANCE
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world.model)


def test_our_own_adapter_export_loads_again(lora_run, world, tmp_path):
    folder, merged = tmp_path / "peft", tmp_path / "merged"
    arguments = ["--mode=export", f"--workdir={lora_run.workdir}", f"--config.export.output={folder}"]
    assert world.run(*arguments, "--config.export.kind=adapter") == 0
    # Without a workdir: base and adapter by their paths.
    assert world.run("--mode=export", f"--config.model.adapter={folder}", f"--config.export.output={merged}") == 0
    student = lora_run.session.student(trained_weights(lora_run))
    theirs = torch_logits(load_torch(merged), lora_run.session)
    assert max_difference(our_logits(lora_run.session, student), theirs) <= TOLERANCE


@pytest.mark.slow
def test_a_bfloat16_export_is_the_float32_one_rounded(lora_run, world, tmp_path):
    tensors = {}
    for dtype in ("float32", "bfloat16"):
        arguments = ["--mode=export", f"--workdir={lora_run.workdir}", f"--config.export.dtype={dtype}"]
        assert world.run(*arguments, f"--config.export.output={tmp_path / dtype}") == 0
        tensors[dtype] = load_torch(tmp_path / dtype, dtype="auto").state_dict()
    assert all(t.dtype == torch.bfloat16 for t in tensors["bfloat16"].values())
    for name, t in tensors["float32"].items():
        assert torch.equal(t.to(torch.bfloat16), tensors["bfloat16"][name]), name
    assert AutoConfig.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16


def test_companions_are_copied_byte_for_byte(lora_run, world, tmp_path):
    folder = tmp_path / "hf"
    arguments = ["--mode=export", f"--workdir={lora_run.workdir}", f"--config.export.output={folder}"]
    assert world.run(*arguments) == 0
    names = {p.name for p in world.model.iterdir() if p.suffix in (".json", ".txt", ".jinja")}
    names -= {"config.json", "model.safetensors.index.json"}
    assert names
    for name in names:
        assert (folder / name).read_bytes() == (world.model / name).read_bytes(), name
    ours, base = (json.loads((f / "config.json").read_text()) for f in (folder, world.model))
    assert ours == base | {"torch_dtype": "float32"}
    assert AutoTokenizer.from_pretrained(folder)("a red cat")["input_ids"]


def test_a_crash_leaves_nothing_under_the_final_name(lora_run, world, tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    arguments = ["--mode=export", f"--workdir={lora_run.workdir}", f"--config.export.output={tmp_path / 'hf'}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export_module.writing, "save_sharded", crash)
        world.run(*arguments)
    assert not (tmp_path / "hf").exists()
    assert world.run(*arguments) == 0  # and what was left is no obstacle
    assert (tmp_path / "hf" / "model.safetensors").is_file()
