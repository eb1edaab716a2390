"""The documentation's site: every page has its place in the navigation, and nothing is fetched when one is opened."""

import importlib.util
import pathlib
import re
import sys

import pytest
import yaml
from browser import dump, needs_browser

ROOT = pathlib.Path(__file__).resolve().parent.parent
GENERATED = {"config.md", "cli.md", "contributing.md", "changelog.md", "security.md", "API_PAGES"}


def leaves(node) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]


def test_every_page_has_its_place_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    named = leaves(site["nav"])
    assert set(named) == pages | GENERATED and len(named) == len(set(named))


def test_what_builds_the_site_is_pinned():
    (line,) = re.findall(r'"docs": \[(.*)\]', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert all(re.fullmatch(r'"[\w-]+==[\d.]+"', package) for package in line.split(", "))


@pytest.fixture(scope="module")
def hooks():
    """docs/site_hooks.py, where the extra `docs` is installed; `make docs` runs it anyway."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        "<script defer src=//cdn.net/x.js></script>",
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<link href="https://x.net/a.css" rel=stylesheet>',
        '<img alt="" src="http://x.net/badge.svg">',
    ],
)
def test_what_would_be_fetched_is_found(hooks, tag):
    assert hooks._FETCHED.search(f"<p>a</p>{tag}")


@pytest.mark.parametrize(
    "tag",
    [
        '<a href="https://arxiv.org/abs/2606.19120">paper</a>',
        '<script src="assets/x.js"></script>',
        '<link rel="canonical" href="https://x.net/">',
        '<img src="method.svg">',
    ],
)
def test_links_may_lead_elsewhere(hooks, tag):
    assert not hooks._FETCHED.search(tag)


def test_every_module_has_its_api_page(hooks):
    text = "\n".join(hooks.api_pages().values())
    for path in (ROOT / "vigos_jax").rglob("*.py"):
        if path.name != "__init__.py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert f"\n::: {name}\n" in text


def test_formulas_become_mathml(hooks):
    out = hooks.on_page_content(r'<p><span class="arithmatex">\(p &lt; q_t\)</span></p>')
    assert out.startswith("<p><math") and "&#x0003C;" in out and "arithmatex" not in out


def test_a_code_block_keeps_its_language_alone(hooks):
    text = "```python config run\nx = 1\n```\n\n```json\n{}\n```\n"
    assert hooks.on_page_markdown(text) == text.replace(" config run", "")


def test_lists_begin_behind_a_blank_line():
    """Python-Markdown shows them as text otherwise; GitHub does not mind."""
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY"))]:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert not re.findall(r"^(?![-#|\d ]).+\n(?:-|1\.) .*$", text, re.M), path.name


# The site itself, where `make docs` has built it; .ci/run runs these behind it.

INDEX = ROOT / "site" / "index.html"
needs_site = pytest.mark.skipif(not INDEX.exists(), reason="make docs builds the site")


@needs_site
@needs_browser
@pytest.mark.parametrize("name", ["index.html", "config.html", "method.html", "api/method.html"])
def test_a_page_opens_from_disk_without_complaint(name, tmp_path):
    document, console = dump(INDEX.parent / name, tmp_path)
    assert console == "" and "md-content" in document


@needs_site
@needs_browser
def test_search_works_from_disk(tmp_path):
    document, console = dump(INDEX, tmp_path, query="?q=repetition_penalty")
    assert console == "" and re.search(r'href="[^"]*config.html[^"]*#samplingrepetition_penalty"', document)
