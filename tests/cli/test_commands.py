"""Commands from the words that are typed to the files that are left: the straight way, and one sentence for each wrong one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.training.made import write_place

from veneer.checkpoints import read_adapter
from veneer.cli import demo
from veneer.cli.main import main

Run = Callable[..., tuple[int, str, str]]
TRAIN = ("train", "train.jsonl", "--base", "base", "--steps", "3", "--batch-size", "2", "--no-plan")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TURN = '{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, examples good and bad, files of options, and a run that is over."""
    torch.set_num_threads(1)
    place = write_place(tmp_path_factory.mktemp("place"))
    files = {
        "broken.jsonl": f'{{"messages": [{TURN}]}}\n{{"messages": [\n{{"messages": [{{"role": "user"}}]}}\n',
        "unasked.jsonl": '{"messages": [{"role": "user", "content": "ask"}]}\n',
        "nothing.jsonl": '{"prompt": "ask", "completion": ""}\n',
        "empty.jsonl": "",
        "unknown.yaml": "bsae: base\nlearning_rat: 1\ndata: train.jsonl\n",
        "wrong.yaml": "data: train.jsonl\nr: many\nsteps: -1\n",
        "file": "a file",
        "prompts.txt": "hello\nworld\n",
    }
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "holds").mkdir()
    (place / "holds" / "something").touch()
    (place / "weights").mkdir()
    (place / "weights" / "model.safetensors").touch()
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        assert main([*TRAIN, "--out", "run"]) == 0
    for part in ("one", "two"):
        shutil.copytree(place / "run" / "adapter", place / "parts" / part)
    return place


@pytest.fixture
def run(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in that folder: (exit code, output, errors)."""
    monkeypatch.chdir(trained)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return (code, *capsys.readouterr())

    return call


def test_a_run_is_used_by_its_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What train leaves is answered with, talked to, merged and gone on with; the merged model says what the adapter says."""
    code, out, _ = run(*TRAIN, "--out", "run")
    assert code == 0 and "already finished at step 3 of 3" in out
    code, answer, _ = run("generate", "run", "12+12", "--max-tokens", "8", "--dtype", "float32")
    assert code == 0 and answer.strip()
    code, both, _ = run("generate", "run", "12+12", "--max-tokens", "8", "--compare", "--json", "--dtype", "float32")
    assert (
        code == 0 and json.loads(both)["answers"]["run"] == answer.rstrip("\n") != json.loads(both)["answers"]["base"]
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("12+12\n/adapter base\n/again\n/save talk.jsonl\n/nonsense\n/exit\n"))
    code, said, _ = run("chat", "run", "--max-tokens", "8", "--dtype", "float32")
    assert (
        code == 0 and said.startswith(answer) and "switched to the base" in said and "unknown command /nonsense" in said
    )
    assert [turn["role"] for turn in json.loads(Path("talk.jsonl").read_text())["messages"]] == ["user", "assistant"]
    assert run("merge", "run", "--out", "merged")[0] == 0
    code, merged, _ = run("generate", "merged", "12+12", "--max-tokens", "8", "--dtype", "float32")
    assert code == 0 and merged == answer
    code, figures, err = run("evaluate", "run", "--data", "valid.jsonl", "--json")
    rows = [json.loads(line)["messages"][1]["content"] for line in Path("valid.jsonl").read_text().splitlines()]
    found = json.loads(figures)["sets"]["valid.jsonl"]
    assert (code, err, found["examples"]) == (0, "", 5)
    assert found["tokens"] == sum(len(answer) + 1 for answer in rows), "each digit and the end of each turn"
    code, shown, _ = run("data", "show", "train.jsonl", "--base", "base", "-n", "1")
    assert code == 0 and "trained 4 of" in shown


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("train", 2, "data names no file of examples; give ROWS.jsonl"),
        ("train none.jsonl --base base --out x", 2, "there is no file none.jsonl"),
        ("train holds --base base --out x", 1, "holds: expected a file train.jsonl"),
        ("train broken.jsonl --base base --out x", 1, "broken.jsonl:2: not valid JSON"),
        ("train unasked.jsonl --base base --out x", 1, "unasked.jsonl:1: messages: nothing to learn"),
        ("train nothing.jsonl --base base --out x", 1, "nothing.jsonl:1: completion: expected text"),
        ("train empty.jsonl --base base --out x", 1, "empty.jsonl: the file is empty"),
        ("train file --base base --out x", 1, "file: unknown file format"),
        ("train unknown.yaml", 2, "unknown.yaml, line 2: learning_rat: unknown option; did you mean learning_rate?"),
        ("train wrong.yaml", 2, "wrong.yaml, line 2: r: expected a whole number, found 'many'"),
        ("train none.yaml", 2, "none.yaml: cannot read the configuration"),
        ("train train.jsonl --bas base --out x", 2, "unknown option --bas"),
        ("train train.jsonl --base nowhere/x --out x", 1, "'nowhere/x' is neither a folder here nor"),
        ("train train.jsonl --base base --out x --target-modules q_prj", 1, "did you mean q_proj"),
        ("train train.jsonl --base base --out x --set foo=1", 2, "--set foo=1: unknown option"),
        (
            "train train.jsonl --base base --out x --max-length 3",
            1,
            "train.jsonl:1: 46 tokens, but the maximum length is 3",
        ),
        ("train train.jsonl --base base --out x --resume-from step-1 --no-plan", 1, "x has no checkpoint step-1"),
        ("train train.jsonl --base base --out file", 1, "file cannot be written: it is a file"),
        ("train train.jsonl --base base --out file/x", 1, "file/x cannot be written: Not a directory"),
        ("generate run", 2, "no prompt given"),
        ("generate org/name hi", 1, "(an adapter org/name was looked for, too)"),
        ("generate nowhere hi", 1, "'nowhere' is neither a folder here nor"),
        ("generate holds hi", 1, "holds contains neither a base (config.json) nor an adapter"),
        ("generate run --file none.txt", 1, "none.txt: no such file"),
        ("generate run hi --max-tokens 0", 2, "--max-tokens: expected at least 1"),
        ("generate run hi --base file", 1, "file of a kind that cannot be loaded"),
        ("generate some/lora hi --base base", 1, "hf download some/lora --local-dir"),
        ("generate run/adapter/adapter_config.json hi", 1, "is a file, not a base or an adapter folder"),
        ("generate . hi --base base", 1, "it contains parts, run: give one, such as parts"),
        ("generate weights/model.safetensors hi --base base", 1, "found a file of weights; give its folder, weights"),
        ("generate prompts.txt --base base hi", 1, "give prompts with --file"),
        ("generate run prompts.txt", 2, "read one prompt per line with --file prompts.txt"),
        ("generate nothing-here hi --base base", 1, "nothing-here: no such folder; give an adapter folder"),
        ("evaluate run valid.jsonl --data valid.jsonl", 1, "examples with --data"),
        ("inspect some/lora", 1, "hf download some/lora"),
        ("inspect prompts.txt", 1, "is a file, not a base or an adapter folder"),
        ("merge some/lora --out x", 1, "hf download some/lora"),
        ("merge parts --out x", 1, "holds several adapters (one, two); give the folder of one"),
        ("compose parts some/lora --out x", 1, "holds several adapters (one, two)"),
        ("chat", 2, "required: TARGET"),
        ("chat nowhere", 1, "'nowhere' is neither a folder here nor"),
        ("chat run --top-p 0", 2, "--top-p: expected more than 0"),
        ("chat run --tempereture 1", 2, "did you mean --temperature?"),
        ("merge run", 2, "required: --out"),
        ("merge nowhere --out x", 1, "nowhere: no such folder"),
        ("merge base --out x", 1, "base: contains no adapter"),
        ("merge run --out holds", 1, "holds is a folder that is not empty"),
        ("merge run --out file/x", 1, "file/x cannot be written: a parent of it is a file"),
        ("merge run:x --out x", 2, "'x' is not a weight"),
        ("data show none.jsonl --base base", 1, "none.jsonl: no such file"),
        ("data show empty.jsonl --base base", 1, "empty.jsonl: the file is empty"),
        ("data show train.jsonl --base base -n 0", 2, "-n: expected at least 1"),
        ("data show train.jsonl --base base --html file/x.html", 1, "file/x.html cannot be written"),
        ("data show train.jsonl --base nowhere", 1, "'nowhere' is neither a folder here nor"),
        ("doctor --jsn", 2, "did you mean --json?"),
        ("demo --steps 0", 2, "--steps: expected at least 1"),
        ("demo --out holds", 2, "holds contains something other than an earlier demo"),
        ("demo --out holds --fresh", 2, "holds contains something other than an earlier demo"),
        ("demo --out file", 2, "file is a file"),
        ("demo --out file/x", 1, "file/x cannot be written"),
        ("generate run --file train.jsonl", 2, "expected a text file with one prompt per line"),
        ("plan --base base", 2, "there is nothing to plan"),
        ("data check - --base base", 1, "write those of the standard input to a file"),
        ("compose run run --op iso_c --out x", 2, "found 'iso_c'; did you mean iso-c?"),
        ("demo --method dore", 2, "found 'dore'; did you mean dora?"),
    ],
)
def test_wrong_words_are_one_sentence(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, says: str
) -> None:
    """The thing is named, the exit code is 1 or 2, there is no traceback, and nothing was written."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    before = sorted(path for path in trained.rglob("*") if "__pycache__" not in path.parts)
    found, _, err = run(*words.split())
    assert found == code and err.startswith("veneer: error: ") and says in err
    assert "Traceback" not in err and "bug" not in err
    assert err.count("\n") == 1 or " problem" in err.splitlines()[0]
    assert sorted(path for path in trained.rglob("*") if "__pycache__" not in path.parts) == before


def test_an_adapter_is_used_by_its_hub_id(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the local hub cache answers, is shown, merged and gone on with; the receipt names the hub id and no folder."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--some--sums"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree("run/adapter", repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ("12+12", "--max-tokens", "4", "--dtype", "float32")
    assert run("generate", "some/sums", *words)[:2] == run("generate", "run", *words)[:2]
    code, shown, _ = run("inspect", "some/sums")
    assert code == 0 and "LoRA" in shown
    assert run("merge", "some/sums:0.5", "--out", str(tmp_path / "merged"), "--no-probe", "--dtype", "float32")[0] == 0
    started = ("--init-from", "some/sums", "--out", str(tmp_path / "on"))
    assert run("train", "train.jsonl", "--base", "base", "--steps", "1", "--no-plan", *started)[0] == 0
    receipt = read_adapter(tmp_path / "on").meta["receipt"]
    assert receipt["init_from"]["folder"] == "some/sums" and receipt["init_from"]["name"] == "sums"


@pytest.mark.parametrize("kind", ["prompts", "options", "settings", "template"])
def test_files_of_a_windows_editor(kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte order mark and Windows line ends are not part of prompts, options, an adapter's settings or its template."""
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    short = ("--max-tokens", "2", "--dtype", "float32")
    if kind == "prompts":
        (tmp_path / "prompts.txt").write_text(f"{mark}1+1\r\n2+2\r\n", encoding="utf-8", newline="")
        code, out, _ = run("generate", "run", "--file", str(tmp_path / "prompts.txt"), "--json", *short)
        assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["1+1", "2+2"]
    elif kind == "options":
        text = f"{mark}data: train.jsonl\r\nbase: base\r\nsteps: 1\r\nplan: false\r\nout: {tmp_path}/run\r\n"
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8", newline="")
        assert run("train", str(tmp_path / "run.yaml"))[0] == 0
    else:
        adapter = tmp_path / "adapter"
        shutil.copytree("run/adapter", adapter)
        expected = run("generate", "run", "1+1", *short)
        name = "adapter_config.json" if kind == "settings" else "chat_template.jinja"
        text = (adapter / name).read_text() if (adapter / name).exists() else TEMPLATE
        (adapter / name).write_text(mark + text.replace("\n", "\r\n"), encoding="utf-8", newline="")
        assert run("generate", str(adapter), "1+1", *short)[:2] == expected[:2]


def test_rows_from_which_nothing_is_learnt_are_shown_as_unusable(run: Run) -> None:
    """data show shows what it can, names the rows that training would refuse, and ends with 1."""
    for name, says in (("unasked", "unasked.jsonl:1: nothing to learn"), ("broken", "broken.jsonl:2: not valid JSON")):
        code, out, _ = run("data", "show", f"{name}.jsonl", "--base", "base")
        assert code == 1 and f"unusable: {says}" in out


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk in memory, mounted with options, again with others where it is there already."""
    place = tmp_path / "disk"
    place.mkdir()
    state = {"mounted": False}

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", ("remount," if state["mounted"] else "") + options, "tmpfs", str(place)]
        if (
            sys.platform != "linux"
            or os.geteuid() != 0
            or subprocess.run(words, capture_output=True, check=False).returncode
        ):
            pytest.skip("disks cannot be mounted here")
        state["mounted"] = True
        return place

    yield mount
    if state["mounted"]:
        subprocess.run(["umount", str(place)], check=True)


COMMANDS = {
    "train": (*TRAIN, "--out", "{disk}/x"),
    "merge": ("merge", "run", "--out", "{disk}/x"),
    "data show": ("data", "show", "train.jsonl", "--base", "base", "--html", "{disk}/x"),
    "demo": ("demo", "--out", "{disk}/x"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("options", ["size=4k", "size=8k", "ro"])
def test_a_disk_that_takes_no_more(run: Run, disk: Callable[[str], Path], command: str, options: str) -> None:
    """A full or read-only disk is one sentence with the place, exit code 1, and nothing half-written is left."""
    place = disk("size=1m" if options == "ro" else options)
    if options == "ro":
        disk("ro")
    code, _, err = run(*(word.format(disk=place) for word in COMMANDS[command]))
    assert code == 1 and err.startswith("veneer: error: ") and err.count("\n") == 1 and str(place) in err
    assert (
        ("Read-only" if options == "ro" else "No space left") in err or "the disk is full" in err or "make room" in err
    )
    assert "bug" not in err and "Traceback" not in err
    left = [path for path in place.rglob("*") if path.is_file()]
    assert not left or (command == "train" and (place / "x" / "config.yaml").stat().st_size > 0)


@pytest.mark.parametrize("size", ["24k", "48k", "96k"])
def test_a_run_that_found_no_room_is_taken_up_when_there_is(run: Run, disk: Callable[[str], Path], size: str) -> None:
    """However far it got on a full disk, the same command on a larger one ends with the adapter of the run that had room."""
    place = disk(f"size={size}")
    command = [word.format(disk=place) for word in COMMANDS["train"]]
    code, _, err = run(*command)
    assert code in (0, 1) and "bug" not in err and "Traceback" not in err
    disk("size=50m")
    assert run(*command)[0] == 0
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (place / "x", Path("run"))]
    assert weights[0].stat().st_size == weights[1].stat().st_size


def test_the_demo_writes_over_nothing_but_its_own(tmp_path: Path) -> None:
    """A folder with other rows under the demo's names is refused; one of an earlier demo is taken up."""
    from veneer.data.stdlib_docs import INSTRUCTION
    from veneer.errors import ConfigError

    rows = tmp_path / "data" / "train.jsonl"
    rows.parent.mkdir()
    rows.write_text(f'{{"messages": [{TURN}]}}\n')
    with pytest.raises(ConfigError, match="something other than an earlier demo"):
        demo._check_folder(tmp_path)
    rows.write_text(f'{{"messages": [{{"role": "user", "content": "{INSTRUCTION}"}}]}}\n')
    demo._check_folder(tmp_path)
    demo._check_folder(tmp_path / "new")
