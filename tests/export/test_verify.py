"""An export is loaded again and compared, says what rounding cost, has a card that tells where it came from."""

import json
import types

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import tiny_runs as runs
from cases import others_slow

from vigos_jax.weights import adapters, writing


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def run(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


def export(world, run, folder, **options) -> int:
    flags = [f"--config.export.{k}={v}" for k, v in options.items()]
    return world.run("--mode=export", f"--workdir={run.workdir}", f"--config.export.output={folder}", *flags)


def report_in(said: str) -> dict:
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [("merged", "float32"), ("merged", "bfloat16"), ("adapter", "float32")])
def test_a_good_export_passes(world, run, tmp_path, capsys, kind, dtype):
    assert export(world, run, tmp_path / "hf", kind=kind, dtype=dtype, check=True) == 0
    report = report_in(capsys.readouterr().out)
    assert report["kind"] == kind and report["dtype"] == dtype and report["tokens"] > 20
    if dtype == "float32":
        assert report["max_logit_difference"] < 1e-4 and report["kl_max"] < 1e-6
    else:
        assert report["kl_mean"] > 0
        assert report["exact"] == ["config.export.dtype=float32", "config.export.kind=adapter"]


@pytest.mark.slow
def test_a_rounded_merge_always_says_its_kl(world, run, tmp_path, capsys):
    assert export(world, run, tmp_path / "hf", dtype="bfloat16") == 0
    report = report_in(capsys.readouterr().out)
    assert report["kl_mean"] > 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"{report['kl_mean']:.3g} nats" in card and "a float32 or adapter export of the same run does not" in card
    assert export(world, run, tmp_path / "float32") == 0
    assert "{" not in capsys.readouterr().out  # nothing is rounded, nothing asked for


@pytest.mark.parametrize("kind", others_slow(["merged", "adapter"]))
def test_what_was_written_wrong_is_found(world, run, tmp_path, monkeypatch, capsys, kind):
    """One projection of one layer doubled on its way to the disk."""
    owner, name = {"merged": (writing, "save_sharded"), "adapter": (adapters, "write_file")}[kind]
    write = getattr(owner, name)

    def write_wrong(path, tensors, **options):
        write(path, tensors, **options)
        (file,) = [path] if path.is_file() else path.glob("*.safetensors")
        stored = safetensors.numpy.load_file(file)
        key = next(k for k in sorted(stored) if "down_proj" in k and "lora_A" not in k)
        safetensors.numpy.save_file(stored | {key: np.ascontiguousarray(stored[key] * 2)}, file)

    monkeypatch.setattr(owner, name, write_wrong)
    assert export(world, run, tmp_path / "hf", kind=kind, check=True) == 2
    said = capsys.readouterr().err
    assert "the export must say what the student says" in said and said.count("\n") == 1
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))


def test_the_card_says_where_it_came_from(world, run, tmp_path):
    assert export(world, run, tmp_path / "hf", kind="adapter") == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    last = runs.read_rows(run.workdir / "metrics.jsonl")[-1]
    for fact in (
        "arXiv 2606.19120", world.model.name, world.data.name, f"| {runs.STEPS}", "reverse_kl", "perception",
        "PeftModel.from_pretrained", f"{last['valid_rate']:.3g}",
    ):  # fmt: skip
        assert fact in card, fact
    assert str(tmp_path) not in card and str(world.folder) not in card  # where it lay is nobody's business
    assert huggingface_hub.ModelCard.load(tmp_path / "hf" / "README.md").data.to_dict()["library_name"]


def test_pushing_is_private_and_off_by_default(world, run, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, **options):
            calls.append(("create", name, options))
            return f"https://hub/{name}"

        def repo_info(self, name):
            return types.SimpleNamespace(private=not name.endswith("public"))

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], sorted(p.name for p in options["folder_path"].iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert export(world, run, tmp_path / "none", kind="adapter") == 0 and not calls
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert export(world, run, tmp_path / "tokenless", kind="adapter", push_to="me/mine") == 2 and not calls
    assert not (tmp_path / "tokenless").exists()  # known before anything is written
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert export(world, run, tmp_path / "pushed", kind="adapter", push_to="me/mine") == 0
    assert calls[:2] == [("token", "hf_secret"), ("create", "me/mine", {"private": True, "exist_ok": True})]
    assert calls[2] == ("upload", "me/mine", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
    assert export(world, run, tmp_path / "public", kind="adapter", push_to="me/public") == 2
    said = capsys.readouterr().err
    assert "is public and nothing was uploaded" in said and (tmp_path / "public" / "README.md").is_file()
    assert len([c for c in calls if c[0] == "upload"]) == 1
