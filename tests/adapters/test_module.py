"""An adapter as a module: what loops of other libraries (transformers' Trainer) do to the model that they are given."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.made import nudge, portrait, values
from tests.adapters.peers import inputs_of, peft_twin
from tests.adapters.test_peft_parity import text_to_learn
from tests.tiny import tiny
from torch import nn

import veneer
from veneer.adapters import DoRA, LoRA
from veneer.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
METHODS = {"lora": LoRA(r=4, lora_alpha=8), "dora": DoRA(r=4, lora_alpha=8)}
ROWS = [{"input_ids": row, "labels": row} for batch in text_to_learn() for row in batch["input_ids"]]


def run(model: nn.Module, folder: Path, *, resume: str | None = None, optimizer: Any = None, **options: Any) -> Any:
    """Twenty steps of transformers' Trainer in fp32; returns the Trainer."""
    from transformers import Trainer, TrainingArguments

    settings = {"learning_rate": 1e-2, "max_steps": 20, "per_device_train_batch_size": 4, "max_grad_norm": 0.5}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{**settings, "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": 3, **options},
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def course(trainer: Any, key: str = "loss") -> list[float]:
    """A figure of every step."""
    return [float(entry[key]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", METHODS)
def test_trainer_does_with_it_what_it_does_with_peft(arch: str, kind: str, tmp_path: Path) -> None:
    """From the same start twenty steps of transformers' Trainer, clipped, have PEFT's losses (1e-4) and gradient norms; they learn."""
    model: Any = tiny(arch)
    plain = copy.deepcopy(model)
    bank = veneer.attach(model)
    bank.add("a", METHODS[kind], seed=1)
    theirs = peft_twin(plain, bank["a"])
    before = values(model)
    ours, other = run(bank.module("a"), tmp_path / "ours"), run(theirs, tmp_path / "theirs")
    assert course(ours)[-1] <= 0.8 * course(ours)[0] and len(course(ours)) == 20
    assert max(abs(a - b) for a, b in zip(course(ours), course(other), strict=True)) <= 1e-4
    norms = course(ours, "grad_norm")
    assert norms == pytest.approx(course(other, "grad_norm"), rel=1e-3) and max(norms) > 0.5
    assert ours.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], abs=1e-4)
    assert values(model) == before


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_trainer_may_checkpoint_activations(reentrant: bool, tmp_path: Path) -> None:
    """With activations computed again, of either kind, the losses are those without."""
    found = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        bank = veneer.attach(tiny("llama"))
        bank.add("a", METHODS["dora"], seed=1)
        if options and reentrant:
            bank.model.enable_input_require_grads()  # type: ignore[operator]
        found.append(course(run(bank.module("a"), tmp_path / "run", max_steps=6, **options)))
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_what_trainer_saves_is_the_adapter_and_it_goes_on_from_there(tmp_path: Path) -> None:
    """A checkpoint holds the adapter's tensors and nothing of the base; going on from it ends where the unbroken run does."""
    whole = veneer.attach(tiny("llama"))
    whole.add("a", METHODS["lora"], seed=1)
    straight = run(whole.module("a"), tmp_path / "straight")
    for resume in (None, str(tmp_path / "broken" / "checkpoint-10")):
        bank = veneer.attach(tiny("llama"))
        bank.add("a", METHODS["lora"], seed=1)
        module = bank.module("a")
        broken = run(module, tmp_path / "broken", resume=resume, save_strategy="steps", save_steps=10)
        assert course(broken)[-1] == pytest.approx(course(straight)[-1], abs=1e-6)
    stored = load_file(tmp_path / "broken" / "checkpoint-10" / "model.safetensors")
    assert set(stored) == set(module.state_dict())
    assert sum(tensor.numel() for tensor in stored.values()) == bank["a"].num_parameters()
    module.save_pretrained(tmp_path / "saved")
    again = veneer.attach(tiny("llama"))
    again.load(tmp_path / "saved", name="a")
    found = {(site, key): value for site, key, value in again["a"].named_tensors()}
    assert (
        all(torch.equal(found.pop((site, key)), value) for site, key, value in bank["a"].named_tensors()) and not found
    )


def test_the_model_itself_can_be_given_to_trainer_with_an_optimizer(tmp_path: Path) -> None:
    """With ``optimizers=`` over the adapter's parameters Trainer, which clears gradients by the model, has the losses of the module."""
    bank = veneer.attach(tiny("llama"))
    bank.add("a", METHODS["lora"], seed=1)
    optimizer = torch.optim.SGD(bank.parameters("a"), lr=0.2)
    with bank.use("a"):
        trainer = run(bank.model, tmp_path, optimizer=optimizer, lr_scheduler_type="constant", max_grad_norm=0.0)
    found = veneer.attach(tiny("llama"))
    found.add("a", METHODS["lora"], seed=1)
    again = run(
        found.module("a"), tmp_path, optim="sgd", learning_rate=0.2, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    assert course(trainer) == pytest.approx(course(again), abs=1e-5)
    assert course(trainer)[-1] < 0.8 * course(trainer)[0]


@pytest.mark.parametrize("to_none", [True, False])
def test_the_models_zero_grad_clears_adapters_too(to_none: bool) -> None:
    """Gradients of every adapter go with the model's; after detach the model's own zero_grad is back, and another's stays."""
    model: Any = tiny("llama")
    before = portrait(model)
    bank = veneer.attach(model)
    for name in "ab":
        nudge(bank.add(name, LoRA(r=2)))
        with bank.use(name):
            model(**inputs_of(model)).logits.sum().backward()
    model.zero_grad(set_to_none=to_none)
    grads = [parameter.grad for name in "ab" for parameter in bank.parameters(name)]
    assert all(grad is None for grad in grads) if to_none else all(not grad.any() for grad in grads if grad is not None)
    copied = copy.deepcopy(model)
    assert copied.zero_grad.model is copied
    bank.detach()
    assert portrait(model) == before


def test_it_looks_like_the_model_and_holds_the_adapter() -> None:
    """Name, signature and config are the base's; parameters, state and counts are the adapter's, the very tensors of the bank."""
    bank = veneer.attach(tiny("llama"))
    nudge(bank.add("a", DoRA(r=2)))
    module = bank.module("a")
    assert type(module).__name__ == "LlamaForCausalLM" and module.config is bank.model.config
    assert "labels" in inspect.signature(type(module).forward).parameters
    assert {id(p) for p in module.parameters()} == {id(p) for p in bank.parameters("a")}
    assert "adapter.model.layers.0.self_attn.q_proj.lora_A" in module.state_dict()
    batch = inputs_of(bank.model)
    with bank.use("a"):
        expected = bank.model(**batch).logits
        answer = bank.model.generate(**batch, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert torch.equal(module(**batch).logits, expected)
    assert torch.equal(module.generate(**batch, max_new_tokens=3, do_sample=False), answer)  # type: ignore[operator]
    module.train()
    assert bank.model.training and module.eval() is module and not bank.model.training
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(**batch).logits, expected) and other.bank is not bank
    module.to(torch.float64)
    assert next(bank.model.parameters()).dtype == bank.parameters("a")[0].dtype == torch.float64
    with pytest.raises(AttributeError, match="resize_token_embeddings"):
        _ = module.resize_token_embeddings


def test_it_works_on_any_module_and_ends_with_its_adapter() -> None:
    """A lone layer has one too; once its adapter was replaced or removed it raises instead of running something else."""
    bank = veneer.attach(nn.Linear(3, 3))
    nudge(bank.add("a", LoRA(r=1)))
    module = bank.module("a")
    x = torch.randn(2, 3)
    with bank.use("a"):
        assert torch.equal(module(x), bank.model(x))
    bank.remove("a")
    with pytest.raises(AdapterError, match='no adapter "a"'):
        module(x)
    bank.add("a", LoRA(r=1))
    with pytest.raises(AdapterError, match=r"make it again with bank\.module"):
        module(x)
    with pytest.raises(AdapterError, match='no adapter "z"'):
        bank.module("z")
