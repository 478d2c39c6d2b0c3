"""``veneer chat TARGET...``: a conversation in the terminal, with the adapter changed as one goes.

/adapter NAME|base   go on with another adapter, or the base      /again    answer the last message anew
/system TEXT         set the system message and start over        /reset    start over
/save FILE           write the conversation as a row of examples  /help  /exit
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._target import add_target_arguments, load_targets
from veneer.cli.generate import add_sampling_arguments, check_sampling
from veneer.config import near_miss
from veneer.errors import VeneerError

if TYPE_CHECKING:
    from veneer.evaluate.generation import Generator, Sampling

_HELP = __doc__.split("\n\n", 1)[1].rstrip()
_COMMANDS = ("/adapter", "/system", "/save", "/again", "/reset", "/help", "/exit", "/quit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target_arguments(parser, several=True)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_sampling(args)
    from veneer.evaluate.generation import Generator, Sampling

    loaded = load_targets(args.target, args.base, args.dtype, force=args.force)
    generator = Generator(loaded.base.model, loaded.base.tokenizer, loaded.bank)
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p, args.seed)
    chat = Chat(generator, loaded.names, sampling, args.system)
    if sys.stdin.isatty():
        print(f"{loaded.base.name}, {chat.speaker}. /help lists the commands, /exit or Ctrl-D ends.")
    while chat.open:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        chat.take(line)
    return 0


class Chat:
    """One conversation: messages so far, and who answers."""

    def __init__(self, generator: Generator, names: list[str], sampling: Sampling, system: str | None) -> None:
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
        """Who answers, in words."""
        return f"adapter {self.route}" if self.route else "the base"

    def reset(self) -> None:
        """Start over."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def take(self, line: str) -> None:
        """One line from the user: a command or a message."""
        if not line.strip():
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
        }
        if word not in actions:
            print(f"{word} is no command{near_miss(word, _COMMANDS) or '; /help lists them'}")
            return
        try:
            actions[word]()
        except OSError as error:
            print(f"{rest.strip()}: {error.strerror}")

    def answer(self) -> None:
        """Let the present speaker answer; Ctrl-C ends the answer, not the conversation."""
        pieces: list[str] = []
        try:
            for piece in self.generator.stream(self.messages, self.route, self.sampling):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except VeneerError as error:
            print(error, end="")
            self.messages.pop()
            pieces = []
        print()
        if pieces:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _again(self) -> None:
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] == "user":
            self.answer()
        else:
            print("there is no message to answer yet")

    def _switch(self, name: str) -> None:
        if name == "base":
            self.route = None
        elif name in self.names:
            self.route = name
        else:
            have = ", ".join([*self.names, "base"])
            print(f"{name or 'nothing'} is not loaded; there is: {have}")
            return
        print(f"now {self.speaker}")

    def _set_system(self, text: str) -> None:
        self.system = text.strip() or None
        self._restart()

    def _restart(self) -> None:
        self.reset()
        print("a new conversation")

    def _save(self, file: str) -> None:
        if not file:
            print("/save needs a file's name")
            return
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        print(f"added to {file} as one row of examples")

    def _end(self) -> None:
        self.open = False
