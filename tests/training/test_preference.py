"""Preference data: losses and gradients against TRL, and runs with DPO, ORPO and KTO jobs beside others."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.training.made import QUIET, Ear, World, apart, digest, examples, options, values
from tests.training.processes import together

from veneer import train
from veneer._options.text import kinds_of
from veneer.adapters import DoRA, LoRA
from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import ConfigError
from veneer.evaluate.losses import Losses, example_losses
from veneer.models.load import Base
from veneer.training.loop.step import Stepper
from veneer.training.parallel.processes import ALONE, Processes
from veneer.training.tasks import TASKS, task_of
from veneer.training.tasks.preference import Answers


def pairs(count: int, *, seed: int = 0) -> list[Example]:
    """Random preferences: prompts of a few tokens with two answers each."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [rng.randrange(3, 320) for _ in range(rng.randint(2, 6))]
        answers = []
        for _ in range(2):
            answer = [rng.randrange(3, 320) for _ in range(rng.randint(1, 8))]
            answers.append(Example((*prompt, *answer), (0.0,) * len(prompt) + (1.0,) * len(answer), f"rows:{i}"))
        found.append(Example.of_sequences(answers))
    return found


def preference_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """A file of sums with a right and a wrong answer."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = rng.randrange(50), rng.randrange(50)
            row = {"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": str(a + b + rng.randint(1, 9))}
            file.write(json.dumps(row) + "\n")
    return path


def stepper_of(world: World, **tasks: TrainOptions) -> Stepper:
    return Stepper(world.runner, world.bank, tasks={name: task_of(one) for name, one in tasks.items()})


def task_options(task: str = "dpo", **others: Any) -> TrainOptions:
    return TrainOptions(data=("rows.jsonl",), task=task, **others)


def gradients(world: World, name: str) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in world.bank[name].parameters() if parameter.grad is not None]
    for parameter in world.bank[name].parameters():
        parameter.grad = None
    return found


class BesideTRL:
    """A tiny base with a LoRA adapter here, and the same weights in one of TRL's trainers."""

    def __init__(self, trainer: type, config: Any, columns: dict[str, list[Any]]) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from tests.tiny import tiny, tiny_tokenizer

        self.world = World()
        self.world.job("a", LoRA(r=3, lora_alpha=6), seed=3)
        sizes = {key: getattr(self.world.model.config, key) for key in ("num_hidden_layers", "hidden_size")}
        model = tiny("llama", **sizes, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
        model.load_state_dict(self.world.model.state_dict())
        lora = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = Dataset.from_dict(columns)
        self.trainer = trainer(
            model=model, args=config, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=lora
        )
        self.theirs = []
        for site, key, parameter in self.world.bank["a"].named_tensors():
            module = self.trainer.model.get_submodule(f"base_model.model.{site}")
            self.theirs.append(getattr(module, key)["default"].weight)
            with torch.no_grad():
                self.theirs[-1].copy_(parameter)

    def compare(self, stepper: Stepper, rows: list[Example], inputs: Any) -> None:
        """The mean loss of the rows and every gradient are within 1e-5 of TRL's."""
        result = stepper.forward_backward(make_batch(rows, "a"))["a"]
        expected = self.trainer.compute_loss(self.trainer.model.train(), inputs)
        wanted = torch.autograd.grad(expected, self.theirs)
        assert result.weight == len(rows)
        assert result.loss / len(rows) == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
        assert all(float(grad.abs().max()) > 0 for grad in wanted)
        assert apart([grad / len(rows) for grad in gradients(self.world, "a")], wanted) < 1e-5


def trl_settings(folder: Path) -> dict[str, Any]:
    """Settings of TRL's trainers: fp32 on the CPU."""
    return {
        "output_dir": str(folder),
        "beta": 0.3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
    }


def prompt_of(sequence: Example) -> list[int]:
    return [i for i, w in zip(sequence.ids, sequence.weights, strict=True) if not w]


@pytest.mark.slow
def test_dpo_equals_trl(tmp_path: Path) -> None:
    """The same base, adapter and pairs through TRL's DPOTrainer, sigmoid and IPO."""
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    texts = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    both = BesideTRL(DPOTrainer, DPOConfig(**trl_settings(tmp_path), loss_type=["sigmoid"]), texts)
    rows = pairs(4)
    inputs = DataCollatorForPreference(pad_token_id=2)(
        [
            {
                "prompt_ids": prompt_of(row.sequences[0]),
                "chosen_ids": answer_of(row.sequences[0]),
                "rejected_ids": answer_of(row.sequences[1]),
            }
            for row in rows
        ]
    )
    for loss in ("sigmoid", "ipo"):
        both.trainer.loss_types = [loss]
        both.compare(stepper_of(both.world, a=task_options(beta=0.3, preference_loss=loss)), rows, inputs)


@pytest.mark.slow
def test_orpo_equals_trl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same through TRL's ORPOTrainer.

    TRL averages the likelihood over all tokens of the prompts and chosen answers of a batch, the paper over those of each answer: the
    same for prompts of one token, which nothing predicts, and answers of one length.
    """
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    texts = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    both = BesideTRL(ORPOTrainer, ORPOConfig(**trl_settings(tmp_path), max_length=64), texts)
    rng = random.Random(1)
    answers = [[[rng.randrange(3, 320) for _ in range(n)] for n in (5, rng.randint(2, 7))] for _ in range(4)]
    rows, inputs = [], {}
    for at, name in enumerate(("chosen", "rejected")):
        longest = max(len(pair[at]) for pair in answers) + 1
        ids, labels, mask = [], [], []
        for number, pair in enumerate(answers):
            padding = longest - 1 - len(pair[at])
            ids.append([7 + number, *pair[at], *[2] * padding])
            labels.append([-100, *pair[at], *[-100] * padding])
            mask.append([1] * (1 + len(pair[at])) + [0] * padding)
        inputs |= {f"{name}_input_ids": torch.tensor(ids), f"{name}_attention_mask": torch.tensor(mask)}
        inputs[f"{name}_labels"] = torch.tensor(labels)
    for number, pair in enumerate(answers):
        both_answers = [Example((7 + number, *one), (0.0, *[1.0] * len(one))) for one in pair]
        rows.append(Example.of_sequences(both_answers))
    both.compare(stepper_of(both.world, a=task_options("orpo", beta=0.3)), rows, inputs)


def answer_of(sequence: Example) -> list[int]:
    return list(sequence.ids[len(prompt_of(sequence)) :])


def rated(count: int, *, seed: int = 0) -> list[Example]:
    """Random single answers, every second one to avoid."""
    firsts = [row.sequences[0] for row in pairs(count, seed=seed)]
    return [replace(one, desirable=at % 2 == 0) for at, one in enumerate(firsts)]


def begun(stepper: Stepper, rows: list[Example]) -> Stepper:
    """The stepper after the start of a step on these rows, as a trainer does it."""
    task = stepper.tasks["a"]
    both = [
        example_losses(stepper.runner, task.compared(rows), bank=stepper.bank, route=route) for route in ("a", None)
    ]
    task.begin_step(*both)
    return stepper


@pytest.mark.slow
def test_kto_equals_trl(tmp_path: Path) -> None:
    """The same base, adapter and rows through TRL's KTOTrainer, with and without a divergence above zero."""
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    texts = {"prompt": ["a", "b"], "completion": ["b", "c"], "label": [True, False]}
    config = KTOConfig(**trl_settings(tmp_path), desirable_weight=1.5, per_device_train_batch_size=2)
    both = BesideTRL(KTOTrainer, config, texts)
    divergences = []
    for seed in (4, 5):
        rows = rated(4, seed=seed)
        inputs = DataCollatorForUnpairedPreference(pad_token_id=2)(
            [
                {
                    "prompt_ids": prompt_of(row),
                    "completion_ids": answer_of(row),
                    "KL_completion_ids": answer_of(rows[at - 1]),
                    "label": row.desirable,
                }
                for at, row in enumerate(rows)
            ]
        )
        stepper = stepper_of(both.world, a=task_options("kto", beta=0.3, desirable_weight=1.5))
        both.compare(begun(stepper, rows), rows, inputs)
        divergences.append(stepper.tasks["a"].kl)
    assert min(divergences) == 0.0 < max(divergences)


def test_the_divergence_is_that_of_the_whole_step() -> None:
    """Cut into passes of a few tokens, alone or beside another job, a KTO job takes the same step."""

    def stepped(budget: int, *, beside: bool) -> tuple[float, float, list[torch.Tensor]]:
        world, ear = World(), Ear()
        jobs = [
            world.job("a", LoRA(r=3, lora_alpha=12), seed=3, rows=rated(4, seed=4), task="kto", batch_size=4, steps=2)
        ]
        jobs += [world.job("b", seed=1, rows=pairs(3), task="dpo", steps=2)] if beside else []
        world.stepper = Stepper(world.runner, world.bank, tasks={job.name: job.task for job in jobs})
        world.trainer(jobs, ear, budget=budget).run()
        return jobs[0].task.kl, ear.losses["a"][-1], values(world, "a")  # type: ignore[attr-defined]

    kl, loss, tensors = stepped(512, beside=False)
    assert kl > 0 and loss > 0
    for found in (stepped(8, beside=False), stepped(512, beside=True)):
        assert found[:2] == (pytest.approx(kl, rel=1e-4), pytest.approx(loss, rel=1e-5))
        assert apart(found[2], tensors) < 1e-4


@pytest.mark.parametrize(
    "task", [pytest.param("dpo", marks=pytest.mark.slow), pytest.param("orpo", marks=pytest.mark.slow), "kto"]
)
def test_two_processes_train_as_one(task: str) -> None:
    """Losses, evaluations and figures are those of one process."""

    def work(processes: Processes) -> list[Any]:
        world, ear = World(), Ear()
        rows = rated(9) if task == "kto" else pairs(9)
        job = world.job("a", seed=2, rows=rows, held_out=rows[:4], task=task, batch_size=5, steps=4, eval_every=2)
        world.stepper = Stepper(world.runner, world.bank, tasks={"a": job.task})
        trainer = world.trainer([job], ear, budget=24)
        trainer.processes = processes
        trainer.run()
        assert job.reason == ""
        figures = [value for _, each in job.progress.figures for value in each.values()]
        return [*ear.losses["a"], *(loss for _, loss in job.progress.evaluations), *figures]

    alone, both = work(ALONE), together(2, work)
    assert len(alone) >= 13 and both[0] == both[1] == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_label_smoothing_is_the_expected_loss_under_flipped_preferences() -> None:
    """A tenth of the weight goes to the opposite order of the pair."""
    logps, tokens = torch.tensor([[-7.0, -9.0]]), torch.ones(1, 2)
    plain, smooth = (task_of(task_options(beta=0.5, label_smoothing=e)) for e in (0.0, 0.1))
    right, wrong = (
        plain.pair_losses(Answers(each, tokens, torch.zeros(1, 2)))
        for each in (logps, logps.flip(1))  # type: ignore[attr-defined]
    )
    found = smooth.pair_losses(Answers(logps, tokens, torch.zeros(1, 2)))  # type: ignore[attr-defined]
    assert torch.allclose(found, 0.9 * right + 0.1 * wrong) and float(right) == pytest.approx(
        float(-F.logsigmoid(torch.tensor(1.0)))
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2", "bloom"])
def test_jobs_of_other_tasks_in_one_pass_get_their_own_gradients(arch: str) -> None:
    """Language modelling, DPO and ORPO, LoRA and DoRA, flat, capped and padded bases: as each job alone."""
    world = World(arch)
    methods = {"plain": LoRA(r=2), "dpo": DoRA(r=2, lora_dropout=0.2), "orpo": LoRA(r=3)}
    for seed, (name, method) in enumerate(methods.items()):
        world.job(name, method, seed=seed)
    stepper = stepper_of(world, dpo=task_options("dpo"), orpo=task_options("orpo"))
    rows = [*zip(["plain"] * 3, examples(3), strict=True), *zip(["dpo", "orpo"] * 2, pairs(4), strict=True)]
    random.Random(0).shuffle(rows)
    losses = stepper.forward_backward(make_batch([row for _, row in rows], [name for name, _ in rows]))
    mixed = {name: gradients(world, name) for name in methods}
    for name in methods:
        world.bank["dpo"].draws = 0
        own = [row for job, row in rows if job == name]
        alone = stepper.forward_backward(make_batch(own, name))[name]
        assert losses[name].loss == pytest.approx(alone.loss, rel=1e-5) and losses[name].weight == alone.weight
        assert apart(mixed[name], gradients(world, name)) < 2e-5
    assert losses["dpo"].weight == losses["orpo"].weight == 2


def test_a_new_adapter_has_the_loss_of_chance_and_a_gradient() -> None:
    """Where the adapter equals its reference, DPO's loss is log 2; the reference takes no part in the gradient."""
    world = World()
    world.bank.add("a", LoRA(r=2), seed=0)
    result = stepper_of(world, a=task_options()).forward_backward(make_batch(pairs(3), "a"))["a"]
    assert result.loss / 3 == pytest.approx(0.6931472, abs=1e-6)
    assert max(float(grad.norm()) for grad in gradients(world, "a")) > 0


def test_accuracy_and_margin_of_an_evaluation() -> None:
    """Rewards are beta times the log-ratios; a tie counts half."""
    own = Losses(torch.tensor([1.0, 5.0, 4.0, 2.0, 3.0, 3.0]).double(), torch.ones(6).double())
    base = Losses(torch.tensor([2.0, 5.0, 4.0, 3.0, 3.0, 3.0]).double(), torch.ones(6).double())
    scores = task_of(task_options(beta=0.5)).scores(pairs(3), own, base)
    assert scores.metrics == {"reward_accuracy": 0.5, "reward_margin": pytest.approx(0.0)}
    margins = torch.tensor([0.5, -0.5, 0.0])
    assert scores.loss == pytest.approx(float(-F.logsigmoid(margins).mean()))


def test_a_run_learns_preferences_beside_another_job(place: Path, base: Base, tmp_path: Path) -> None:
    """A DPO job beside one of language modelling ends as alone; its held-out figures are in the metrics and the result."""
    rows = preference_rows(tmp_path / "rows.jsonl", 8)
    own = {"task": "dpo", "data": (rows,), "valid": (rows,), "eval_every": 6, "steps": 12, "method": "dora"}
    alone = train(options(place, tmp_path / "alone", **own), base=base, console=QUIET)
    jobs = [{"name": "alone", **own}, {"name": "plain", "seed": 1}]
    both = train(options(place, tmp_path / "both", jobs=jobs), base=base, console=QUIET)
    job = both.jobs["alone"]
    assert [step for step, _ in job.figures] == [0, 6, 12] and job.losses[0][1] == pytest.approx(0.6931472, abs=1e-6)
    assert job.losses[-1][1] < 0.69 and job.figures[-1][1]["reward_margin"] > 0
    assert job.losses[-1][1] == pytest.approx(alone.jobs["alone"].losses[-1][1], abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "both" / "metrics" / "alone.jsonl").read_text().splitlines()]
    assert "held_out_reward_accuracy" in next(line for line in lines if "held_out_loss" in line)


def test_a_run_that_was_stopped_ends_with_the_same_bits(place: Path, base: Base, tmp_path: Path) -> None:
    """Resumed from its checkpoint, a DPO run on top of an adapter ends as the one that was never stopped."""
    rows = preference_rows(tmp_path / "rows.jsonl", 24)
    train(options(place, tmp_path / "first", steps=4), base=base, console=QUIET)
    own = {
        "name": "a",
        "task": "dpo",
        "data": (rows,),
        "valid": (rows,),
        "eval_every": 5,
        "on_top_of": (tmp_path / "first",),
    }
    train(options(place, tmp_path / "whole", **own), base=base, console=QUIET)
    train(options(place, tmp_path / "part", **own), base=base, console=QUIET)
    train(options(place, tmp_path / "part", **own), base=base, console=QUIET, resume_from="step-00000010")
    assert digest(tmp_path / "whole") == digest(tmp_path / "part")


def test_a_kto_run_learns_and_resumes_with_the_same_bits(place: Path, base: Base, tmp_path: Path) -> None:
    """Right and wrong sums with a label: the margin of the rewards grows, and a stopped run ends as one that was not."""
    rows, half = tmp_path / "rows.jsonl", preference_rows(tmp_path / "pairs.jsonl", 12)
    lines = [json.loads(line) for line in half.read_text().splitlines()]
    answers = [(one["prompt"], one[key], key == "chosen") for one in lines for key in ("chosen", "rejected")]
    rows.write_text(
        "".join(json.dumps(dict(zip(("prompt", "completion", "label"), one, strict=True))) + "\n" for one in answers)
    )
    own = {"name": "a", "task": "kto", "data": (rows,), "valid": (rows,), "eval_every": 6, "batch_size": 4}
    result = train(options(place, tmp_path / "whole", **own), base=base, console=QUIET)
    assert [sorted(figures) for _, figures in result.jobs["a"].figures] == [["kl", "reward_margin"]] * 3
    first, *_, last = (loss for _, loss in result.jobs["a"].losses)
    assert first == pytest.approx(0.5, abs=1e-6) and last < 0.499
    assert result.jobs["a"].figures[-1][1]["reward_margin"] > 0
    train(options(place, tmp_path / "part", **own), base=base, console=QUIET)
    train(options(place, tmp_path / "part", **own), base=base, console=QUIET, resume_from="step-00000010")
    assert digest(tmp_path / "whole") == digest(tmp_path / "part")


def test_a_job_that_starts_from_an_adapter_has_it_as_its_reference(place: Path, base: Base, tmp_path: Path) -> None:
    """DPO after supervised training compares with the adapter that it starts from, as TRL does."""
    rows = preference_rows(tmp_path / "rows.jsonl", 8)
    train(options(place, tmp_path / "first", steps=6), base=base, console=QUIET)
    own = {"task": "dpo", "data": (rows,), "valid": (rows,), "steps": 2, "init_from": tmp_path / "first", "r": 2}
    result = train(options(place, tmp_path / "second", **own), base=base, console=QUIET)
    job = result.jobs["second"]
    assert job.losses[0][1] == pytest.approx(0.6931472, abs=1e-6) and job.losses[-1][1] != job.losses[0][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "dpo", "train_on": "all"}, "train_on: all would also score the prompt"),
        ({"task": "dpo", "format": "prompt"}, "format is prompt, and task: dpo reads preferences"),
        ({"task": "orpo", "label_smoothing": 0.1}, "label_smoothing is part of DPO's sigmoid loss only"),
        ({"task": "dpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"task": "kto", "batch_size": 1}, "batch_size is 1, and task: kto compares"),
        ({"task": "dpo", "desirable_weight": 2.0}, "are weights of task: kto"),
        ({"task": "ppo"}, r"task: expected 'sft', 'dpo', .* found 'ppo'"),
    ],
)
def test_options_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    """One sentence for a combination that could not do what it says."""
    with pytest.raises(ConfigError, match=message):
        TrainOptions(data=("rows.jsonl",), **given)


def test_the_table_has_the_tasks_of_the_options() -> None:
    """The option takes the names of the table."""
    assert set(kinds_of(TrainOptions.model_fields["task"].annotation).words) == set(TASKS)
