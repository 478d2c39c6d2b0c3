"""What cannot learn is stopped in its first steps, with the reason; what learns slowly or rarely is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny
from tests.training.made import QUIET, options
from torch import Tensor, nn

from veneer.adapters import Adapter, DoRA, LoRA, attach
from veneer.errors import TrainingError
from veneer.models.load import Base, load_base
from veneer.training import train
from veneer.training.run.sanity_checks import SanityChecks

IDS = torch.arange(5, 19).reshape(2, 7)


def watched(method: LoRA | DoRA | None = None, *, steps: int = 5, arch: str = "llama") -> tuple[Adapter, SanityChecks]:
    """A fresh adapter with the gradients of its first step, and its watch."""
    model = tiny(arch, tie_word_embeddings=False)
    bank = attach(model)
    adapter = bank.add("a", method or LoRA(r=2))
    with bank.use("a", training=True):
        model(input_ids=IDS, labels=IDS).loss.backward()
    return adapter, SanityChecks(adapter, 320, steps)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2),
        DoRA(r=2),
        LoRA(r=2, target_modules=("embed_tokens", "q_proj")),
        LoRA(r=2, modules_to_save=("lm_head", "norm"), trainable_token_indices=(300,)),
        LoRA(r=2, lora_bias=True),
    ],
    ids=lambda method: f"{method.name} {method.modules_to_save}",
)
def test_what_learns_passes(method: LoRA | DoRA) -> None:
    """Gradients at step one and tensors that move afterwards raise nothing; nor does the row of a token that did not occur."""
    adapter, watch = watched(method)
    watch.before_step(0)
    for step in range(1, 6):
        with torch.no_grad():
            for _, key, parameter in adapter.named_tensors():
                if key != "rows":
                    parameter.add_(1e-4)
        watch.after_step(step, 1e-3)
    assert watch.done


def wipe(adapter: Adapter, *kinds: str, to: str, sites: str = "") -> None:
    """Take the gradients of some tensors away, or make them zero."""
    for site, key, parameter in adapter.named_tensors():
        if key in kinds and sites in site:
            parameter.grad = None if to == "none" else torch.zeros_like(parameter)


@pytest.mark.parametrize("to", ["none", "zero"])
@pytest.mark.parametrize("kind", ["lora_B", "lora_magnitude_vector", "weight", "bias"])
def test_gradients_that_do_not_arrive_stop_the_run(kind: str, to: str) -> None:
    """Where B, a magnitude, a head or a bias must have a gradient at step one and has none, or zero, the tensors are named."""
    method = {
        "lora_magnitude_vector": DoRA(r=2),
        "weight": LoRA(r=2, modules_to_save=("lm_head",)),
        "bias": LoRA(r=2, bias="all"),
    }.get(kind, LoRA(r=2))
    adapter, watch = watched(method, arch="opt" if kind == "bias" else "llama")
    wipe(adapter, kind, to=to)
    with pytest.raises(TrainingError, match=rf"\.{kind}.* as a gradient at step one") as caught:
        watch.before_step(0)
    assert caught.value.code == "still"
    assert str(caught.value).startswith("no gradient reached" if to == "none" else "zero reached")


def test_sites_that_no_gradient_reaches_are_to_be_left_out() -> None:
    """Some sites without a gradient among others with one: they are named with the remedy."""
    adapter, watch = watched()
    wipe(adapter, "lora_B", to="none", sites="v_proj")
    with pytest.raises(TrainingError, match=r"reached model\.layers\.0\.self_attn\.v_proj\.lora_B.*exclude_modules"):
        watch.before_step(0)


@pytest.mark.parametrize("steps", [1, 2, 5, 80])
def test_tensors_that_do_not_move_in_their_stored_type_stop_the_run(steps: int) -> None:
    """After five steps, or the last of a shorter run, a tensor with its first bits is told; A only where B has moved before."""
    adapter, watch = watched(steps=steps)
    last = min(5, steps)
    watch.before_step(0)
    for step in range(1, last):
        watch.after_step(step, 1e-12)
    with pytest.raises(TrainingError, match=rf"did not move in {last} steps? at a learning rate of 1e-12") as caught:
        watch.after_step(last, 1e-12)
    assert ("lora_A" in str(caught.value)) == (steps > 1)
    assert not watch.needed(last)
    assert len(list(adapter.parameters())) > 0


@pytest.mark.parametrize("reached", [True, False])
def test_rows_must_move_once_a_gradient_reached_them(reached: bool) -> None:
    """A token that the first examples hold must be learnt; one that they do not hold cannot."""
    adapter, watch = watched(LoRA(r=2, target_modules=("q_proj",), trainable_token_indices=(7 if reached else 300,)))
    watch.before_step(0)
    with torch.no_grad():
        for _, key, parameter in adapter.named_tensors():
            if key != "rows":
                parameter.add_(1e-4)
    if reached:
        with pytest.raises(TrainingError, match=r"embed_tokens\.rows did not move"):
            watch.after_step(5, 1e-3)
    else:
        watch.after_step(5, 1e-3)


def test_a_first_loss_far_above_chance_is_a_warning() -> None:
    """Far above guessing: the remark says what guessing gives and where to look. An overfitted base really starts there."""
    _, watch = watched()
    assert watch.warning(1, 8.6) is None and watch.warning(2, 20.0) is None
    told = watch.warning(1, 8.7)
    assert told is not None
    assert "first loss is 8.70, far above the loss of random guessing (5.77)" in told and "veneer data show" in told


def test_examples_that_are_known_already_give_no_gradient() -> None:
    """With a first loss of zero, gradients of zero and tensors that stay are as they must be."""
    adapter, watch = watched()
    wipe(adapter, "lora_B", to="zero")
    watch.before_step(0, loss=0.0)
    watch.after_step(5, 1e-3)


class Cut(nn.Module):
    """A last norm through which no gradient, or one of zero, comes back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """The input, cut off from its graph."""
        return x.detach() if self.how == "none" else x * 0


@pytest.mark.parametrize("how", ["none", "zero"])
def test_a_run_without_gradients_stops_at_step_one(how: str, place: Path, tmp_path: Path) -> None:
    """What stops gradients inside the model ends the run before a step is taken, and nothing is saved as a result."""
    base = load_base(place / "base", dtype="float32")
    base.model.model.norm = Cut(how)
    with pytest.raises(TrainingError, match="as a gradient at step one, so the adapter cannot learn") as caught:
        train(options(place, tmp_path / "a"), base=base, console=QUIET)
    assert caught.value.code == "still"
    assert not (tmp_path / "a" / "adapter").exists()


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_a_run_that_rounds_its_steps_away_stops(steps: int, place: Path, base: Base, tmp_path: Path) -> None:
    """A learning rate below the resolution of the stored numbers ends the run, however short it is."""
    chosen: dict[str, Any] = {"learning_rate": 1e-30, "warmup_steps": 0, "steps": steps}
    with pytest.raises(TrainingError, match=rf"did not move in {min(5, steps)} step"):
        train(options(place, tmp_path / "a", **chosen), base=base, console=QUIET)
