"""Scripts for shells complete commands and options."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from veneer.cli.main import COMMANDS, main

CASES = {
    "veneer ex": {"extract", "export"},
    "veneer data ": {"check", "show"},
    "veneer train --learning-r": {"--learning-rate"},
    "veneer data check --train": {"--train-on"},
}


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The script that the command prints."""
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    """Bash offers the commands and the options that start with the typed word."""
    text = script("bash", capsys)
    for line, expected in CASES.items():
        words = line.split(" ")
        call = f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; _veneer"
        bash = ["bash", "-c", f'{text}\n{call}; echo "${{COMPREPLY[@]}}"']
        found = subprocess.run(bash, capture_output=True, text=True, check=True).stdout.split()
        assert set(found) == expected, line


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(capsys: pytest.CaptureFixture[str]) -> None:
    """Fish offers the same."""
    text = script("fish", capsys)
    for line, expected in CASES.items():
        fish = ["fish", "-c", f"{text}\ncomplete -C '{line}'"]
        found = subprocess.run(fish, capture_output=True, text=True, check=True).stdout.splitlines()
        assert {offer.split("\t")[0] for offer in found} == expected, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No command is missing."""
    text = script(shell, capsys)
    assert [name for name in COMMANDS if not all(word in text for word in name.split())] == []
