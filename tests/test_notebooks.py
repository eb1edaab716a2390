"""The notebooks run from top to bottom, show what they promise, and are stored without outputs, beside their text.

A notebook and its text are one thing: change either, then `jupytext --sync notebooks/NAME.py`.
"""

import ast
import base64
import html
import io
import json
import pathlib
import re
import sys

import jupytext
import nbformat
import numpy as np
import pytest
import safetensors.numpy
from nbclient import NotebookClient
from PIL import Image, ImageColor

from vigos_jax.config import validate
from vigos_jax.models.config import ModelConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = 2
NAMES = ("export", "own_data", "palr", "quickstart")
# Beyond the standard library and ourselves: what the package itself needs, and what draws.
MAY_IMPORT = {"jax", "numpy", "PIL", "matplotlib", "IPython", "vigos_jax", "configs"}
ALSO = {"export": {"torch", "transformers", "peft"}}  # what its own install line names


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_notebooks_were_found():
    assert [path.stem for path in NOTEBOOKS] == list(NAMES)
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("*.py"))] == list(NAMES)


def as_text(notebook: nbformat.NotebookNode) -> str:
    return jupytext.writes(notebook, fmt="py:percent")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_and_text_are_the_same(path):
    assert as_text(jupytext.read(path)) == path.with_suffix(".py").read_text(), "run: jupytext --sync"


def test_a_notebook_that_differs_from_its_text_is_found():
    text, notebook = QUICKSTART.with_suffix(".py").read_text(), jupytext.read(QUICKSTART)
    for cell in (notebook.cells[0], notebook.cells[-2]):  # prose and code
        cell.source += "\n# more"
        assert as_text(notebook) != text
        cell.source = cell.source.removesuffix("\n# more")
    assert as_text(notebook) == text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_stored_without_outputs(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_imports_only_what_its_install_brings(path):
    found = set()
    for cell in read(path).cells:
        if cell.cell_type == "code":
            code = re.sub(r"^(\s*)%+\w.*$", r"\1pass", cell.source, flags=re.M)
            for node in ast.walk(ast.parse(code)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                found |= {name.split(".")[0] for name in names}
    assert "vigos_jax" in found
    assert found - set(sys.stdlib_module_names) <= MAY_IMPORT | ALSO.get(path.stem, set())


def test_the_config_file_it_recommends_is_valid():
    (source,) = re.findall(r"```python\n(.*?)```", read(QUICKSTART).cells[-1].source, flags=re.S)
    names = {}
    exec(compile(source, "mine.py", "exec"), names)
    config = names["get_config"]()
    validate(config)
    assert config.data.source == "mine.jsonl"


def data_of(notebook: nbformat.NotebookNode, cell_id: str, mime: str) -> str:
    """The one output of this kind that a cell shows."""
    (cell,) = [c for c in notebook.cells if c.id == cell_id]
    (data,) = [o.data[mime] for o in cell.outputs if mime in o.get("data", {})]
    return data


def picture_of(notebook: nbformat.NotebookNode, cell_id: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    data = base64.b64decode(data_of(notebook, cell_id, "image/png"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def count_pixels(picture: np.ndarray, color: str) -> int:
    return int(np.sum(np.all(picture == ImageColor.getrgb(color), axis=-1)))


def execute(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook, executed in `folder` in short; a cell that raises ends it."""
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIGOS_NOTEBOOK_STEPS", str(STEPS))
        patch.setenv("VIGOS_NOTEBOOK_MODEL", "tiny")
        patch.setenv("PYTHONPATH", str(ROOT))  # this checkout, installed or not
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # no start-up files of whoever runs the tests
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures
        patch.delenv("XLA_FLAGS", raising=False)  # one device, as for a newcomer
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    outputs = [o for c in code for o in c.outputs]
    # Nor warnings: a newcomer takes them for errors.
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], outputs
    assert "Warning" not in printed(notebook)
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(shown_by(c) for c in notebook.cells if c.cell_type == "code")


def shown_by(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, which the kernel may send in several pieces."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> list[np.ndarray]:
    """All figures shown; none is an empty canvas."""
    outputs = [o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    out = [np.asarray(Image.open(io.BytesIO(base64.b64decode(o["image/png"])))) for o in outputs if "image/png" in o]
    assert all(picture.std() > 10 for picture in out)
    return out


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the executed quickstart, the folder it ran in)."""
    folder = tmp_path_factory.mktemp("quickstart")
    return execute("quickstart", folder), folder


@pytest.mark.slow  # a run of its own: a dozen compilations
def test_runs_without_errors(executed):
    notebook, folder = executed
    run = folder / "runs" / "quickstart"
    rows = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"base", "trained"} <= set(json.loads((run / "results.json").read_text()))
    for cell_id in ("pictures", "result-bars"):
        assert picture_of(notebook, cell_id).std() > 10  # not an empty canvas


@pytest.mark.slow
def test_mask_figure_shows_every_role(executed):
    notebook, _ = executed
    picture = picture_of(notebook, "mask-figure")
    legend = re.findall(r'solid (#[0-9a-f]{6})">(\w+)<', data_of(notebook, "colored-rollout", "text/html"))
    assert [name for _, name in legend] == ["perception", "reasoning", "reference"]
    for color, name in legend:
        assert count_pixels(picture, color) > 100, name  # the marks of scored rows
    # The parser told the two hand-written rollouts apart.
    (cell,) = [c for c in notebook.cells if c.id == "pack"]
    assert re.findall(r"^valid (True|False) +(\w*)", shown_by(cell), flags=re.M) == [
        ("True", ""),
        ("False", "no_think_close"),
    ]


@pytest.mark.slow
def test_rollout_is_colored_and_escaped(executed):
    notebook, _ = executed
    page = data_of(notebook, "colored-rollout", "text/html")
    assert set(re.findall(r"</?([\w|]*)", page)) == {"b", "br", "code", "div", "span"}  # tokens add no tags
    before, after = (
        re.findall(r'<span style="([^"]*)" title="([^"]*)">([^<]*)</span>', line)
        for line in re.findall(r"<code[^>]*>(.*?)</code>", page, flags=re.S)
    )
    text = html.unescape("".join(token for _, _, token in before))
    assert all(tag in text for tag in ("</description>", "<think>", "</think>", "\\boxed{"))
    assert [token for _, _, token in before] == [token for _, _, token in after]
    kinds = {tip.split(":")[0] for _, tip, _ in before}
    assert kinds == {"perception", "reasoning", "no role scores this token"}
    for style, tip, _ in before + after:
        kl = re.search(r"KL (\d+\.\d+) nats", tip)
        assert ("background" in style) == (kl is not None)
        if kl:  # the stronger the color, the larger the divergence
            strength = int(re.search(r"background:#[0-9a-f]{6}([0-9a-f]{2})", style)[1], 16) / 255
            assert strength == pytest.approx(min(1.0, float(kl[1])) ** 0.5, abs=0.03)
    assert [style for style, _, _ in before] != [style for style, _, _ in after]  # training moved the student


@pytest.mark.slow
def test_own_data(tmp_path):
    """With a random checkpoint that the notebook makes itself: every step from rows to an exported folder."""
    notebook = execute("own_data", tmp_path)
    assert len(rows_of(tmp_path / "data" / "train.jsonl")) == len(list((tmp_path / "data").glob("*.png"))) == 48
    config = json.loads((tmp_path / "runs" / "mine" / "config.json").read_text())
    assert (config["model"]["path"], config["data"]["source"], config["lora"]["rank"]) == (
        str(tmp_path / "tiny-qwen3_5"),
        str(tmp_path / "data" / "train.jsonl"),
        4,
    )
    metrics = rows_of(tmp_path / "runs" / "mine" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert all(row["bad_rows"] == 0 and row["reference/tokens"] > 0 for row in metrics)
    assert len(pictures(notebook)) == 2  # the rows and the curves
    assert printed(notebook).count("<description>") == 2  # the base's answer and the student's
    # The export is the trained model, not the base.
    folders = tmp_path / "tiny-qwen3_5", tmp_path / "my_model"
    base, student = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in folders)
    assert base.keys() == student.keys() and ModelConfig.load(tmp_path / "my_model").family == "qwen3_5"
    assert any(not np.array_equal(base[name], student[name]) for name in base)


@pytest.mark.slow
def test_palr(tmp_path):
    """The figure's numbers are those of `--mode diagnose`, and ViGOS's descriptions have no answer in them."""
    notebook = execute("palr", tmp_path)
    assert len(pictures(notebook)) == 2  # the bars, and the picture of the question that is shown
    for name, roles in (("base", {"perception", "reasoning"}), ("opsd_same_prompt", {"reference"})):
        folder = tmp_path / "runs" / f"palr-{name}" / "diagnose"
        found = {role for row in rows_of(folder / "palr.jsonl") for role in row["role"] if role}
        assert found == roles
        leak = json.loads((folder / "summary.json").read_text())["T_d"]["palr"]
        assert (leak == 0) == (name == "base")
    (cell,) = [c for c in notebook.cells if "barh" in c.source]
    numbers = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in shown_by(cell).splitlines()}
    for method, name in (("ViGOS", "base"), ("OPSD", "opsd_same_prompt")):
        summary = json.loads((tmp_path / "runs" / f"palr-{name}" / "diagnose" / "summary.json").read_text())
        assert numbers[method] == pytest.approx([summary[g]["palr"] for g in ("T_d", "T_ra", "T_y")], abs=1e-3)
    (page,) = [
        o.data["text/html"] for c in notebook.cells if "colored" in c.source for o in c.outputs
        if "text/html" in o.get("data", {})
    ]  # fmt: skip
    assert "<b>ViGOS</b>" in page and "<b>OPSD</b>" in page and page.count("rgba(") > 10
    assert set(re.findall(r"</?([\w|]*)", page)) == {"b", "br", "code", "div", "span"}  # tokens add no tags


@pytest.mark.slow
def test_export(tmp_path):
    """transformers, peft and this program say the same: the notebook asserts it, and shows it."""
    notebook = execute("export", tmp_path)
    lines = printed(notebook).splitlines()
    (ours,) = [line.removeprefix("vigos_jax").strip() for line in lines if line.startswith("vigos_jax")]
    (theirs,) = [line.removeprefix("transformers").strip() for line in lines if line.startswith("transformers")]
    assert ours == theirs and "\\boxed{" in ours
    assert "peft          the same answers to all three" in lines
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()
    assert len(pictures(notebook)) == 1
