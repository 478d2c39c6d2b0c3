"""A job: its own division, clipping, decay, finite check, order of examples and optimizer."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tests.training.made import World, apart, examples, values
from torch import nn

from veneer.adapters import DoRA, LoRA
from veneer.data.batch import make_batch
from veneer.errors import TrainingError
from veneer.training.loop.job import Job


def feed(world: World, job: Job) -> None:
    """The gradient of the job's next step."""
    rows = job.next_examples()
    job.add(world.stepper.forward_backward(make_batch(rows, job.name))[job.name])


def test_a_step_is_the_optimizers_own_on_the_mean_loss() -> None:
    """Loss, division by the weights, clipping and AdamW agree with a plain loop over the same examples."""
    world = World()
    job = world.job("a", DoRA(r=2), clip=0.5, weight_decay=0.1, warmup_steps=3)
    twin = World()
    twin.job("a", DoRA(r=2))
    parameters = list(twin.bank["a"].parameters())
    plain = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1)
    for step in range(5):
        rows = job.next_examples()
        batch = make_batch(rows, "a")
        with twin.bank.use("a", training=True):
            logits = twin.runner.logits(batch)
        keep = batch.weights > 0
        loss = nn.functional.cross_entropy(logits[keep], batch.targets[keep])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in plain.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        plain.step()
        plain.zero_grad()
        feed(world, job)
        figures = job.optim_step()
        assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert apart(values(world, "a"), values(twin, "a")) < 1e-5


def test_loraplus_gives_b_its_own_rate() -> None:
    """With a ratio of 4 and SGD, B moves four times as far as with 1, and A as far."""
    moves = {}
    for ratio in (1.0, 4.0):
        world = World()
        job = world.job("a", LoRA(r=2, loraplus_lr_ratio=ratio), optimizer="sgd", clip=None)
        before = values(world, "a")
        feed(world, job)
        job.optim_step()
        moves[ratio] = [after - start for after, start in zip(values(world, "a"), before, strict=True)]
    names = [key for _, key, _ in world.bank["a"].named_tensors()]
    for name, one, four in zip(names, moves[1.0], moves[4.0], strict=True):
        assert apart([four], [one * (4 if name == "lora_B" else 1)]) < 1e-4


def test_every_example_comes_once_an_epoch() -> None:
    """Steps run on through epochs; each epoch holds every example once, and the cursor moves only when a step is taken."""
    world = World()
    job = world.job("a", rows=examples(6), batch_size=4, steps=9)
    seen: list[str] = []
    for _ in range(9):
        assert [row.source for row in job.next_examples()] == [row.source for row in job.next_examples()]
        seen += [row.source for row in job.next_examples()]
        feed(world, job)
        job.optim_step()
    for epoch in range(6):
        assert Counter(seen[6 * epoch : 6 * epoch + 6]) == Counter(f"rows:{i}" for i in range(6))


@pytest.mark.parametrize("site", ["self_attn.q_proj", "mlp.down_proj"])
@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_seen_at_once(site: str, key: str, value: float) -> None:
    """Even where attention makes numbers of NaN again, the step is not taken, and nothing else of the job moves."""
    world = World()
    job = world.job("a")
    feed(world, job)
    job.optim_step()
    with torch.no_grad():
        world.bank["a"].tensors[f"model.layers.0.{site}"][key].view(-1)[1] = value
    before, moments = values(world, "a"), job.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    feed(world, job)
    with pytest.raises(TrainingError, match="step") as caught:
        job.optim_step()
    assert caught.value.code == "non_finite"
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(values(world, "a"), before, strict=True))
    assert torch.equal(moments, job.optimizer.state_dict()["state"][0]["exp_avg"])
    assert all(parameter.grad is None for parameter in job.parameters)
    assert (job.progress.step, job.progress.cursor) == (1, 2)


def test_a_loss_that_is_not_finite_names_its_examples() -> None:
    """The message has the job, the step, the examples at fault and what to do."""
    world = World()
    job = world.job("a")
    with torch.no_grad():
        world.bank["a"].tensors["model.layers.0.mlp.down_proj"]["lora_B"].fill_(1e38)
    feed(world, job)
    with pytest.raises(
        TrainingError, match=r'job "a", step 1: the loss of rows:\d, rows:\d is nan.*lower learning_rate'
    ):
        job.optim_step()


def test_a_job_that_ends_keeps_nothing_of_its_half_step() -> None:
    """Gradients and counts of a step that is not taken are gone."""
    world = World()
    job = world.job("a")
    feed(world, job)
    job.drop_gradients()
    assert all(parameter.grad is None for parameter in job.parameters)
    feed(world, job)
    assert job.optim_step()["tokens"] == sum(len(job.examples[job.order.at(i)]) for i in range(2))
