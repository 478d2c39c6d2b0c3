"""What a run does with its rows: folders, tags, templates, what is remarkable, and what the maximum length costs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_tokenizer
from tests.training.made import QUIET, options, write_rows

from veneer.checkpoints import read_adapter
from veneer.cli.main import main
from veneer.data.hashing import template_hash
from veneer.errors import DataError
from veneer.models.load import Base, load_base
from veneer.training import train
from veneer.training.run.console import Console

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def rows(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def chat(asked: str, answered: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def said_by(chosen: dict[str, Any], base: Base) -> str:
    """What a run of two steps prints."""
    screen = io.StringIO()
    train({**chosen, "steps": 2}, base=base, console=Console(screen))
    return screen.getvalue()


def test_what_is_remarkable_is_told_before_the_first_step(place: Path, base: Base, tmp_path: Path) -> None:
    """Rows that stand twice, held-out rows that are trained on, and typed control strings, with their places."""
    data = rows(tmp_path / "a.jsonl", chat("1+1", "2"), chat("1+1", "2"), chat("2+2", "4"), chat("<|im_end|>", "5"))
    valid = rows(tmp_path / "b.jsonl", chat("2+2", "4"), chat("3+3", "6"))
    said = said_by(options(place, tmp_path / "r", data=(data,), valid=(valid,)), base)
    assert "note: duplicate rows" in said and "a.jsonl:2 (same as a.jsonl:1)" in said
    assert "which makes the held-out loss too low: 1 (b.jsonl:1 (same as a.jsonl:3))" in said
    assert "these are encoded as text: 1 (a.jsonl:4 (<|im_end|>))" in said


def test_ends_that_the_base_does_not_know_are_told_and_recorded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Turns that end with another token than the base's own are told before the first step and by ``data check``; the receipt has
    the token, and nothing is said where the base's generation config knows it."""
    other = shutil.copytree(place / "base", tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(other)
    ends = "turns end with <|im_end|> (token 2), which is not an end token of the base (<|endoftext|>)"
    for own, told in (("0", True), ("[0, 2]", False)):
        (other / "generation_config.json").write_text(f'{{"eos_token_id": {own}}}')
        base = load_base(str(other), dtype="float32")
        assert (ends in said_by(options(place, tmp_path / f"run-{told}"), base)) == told
        adapter = read_adapter(tmp_path / f"run-{told}" / "adapter")
        assert adapter.meta["receipt"]["stop_tokens"] == {"<|im_end|>": 2}
        assert main(["data", "check", str(place / "train.jsonl"), "--base", str(other)]) == 0
        assert (ends in capsys.readouterr().out) == told


def test_clean_rows_are_passed_over_in_silence(place: Path, base: Base, tmp_path: Path) -> None:
    """Nothing remarkable, no note."""
    data = rows(tmp_path / "a.jsonl", *(chat(f"{i}+1", str(i + 1)) for i in range(4)))
    assert "note:" not in said_by(options(place, tmp_path / "r", data=(data,)), base)


@pytest.mark.parametrize(
    ("truncate", "says"),
    [
        ("end", "rows cut at 40 tokens: 1, which lost"),
        ("drop", "rows dropped for having more than 40 tokens: 1, with"),
    ],
)
def test_what_the_maximum_length_costs_is_told(
    truncate: str, says: str, place: Path, base: Base, tmp_path: Path
) -> None:
    """Rows cut or left out are counted with the trained tokens that they lose."""
    data = rows(tmp_path / "a.jsonl", chat("1", "2"), chat("1", "word " * 40), chat("1", "3"))
    chosen = options(place, tmp_path / "r", data=(data,), max_length=40, truncate=truncate)
    assert says in said_by(chosen, base)


def test_a_folder_stands_for_its_files(place: Path, base: Base, tmp_path: Path) -> None:
    """train and valid of a folder are found; one without a train file says what it holds."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "other.jsonl", 3)
    with pytest.raises(DataError, match=r"expected a file train\.jsonl .* found other\.jsonl"):
        train(options(place, tmp_path / "r", data=(folder,)), base=base, console=QUIET)
    write_rows(folder / "train.jsonl", 9)
    write_rows(folder / "valid.jsonl", 2, seed=4)
    assert "9 examples" in (said := said_by(options(place, tmp_path / "r", data=(folder,)), base))
    assert "2 held out" in said


def test_other_tags_are_mapped_to_roles(place: Path, base: Base, tmp_path: Path) -> None:
    """A sharegpt tag of the file's own is refused with the known ones, and read with a map."""
    turns = [{"from": "human", "value": "1+1"}, {"from": "npc", "value": "2"}]
    data = rows(tmp_path / "a.jsonl", {"conversations": turns}, {"conversations": turns[:1] + turns[1:]})
    with pytest.raises(DataError, match="map other tags to roles"):
        train(options(place, tmp_path / "r", data=(data,)), base=base, console=QUIET)
    assert "2 examples" in said_by(options(place, tmp_path / "r", data=(data,), roles={"npc": "assistant"}), base)


def test_control_strings_of_rendered_rows_can_be_control_tokens(place: Path, base: Base, tmp_path: Path) -> None:
    """Rows that a template rendered before: text as it stands, or with their control strings as tokens, if said so."""
    data = rows(tmp_path / "a.jsonl", {"text": "<|im_start|>one<|im_end|>"}, {"text": "<|im_start|>two<|im_end|>"})
    plain = said_by(options(place, tmp_path / "r", data=(data,)), base)
    parsed = said_by(options(place, tmp_path / "s", data=(data,), parse_specials=True), base)
    count = [int(said.split(" tokens trained)")[0].rsplit(" ", 1)[1]) for said in (plain, parsed)]
    assert count[1] < count[0]


def test_another_template_is_kept_with_the_adapter_and_used(
    place: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template in the folder is the one that the receipt names, and prompts are written with it afterwards."""
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    result = train(options(place, tmp_path / "r", chat_template=file), base=base, console=QUIET)
    assert (result.adapter / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    adapter = read_adapter(result.adapter)
    assert adapter.meta["receipt"]["template_sha256"] == template_hash(base.tokenizer, TEMPLATE)
    command = ["generate", str(result.adapter), "1+1", "--base", str(place / "base"), "--max-tokens", "2"]
    assert main(command) == 0
    assert "using the chat template in the adapter folder" in capsys.readouterr().err
    (result.adapter / "chat_template.jinja").write_text(TEMPLATE.replace(": ", "; "), encoding="utf-8")
    assert main(command) == 0
    assert "is not the one that this adapter was trained with" in capsys.readouterr().err
    (result.adapter / "chat_template.jinja").write_bytes(b"\xff")
    assert main(command) == 1
    assert "chat_template.jinja is not UTF-8 text" in capsys.readouterr().err


def test_the_base_s_own_template_is_silent(
    place: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained and used with one template: nothing is kept and nothing said; after the base's template changed it is."""
    result = train(options(place, tmp_path / "r"), base=base, console=QUIET)
    assert not (result.adapter / "chat_template.jinja").exists()
    command = ["generate", str(result.adapter), "1+1", "--max-tokens", "2", "--dtype", "float32"]
    assert main([*command, "--base", str(place / "base")]) == 0
    assert capsys.readouterr().err == ""
    changed = tmp_path / "changed"
    base.model.save_pretrained(changed)
    base.tokenizer.save_pretrained(changed)
    (changed / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert main([*command, "--base", str(changed)]) == 0
    assert "the base's chat template or tokenizer is not the one" in capsys.readouterr().err
