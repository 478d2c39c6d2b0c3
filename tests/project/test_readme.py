"""Commands, code and links in the documents are valid."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from tests.project.source import ROOT, failing, text
from tests.project.test_structure import missing, tree_files

import veneer
from veneer.cli.main import COMMANDS, parser_of

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(language: str) -> list[tuple[str, str]]:
    """(where, text) of every fenced block in a language."""
    found = []
    for path in DOCUMENTS:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text(path), re.S | re.M):
            found.append((str(path.relative_to(ROOT)), match.group(1)))
    return found


def links_of(path: Path) -> list[str]:
    """Targets of the relative links in a document."""
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(path))


def lines(tool: str) -> list[str]:
    """Every line of a shell block that calls a tool, continued lines joined."""
    joined = "\n".join(body.replace("\\\n", " ") for _, body in blocks("bash"))
    return [line.strip() for line in joined.splitlines() if line.strip().split(" ")[0] == tool]


@pytest.mark.parametrize("line", lines("veneer"))
def test_commands_parse(line: str) -> None:
    """Each ``veneer`` line names an existing command, whose parser accepts its flags."""
    words = shlex.split(line, comments=True)[1:]
    for stop in ("|", ">", ">>", "&&", ";"):
        words = words[: words.index(stop)] if stop in words else words
    if words in (["--help"], ["--version"]):
        return
    known = COMMANDS
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in known)
    parser, _ = parser_of(name)
    rest = words[len(name.split()) :]
    assert "--help" in rest or parser.parse_args(rest)


@pytest.mark.parametrize("line", lines("python"))
def test_python_scripts_exist(line: str) -> None:
    """Each ``python`` line runs a script or a module of the repository."""
    words = shlex.split(line, comments=True)[1:]
    path = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("line", lines("make"))
def test_make_targets_exist(line: str) -> None:
    """Each ``make`` line names a target of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.M)
    words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert words and set(words) <= set(targets)


@pytest.mark.parametrize(("where", "body"), blocks("python"))
def test_python_blocks_use_public_names(where: str, body: str) -> None:
    """Each Python block parses, and every ``veneer.x`` in it is public."""
    syntax = ast.parse(body)
    for node in ast.walk(syntax):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "veneer":
            assert node.attr in veneer.__all__
        if isinstance(node, ast.ImportFrom) and node.module == "veneer":
            assert {alias.name for alias in node.names} <= set(veneer.__all__)


def test_documents_have_something_to_check() -> None:
    """The documents have commands, code and links, so that the tests above check something."""
    assert len(lines("veneer")) > 20 and len(lines("make")) > 5 and len(blocks("python")) >= 2
    assert sum(len(links_of(path)) for path in DOCUMENTS) > 5


def test_links_resolve() -> None:
    """Each relative link in a document names an existing file."""
    assert failing(DOCUMENTS, lambda path: [to for to in links_of(path) if not (path.parent / to).exists()]) == {}


def test_files_that_documents_name_exist() -> None:
    """Each source file that a document names is in the tree; ``NAME.py`` stands for any."""
    files = tree_files()
    assert failing(DOCUMENTS, lambda path: missing(text(path).replace("NAME.py", ""), files)) == {}
