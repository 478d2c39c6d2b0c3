"""Pictures of the documentation, made from real output.

python docs/scripts/picture.py docs/pictures/demo.svg --lines 10:50 veneer demo     the terminal of a command, or a part of it
python docs/scripts/picture.py docs/pictures/compare.svg runs/films/compare.html    the plot of a report
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shlex
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

COLUMNS = 100
_FONT_FACES = re.compile(r"@font-face \{\{.*?\}\}\s*", re.S)  # they name fonts on another server
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-HJ-KST-ln]|\x1b\][^\x07]*\x07")  # all but colours


def output_of(command: list[str]) -> str:
    """Run a command in a pseudo terminal, and return what stays on its screen."""
    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
    read: list[bytes] = []

    def keep(terminal: int) -> bytes:
        part = os.read(terminal, 1 << 16)
        read.append(part)
        return part

    code = os.waitstatus_to_exitcode(pty.spawn(command, keep))
    if code:
        sys.exit(f"{shlex.join(command)} ended with exit code {code}")
    text = b"".join(read).decode(errors="replace").replace("\r\n", "\n")
    lines = (_CONTROL.sub("", line.rpartition("\r")[2]) for line in text.split("\n"))
    return "\n".join(lines).strip("\n")


def picture(text: str, title: str) -> str:
    """The SVG of a terminal with this text."""
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=io.StringIO())
    console.print(Text.from_ansi(text))
    return console.export_svg(title=title, code_format=_FONT_FACES.sub("", CONSOLE_SVG_FORMAT))


def plot_of(report: Path) -> str:
    """The plot in a report of ``veneer compare``, on white, as a file of its own."""
    found = re.search(r"<svg (.*?>)(.*?</svg>)", report.read_text(encoding="utf-8"), re.S)
    if found is None:
        sys.exit(f"{report} has no plot")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {found[1]}<rect width="100%" height="100%" fill="#fff"/>{found[2]}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", default=":", help="first and last line to draw, such as 10:50")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.command[0].endswith(".html"):
        drawn = plot_of(Path(args.command[0]))
    else:
        lines = output_of(args.command).split("\n")
        first, _, last = args.lines.partition(":")
        chosen = lines[int(first or 1) - 1 : int(last or len(lines))]
        drawn = picture("\n".join(chosen), shlex.join(args.command))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
