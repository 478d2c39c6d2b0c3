"""The documentation site: generated reference pages, links between pages, and code that runs."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from docs.scripts import site
from tests.project.source import ROOT

from veneer.cli.main import COMMANDS
from veneer.config import TrainOptions


def test_commands_page_is_complete() -> None:
    """Every command has a section, and its options are listed."""
    page = site.commands_page()
    assert re.findall(r"^## veneer (.+)$", page, re.M) == list(COMMANDS)
    assert "```bash\nveneer runs\nveneer runs runs/both --pause sql\n```" in page
    assert "`--method lora / dora`" in page and "`--top-p P`" in page


def test_options_page_is_complete() -> None:
    """Every option is listed once, with its default as YAML writes it."""
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", site.options_page(), re.M))
    assert list(rows) and set(rows) == set(TrainOptions.model_fields)
    assert (rows["valid_fraction"], rows["plan"], rows["data"], rows["warmup_steps"]) == ("0.0", "true", "none", "10")


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[a](../README.md) [b](../CHANGELOG.md#x)", "[a](index.md) [b](CHANGELOG.md#x)"),
        ("guides/x.md", "[a](../../CONTRIBUTING.md)", "[a](../CONTRIBUTING.md)"),
        ("CONTRIBUTING.md", "[a](docs/log/index.md)", "[a](log/index.md)"),
        ("glossary.md", "[load.py](../src/veneer/models/load.py)", "load.py"),
        ("log/a.md", "[a](../composing.md)", "[a](../composing.md)"),
    ],
)
def test_links_stay_in_the_site(page: str, text: str, expected: str) -> None:
    """Links to the root's pages become links in the site; links to source files become text."""
    assert site.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=page))) == expected


def test_every_page_is_in_the_navigation() -> None:
    """A page that the navigation lacks cannot be found."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert len(pages) > 20
    assert [page for page in pages if page not in navigation] == []


def test_options_of_the_migration_guide_exist() -> None:
    """Every option in the right column of a table of options is an option of a run."""
    text = (ROOT / "docs" / "guides" / "coming_from.md").read_text(encoding="utf-8")
    found = {
        word
        for row in re.findall(r"^\|[^|]*\|([^|]*)\|$", text, re.M)
        for word in re.findall(r"`([a-z_]+)(?::[^`]*)?`", row)
    }
    assert len(found) > 15
    assert found <= set(TrainOptions.model_fields) | {"messages"}, found - set(TrainOptions.model_fields)
