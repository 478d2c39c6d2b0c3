"""``veneer completion bash|zsh|fish``: print a script that completes commands and options in a shell.

The script is a list of words made from the parsers of all commands, so completing starts no Python process.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

SHELLS = {
    "bash": 'eval "$(veneer completion bash)"  in ~/.bashrc',
    "zsh": 'eval "$(veneer completion zsh)"  in ~/.zshrc, after compinit',
    "fish": "veneer completion fish > ~/.config/fish/completions/veneer.fish",
}
"""Every supported shell with the way to install its script."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell that reads the script")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from veneer.cli.main import COMMANDS, parser_of

    options = {name: sorted(parser_of(name)[0].long_options()) for name in COMMANDS}
    print(f"# {SHELLS[args.shell]}")
    print(_fish(COMMANDS, options) if args.shell == "fish" else _bash(options, zsh=args.shell == "zsh"))
    return 0


def _bash(options: Mapping[str, Sequence[str]], *, zsh: bool) -> str:
    """Return a bash function; zsh runs it through bashcompinit. Words without options complete as files."""
    first = " ".join(dict.fromkeys(name.split()[0] for name in options))
    groups: dict[str, list[str]] = {}
    for group, _, command in (name.partition(" ") for name in options):
        if command:
            groups.setdefault(group, []).append(command)
    lines = [
        *(["autoload -U +X bashcompinit && bashcompinit"] if zsh else []),
        "_veneer() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" words=""',
        f'    if [ "$COMP_CWORD" -eq 1 ]; then words="{first} help --help --version"',
        *(
            f'    elif [ "$COMP_CWORD" -eq 2 ] && [ "$command" = {group} ]; then words="{" ".join(commands)}"'
            for group, commands in groups.items()
        ),
        '    elif [ "${word#-}" != "$word" ]; then',
        f'        case "$command" in {"|".join(groups)}) command="$command ${{COMP_WORDS[2]}}" ;; esac',
        '        case "$command" in',
        *(f'            "{name}") words="{" ".join(flags)}" ;;' for name, flags in options.items()),
        "        esac",
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _veneer veneer",
    ]
    return "\n".join(lines)


def _fish(commands: Mapping[str, str], options: Mapping[str, Sequence[str]]) -> str:
    """Return one fish ``complete`` line for each command and each option."""
    lines = []
    for name, description in commands.items():
        group, _, command = name.partition(" ")
        after = f"__fish_seen_subcommand_from {group}" if command else "__fish_use_subcommand"
        if command:
            lines.append(f"complete -c veneer -f -n __fish_use_subcommand -a {group}")
        text = description.replace("'", "\\'")
        lines.append(f"complete -c veneer -f -n '{after}' -a {command or name} -d '{text}'")
        seen = " && ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        lines += [f"complete -c veneer -n '{seen}' -l {flag.removeprefix('--')}" for flag in options[name]]
    return "\n".join(lines)
