"""Preference data: losses and gradients against TRL, and runs with DPO and ORPO jobs beside others."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.training.made import QUIET, World, apart, digest, examples, options

from veneer import train
from veneer._options.text import kinds_of
from veneer.adapters import DoRA, LoRA
from veneer.config import TrainOptions
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import ConfigError
from veneer.evaluate.losses import Losses
from veneer.models.load import Base
from veneer.training.loop.step import Stepper
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


@pytest.mark.slow
def test_losses_and_gradients_equal_those_of_trl(tmp_path: Path) -> None:
    """The same base, adapter and pairs through TRL's DPOTrainer: loss and every gradient within 1e-5 in fp32."""
    from datasets import Dataset
    from peft import LoraConfig
    from tests.tiny import tiny, tiny_tokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    world = World()
    world.job("a", LoRA(r=3, lora_alpha=6), seed=3)
    rows = pairs(4)
    model = tiny(
        "llama",
        **{key: getattr(world.model.config, key) for key in ("num_hidden_layers", "hidden_size")},
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model.load_state_dict(world.model.state_dict())
    config = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        loss_type=["sigmoid"],
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    texts = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(texts),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = {}
    for site, key, parameter in world.bank["a"].named_tensors():
        module = trainer.model.get_submodule(f"base_model.model.{site}")
        theirs[site, key] = getattr(module, key)["default"].weight
        with torch.no_grad():
            theirs[site, key].copy_(parameter)
    prompts = [
        [i for i, w in zip(one.ids, one.weights, strict=True) if not w] for one in (row.sequences[0] for row in rows)
    ]
    inputs = DataCollatorForPreference(pad_token_id=2)(
        [
            {
                "prompt_ids": prompt,
                "chosen_ids": list(row.sequences[0].ids[len(prompt) :]),
                "rejected_ids": list(row.sequences[1].ids[len(prompt) :]),
            }
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    )
    for loss in ("sigmoid", "ipo"):
        chosen = task_options(beta=0.3, preference_loss=loss)
        result = stepper_of(world, a=chosen).forward_backward(make_batch(rows, "a"))["a"]
        trainer.loss_types = [loss]
        expected = trainer.compute_loss(trainer.model.train(), inputs)
        names = [theirs[site, key] for site, key, _ in world.bank["a"].named_tensors()]
        wanted = torch.autograd.grad(expected, names)
        assert result.weight == 4 and result.loss / 4 == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
        assert all(float(grad.abs().max()) > 0 for grad in wanted)
        assert apart([grad / 4 for grad in gradients(world, "a")], wanted) < 1e-5


@pytest.mark.slow
def test_orpo_equals_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The odds ratio term of TRL's experimental trainer, from the same log-probabilities, and the gradient by autograd."""
    from types import SimpleNamespace

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps = torch.tensor([[-7.0, -9.0], [-20.0, -3.0]], requires_grad=True)
    tokens = torch.tensor([[3.0, 4.0], [10.0, 2.0]])
    task = task_of(task_options("orpo", beta=0.2))
    found = task.pair_losses(Answers.of(logps.flatten(), tokens.flatten(), None))  # type: ignore[attr-defined]
    means = logps / tokens
    device = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    ratio = ORPOTrainer.odds_ratio_loss(device, means[:, 0], means[:, 1])[0]
    expected = -means[:, 0] - ratio
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(
        torch.autograd.grad(found.sum(), logps, retain_graph=True)[0],
        torch.autograd.grad(expected.sum(), logps)[0],
        atol=1e-5,
    )


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
    scores = task_of(task_options(beta=0.5)).scores(own, base)
    assert scores.figures == {"reward_accuracy": 0.5, "reward_margin": pytest.approx(0.0)}
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
        ({"task": "dpo", "format": "prompt"}, "format is prompt, and task dpo reads preferences"),
        ({"task": "orpo", "label_smoothing": 0.1}, "label_smoothing is part of DPO's sigmoid loss only"),
        ({"task": "dpo", "label_smoothing": 0.5}, "label_smoothing"),
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
