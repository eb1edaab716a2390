"""The notebooks run from top to bottom, show what they promise, and are stored without outputs."""

import ast
import base64
import html
import io
import json
import pathlib
import re
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageColor

from vigos_jax.config import validate

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = 2
# Beyond the standard library and ourselves: what the package itself needs, and what draws.
MAY_IMPORT = {"jax", "numpy", "ml_collections", "matplotlib", "IPython", "vigos_jax", "configs"}


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_notebooks_were_found():
    assert QUICKSTART in NOTEBOOKS


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
            code = re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.M)
            for node in ast.walk(ast.parse(code)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                found |= {name.split(".")[0] for name in names}
    assert "vigos_jax" in found
    assert found - set(sys.stdlib_module_names) <= MAY_IMPORT


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


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the executed notebook, the folder it ran in)."""
    folder = tmp_path_factory.mktemp("quickstart")
    notebook = read(QUICKSTART)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIGOS_NOTEBOOK_STEPS", str(STEPS))
        patch.setenv("PYTHONPATH", str(ROOT))  # this checkout, installed or not
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # no start-up files of whoever runs the tests
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures
        patch.delenv("XLA_FLAGS", raising=False)  # one device, as for a newcomer
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return notebook, folder


@pytest.mark.slow  # a run of its own: a dozen compilations
def test_runs_without_errors(executed):
    notebook, folder = executed
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    assert not [c.id for c in code for o in c.outputs if o.output_type == "error"]
    run = folder / "runs" / "quickstart"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
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
    assert re.findall(r"^valid (True|False) +(\w*)", cell.outputs[0].text, flags=re.M) == [
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
