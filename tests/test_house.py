"""The house rules, read from the source: imports point down, files stay small, nothing unsafe, no torch."""

import ast
import pathlib
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_LINES = 400

# The packages and top-level modules of vigos_jax, highest first: an import points down, or stays in its package.
ROOMS = (
    *("miniature", "main", "explain", "plan", "training", "evaluation", "analysis", "export", "rollouts", "teachers"),
    *(
        "session",
        "method",
        "weights",
        "report",
        "data",
        "models",
        "grading",
        "config",
        "config_limits",
        "runtime",
        "demo",
    ),
    *("errors", "__init__"),
)
LEVELS = {room: level for level, room in enumerate(reversed(ROOMS))}
CONFIGS_MAY_IMPORT = LEVELS["config"]  # a config is data: it needs leaves and other configs

TEST_ONLY = {"torch", "torchvision", "torchaudio", "peft", "accelerate", "tests", "pytest", "hypothesis"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Of libraries that read data with one function and run it with another.
UNSAFE_CALLS = {
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pty.spawn"),
    *("pandas.read_pickle", "pd.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput"),
}


def room_of(path: str) -> str | None:
    """The entry of ROOMS that holds a file of vigos_jax (path relative to it), or None."""
    room = path.split("/")[0].removesuffix(".py")
    return room if room in LEVELS else None


def imported(tree: ast.Module, path: str) -> list[tuple[int, str]]:
    """(line, dotted name) of each import at any depth; `from a import b` is "a.b", relative ones resolved."""
    package = path.removesuffix(".py").split("/")[:-1]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            names += [(node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return names


def called(node: ast.Call) -> str:
    return getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def file_of(name: str, files: set[str]) -> str | None:
    """The file of vigos_jax (relative to it) that a dotted name lies in; None for anything else."""
    parts = name.split(".")
    if parts[0] != "vigos_jax":
        return None
    for length in range(len(parts), 0, -1):
        stem = "/".join(parts[1:length])
        for path in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if path in files:
                return path
    return "__init__.py"


def import_faults(path: str, source: str, files: set[str]) -> list[str]:
    """Imports that do not point down, or reach for what only tests have. `files`: those of vigos_jax."""
    faults = []
    own = path.removeprefix("vigos_jax/")
    in_configs = path.startswith("configs/")
    for line, name in imported(ast.parse(source), path):
        if name.split(".")[0] in TEST_ONLY:
            faults.append(f"{path}:{line} imports {name}, which is not there at run time")
        if name.split(".")[0] == "configs" and not in_configs and room_of(own) != "miniature":
            faults.append(f"{path}:{line} imports {name}; a config is handed in, by --config")
        target = file_of(name, files)
        if target is None or room_of(target) is None:
            continue
        there = LEVELS[room_of(target)]
        if in_configs:
            is_down = there <= CONFIGS_MAY_IMPORT
        else:
            here = room_of(own)
            is_down = here is None or there < LEVELS[here] or (room_of(target) == here and "/" in own)
        if not is_down:
            faults.append(f"{path}:{line} imports {name}, which is not below it (ROOMS in {__name__}.py)")
    return faults


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Files that import each other in a ring, given what each imports: every ring once."""
    found, done = [], set()

    def visit(path: str, above: list[str]) -> None:
        if path in above:
            found.append([*above[above.index(path) :], path])
        elif path not in done:
            for target in sorted(imports.get(path, ())):
                visit(target, [*above, path])
            done.add(path)

    for path in sorted(imports):
        visit(path, [])
    return found


def unsafe_faults(path: str, source: str) -> list[str]:
    """Unpickling, evaluating strings, and remote code, wherever it is switched on or could be."""
    tree = ast.parse(source)
    faults = [
        f"{path}:{line} imports {name}, which runs code from data"
        for line, name in imported(tree, path)
        if name.split(".")[0] in UNPICKLERS
    ]
    for node in ast.walk(tree):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            dotted = ast.unparse(node.func)
            if dotted in UNSAFE_CALLS or called(node) in ("compile", "__import__") and dotted == called(node):
                faults.append(f"{where} calls {dotted}()")
            owner = getattr(node.func, "value", None)  # of `owner.eval()`
            if called(node) in ("eval", "exec") and getattr(owner, "id", owner) in (None, "builtins"):
                faults.append(f"{where} calls {called(node)}()")
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            pairs = zip(keys, node.values, strict=True)
        else:
            continue
        for key, value in pairs:
            is_off = isinstance(value, ast.Constant) and value.value is False
            if key in ("trust_remote_code", "allow_pickle", "shell") and not is_off:
                faults.append(f"{where} sets {key}")
    return faults


def length_faults(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path} has {lines} lines, more than {MAX_LINES}: split it"] if lines > MAX_LINES else []


def place_faults(path: str) -> list[str]:
    """A file of vigos_jax that ROOMS does not know."""
    if not path.startswith("vigos_jax/") or room_of(path.removeprefix("vigos_jax/")):
        return []
    return [f"{path} is in no package of ROOMS in tests/test_house.py"]


SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for package in ("vigos_jax", "configs")
    for path in sorted((ROOT / package).rglob("*.py"))
}
FILES = {path.removeprefix("vigos_jax/") for path in SOURCES if path.startswith("vigos_jax/")}


@pytest.mark.parametrize("path", SOURCES)
def test_file_keeps_the_house_rules(path):
    source = SOURCES[path]
    faults = place_faults(path) + import_faults(path, source, FILES)
    faults += unsafe_faults(path, source) + length_faults(path, source)
    assert not faults, "\n".join(faults)


def imported_files(path: str, source: str) -> set[str]:
    """The files of vigos_jax that one of them imports; a package's own `__init__` is not one."""
    targets = {file_of(name, FILES) for _, name in imported(ast.parse(source), path)}
    return {t for t in targets if t and not t.endswith("__init__.py")}


def test_no_file_imports_itself_through_others():
    imports = {path.removeprefix("vigos_jax/"): imported_files(path, source) for path, source in SOURCES.items()}
    assert circles(imports) == []
    assert sum(map(len, imports.values())) > 200  # they were found


@pytest.mark.parametrize(
    "imports, rings",
    [
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, [["a", "b", "c", "a"]]),
        ({"a": {"a"}}, [["a", "a"]]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
    ],
)
def test_circle_check(imports, rings):
    assert circles(imports) == rings


def test_there_are_few_packages():
    folders = {path.split("/")[0] for path in FILES if "/" in path}
    assert folders <= set(ROOMS) and len(folders) <= 16


def test_the_package_was_found():
    assert {"vigos_jax/__init__.py", "vigos_jax/errors.py", "configs/__init__.py"} <= set(SOURCES)


# Each check, shown to fail on what it is for and to pass on its harmless neighbour.
PLANTED_FILES = {
    *("__init__.py", "errors.py", "config.py", "session.py", "main.py", "method/__init__.py", "method/roles.py"),
    *("method/spans.py", "data/__init__.py", "data/loader.py", "training/__init__.py", "training/loop.py"),
    *("models/__init__.py", "models/layers.py", "models/vlm.py", "demo/__init__.py", "miniature/make_base.py"),
}


@pytest.mark.parametrize(
    "path, source",
    [
        ("vigos_jax/method/roles.py", "import vigos_jax.session"),  # up
        ("vigos_jax/session.py", "from vigos_jax import main"),
        ("vigos_jax/data/loader.py", "from vigos_jax.method.spans import find_spans"),
        ("vigos_jax/data/loader.py", "from ..method import spans"),
        ("vigos_jax/data/loader.py", "def f():\n    from vigos_jax.method.roles import TeacherRole"),  # local
        ("vigos_jax/models/layers.py", "from ..training.loop import train"),
        ("vigos_jax/models/layers.py", "import importlib\nimportlib.import_module('vigos_jax.training.loop')"),
        ("vigos_jax/errors.py", "from vigos_jax.config import Config"),
        ("vigos_jax/demo/__init__.py", "from vigos_jax.miniature import make_base"),  # highest of all
        ("vigos_jax/training/loop.py", "from configs import base"),
        ("configs/base.py", "from vigos_jax.training import loop"),
        ("vigos_jax/training/loop.py", "import torch.nn as nn"),
        ("vigos_jax/training/loop.py", "def f():\n    from peft import LoraConfig"),
        ("configs/base.py", "import torch"),
    ],
)
def test_import_check_fails(path, source):
    assert len(import_faults(path, source, PLANTED_FILES)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("vigos_jax/main.py", "from vigos_jax import __version__, session\nimport vigos_jax.errors"),
        ("vigos_jax/models/vlm.py", "from vigos_jax.models import layers\nfrom .layers import Dense"),
        ("vigos_jax/miniature/make_base.py", "from configs import demo_base\nfrom vigos_jax import main"),
        ("configs/base.py", "from configs import demo_base\nfrom vigos_jax.config import Config"),
        ("vigos_jax/training/loop.py", "import jax\nimport flax.linen as nn  # not torch"),
    ],
)
def test_import_check_passes(path, source):
    assert import_faults(path, source, PLANTED_FILES) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "load(name, trust_remote_code=True)",
        "load(name, trust_remote_code=flag)",
        "load(name, **{'trust_remote_code': True})",
        "np.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "yaml.unsafe_load(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "import dill as d",
    ],
)
def test_unsafe_check_fails(source):
    assert len(unsafe_faults("vigos_jax/training/loop.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "f()().eval()",
        "'eval(pickle)'",
        "load(name, trust_remote_code=False)",
        "re.compile(text)",
        "yaml.safe_load(text)",
        "lowered.compile()",
        "np.load(path, allow_pickle=False)",
    ],
)
def test_unsafe_check_passes(source):
    assert unsafe_faults("vigos_jax/training/loop.py", source) == []


def test_length_check():
    assert length_faults("vigos_jax/training/loop.py", "x = 1\n" * (MAX_LINES + 1))
    assert not length_faults("vigos_jax/training/loop.py", "x = 1\n" * MAX_LINES)


def test_place_check():
    assert "is in no package" in place_faults("vigos_jax/utils.py")[0]
    assert place_faults("vigos_jax/helpers/text.py")
    assert not place_faults("vigos_jax/models/qwen9_vl.py")
    assert not place_faults("configs/mine.py")
