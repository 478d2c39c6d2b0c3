"""Hooks of the documentation site: generated reference pages, pages from the repository's root, and links that leave ``docs/``.

mkdocs.yml names this file; ``make docs`` builds the site.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

from veneer.cli.main import COMMANDS, EXAMPLES, parser_of
from veneer.config import TrainOptions

ROOT = Path(__file__).parents[2]
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")

_TO_ROOT = re.compile(r"\]\((?:\.\./)+(README|CHANGELOG|CONTRIBUTING)\.md(#[^)]*)?\)")
_TO_DOCS = re.compile(r"\]\(docs/([^)]*)\)")
_TO_OTHER_FILES = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?:src|bench|tests|examples|evidence|LICENSE)[^)]*\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root and the generated reference."""
    from mkdocs.structure.files import File

    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in ROOT_PAGES}
    pages |= {"reference/commands.md": commands_page(), "reference/options.md": options_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to the root's pages at their copies in the site, and drop links to files that are not pages."""
    depth = page.file.src_uri.count("/")

    def to_page(match: re.Match[str]) -> str:
        name = "index" if match[1] == "README" else match[1]
        return f"]({'../' * depth}{name}.md{match[2] or ''})"

    return _TO_OTHER_FILES.sub(r"\1", _TO_DOCS.sub(r"](\1)", _TO_ROOT.sub(to_page, markdown)))


def commands_page() -> str:
    """The reference of the command line, from the parsers."""
    lines = ["# Commands", "", "`veneer COMMAND --help` prints the same. All commands accept `--debug`.", ""]
    lines += [f"- [`veneer {name}`](#veneer-{name.replace(' ', '-')}): {text}" for name, text in COMMANDS.items()]
    for name, text in COMMANDS.items():
        parser, module = parser_of(name)
        lines += ["", f"## veneer {name}", "", f"{text[0].upper()}{text[1:]}."]
        lines += _details(module.__doc__ or "")
        if name in EXAMPLES:
            lines += ["", "```bash", *(f"veneer {name} {words}".rstrip() for words in EXAMPLES[name]), "```"]
        positional = [action for action in parser._actions if not action.option_strings]
        options = [
            action for action in parser._actions if action.option_strings and action.dest not in ("help", "debug")
        ]
        if name in ("train", "plan"):
            lines += ["", "The options of a run are on [a page of their own](options.md)."]
            options = [action for action in options if action.dest.replace("-", "_") not in TrainOptions.model_fields]
        rows = [(_usage(action), action.help or "") for action in positional + options]
        lines += ["", *_table(("argument", "meaning"), rows)] if rows else []
    return "\n".join(lines) + "\n"


def options_page() -> str:
    """The reference of the training options, from their declarations."""
    lines = [
        "# Training options",
        "",
        "Each option is a YAML key, and a flag with dashes: `learning_rate` is `--learning-rate`.",
        "",
    ]
    groups: dict[str, list[tuple[str, ...]]] = {}
    for group in reversed(TrainOptions.__mro__):
        for name in inspect.get_annotations(group):
            field = TrainOptions.model_fields.get(name)
            if field is not None:
                title = getattr(group, "title", group.__name__)
                default = _shown(field.get_default(call_default_factory=True))
                groups.setdefault(title, []).append((f"`{name}`", f"`{default}`", field.description or ""))
    for title, rows in groups.items():
        lines += ["", f"## {title}", "", *_table(("option", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _details(docstring: str) -> list[str]:
    """The paragraphs of a command's docstring after its first one."""
    paragraphs = docstring.strip().split("\n\n")[1:]
    return [line for paragraph in paragraphs for line in ("", _code(paragraph))]


def _code(paragraph: str) -> str:
    if paragraph.startswith("    "):
        return f"```text\n{paragraph}\n```"
    return paragraph.replace("``", "`")


def _usage(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return f"`{metavar}`"
    value = "" if action.nargs == 0 else f" {' / '.join(map(str, action.choices)) if action.choices else metavar}"
    return f"`{action.option_strings[-1]}{value}`"


def _shown(value: Any) -> str:
    """A default as it is written in YAML; an empty collection is "none"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    return "none" if value in (None, "", {}) else str(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ").replace("%%", "%") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in cells)]
