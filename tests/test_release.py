"""What a release says of itself agrees: version, date, changelog, citation, and the files that come with it."""

import pathlib
import re

import yaml

from vigos_jax import __version__

ROOT = pathlib.Path(__file__).resolve().parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_changelog_has_this_version_and_its_date():
    headings = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.M)
    releases = [h for h in headings if h != "Unreleased"]
    assert headings.count("Unreleased") <= 1 and headings.index(releases[0]) <= 1
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", h) for h in releases), releases
    assert releases[0].split(" - ")[0] == __version__
    assert releases == sorted(releases, key=lambda h: [int(n) for n in h.split(" - ")[0].split(".")], reverse=True)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__
    (date,) = re.findall(rf"^## {re.escape(__version__)} - (.*)$", read("CHANGELOG.md"), re.M)
    assert str(citation["date-released"]) == date
    assert citation["license"] == "Apache-2.0" and citation["cff-version"] == "1.2.0"
    assert {"title", "authors", "message", "type"} <= set(citation)
    assert "2606.19120" in citation["references"][0]["url"]


def test_issue_templates_are_forms():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    read_ = {form.stem: yaml.safe_load(form.read_text(encoding="utf-8")) for form in forms}
    assert {"bug", "feature", "numbers", "config"} == set(read_)
    for name, form in read_.items():
        if name != "config":
            assert form["name"] and form["description"]
            ids = [item["id"] for item in form["body"] if item["type"] != "markdown"]
            assert len(ids) == len(set(ids)) >= 3
