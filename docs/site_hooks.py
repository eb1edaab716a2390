"""What mkdocs does beside rendering docs/: generated pages, equations as MathML, a check that nothing is fetched."""

import html
import pathlib
import re
import sys

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vigos_jax import main  # noqa: E402
from vigos_jax.explain.render import markdown  # noqa: E402

PACKAGE = ROOT / "vigos_jax"
_SHIM = "https://unpkg.com/iframe-worker/shim"  # docs/assets/iframe_worker.js instead
# The tags and attributes by which a page fetches something when it is opened; a link to click is none.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|input)\b[^>]*?\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|prefetch|preconnect|modulepreload|icon))[^>]*?\bhref=["']?(?:https?:)?//[^>]*>""",
    re.I,
)
_IMPORTED = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*")  # by a style sheet
_SOURCE = '<details class="mkdocstrings-source">'
_FORMULA = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.S)


def api_pages() -> dict[str, str]:
    """Page of every package of vigos_jax, and one of the modules beside them: what mkdocstrings fills in."""
    modules: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" or not path.read_text(encoding="utf-8").strip():
            continue
        modules.setdefault(parts[0] if len(parts) > 1 else "", []).append(".".join(("vigos_jax", *parts)))
    pages = {}
    for package, names in sorted(modules.items()):
        title = f"vigos_jax.{package}" if package else "vigos_jax"
        parts = [f"# {title}", _first_line(package)]
        for name in names:
            parts += [f"## {name.removeprefix(title + '.')}", f"::: {name}\n    options: {{heading_level: 3}}"]
        pages[f"api/{package or 'vigos_jax'}.md"] = "\n\n".join(parts) + "\n"
    return pages


def _first_line(package: str) -> str:
    path = PACKAGE / package / "__init__.py" if package else PACKAGE / "__init__.py"
    match = re.match(r'"""(.*)', path.read_text(encoding="utf-8"))
    return match[1].removesuffix('"""') if match else ""


def cli_page() -> str:
    """The command line's own help, and how a field is explained."""
    return (
        "---\nhide: [toc]\n---\n\n# Command line\n\n"
        f'<div class="help" markdown>\n\n```text\n{main.HELP}```\n\n</div>\n\n'
        "Exit codes are explained in "
        "[Troubleshooting](troubleshooting.md#exit-codes), fields of a config in [Config fields](config.md).\n\n"
        "Other programs of the package:\n\n"
        "| | |\n|---|---|\n"
        "| `python -m vigos_jax.miniature.study` | [the paper in miniature](miniature.md) |\n"
        "| `python -m benchmarks` | speed and memory as ratios, from a checkout: [why it is fast](speed.md) |\n"
    )


def root_page(name: str) -> str:
    """A page of the repository's root, whose links lead into docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


def generated() -> dict[str, str]:
    """Name -> Markdown of every page that no file of docs/ holds."""
    pages = {"config.md": markdown(), "cli.md": cli_page(), **api_pages()}
    return pages | {f"{name.lower()}.md": root_page(f"{name}.md") for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")}


def on_config(config):
    """Puts the API's pages into the navigation."""
    pages = list(api_pages())
    for section in config.nav:
        for entry in next(iter(section.values())) if isinstance(next(iter(section.values())), list) else []:
            if entry.get("API") == "API_PAGES":
                entry["API"] = pages
    return config


def on_files(files, config):
    """Adds the generated pages."""
    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Leaves out what a code block's first line tells the tests after its language."""
    return re.sub(r"^```(\w+) [^`\n]+$", r"```\1", markdown, flags=re.M)


def on_page_content(content, **_):
    """Formulas as MathML, which browsers render themselves; source code left out of search; intervals on one line."""

    def formula(match: re.Match) -> str:
        latex = html.unescape(match[2]).strip()
        display = "block" if latex.startswith(r"\[") else "inline"
        return latex2mathml.converter.convert(latex[2:-2].strip(), display=display)

    content = content.replace(_SOURCE, f"{_SOURCE[:-1]} data-search-exclude>")
    return _FORMULA.sub(formula, content.replace(" ± ", "&nbsp;±&nbsp;"))


def on_post_page(output, page, **_):
    """Takes the theme's help for search from disk from this site instead of another host."""
    return output.replace(_SHIM, get_relative_url("assets/iframe_worker.js", page.url))


def on_post_template(output_content, **_):
    """The same for the page of what is not found, which has no place to be relative to."""
    return output_content.replace(f'<script src="{_SHIM}"></script>', "")


def on_post_build(config):
    """Fails if a page would fetch something from another host when it is opened, or shows Markdown as it stands."""
    site, found = pathlib.Path(config.site_dir), []
    for page in sorted(site.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        found += [f"{page.relative_to(site)} fetches {tag[:160]}" for tag in _FETCHED.findall(text)]
        found += [f"{page.relative_to(site)} shows a code block as text"] if re.search(r"<p>```", text) else []
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text(encoding="utf-8")
        found += [f"{sheet.relative_to(site)} fetches {address}" for address in _IMPORTED.findall(text)]
    if found:
        raise PluginError("pages must fetch nothing from other hosts, and show what was meant:\n" + "\n".join(found))
