"""``veneer chat TARGET...``: chat in the terminal, with commands to switch adapters.

/adapter NAME|base   switch to another adapter, or to the base   /again    answer the last message again
/system TEXT         set the system message and start over       /reset    start over
/save FILE           append the conversation to FILE as a row    /help  /exit
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._targets import add_target_arguments, load_targets
from veneer.cli.generate import add_sampling_arguments, sampling_of
from veneer.config import similar
from veneer.errors import VeneerError

if TYPE_CHECKING:
    from veneer.serve.engine.request import SamplingParams
    from veneer.serve.generation import TextGenerator

_WITHOUT_SLASH = {
    "exit": "/exit",
    "quit": "/exit",
    "q": "/exit",
    "bye": "/exit",
    "help": "/help",
    "clear": "/reset",
    "reset": "/reset",
}
"""Commands of other chat programs, typed as messages -> the command here."""
_HELP = __doc__.split("\n\n", 1)[1].rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_target_arguments(parser, several=True)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the user ends the conversation."""
    from veneer.serve.generation import text_generator

    loaded = load_targets(args)
    generator = text_generator(loaded.base, loaded.bank)
    chat = Chat(generator, loaded.names, sampling_of(args), args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{loaded.base.name}, {chat.speaker}. Type /help for the commands; /exit or Ctrl-D ends the chat.")
    while chat.open:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            break
        chat.take(line)
    return 0


class Chat:
    """A conversation: the messages so far, and the adapter that answers."""

    def __init__(
        self, generator: TextGenerator, names: list[str], sampling: SamplingParams, system: str | None
    ) -> None:
        self.generator = generator
        self.names = names
        self.route: str | None = names[0] if names else None
        self.sampling = sampling
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.open = True
        self.reset()

    @property
    def speaker(self) -> str:
        """The adapter that answers, or the base."""
        return f"adapter {self.route}" if self.route else "the base"

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def take(self, line: str) -> None:
        """Handle one line of input: a command or a message."""
        if not line.strip():
            return
        if (meant := _WITHOUT_SLASH.get(line.strip().lower())) is not None:
            print(f"commands begin with a slash: {meant}")
            return
        if not line.startswith("/"):
            self.messages.append({"role": "user", "content": line})
            self.answer()
            return
        word, _, rest = line.partition(" ")
        actions = {
            "/adapter": lambda: self._switch(rest.strip()),
            "/system": lambda: self._set_system(rest),
            "/save": lambda: self._save(rest.strip()),
            "/again": self._again,
            "/reset": self._restart,
            "/help": lambda: print(_HELP),
            "/exit": self._end,
            "/quit": self._end,
            "/bye": self._end,
            "/clear": self._restart,
        }
        if word not in actions:
            print(f"unknown command {word}{similar(word, actions) or '; /help lists the commands'}")
            return
        try:
            actions[word]()
        except OSError as error:
            print(f"{rest.strip()}: {error.strerror}")

    def answer(self) -> None:
        """Generate an answer; Ctrl-C ends the answer, not the conversation."""
        pieces: list[str] = []
        try:
            for piece in self.generator.stream(self.messages, self.route, self.sampling):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except VeneerError as error:
            print(f"{error}; /reset starts a new conversation" if len(self.messages) > 2 else error)
            self.messages.pop()
            return
        print("" if pieces else "(the answer is empty)")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})  # even an empty one: roles take turns

    def _again(self) -> None:
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] == "user":
            self.answer()
        else:
            print("there is no message to answer")

    def _switch(self, name: str) -> None:
        if name == "base" or name in self.names:
            self.route = None if name == "base" else name
            print(f"switched to {self.speaker}")
        else:
            available = ", ".join([*self.names, "base"])
            print(f"{f'{name} is not loaded' if name else 'name an adapter'}; available: {available}")

    def _set_system(self, text: str) -> None:
        self.system = text.strip() or None
        self._restart()

    def _restart(self) -> None:
        self.reset()
        print("started a new conversation")

    def _save(self, file: str) -> None:
        if not file:
            print("/save needs a file name")
            return
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        print(f"appended the conversation to {file} as one row")

    def _end(self) -> None:
        self.open = False
