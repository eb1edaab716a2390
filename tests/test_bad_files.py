"""Files that lie, disks that are full, folders that cannot be written: one line, exit code 2, nothing half written."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_runs as runs
from helpers import make_processor_folder

from vigos_jax import main
from vigos_jax.data.processor import Processor
from vigos_jax.errors import InputError
from vigos_jax.export import export as export_module
from vigos_jax.models.config import PARSERS, ModelConfig
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.weights import adapters, reading
from vigos_jax.weights.safetensors_file import DTYPES, read_header
from vigos_jax.weights.weight_files import is_finite

KEY = "MARKERkey0123456789"  # in the environment of every run here


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once(), pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "OPENAI_API_KEY"):
            patch.setenv(name, KEY)
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    return runs.finished_run(tmp_path_factory)


def refusal(capsys, run) -> str:
    """What a command that must fail says: one line, and exit code 2."""
    capsys.readouterr()
    assert run() == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("vigos_jax: ") and "\n" not in said
    return said


# Safetensors.


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data, problem",
    [
        (b"", "it is empty"),
        (b"\x01\x02", "it ends after 2 bytes"),
        (file_of(b"{}", length=2**63), "it does not begin with the length of a header"),
        (file_of(b"{}", length=2**64 - 1), "it does not begin with the length of a header"),
        (file_of(b"{}", length=10**8), "it ends inside its header"),
        (file_of(b"{}", length=1), "its header is not JSON"),
        (file_of(b"not json"), "its header is not JSON"),
        (file_of(b"\xff\xfe{"), "its header is not JSON"),
        (file_of(b"[" * 100_000), "its header is not JSON"),
        (file_of(b'{"a":' * 20_000), "its header is not JSON"),
        (file_of([1]), "its header does not describe tensors"),
        (file_of("text"), "its header does not describe tensors"),
        (file_of({"a": 3}), "its header does not describe tensors"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}, b"0000"), "its header does not describe tensors"),
        (file_of({"a": f32(0, 4)}, b"000"), "it is cut short, 3 bytes of tensors where its header says 4"),
        (file_of({"a": f32(0, 4)}, b"00000"), "it has 1 bytes behind its last tensor"),
        (file_of({"a": f32(0, 2**62, (2**60,))}, b"0000"), "it is cut short"),
        (file_of({"a": f32(0, 4), "b": f32(0, 4)}, b"0000"), "its tensors overlap or leave a gap before b"),
        (file_of({"a": f32(0, 4), "b": f32(2, 6)}, b"000000"), "its tensors overlap or leave a gap before b"),
        (file_of({"a": f32(0, 4), "b": f32(5, 9)}, b"0" * 9), "its tensors overlap or leave a gap before b"),
        (file_of({"a": f32(4, 8)}, b"0" * 8), "its tensors overlap or leave a gap before a"),
        (file_of({"a": f32(-4, 0)}, b"0000"), "a tensor of dtype 'F32', shape [1] and bytes -4 to 0"),
        (file_of({"a": f32(4, 0)}, b"0000"), "bytes 4 to 0"),
        (file_of({"a": f32(0, 4, (2,))}, b"0000"), "4 bytes for a tensor of dtype F32 and shape [2]"),
        (file_of({"a": f32(0, 4, (-1, -1))}, b"0000"), "shape [-1, -1]"),
        (file_of({"a": f32(0, 4, (1.0,))}, b"0000"), "shape [1.0]"),
        (file_of({"a": f32(0, 4, (True,))}, b"0000"), "shape [True]"),
        (file_of({"a": f32(0, 4, (2**40, 2**40))}, b"0000"), "4 bytes for a tensor"),
        (file_of({"a": f32(0, 4, dtype=7)}, b"0000"), "a tensor of dtype 7"),
        (file_of(b'{"a": %s, "a": %s}' % ((json.dumps(f32(0, 4)).encode(),) * 2), b"0000"), "'a' is there twice"),
        (file_of(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 2]}}', b"00"), "'dtype' is"),
        (file_of({"a\n\x1b[31mb": f32(4, 8)}, b"0" * 8), "gap before a\\n\\x1b[31mb"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_headers_that_lie(tmp_path, data, problem):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as e:
        read_header(path)
    assert problem in str(e.value) and str(path) in str(e.value) and str(e.value).isprintable()


def test_a_header_that_does_not_lie(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"b": f32(4, 8), "a": f32(0, 4), "c": f32(8, 8, (0,))}
    path.write_bytes(file_of({"__metadata__": {"x": "y"}} | tensors, b"0" * 8))
    assert {name: (s.shape, s.start > 8) for name, s in read_header(path).items()} == {
        "a": ((1,), True), "b": ((1,), True), "c": ((0,), True),
    }  # fmt: skip


def test_any_flipped_byte_is_read_or_named(tmp_path):
    """Of a good file's header: its own reader and ours never disagree on what may be read."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, path)
    good, rng, read = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(2000):
        data = bytearray(good)
        for at in rng.integers(0, len(good) - 32, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            theirs = {n: x.shape for n, x in safetensors.numpy.load(bytes(data)).items()}
        except Exception:
            theirs = None
        try:
            ours = {name: stored.shape for name, stored in read_header(path).items() if stored.dtype in DTYPES}
            read += 1
        except InputError as e:
            assert str(e).isprintable()
            continue
        if theirs is not None:
            assert {n: theirs.get(n) for n in ours} == ours
    assert 20 < read < 1980


def write_weights(folder: pathlib.Path, change) -> None:
    """Puts all weights of a folder into one file, changed: a function of the dict of tensors."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")


@pytest.fixture
def model(world, tmp_path):
    return pathlib.Path(shutil.copytree(world.model, tmp_path / "model"))


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


def test_weights_that_are_no_numbers_are_named(world, model, tmp_path, capsys):
    def spoil(tensors):
        tensors[Q] = tensors[Q].copy()
        tensors[Q][3, 5] = np.nan
        tensors[NORM] = tensors[NORM].copy()
        tensors[NORM][-1] = -np.inf

    write_weights(model, spoil)
    said = refusal(capsys, lambda: world.run(f"--workdir={tmp_path / 'run'}", f"--config.model.path={model}"))
    assert f"2 tensor(s) hold NaN or infinity in float32, and must not: {Q}, {NORM}" in said and str(model) in said
    assert not (tmp_path / "run").exists()


def test_weights_that_overflow_when_rounded_are_named(model):
    def spoil(tensors):
        tensors[NORM] = tensors[NORM].copy()
        tensors[NORM][0] = 3.4e38  # finite in float32, infinite in bfloat16

    write_weights(model, spoil)
    config = ModelConfig.load(model)
    abstract = abstract_variables(VisionLanguageModel(config))["params"]
    reading.load_params(model, config, abstract, dtype=np.float32)
    with pytest.raises(InputError, match=rf"1 tensor\(s\) hold NaN or infinity in bfloat16, and must not: {NORM}$"):
        reading.load_params(model, config, abstract, dtype=jnp.bfloat16)


def test_an_adapter_that_is_no_numbers(world, tmp_path, capsys):
    adapter = pathlib.Path(shutil.copytree(world.adapter, tmp_path / "adapter"))
    tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = np.full_like(tensors[name], np.nan)
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    run = lambda: world.run(f"--workdir={tmp_path / 'run'}", f"--config.model.adapter={adapter}")  # noqa: E731
    assert f"1 tensor(s) hold NaN or infinity in float32, and must not: {name}" in refusal(capsys, run)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_finite(dtype):
    for n in (0, 1, 2**18, 2**18 + 3):
        x = np.linspace(-6e4, 6e4, n).astype(dtype)
        assert is_finite(x)
        for value in (np.nan, -np.nan, np.inf, -np.inf) if n else ():
            for at in (0, n // 2, n - 1):
                y = x.copy()
                y[at] = value
                assert not is_finite(y)
    assert is_finite(np.array([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).smallest_subnormal, 0], dtype))


def test_wrong_shapes_are_listed(world, model, tmp_path, capsys):
    def spoil(tensors):
        tensors[Q] = tensors[Q][:-1]
        tensors[NORM] = tensors[NORM][None]

    write_weights(model, spoil)
    said = refusal(capsys, lambda: world.run(f"--workdir={tmp_path / 'run'}", f"--config.model.path={model}"))
    assert "2 problem(s)" in said and f"{Q} has shape" in said and f"{NORM} has shape" in said


BAD_ADAPTERS = [("r", value) for value in (0, 2.5, 10**9, True, "4", None)]
BAD_ADAPTERS += [("lora_alpha", value) for value in (float("nan"), float("inf"), 0, -1, "8", None)]


@pytest.mark.parametrize("field, value", BAD_ADAPTERS)
def test_an_adapter_config_of_nonsense(world, tmp_path, field, value):
    adapter = pathlib.Path(shutil.copytree(world.adapter, tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match="adapter_config.json"):
        adapters.adapter_spec(adapter, dropout=0.0)


# config.json and the tokenizer.

NONSENSE = (
    *(None, 0, -1, 2.5, 10**9, 10**400, float("inf"), float("nan"), "64", [], [1], [[]], {}, {"a": 1}, True),
    "DELETE",
)


def fields_of(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from fields_of(value, (*path, key))


@pytest.mark.parametrize("family", PARSERS)
def test_a_model_config_of_nonsense(tmp_path, family):
    """Every field of config.json, replaced by each of NONSENSE: refused in one line, or a model of sane sizes."""
    raw = json.loads((make_processor_folder(tmp_path, family=family) / "config.json").read_text())
    tried = refused = 0
    for path in fields_of(raw):
        for value in NONSENSE:
            changed = json.loads(json.dumps(raw))
            node = changed
            for key in path[:-1]:
                node = node[key]
            if value == "DELETE":
                del node[path[-1]]
            else:
                node[path[-1]] = value
            tried += 1
            try:
                config = ModelConfig.from_hf(changed)
            except InputError as e:
                refused += 1
                assert str(e).isprintable()
                continue
            sizes = [v for part in (config, config.vision) for v in vars(part).values() if type(v) is int]
            assert all(0 <= n <= 2**24 for n in sizes) and config.num_layers <= 1024 and config.rms_eps > 0
            assert 0 < config.rope_theta < 1e31 and config.num_heads % config.num_kv_heads == 0
    print(f"{tried} configs tried, {refused} refused")
    assert tried > 400 and refused > tried / 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 20_000, "\xff", '"x"', "NaN"])
def test_a_model_config_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def edit(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_tokenizer_of_another_vocabulary(tmp_path):
    folder = make_processor_folder(tmp_path / "model")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = Processor.load(folder).tokenizer.get_vocab()
    edit(folder / "config.json", vocab_size=max(tokens.values()) + 1)  # as small as it may be
    Processor.load(folder)
    edit(folder / "config.json", vocab_size=max(tokens.values()))
    with pytest.raises(InputError, match=r"the tokenizer is not this model's: .*vocab_size"):
        Processor.load(folder)
    edit(folder / "config.json", vocab_size=size, image_token_id=tokens.get("red", 5))
    with pytest.raises(InputError, match="image_token_id .* must be a control token"):
        Processor.load(folder)


@pytest.mark.parametrize("ids", [10**9, -1, [1, 10**9], [True], "x", [[1]]])
def test_ends_that_the_model_does_not_have(tmp_path, ids):
    folder = make_processor_folder(tmp_path / "model")
    edit(folder / "generation_config.json", eos_token_id=ids)
    with pytest.raises(InputError) as e:
        Processor.load(folder)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    "values",
    [
        {"image_std": [0, 0, 0]},
        {"image_std": [float("nan")] * 3},
        {"image_mean": [1e9] * 3},
        {"image_mean": [1]},
        {"image_mean": "x"},
        {"rescale_factor": 0},
        {"rescale_factor": 1.0},
        {"do_rescale": False},
        {"do_resize": False},
        {"min_pixels": 10**12},
        {"min_pixels": float("inf")},
        {"min_pixels": "x"},
        {"max_pixels": -1},
        {"resample": 99},
        {"size": {"height": 1}},
    ],
    ids=str,
)
def test_picture_settings_of_nonsense(tmp_path, values):
    """What would give numbers that are none, or a picture no memory holds, shows before a run begins."""
    folder = make_processor_folder(tmp_path / "model")
    edit(folder / "preprocessor_config.json", **values)
    with pytest.raises(InputError, match=r"cannot load .*preprocessor_config\.json") as e:
        Processor.load(folder)
    assert str(e.value).isprintable()


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ 1 / 0 }}", "{{ x.y.z }}", ""])
def test_a_chat_template_that_fails(tmp_path, template):
    processor = Processor.load(make_processor_folder(tmp_path / "model", chat_template=template or "{{ '' }}"))
    with pytest.raises(InputError, match="the chat template of ") as e:
        processor.encode_turn(user_text="x", grids=[(1, 4, 4)], assistant_prefill="")
    assert str(e.value).isprintable()


@pytest.mark.parametrize("field", ["model", "added_tokens", "pre_tokenizer", "normalizer", "decoder", "post_processor"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [3], {}, {"type": "BPE"}, {"type": "x"}], ids=str)
def test_a_tokenizer_of_nonsense(tmp_path, field, value):
    """Rust panics, which are no Exceptions, are named too."""
    folder = make_processor_folder(tmp_path / "model")
    edit(folder / "tokenizer.json", **{field: value})
    try:
        processor = Processor.load(folder)
    except InputError as e:
        assert str(e).isprintable()
    else:
        assert processor.decode(processor.encode_text("it is red")) == "it is red"


# Disks.


@contextlib.contextmanager
def mounted(folder: pathlib.Path, *options: str):
    """A file system of its own at a folder; skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"this user may not mount: {e}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tmpfs(folder: pathlib.Path, size: str):
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def names_below(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_disk_that_is_full_when_a_run_begins(world, tmp_path, capsys):
    with tmpfs(tmp_path / "disk", "4k") as disk:
        said = refusal(capsys, lambda: world.run(f"--workdir={disk / 'run'}"))
        assert "cannot write to --workdir" in said and "No space left on device" in said
        assert not (disk / "run" / "config.json").exists()


def test_a_disk_that_is_full_in_the_middle_of_a_save(world, finished, tmp_path, capsys):
    """The checkpoint before stays, is the newest, and the run goes on from it to the same end when there is room."""
    with tmpfs(tmp_path / "disk", "64m") as disk:
        workdir = pathlib.Path(shutil.copytree(finished.workdir, disk / "run"))
        full = sum(p.stat().st_size for p in (workdir / "checkpoints" / "4").rglob("*") if p.is_file())
        shutil.rmtree(workdir / "checkpoints" / "4")
        rows = runs.read_rows(workdir / "metrics.jsonl")
        with (disk / "ballast").open("wb") as file:  # leaves room for half a checkpoint
            file.write(bytes(shutil.disk_usage(disk).free - full // 2))
        capsys.readouterr()
        assert world.run(f"--workdir={workdir}") == 2
        said = capsys.readouterr().err.splitlines()
        assert any(line.startswith("vigos_jax: cannot write") and "No space left on device" in line for line in said)
        assert [n for n in names_below(workdir / "checkpoints") if n.isdigit()] == ["1", "2", "3"]
        (disk / "ballast").unlink()
        assert world.run(f"--workdir={workdir}") == 0
        assert [r["loss"] for r in runs.read_rows(workdir / "metrics.jsonl")] == [r["loss"] for r in rows]
        runs.assert_same_trees(runs.saved_state(workdir, 4), runs.saved_state(finished.workdir, 4))


@pytest.mark.slow
def test_a_disk_without_inodes_is_said_in_a_few_lines(world, tmp_path):
    """A process of its own: what its libraries log of the failed save, in hundreds of lines, is for -v alone."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=200m,nr_inodes=70", "tmpfs") as disk:
        command = [sys.executable, "-m", "vigos_jax.main", f"--config={world.config}", f"--workdir={disk / 'run'}"]
        # One device: on several, XLA says how it splits arrays.
        command += [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        options = {"cwd": pathlib.Path(main.__file__).parents[1], "env": environment}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        said = [line for line in done.stderr.splitlines() if not line.startswith("train ")]
        assert 1 <= len(said) <= 3 and "No space left on device" in said[-1], done.stderr
        assert said[-1].startswith("vigos_jax: cannot write")


def test_a_disk_too_small_for_an_export(world, tmp_path, capsys):
    with tmpfs(tmp_path / "disk", "100k") as disk:
        said = refusal(capsys, lambda: world.run("--mode=export", f"--config.export.output={disk / 'hf'}"))
        assert "config.export.output=" in said and "GB" in said
        assert names_below(disk) == []


def test_a_disk_that_gets_full_during_an_export(world, tmp_path, capsys, monkeypatch):
    """There was room when it began: the failing write itself is named, and nothing stays."""
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    for size in ("100k", "480k", "488k"):  # in the weights, in the companions
        with tmpfs(tmp_path / size, size) as disk:
            said = refusal(capsys, lambda: world.run("--mode=export", f"--config.export.output={disk / 'hf'}"))  # noqa: B023
            assert "cannot write config.export.output=" in said and "No space left on device" in said
            assert names_below(disk) == []


def test_a_disk_that_is_full_when_scores_are_written(world, tmp_path, capsys):
    rows = [{"id": "a", "images": ["pictures/0.png"], "problem": "Q", "answer": "a", "completion": "x"}]
    (tmp_path / "data").mkdir()
    runs.write_pictures(tmp_path / "data" / "pictures", 1)
    rollouts = runs.write_rows(tmp_path / "data" / "r.jsonl", rows * 40)
    with tmpfs(tmp_path / "disk", "4k") as disk:
        flags = [f"--config.score.rollouts={rollouts}", f"--config.score.output={disk / 'scores'}"]
        capsys.readouterr()
        assert world.run("--mode=score", *flags) == 2
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        assert not {"scores.jsonl", "summary.json"} & set(names_below(disk / "scores"))


@contextlib.contextmanager
def read_only(folder: pathlib.Path):
    """A folder nobody can write to, root neither."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield folder


def test_a_read_only_workdir(world, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    with read_only(tmp_path / "folder") as folder:
        for path in (folder, folder / "run"):
            said = refusal(capsys, lambda: world.run(f"--workdir={path}"))  # noqa: B023
            assert "cannot write to --workdir" in said and "Read-only file system" in said
        said = refusal(capsys, lambda: world.run("--mode=export", f"--config.export.output={folder / 'hf'}"))
        assert "cannot write config.export.output=" in said and "Read-only file system" in said
    assert names_below(tmp_path / "folder") == []


def test_a_run_whose_folder_became_read_only(world, finished, tmp_path, capsys):
    workdir = pathlib.Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    before = runs.bytes_of(workdir)
    with read_only(workdir):
        capsys.readouterr()
        assert world.run(f"--workdir={workdir}") == 2
        assert "Read-only file system" in capsys.readouterr().err.splitlines()[-1]
        # Reading needs no writing.
        assert world.run("--mode=export", f"--workdir={workdir}", f"--config.export.output={tmp_path / 'hf'}") == 0
    assert runs.bytes_of(workdir) == before


def test_a_file_where_the_workdir_should_be(world, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "below"):
        assert str(tmp_path / "run") in refusal(capsys, lambda: world.run(f"--workdir={path}"))  # noqa: B023


def test_no_file_of_a_run_or_an_export_holds_a_key(world, finished, tmp_path):
    assert world.run("--mode=export", f"--workdir={finished.workdir}", f"--config.export.output={tmp_path / 'hf'}") == 0
    for folder in (finished.workdir, tmp_path / "hf"):
        files = runs.bytes_of(folder)
        assert len(files) > 5 and not [name for name, data in files.items() if KEY.encode() in data]


def test_a_workdir_of_another_config(world, finished, capsys):
    before = runs.bytes_of(finished.workdir)
    other = ["--config.seed=9", "--config.optimizer.learning_rate=0.5", "--config.prompts.student.user={problem}!"]
    said = refusal(capsys, lambda: world.run(f"--workdir={finished.workdir}", *other))
    for difference in (
        "optimizer.learning_rate: 0.01 -> 0.5",
        "prompts.student.user: '{problem}' -> '{problem}!'",
        "seed: 0 -> 9",
    ):
        assert difference in said
    assert runs.bytes_of(finished.workdir) == before


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", '{"steps": 1}', '{"steps": 1, "steps": 2}'])
def test_a_workdir_whose_config_is_broken(world, tmp_path, capsys, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    for mode in ("train", "export", "score"):
        refusal(capsys, lambda: world.run(f"--mode={mode}", f"--workdir={tmp_path / 'run'}",  # noqa: B023
                                          f"--config.export.output={tmp_path / 'hf'}"))  # fmt: skip


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(2, "No such file")])
def test_what_is_no_disks_fault_stays_a_traceback(world, tmp_path, monkeypatch, error):
    """Only what a user can mend is put into one line."""
    monkeypatch.setitem(main.MODES, "train", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        world.run(f"--workdir={tmp_path / 'run'}")


def test_a_full_disk_is_said_in_one_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(main.MODES, "train", mock.Mock(side_effect=OSError(28, "No space left on device", "x")))
    assert "cannot write x: No space left on device" in refusal(capsys, lambda: world.run("--workdir=run"))
