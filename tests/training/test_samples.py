"""Sample answers at each evaluation: their prompts, their file, and what they must not change."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CHATML, tiny
from tests.training.made import QUIET, options

from veneer.cli.main import main
from veneer.config import TrainOptions, resolve
from veneer.data.example import Example
from veneer.errors import BaseModelError
from veneer.evaluate.generation import Generator
from veneer.models.load import Base, load_base
from veneer.training import train
from veneer.training.run.console import Console
from veneer.training.samples import _answer_of


def stored(folder: Path, job: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{job}.jsonl").read_text().splitlines()]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def sampled(place: Path, out: Path, **others: Any) -> dict[str, Any]:
    held_out = {"valid": (place / "valid.jsonl",), "eval_every": 6, "sample_tokens": 4}
    return options(place, out, **{**held_out, **others})


def test_answers_are_printed_and_stored_and_change_nothing(
    place: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out prompts and own ones are answered at every evaluation; the adapter has the same bits as without; ``veneer runs``
    shows the latest."""
    train(sampled(place, tmp_path / "a" / "run"), base=base, console=QUIET)
    screen, out = io.StringIO(), tmp_path / "b" / "run"
    wanted = sampled(place, out, samples=2, sample_prompts=("one, two",))
    train(wanted, base=base, console=Console(screen))
    assert digest(out) == digest(tmp_path / "a" / "run")
    rows = [json.loads(line)["messages"] for line in (place / "valid.jsonl").read_text().splitlines()]
    asked = [("one, two", None), *((rows[i][0]["content"], rows[i][1]["content"]) for i in (0, 2))]
    found = stored(out, "run")
    assert [(line["step"], line["prompt"], line["expected"]) for line in found] == [
        (step, *pair) for step in (0, 6, 12) for pair in asked
    ]
    assert f"step 12: sample\n  prompt    {asked[1][0]}\n  expected  {asked[1][1]}\n  answer    " in screen.getvalue()
    assert main(["runs", f"{out}/"]) == 0
    shown = capsys.readouterr().out
    assert "samples of run at step 12:\n  prompt    one, two\n  answer" in shown and shown.count("prompt") == 3
    assert main(["runs", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["samples"] == found[-3:]
    assert main(["runs", str(tmp_path / "b")]) == 0  # a list of runs has no samples
    assert "prompt" not in capsys.readouterr().out


def test_the_last_answers_are_those_of_the_saved_adapter(place: Path, base: Base, tmp_path: Path) -> None:
    """A sample is what the adapter writes after the run, greedily, for the same prompt."""
    result = train(sampled(place, tmp_path / "run", sample_prompts=("7+8",), sample_tokens=6), base=base, console=QUIET)
    from veneer.checkpoints import attach
    from veneer.evaluate.generation import Sampling

    bank = attach(base.model)
    try:
        bank.load(result.adapter, name="a")
        again = Generator(base.model, base.tokenizer, bank).write("7+8", "a", Sampling(6))
    finally:
        bank.detach()
    assert stored(tmp_path / "run", "run")[-1]["answer"] == again


def test_a_resumed_run_repeats_no_sample(place: Path, base: Base, tmp_path: Path) -> None:
    """Samples after the checkpoint that a run resumes from are cut off and made again; asking for others is no other run."""
    out = tmp_path / "run"
    train(sampled(place, out, samples=1, eval_every=3), base=base, console=QUIET)
    before = stored(out, "run")
    more = sampled(place, out, samples=1, eval_every=3, sample_prompts=("5",))
    train(more, base=base, console=QUIET, resume_from="step-00000010")
    after = stored(out, "run")
    assert [line["step"] for line in before] == [0, 3, 6, 9, 12]
    assert [line["step"] for line in after] == [0, 3, 6, 9, 12, 12]
    assert [line["answer"] for line in after if line["prompt"] != "5"] == [line["answer"] for line in before]


def test_prompts_need_no_held_out_examples(place: Path, base: Base, tmp_path: Path) -> None:
    """Without held-out examples the prompts are answered at the same steps, and numbered samples come from the training examples."""
    wanted = options(place, tmp_path / "run", eval_every=5, samples=1, sample_prompts="hello", sample_tokens=2)
    train(wanted, base=base, console=QUIET)
    found = stored(tmp_path / "run", "run")
    first = json.loads((place / "train.jsonl").read_text().splitlines()[0])["messages"]
    assert [line["step"] for line in found] == [0, 0, 5, 5, 10, 10, 12, 12]
    assert (found[1]["prompt"], found[1]["expected"]) == (first[0]["content"], first[1]["content"])


def test_a_job_is_asked_through_its_own_template(place: Path, tmp_path: Path) -> None:
    """Prompts go through the template of the job, of a tokenizer with several too."""
    base = load_base(str(place / "base"), dtype="float32")
    base.tokenizer.chat_template = {"default": CHATML, "rag": CHATML.replace("answer in one line", "read")}
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_start|>' + message", "<|im_start|>the ' + message"))
    asked: list[str] = []

    class Asked(Generator):
        def complete(self, prompt: Any, *_: Any) -> str:
            asked.append(self.tokenizer.decode(prompt))
            return "so"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("veneer.training.samples.Generator", Asked)
        for name, template in (("a", None), ("b", tmp_path / "own.jinja")):
            wanted = options(place, tmp_path / name, sample_prompts=("7+8",), chat_template=template, eval_every=12)
            train(wanted, base=base, console=QUIET)
    assert [("one line" in text, "<|im_start|>the user\n7+8" in text) for text in asked] == [(True, False)] * 2 + [
        (True, True)
    ] * 2


def test_a_failure_of_generation_costs_the_samples_only(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run says why there are no more samples, and finishes."""

    def broken(*_: object, **__: object) -> str:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Generator, "complete", broken)
    screen = io.StringIO()
    result = train(sampled(place, tmp_path / "run", samples=1), base=base, console=Console(screen))
    assert result.jobs["run"].state == "finished"
    assert screen.getvalue().count("no more samples, because generation failed: out of luck") == 1


def test_a_base_that_writes_no_text_is_refused_before_the_first_step(place: Path, base: Base, tmp_path: Path) -> None:
    """Samples of a model without generation are an error of one sentence."""
    masked = Base(tiny("bert").requires_grad_(False), base.tokenizer, "bert", None, torch.float32)
    with pytest.raises(BaseModelError, match="BertForMaskedLM does not generate text"):
        train(sampled(place, tmp_path / "run", samples=1, target_modules=("query",)), base=masked, console=QUIET)


def test_prompts_keep_their_commas() -> None:
    """On the command line every flag is one prompt."""
    flags = {"data": ["rows.jsonl"], "sample_prompts": ["Red, green", "[x] blue, or not?"]}
    found, _ = resolve(TrainOptions, None, flags=flags)
    assert found.sample_prompts == ("Red, green", "[x] blue, or not?")


@pytest.mark.parametrize(
    ("weights", "span"),
    [((0, 0, 1, 1, 0, 1), (2, 4)), ((0, 0, 0, 1), (3, 4)), ((0, 1, 1, 1), (2, 4)), ((0,) + (1,) * 99, (32, 100))],
)
def test_the_answer_is_the_first_trained_span(weights: tuple[int, ...], span: tuple[int, int]) -> None:
    """Of a text that is trained as a whole, the beginning is the prompt."""
    assert _answer_of(Example(tuple(range(len(weights))), tuple(map(float, weights)), "rows:1")) == span
