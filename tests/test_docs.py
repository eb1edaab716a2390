"""What the documentation speaks of is there: flags, fields, files, names and links; its configs are valid, one runs."""

import ast
import functools
import pathlib
import re

import ml_collections
import pytest
import tiny_runs as runs

from configs import base
from vigos_jax import main
from vigos_jax.config import TEMPLATE_SWITCHES, validate
from vigos_jax.method.roles import ENTRY_FIELDS, SPANS, role_table
from vigos_jax.rollouts.sampling import Sampling

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = {"config", "mode", "workdir", "help", "version", "verbose", "v"}
SUFFIXES = "py|md|svg|ipynb|jsonl|json|html|j2|safetensors|txt"
# What the user calls his own, and what the code puts together from parts.
ELSEWHERE = {"my_run.py", "mine.py", "no_NAME", "patches_too_long", "sequence_too_long"}

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FIELD = re.compile(r"(?<![\w./])config((?:\.[A-Za-z_]\w*)+)")
FLAG = re.compile(r"\s--?([a-z][\w-]*)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def fences(text: str) -> list[tuple[str, str]]:
    """(what stands behind the opening fence, the block)."""
    return FENCE.findall(text)


def inline(text: str) -> list[str]:
    """Code spans outside of fenced blocks."""
    return CODE.findall(FENCE.sub("", text))


@functools.cache
def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("vigos_jax", "configs", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != pathlib.Path(__file__).name  # misspelt names stand here
    }


@functools.cache
def words() -> set[str]:
    """Every name and word in the code: what is none of them is misspelt or gone."""
    texts = [*sources().values(), *((ROOT / name).read_text() for name in ("Makefile", "setup.py", "pyproject.toml"))]
    return {word for text in texts for word in re.findall(r"\w+", text)}


@functools.cache
def modules() -> dict[str, set[str]]:
    """Module name -> what it defines, methods, fields and string values of its classes included."""
    out: dict[str, set[str]] = {}
    for path, text in sources().items():
        if path.startswith("vigos_jax/"):
            names = out.setdefault(pathlib.Path(path).stem, set())
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
    return out


def field_fault(dotted: str) -> str | None:
    """What is wrong with `config.a.b`; roles and prompts are the user's to name."""
    node, parts = base.get_config(), dotted.split(".")[1:]
    if parts[0] in ("roles", "prompts") and len(parts) > 2:
        choices = ENTRY_FIELDS if parts[0] == "roles" else ("user", "assistant_prefill")
        return None if parts[2] in choices else f"{dotted}: {parts[2]} is not a field of {parts[0]}"
    if dotted.startswith(f"config.{TEMPLATE_SWITCHES}."):  # a template names them
        return None
    for part in parts[:1] if parts[0] in ("roles", "prompts") else parts:
        if part.isupper():  # a placeholder
            return None
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            # A method of the config, or of what it holds, is fine.
            return None if hasattr(node, part) and part != "fields" else f"{dotted}: there is no {part}"
        node = node[part]
    return None


def exists(name: str, page: pathlib.Path) -> bool:
    """Whether a file is in the repository, under any of its folders, or is one that the code writes or reads."""
    if name in ELSEWHERE or "..." in name or name.startswith(("/", "http", "~")):
        return True
    places = [ROOT, page.parent, ROOT / "vigos_jax", ROOT / "vigos_jax" / "demo"]
    if any((place / name).exists() for place in places):
        return True
    return "/" not in name and any(name in text for text in sources().values())


def faults(page: pathlib.Path, text: str) -> list[str]:
    """Everything a page speaks of that is not there."""
    out = []
    for dotted in sorted({"config" + m for m in FIELD.findall(text)}):
        if not re.search(rf"\.({SUFFIXES})$", dotted) and (fault := field_fault(dotted)):
            out.append(fault)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if "vigos_jax.main" in line:
            out += [f"no flag --{f}" for f in FLAG.findall(line.split("vigos_jax.main")[1]) if f not in FLAGS]
        out += [f"no mode {m}" for m in re.findall(r"--mode[ =](\w+)", line) if m not in main.MODES and m != "MODE"]
        named = re.findall(r"(?<![\w/-])(?:configs|vigos_jax|tests|docs|notebooks|benchmarks)/[\w/.-]+\.\w+", line)
        out += [f"no file {f}" for f in named if not exists(f, page)]
    for span in inline(text):
        for word in span.split() if " " in span else [span]:
            if re.fullmatch(rf"[\w./~-]+\.(?:{SUFFIXES})", word):
                out += [] if exists(word, page) else [f"no file {word}"]
        name = span.removesuffix("()")
        if re.fullmatch(rf"[\w.]+\.(?:{SUFFIXES})", name):
            continue
        if match := re.fullmatch(r"([a-z_]\w*)\.([A-Za-z_]\w*)(\.\w+)*", name):
            if match[1] in modules() and match[1] != "config":
                is_known = match[2] in modules()[match[1]] or not field_fault(f"config.{name}")
                out += [] if is_known else [f"no {match[2]} in {match[1]}.py"]
        elif re.fullmatch(r"[A-Za-z]\w*_\w+", name) or (span.endswith("()") and name.isidentifier()):
            out += [] if name in words() | ELSEWHERE else [f"{name} is nowhere in the code"]
    for target in LINK.findall(FENCE.sub("", text)):
        out += link_faults(target, page, text)
    return out


def link_faults(target: str, page: pathlib.Path, text: str) -> list[str]:
    if re.match(r"[a-z]+:", target):
        return []
    name, _, anchor = target.partition("#")
    path = (page.parent / name) if name else page
    if name and not path.exists():
        return [f"no file {target}"]
    content = path.read_text(encoding="utf-8") if name and anchor else text
    headings = re.findall(r"^#+ (.*)$", content, re.M) if anchor else []
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return [f"no heading {target}"] if anchor and anchor not in slugs else []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_speaks_of_is_there(page):
    found = faults(page, page.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "`--config.sampling.max_token=3`",
        "see `config.lora.ranks`",
        "```python\nconfig.optimizer.learning_rat = 1\n```",
        "`config.roles.mine.weights`",
        "`--mode diagnos`",
        "`python -m vigos_jax.main --config configs/base.py --work-dir x`",
        "```bash\npython -m vigos_jax.main \\\n  --config configs/bases.py\n```",
        "`vigos_jax/los.py`",
        "`metric.jsonl`",
        "`losses.divergense`",
        "`packing.make_rows`",
        "`find_span`",
        "`pack_score()`",
        "[data](dta.md)",
        "[data](data.md#rollout)",
        "[here](#nowhere)",
    ],
)
def test_a_misspelling_is_found(text):
    assert len(set(faults(ROOT / "docs" / "page.md", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "`--config.sampling.max_tokens=3` `config.roles.mine.weight` `config.prompts.mine.user` `config.FIELD`",
        "`vigos_jax/method/losses.py` `metrics.jsonl` `losses.weighted_loss` `find_spans()` `config.json` `my_run.py`",
        "# Some heading\n[data](files.md#wrong-answers-configdiagnosewrong_answers_file) [here](#some-heading)",
        "`python -m vigos_jax.main --config configs/base.py --mode eval -v --workdir x`",
    ],
)
def test_what_is_there_is_not_reported(text):
    assert faults(ROOT / "docs" / "page.md", text) == []


# The configs in the pages.


def config_blocks() -> list:
    out = []
    for page in PAGES:
        marked = [(kind.split(), code) for kind, code in fences(page.read_text()) if kind.startswith("python config")]
        out += [pytest.param(kind, code, id=f"{page.name}-{i}") for i, (kind, code) in enumerate(marked)]
    return out


def config_of(code: str):
    names: dict = {}
    exec(compile(code, "<documentation>", "exec"), names)
    return names["get_config"]()


@pytest.mark.parametrize("kind, code", config_blocks())
def test_a_config_is_valid(kind, code):
    config = config_of(code)
    validate(config)
    table = role_table(config.roles, config.prompts, data_fields=tuple(config.data.fields))
    assert Sampling(**config.sampling).max_tokens > 0
    assert config.to_json_best_effort() != base.get_config().to_json_best_effort()  # it says something
    assert {span for role in table for span in role.scores} <= set(SPANS)


def test_configs_are_there():
    assert len(config_blocks()) >= 7
    assert any("run" in param.values[0] for param in config_blocks())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runs.compile_once():
        yield runs.make_world(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("kind, code", [p for p in config_blocks() if "run" in p.values[0]])
def test_a_config_trains(world, tmp_path, kind, code):
    """A step of the tiny model with the page's roles: those that can score a rollout of it have tokens."""
    lines = world.config.read_text().replace("return config", "return page(config)")
    page = f"\n\ndef page(config):\n    own = {{}}\n    exec({code!r}, own)\n    theirs = own['get_config']()\n"
    page += "    config.roles, config.prompts = theirs.roles, theirs.prompts\n    return config\n"
    (tmp_path / "mine.py").write_text(lines + page)
    workdir = tmp_path / "run"
    options = ["--config.steps=1", "--config.buckets.prompt=(512,)", "--config.buckets.sequence=(1024,2048)"]
    assert main.main(["vigos_jax", f"--config={tmp_path / 'mine.py'}", f"--workdir={workdir}", *options]) == 0
    (row,) = runs.read_rows(workdir / "metrics.jsonl")
    names = {key.removesuffix("/tokens") for key in row if key.endswith("/tokens")}
    config = config_of(code)
    assert names == {name for name, role in config.roles.items() if role.weight}
    assert row["loss"] > 0 and sum(row[f"{name}/tokens"] for name in names) > 0


# The metrics that docs/files.md lists.


def documented_keys() -> set[str]:
    text = (ROOT / "docs" / "files.md").read_text()
    section = text.split("### metrics.jsonl")[1].split("###")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in CODE.findall(row)}


@pytest.mark.slow
def test_the_metrics_are_those_that_are_written(world, tmp_path_factory):
    workdir = runs.finished_run(tmp_path_factory).workdir
    names = "|".join(base.get_config().roles)
    written = {key for row in runs.read_rows(workdir / "metrics.jsonl") for key in row}
    general = {re.sub(r"^invalid/.*", "invalid/REASON", re.sub(rf"^({names})/", "ROLE/", key)) for key in written}
    assert general - documented_keys() == set(), "docs/files.md lacks these"
    # A tiny random model has no valid rollout, nor a part of one; this run's roles weigh no tokens.
    absent = {"length/description", "length/reasoning", "length/answer", "leak_rate", "ROLE/effective_tokens"}
    assert documented_keys() - general <= absent, "nothing writes these"


# Docstrings.


def undocumented(path: str, text: str) -> list[str]:
    """Public functions, classes and methods without a docstring; not properties, `setup` and `close`."""
    tree, out = ast.parse(text), []
    if text.strip() and not ast.get_docstring(tree):
        out.append(path)
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for item in [node, *inner]:
            if not isinstance(item, ast.FunctionDef | ast.ClassDef) or item.name.startswith("_"):
                continue
            known = item is not node and item.name in ("setup", "close")
            decorators = [getattr(d, "id", getattr(d, "attr", "")) for d in item.decorator_list]
            is_property = any(name.endswith("property") for name in decorators)
            if not (known or is_property or ast.get_docstring(item)):
                out.append(f"{path}:{item.lineno} {item.name}")
    return out


def test_public_names_have_docstrings():
    found = [x for path, text in sources().items() if path.startswith("vigos_jax/") for x in undocumented(path, text)]
    assert not found, "\n".join(found)


def test_a_missing_docstring_is_found():
    text = '"""M."""\ndef a():\n    pass\ndef _b():\n    pass\nclass C:\n    """C."""\n    def d(self):\n        pass\n'
    assert undocumented("x.py", text) == ["x.py:2 a", "x.py:8 d"]
    assert undocumented("x.py", "def a():\n    '''A.'''\n") == ["x.py"]
