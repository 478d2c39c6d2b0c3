"""A finished run that takes more steps, and runs that start from the weights of an adapter."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny
from tests.training.made import QUIET, digest, figures, options

from veneer.checkpoints import attach, read_adapter
from veneer.cli.main import main
from veneer.errors import CheckpointError, ConfigError
from veneer.models.load import Base
from veneer.training import RunResult, train
from veneer.training.run.console import Console

RATE: dict[str, Any] = {"learning_rate": 1e-2, "lora_dropout": 0.0}


def run(place: Path, base: Base, out: Path, **more: Any) -> tuple[RunResult, str]:
    """A short run, and what it printed."""
    said = io.StringIO()
    result = train(options(place, out, **{**RATE, **more}), console=Console(said), base=base)
    return result, " ".join(said.getvalue().split())


@pytest.fixture(scope="module")
def parent(place: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of rank 3 on two kinds of modules."""
    out = tmp_path_factory.mktemp("runs") / "parent"
    run(place, base, out, r=3, lora_alpha=5.0, target_modules=("q_proj", "v_proj"), method="dora")
    return out


# More steps


@pytest.mark.parametrize(
    ("more", "dropout"), [({"steps": 12}, 0.0), ({"epochs": 2.0, "steps": None}, 0.0), ({"steps": 9}, 0.2)]
)
def test_more_steps_end_as_if_they_had_been_asked_for_at_once(
    place: Path, base: Base, tmp_path: Path, more: dict[str, Any], dropout: float
) -> None:
    """At a constant rate, 4 steps and then more end with the bits of a run that was never finished in between."""
    shared: dict[str, Any] = {"name": "one", "schedule": "constant", "batch_size": 7, "lora_dropout": dropout}
    run(place, base, tmp_path / "whole", **shared, **more)
    run(place, base, tmp_path / "parts", **shared, steps=4)
    result, said = run(place, base, tmp_path / "parts", **shared, **more)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    assert f"one: 4 steps become {result.jobs['one'].steps}; the learning rate goes on at 1.00e-02" in said


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_is_stretched_and_said_to_be(place: Path, base: Base, tmp_path: Path, schedule: Any) -> None:
    """More steps of a decaying schedule go on at the rate of the longer decay, and the line names both rates and the other way."""
    run(place, base, tmp_path / "a", schedule=schedule, steps=6, warmup_steps=0)
    _, said = run(place, base, tmp_path / "a", schedule=schedule, steps=12, warmup_steps=0)
    lines = [line for line in figures(tmp_path / "a" / "metrics" / "a.jsonl") if "lr" in line]
    before, now = lines[5]["lr"], lines[6]["lr"]
    assert before < now == pytest.approx(5e-3)
    assert f"decays to the new end, so the learning rate goes on at {now:.2e} in place of {before:.2e}" in said
    assert "--init-from" in said


def test_a_run_from_before_the_default_changed_goes_on_as_it_began(place: Path, base: Base, tmp_path: Path) -> None:
    """Without --schedule a run at a constant rate keeps it, and one that begins now decays; another schedule is still refused."""
    run(place, base, tmp_path / "old", schedule="constant", steps=4)
    run(place, base, tmp_path / "old", steps=8)
    run(place, base, tmp_path / "new", steps=8)
    rates = {
        name: [line["lr"] for line in figures(tmp_path / name / "metrics" / f"{name}.jsonl") if "lr" in line]
        for name in ("old", "new")
    }
    assert set(rates["old"][3:]) == {rates["old"][3]} and rates["new"][3] > rates["new"][-1]
    with pytest.raises(ConfigError, match="schedule: 'constant' in the folder, 'cosine' now"):
        run(place, base, tmp_path / "old", schedule="cosine", steps=8)
    with pytest.raises(ConfigError, match="schedule: 'constant' in the folder, 'linear' now"):
        run(place, base, tmp_path / "old", schedule="linear", steps=8)


def test_fewer_steps_are_refused(place: Path, base: Base, tmp_path: Path) -> None:
    """Steps that were taken cannot be taken back: the numbers and the remedies are named, and nothing changes."""
    run(place, base, tmp_path / "a", steps=4)
    before = digest(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"a run of 4 steps, and this command asks for 3; ask for 4 or more.*--fresh"):
        run(place, base, tmp_path / "a", steps=3)
    with pytest.raises(ConfigError, match=r"a run of 4 steps, and this command asks for 2"):
        run(place, base, tmp_path / "a", steps=None, epochs=0.1)
    assert digest(tmp_path / "a") == before


def test_a_run_that_was_stopped_gets_more_steps(place: Path, base: Base, tmp_path: Path) -> None:
    """Interrupted at step 3 of 5 and resumed with 8: the end is that of a run of 8."""

    class Stopper(Console):
        shown = 0

        def progress(self, text: str, *, important: bool = False) -> None:
            self.shown += 1
            if self.shown == 3:
                os.kill(os.getpid(), 2)

    run(place, base, tmp_path / "whole", name="one", steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(options(place, tmp_path / "parts", **RATE, name="one", steps=5), console=Stopper(quiet=True), base=base)
    run(place, base, tmp_path / "parts", name="one", steps=8)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_jobs_of_one_run_go_on(place: Path, base: Base, tmp_path: Path) -> None:
    """Of two jobs one gets more steps; the other stays as it was, to the bit."""
    jobs = [{"name": "a", "seed": 1}, {"name": "b", "seed": 2}]
    run(place, base, tmp_path / "both", jobs=jobs, steps=4)
    other = (tmp_path / "both" / "adapters" / "b" / "adapter_model.safetensors").read_bytes()
    result, said = run(place, base, tmp_path / "both", jobs=[{**jobs[0], "steps": 7}, jobs[1]], steps=4)
    assert [job.steps for job in result.jobs.values()] == [7, 4] and "a: 4 steps become 7" in said
    assert (tmp_path / "both" / "adapters" / "b" / "adapter_model.safetensors").read_bytes() == other


# From an adapter


def test_the_first_loss_is_that_of_the_adapter(place: Path, base: Base, parent: Path, tmp_path: Path) -> None:
    """A job starts from a copy with the method, rank, scale and modules of its parent, which stays as it is, and lowers its loss."""
    files = {file: file.read_bytes() for file in (parent / "adapter").iterdir()}
    held_out = {"valid": (place / "valid.jsonl",), "eval_every": 4}
    result, _ = run(place, base, tmp_path / "child", init_from=parent, r=3, steps=8, **held_out)
    job = result.jobs["child"]
    own, old = read_adapter(result.adapter), read_adapter(parent)
    assert (job.method, job.r) == ("dora", 3) and own.method.lora_alpha == 5.0
    assert own.tensors.keys() == old.tensors.keys()
    tiny_rate, _ = run(place, base, tmp_path / "still", init_from=parent, r=3, steps=1, learning_rate=1e-7, **held_out)
    for site, key, value in read_adapter(tiny_rate.adapter).named_tensors():
        torch.testing.assert_close(value, old.tensors[site][key], rtol=0, atol=1e-6)
    assert job.losses[0] == tiny_rate.jobs["still"].losses[0] and job.losses[-1][1] < job.losses[0][1]
    assert {file: file.read_bytes() for file in (parent / "adapter").iterdir()} == files
    made_of = own.meta["receipt"]["init_from"]
    assert made_of["name"] == "parent" and len(made_of["sha256"]) == 64


def test_a_job_of_several_starts_from_an_adapter(place: Path, base: Base, parent: Path, tmp_path: Path) -> None:
    """init_from is an option of a job: the others start from the base, and the table has no false row of the base's loss."""
    jobs = [{"name": "fresh", "r": 4}, {"name": "child", "r": 3, "init_from": str(parent / "adapter")}]
    result, _ = run(place, base, tmp_path / "both", jobs=jobs, steps=2)
    assert {name: (job.method, job.r) for name, job in result.jobs.items()} == {
        "fresh": ("lora", 4),
        "child": ("dora", 3),
    }
    again, _ = run(place, base, tmp_path / "both", jobs=jobs, steps=2)
    assert again == result


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"r": 8}, r"r is 8 at .*q_proj, and the adapter has 3; leave out --r"),
        ({"r": 3, "method": "lora"}, r"method is lora, and the adapter has dora; leave out --method"),
        ({"r": 3, "lora_alpha": 6.0}, r"lora_alpha is 6 at .*, and the adapter has 5; leave out --lora-alpha"),
        (
            {"r": 3, "target_modules": ("q_proj",)},
            r"target_modules is a choice of 1 modules.* leave out --target-modules",
        ),
        ({"r": 3, "use_rslora": True}, r"use_rslora is True, and the adapter has False; leave out --use-rslora"),
        ({"r": 3, "init_lora_weights": "gaussian"}, r"leave out --init-lora-weights"),
        ({"r": 3, "method": "full"}, r"method is full, and the adapter has dora"),
    ],
)
def test_options_that_the_adapter_contradicts(
    place: Path, base: Base, parent: Path, tmp_path: Path, more: dict[str, Any], says: str
) -> None:
    """Each contradicting option is named with both values and the flag to leave out, and nothing is written."""
    with pytest.raises(ConfigError, match=says):
        run(place, base, tmp_path / "child", init_from=parent, **more)
    assert not (tmp_path / "child").exists()


def test_options_that_agree_may_be_repeated(place: Path, base: Base, parent: Path, tmp_path: Path) -> None:
    """The parent's own options, and those that concern training alone."""
    same = {"r": 3, "lora_alpha": 5.0, "target_modules": ("v_proj", "q_proj"), "method": "dora"}
    result, _ = run(place, base, tmp_path / "child", init_from=parent, steps=2, **{**same, "lora_dropout": 0.1})
    assert read_adapter(result.adapter).method.lora_dropout == 0.1


def test_it_resumes_without_its_parent_having_stayed(place: Path, base: Base, parent: Path, tmp_path: Path) -> None:
    """From a checkpoint the same bits, although the parent went on in between; the receipt names the parent of the start."""
    old = tmp_path / "old"
    shutil.copytree(parent, old)
    more: dict[str, Any] = {"init_from": old, "name": "x", "steps": 8}
    left_out = {key: value for key, value in options(place, tmp_path, **RATE).items() if key != "r"}
    train({**left_out, **more, "out": tmp_path / "whole"}, console=QUIET, base=base)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    before = digest(tmp_path / "whole")
    run(place, base, old, r=3, lora_alpha=5.0, target_modules=("q_proj", "v_proj"), method="dora", steps=14)
    stored = tmp_path / "parts" / "config.yaml"
    assert "\nr:" not in stored.read_text()
    train(stored, out=tmp_path / "parts", console=QUIET, base=base, resume_from="step-00000005")
    assert digest(tmp_path / "parts") == before


def test_a_folder_that_peft_wrote(place: Path, base: Base, tmp_path: Path) -> None:
    """An adapter of another program, with its own spelling of the settings, is a start like any other."""
    peft = pytest.importorskip("peft")
    model = tiny(
        "llama", num_key_value_heads=1, num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2
    )
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=r".*\.(q|o)_proj", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    result, _ = run(place, base, tmp_path / "child", init_from=tmp_path / "theirs", steps=2)
    assert {site.rpartition(".")[2] for site in read_adapter(result.adapter).tensors} == {"q_proj", "o_proj"}
    assert "model.layers.0.self_attn.o_proj" in read_adapter(result.adapter).tensors


def test_what_cannot_be_a_start(place: Path, base: Base, parent: Path, tmp_path: Path) -> None:
    """No adapter there, several of them, or a projection that would change the weights."""
    with pytest.raises(CheckpointError, match="holds no adapter"):
        run(place, base, tmp_path / "out", init_from=tmp_path)
    run(place, base, tmp_path / "both", jobs=[{"name": "a"}, {"name": "b", "seed": 1}], steps=1)
    with pytest.raises(CheckpointError, match=r"several adapters \(a, b\)"):
        run(place, base, tmp_path / "out", init_from=tmp_path / "both")
    with pytest.raises(ConfigError, match="would change the weights that training starts from"):
        run(place, base, tmp_path / "out", init_from=parent, orthogonal_to=(parent,), orthogonal="projection")


def test_an_overfitted_start_is_no_fault(place: Path, base: Base, tmp_path: Path) -> None:
    """On top of an adapter that is sure of other answers, the first loss is above chance: a warning, an event, and the run goes on."""
    bank = attach(base.model)
    try:
        from veneer.adapters import LoRA

        bank.add("loud", LoRA(r=2, target_modules=("re:.*down_proj", "lm_head")))
        generator = torch.Generator().manual_seed(0)
        for parameter in bank.parameters("loud"):
            parameter.data = 3 * torch.randn(parameter.shape, generator=generator)
        bank.save("loud", tmp_path / "loud")
    finally:
        bank.detach()
    result, said = run(place, base, tmp_path / "second", on_top_of=(tmp_path / "loud",), steps=3)
    assert result.jobs["second"].state == "finished"
    assert "warning: the first loss is" in said and "overfitted" in said
    events = [json.loads(line) for line in (tmp_path / "second" / "events.jsonl").read_text().splitlines()]
    assert [event["job"] for event in events if event["event"] == "warning"] == ["second"]


# The best adapter


def test_the_closing_lines_name_the_best_adapter(
    place: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the last adapter is not the best, the best one is named with both losses, and the run means it everywhere."""
    out, answers = tmp_path / "a", {"train": "yes", "valid": "yen"}
    for part, answer in answers.items():
        rows = [
            {"messages": [{"role": "user", "content": f"{a}+{a}"}, {"role": "assistant", "content": answer}]}
            for a in range(6)
        ]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--dtype float32 --compile false --eval-every 5 --steps 40 --r 8 --set plan=false --learning-rate 0.1 --warmup-steps 3"
    paths = {"--base": place / "base", "--valid": tmp_path / "valid.jsonl", "--out": out}
    command = ["train", str(tmp_path / "train.jsonl"), *flags.split(), "--schedule", "constant", "--batch-size", "2"]
    command += [str(part) for pair in paths.items() for part in pair]
    assert main(command) == 0
    losses = {
        line["step"]: line["held_out_loss"] for line in figures(out / "metrics" / "a.jsonl") if "held_out_loss" in line
    }
    step = min((s for s in losses if s), key=lambda s: losses[s])
    assert 0 < step < 40
    said = " ".join(capsys.readouterr().out.split())
    assert f"best adapter: {out / 'best'} (step {step}, held-out loss {losses[step]:.4f})" in said
    assert f"last: {out / 'adapter'} ({losses[40]:.4f})" in said
    bank = attach(base.model)
    try:
        assert bank.load(out).meta["path"] == str(out / "best")
        assert bank.load(out / "adapter", name="last").meta["receipt"]["steps"] == 40
    finally:
        bank.detach()
    result, _ = run(place, base, tmp_path / "child", init_from=out, r=8, steps=1)
    assert read_adapter(result.adapter).meta["receipt"]["init_from"]["folder"] == str(out / "best")
    assert main(["inspect", str(out)]) == 0
    assert "this is its best adapter" in capsys.readouterr().err
