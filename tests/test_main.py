"""The command line: what is wrong is said in one line with exit code 2, and a user's own config works from anywhere."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny_runs as runs
import transformers

from vigos_jax import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODES = ("train", "data", "generate", "score", "diagnose", "eval", "export", "plan", "report")


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A default workdir is made in the current folder: not in the repository, please."""
    monkeypatch.chdir(tmp_path)


def refusal(capsys, argv: list[str], *, code: int = 2) -> str:
    """Runs a command line that must be refused; the one line it says."""
    assert main.main(["vigos_jax", *argv]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said, said
    return said


def write_config(path: pathlib.Path, *lines: str) -> str:
    """A config file that changes the base config by `lines`; the flag that names it."""
    body = "".join(f"    {line}\n" for line in lines)
    head = "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
    path.write_text(f"{head}{body}    return config\n")
    return f"--config={path}"


# Refused before anything is loaded.


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config.stepz=3"], ["stepz"]),
        (["--config.lora.rang=3"], ["rang"]),
        (["--config.steps=many"], ["steps", "many"]),
        (["--config.steps=1.5"], ["steps", "1.5"]),
        (["--config.data.shuffle=perhaps"], ["shuffle", "perhaps"]),
        (["--config.steps=0"], ["config.steps=0", "at least 1"]),
        (["--config.lora.dropout=1"], ["config.lora.dropout=1.0", "from 0 to 0.999"]),
        (["--config.optimizer.learning_rate=nan"], ["config.optimizer.learning_rate=nan", "finite"]),
        (["--config.model.dtype=int8"], ["config.model.dtype='int8'", "float32, bfloat16"]),
        (["--config.optimizer.schedule=cosine"], ["'cosine'", "constant, linear"]),
        (["--config.sampling.max_tokens=99999"], ["config.sampling.max_tokens=99999", "config.buckets.completion"]),
        (["--config.sampling.top_p=0"], ["sampling.top_p=0", "above 0 and at most 1"]),
        (["--config.prompts.student.user={reference}"], ["config.prompts.student", "{reference}"]),
        (["--config.roles.perception.scores=('title',)"], ["perception.scores='title'", "description, reasoning"]),
        (["--config.roles.reasoning.divergence=js"], ["divergence='js'", "forward_kl, reverse_kl"]),
        (["--config.roles.reasoning.when=never"], ["when='never'", "valid, invalid, always"]),
        (["--config.roles.reasoning.reads=all"], ["reads='all'", "completion, scored"]),
        (["--config.roles.reasoning.beta=1"], ["config.roles.reasoning.beta=1.0", "between 0 and 1"]),
        (["--config.prompts.reasoning.user={caption}"], ["{caption}", "config.prompts.reasoning.user", "data.fields"]),
        (["--config.span_rule=lenient"], ["'lenient'", "paper, released"]),
        (["--config.teacher.weights=moving"], ["'moving'", "frozen, ema, live"]),
        (["--config.loss.reduction=mean"], ["'mean'", "tokens, sequences"]),
        (["--config.roles.reasoning.weight=-1"], ["config.roles.reasoning.weight=-1", "at least 0"]),
        (["--config.mesh.data=3"], ["data=3, fsdp=2, tensor=2", "8 device(s)"]),
        (["--config.mesh.fsdp=0"], ["fsdp=0", "at least 1"]),
        (["--config.model.path=/no/such/model"], ["'/no/such/model'", "choices: a folder"]),
        (["--config.model.path="], ["config.model.path=''", "choices: a folder"]),
        (["--config.model.adapter=/no/adapter"], ["'/no/adapter'", "adapter_model.safetensors"]),
        (["--mode=dance"], ["dance", *MODES]),
        (["--stepz=3"], ["stepz"]),
        (["train"], ["'train'", "--help"]),
    ],
)
def test_bad_value_is_refused(capsys, world, argv, words):
    said = refusal(capsys, [f"--config={world.config}", *argv])
    assert all(word in said for word in words), said
    assert not pathlib.Path("runs").exists()  # a run that cannot begin takes no workdir


def test_missing_flag_and_file(capsys, tmp_path):
    assert "--config" in refusal(capsys, [])
    assert "--config" in refusal(capsys, ["--mode=score"])
    assert "/no/such/config.py" in refusal(capsys, ["--config=/no/such/config.py"])
    assert str(tmp_path) in refusal(capsys, [f"--config={tmp_path}"])


@pytest.mark.parametrize(
    "line, words",
    [
        ("raise RuntimeError('a\\nb')", ["RuntimeError", "a b"]),
        ("1 +", ["SyntaxError"]),
        ("import no_such_module", ["no_such_module"]),
        ("config.stepz = 3", ["stepz"]),
        ("config.steps = 'many'", ["steps"]),
        ("config = None", ["--config", "get_config()"]),
        ("config.lora.rang = 3", ["rang"]),
        ("config.roles.reasoning.clipp = 0.0", ["config.roles.reasoning", "clipp"]),
        ("config.unlock(); del config.lora", ["lora"]),
        ("config.roles = type(config.roles)()", ["config.roles", "at least one teacher"]),
        ("for r in config.roles.values(): r.weight = 0.0", ["config.roles", "positive weight"]),
        ("config.roles.judge = base.role(('answer',), 'valid', 'forward_kl', weight=1.0)", ["config.prompts.judge"]),
        ("config.roles.judge = type(config)({'scores': ('answer',)})", ["config.roles.judge", "when", "divergence"]),
        ("config.prompts.reasoning = type(config)({'user': ''})", ["config.prompts.reasoning", "assistant_prefill"]),
    ],
)
def test_bad_config_file(capsys, tmp_path, line, words):
    said = refusal(capsys, [write_config(tmp_path / "mine.py", line)])
    assert all(word in said for word in words), said


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--config=x.py", "--help"], ["--helpfull"]])
def test_help(capsys, argv):
    assert main.main(["vigos_jax", *argv]) == 0
    said = capsys.readouterr().out
    listed = said.split("modes\n")[1].split("\n\n")[0]
    names = [line.split()[0] for line in listed.splitlines() if not line.startswith("   ")]
    assert names == list(MODES) == list(main.MODES)
    assert "examples" in said and "--workdir" in said


# Refused when the model is there.


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config.batch_size=6"], ["config.batch_size=6", "multiple", "4"]),
        (["--config.gradient_accumulation_steps=2"], ["config.batch_size=4", "8"]),
        (["--config.accumulation=2"], ["config.accumulation is now config.gradient_accumulation_steps"]),
        (["--config.evaluate.seed=1"], ["config.evaluate.seed is now config.demo_eval.seed"]),
        (["--config.data.fields=('caption',)"], ["lacks caption", "problem, answer"]),
        (["--config.data.fields=('caption',)", "--config.data.source=demo"], ["caption", "demo"]),
        (["--config.data.source=/no/such/data.jsonl"], ["'/no/such/data.jsonl'", "choices"]),
        (["--config.export.after_training=1", "--config.export.kind=adapter", "--config.lora.rank=0"], ["adapter"]),
        (["--mode=generate", "--config.generate.question=Why?"], ["--config.generate.image"]),
        (["--mode=generate", "--config.generate.image=x.png", "--config.generate.question= "], ["generate.question"]),
        (["--mode=generate", "--config.generate.image=x.png", "--config.generate.question=Why?"], ["not a file"]),
        (["--mode=score"], ["config.score.rollouts=''", ".jsonl"]),
        (["--mode=score", "--config.score.rollouts=/no/rollouts.jsonl"], ["'/no/rollouts.jsonl'", ".jsonl"]),
        (["--mode=diagnose"], ["--mode diagnose", "--workdir", "--config.diagnose.output"]),
        (["--mode=export"], ["--config.export.output"]),
        (["--mode=export", "--workdir=/no/run"], ["/no/run/config.json"]),
        (["--mode=score", "--workdir=/no/run"], ["/no/run/config.json"]),
    ],
)
def test_bad_input_is_refused(capsys, world, argv, words):
    said = refusal(capsys, [f"--config={world.config}", *argv])
    assert all(word in said for word in words), said
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("config.accumulation = 8", "config.accumulation is now config.gradient_accumulation_steps"),
        ("config['accumulation'] = 8", "config.accumulation is now config.gradient_accumulation_steps"),
        ("config.evaluate.seed = 1", "config.evaluate is now config.demo_eval"),
        ("config['evaluate']['seed'] = 1", "config.evaluate is now config.demo_eval"),
    ],
)
def test_a_config_file_with_a_renamed_field(capsys, tmp_path, line, words):
    file = tmp_path / "mine.py"
    body = f"def get_config():\n    config = base.get_config()\n    {line}\n    return config\n"
    file.write_text(f"from configs import base\n\n\n{body}")
    assert words in refusal(capsys, [f"--config={file}"])


def test_data_without_its_columns(capsys, world, tmp_path):
    data = runs.write_rows(tmp_path / "data.jsonl", [{"id": "a", "question": "Why?", "images": []}])
    said = refusal(capsys, [f"--config={world.config}", f"--config.data.source={data}"])
    assert str(data) in said and "lacks answer" in said and "question" in said


def test_an_unreadable_picture(capsys, world, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"no picture")
    options = [f"--config.generate.image={picture}", "--config.generate.question=Why?"]
    said = refusal(capsys, [f"--config={world.config}", "--mode=generate", *options])
    assert str(picture) in said and "PNG" in said


@pytest.mark.parametrize("mode", ["train", "score", "export"])
def test_a_file_stands_where_a_folder_should_be(capsys, world, tmp_path, mode):
    file = tmp_path / "file"
    file.write_text("mine")
    rollouts = runs.write_rows(tmp_path / "r.jsonl", [{"problem": "?", "answer": "1", "images": [], "completion": ""}])
    options = {
        "train": [f"--workdir={file}"],
        "score": [f"--config.score.rollouts={rollouts}", f"--config.score.output={file}"],
        "export": [f"--config.export.output={file}/out"],
    }[mode]
    assert str(file) in refusal(capsys, [f"--config={world.config}", f"--mode={mode}", *options])
    assert file.read_text() == "mine"


# Refused because of an earlier run.


def test_a_workdir_of_another_config(capsys, world, tmp_path_factory):
    workdir = runs.finished_run(tmp_path_factory).workdir
    before = runs.bytes_of(workdir)
    capsys.readouterr()
    argv = [f"--config={world.config}", f"--workdir={workdir}", "--config.steps=9", "--config.lora.alpha=1"]
    said = refusal(capsys, argv)
    assert str(workdir) in said and "steps: 4 -> 9" in said and "lora.alpha: 8.0 -> 1.0" in said
    assert "seed" not in said  # only what differs
    assert runs.bytes_of(workdir) == before


def test_an_adapter_where_none_was_trained(capsys, world, tmp_path):
    options = ["--mode=export", "--config.export.kind=adapter", f"--config.export.output={tmp_path / 'out'}"]
    assert "choices: merged" in refusal(capsys, [f"--config={world.config}", *options])
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(capsys, world, tmp_path):
    (tmp_path / "mine").write_text("mine")
    options = ["--mode=export", f"--config.export.output={tmp_path}"]
    assert "not an empty folder" in refusal(capsys, [f"--config={world.config}", *options])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_run_does_not_begin_if_its_export_would_fail(capsys, world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    options = ["--config.export.after_training=1", f"--config.export.output={tmp_path / 'out'}"]
    said = refusal(capsys, [f"--config={world.config}", f"--workdir={tmp_path / 'run'}", *options])
    assert str(tmp_path / "out") in said and not (tmp_path / "run").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_workdir_without_a_checkpoint(capsys, world, tmp_path_factory, tmp_path):
    shutil.copy(runs.finished_run(tmp_path_factory).workdir / "config.json", tmp_path / "config.json")
    capsys.readouterr()
    options = ["--mode=export", f"--workdir={tmp_path}", f"--config.export.output={tmp_path / 'out'}"]
    assert "no checkpoint" in refusal(capsys, [f"--config={world.config}", *options])


# What works.


def test_the_default_workdir_is_named_after_the_config(world):
    parse = lambda *argv: main._parse(["vigos_jax", *argv])[2]  # noqa: E731
    mine = str(world.config)
    assert parse(f"--config={mine}") == pathlib.Path("runs/mine")
    assert parse("--config", mine) == pathlib.Path("runs/mine")
    assert parse("--config", mine, "--workdir=") == pathlib.Path("runs/mine")
    assert parse(f"--config={mine}", "--workdir", "~/x") == pathlib.Path.home() / "x"
    assert parse(f"--config={mine}", "--mode=score") is None


def test_the_config_is_locked_and_its_flags_count(world):
    flags = ["--config.steps=7", "--config.prompts.student.user=", "--config.buckets.prompt=(8,16)"]
    config, mode, _ = main._parse(["vigos_jax", f"--config={world.config}", *flags])
    assert (config.steps, config.prompts.student.user, config.buckets.prompt, mode) == (7, "", (8, 16), "train")
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.stepz = 3


PROBE = """
import sys
sys.modules |= dict.fromkeys(("torch", "torchvision", "peft", "accelerate"))  # as if not installed
from vigos_jax import main
from vigos_jax.analysis import score_rollouts
from vigos_jax.evaluation import demo_scores
from vigos_jax.rollouts import generate
from vigos_jax.training import loop
sys.exit(main.main(["vigos_jax", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_users_config_from_a_checkout_without_torch(world, tmp_path):
    """As a user starts it: from the repository, which is not installed, with a config that lies elsewhere."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    mesh = [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")]  # one device, as on a laptop
    options = [f"--config={world.config}", "--mode=export", *mesh]
    outputs = [tmp_path / "m", tmp_path / "c"]
    programs = [["-m", "vigos_jax.main"], ["-c", PROBE]]
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *options, f"--config.export.output={output}"],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for program, output in zip(programs, outputs, strict=True)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [printed for printed, _ in results] == [f"{output}\n" for output in outputs]
    assert runs.bytes_of(outputs[0]) == runs.bytes_of(outputs[1])
    assert transformers.AutoConfig.from_pretrained(outputs[0]).model_type == "qwen2_5_vl"
    assert json.loads((outputs[0] / "config.json").read_text())["torch_dtype"] == "float32"
