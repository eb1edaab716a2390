"""What `pip install` brings works without the repository: from an empty folder, with the wheel alone on the path."""

import importlib.util
import pathlib
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

from vigos_jax import __version__, main
from vigos_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = "import sys, setuptools.build_meta as b; b.build_{0}(sys.argv[1])"


def files_of(folder: pathlib.Path) -> set[str]:
    """Paths of all files below, but for what running leaves behind."""
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder.parent).as_posix() for p in found}


PACKAGED = files_of(ROOT / "vigos_jax") | files_of(ROOT / "configs")


def build(kind: str, tree: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """An sdist or wheel, made as `pip` makes it, without its own environment, which would need a network."""
    command = [sys.executable, "-c", BUILD.format(kind), str(output)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (built,) = [p for p in output.iterdir() if p.suffix == {"wheel": ".whl", "sdist": ".gz"}[kind]]
    return built


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist of this tree, wheel of the unpacked sdist)."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "site", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    sdist = build("sdist", tree, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", folder / "unpacked" / f"vigos_jax-{__version__}", folder)


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The python of a fresh environment with the wheel, and with what it needs from this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth is only added: the editable install's own .pth in there is not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    with zipfile.ZipFile(distributions[1]) as wheel:  # all that installing a pure wheel does
        wheel.extractall(packages)
    return python


@pytest.fixture
def start(installed, tmp_path, monkeypatch):
    """Starts the installed program in an empty folder; returns what it did."""
    for name in ("XLA_FLAGS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*arguments: str, program=("-m", "vigos_jax.main")) -> subprocess.CompletedProcess:
        return subprocess.run([installed, *program, *arguments], cwd=empty, capture_output=True, text=True, timeout=500)

    return run


def test_the_wheel_has_every_file_of_the_packages_and_no_other(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == PACKAGED
    assert {"vigos_jax/report/page.html.j2", "vigos_jax/demo/base/model.safetensors", "configs/base.py"} <= names
    assert any(n.startswith("vigos_jax/evaluation/tasks/") for n in names)


def test_the_sdist_can_be_built_tested_and_read(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "setup.py", "pyproject.toml"}
    wanted |= files_of(ROOT / "tests") | files_of(ROOT / "docs") | files_of(ROOT / "notebooks")
    wanted |= files_of(ROOT / "constraints") | {"mkdocs.yml", "CITATION.cff", "SECURITY.md"}
    assert PACKAGED | wanted <= names


def test_the_package_index_can_show_it(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = wheel.read(name).decode()
    head, _, body = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head and f"\nVersion: {__version__}\n" in head
    assert body.startswith("# vigos_jax")
    if importlib.util.find_spec("twine") is None:
        pytest.skip("twine is not installed (pip install -e '.[release]')")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_help_and_version(start):
    where = start(program=("-c", "import configs, vigos_jax; print(configs.__file__, vigos_jax.__file__)")).stdout
    assert str(ROOT) not in where and where.count("site-packages") == 2
    done = start("--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == main.HELP
    assert start("--version").stdout == f"vigos_jax {__version__}\n"


@pytest.mark.slow  # compiles a training step
def test_the_demo_from_an_empty_folder(start, tmp_path):
    workdir = tmp_path / "run"
    options = ["--config.steps=1", "--config.batch_size=4", "--config.compilation_cache="]
    options += ["--config.demo_eval.questions=0", "--config.export.after_training=False"]
    done = start("--config", "configs/base.py", *options, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert (workdir / "metrics.jsonl").read_text().count("\n") == 1
    assert done.stdout.startswith(f"the run is complete: {workdir}\n")
    # Quiet: what other libraries have to say is not for everyone. One line of ours for the one step.
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["train", "1/1"]]


@pytest.mark.slow
def test_a_quick_look_from_an_empty_folder(start):
    done = start("--mode", "generate")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("question  ") == 2 and done.stdout.count("answer    <description>") == 2


# Which config is meant.


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*arguments: str):
    return main._parse(["vigos_jax", *arguments])


def test_a_shipped_config_is_found_from_anywhere(elsewhere):
    config, _, workdir = parse("--config=configs/paper.py", "--config.steps=7")
    assert config.roles.perception.clip == 0.05 and config.steps == 7 and workdir == pathlib.Path("runs/paper")
    assert parse("--config", "configs/base.py")[0].roles.perception.clip == 0.0


def test_a_file_of_ones_own_wins(elsewhere):
    (elsewhere / "configs").mkdir()
    text = "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n    config.steps = 3\n"
    (elsewhere / "configs" / "paper.py").write_text(text + "    return config\n")
    assert parse("--config=configs/paper.py")[0].steps == 3
    assert parse("--config=configs/opsd.py")[0].steps == 80


@pytest.mark.parametrize("name", ["configs/papre.py", "paper.py", "elsewhere/base.py", "configs", "setup.py"])
def test_an_unknown_config_is_refused_with_those_there_are(elsewhere, name):
    with pytest.raises(InputError, match="no such file; shipped are configs/base.py, .*configs/paper.py") as e:
        parse(f"--config={name}")
    assert name in str(e.value) and "__init__" not in str(e.value)


def test_generate_alone_may_leave_the_config_out(elsewhere):
    for arguments in (["--mode=generate"], ["--mode", "generate"]):
        config, mode, workdir = parse(*arguments)
        assert (config.model.path, mode, workdir) == ("demo", "generate", None)
    for arguments in ([], ["--mode=score"], ["--workdir", "generate"]):
        with pytest.raises(InputError, match="--config FILE is missing"):
            parse(*arguments)
