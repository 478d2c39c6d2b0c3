"""An adapter as a module: what loops of other libraries (transformers' Trainer) do to the model that they are given."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.made import nudge, portrait, values
from tests.adapters.peers import inputs_of, peft_twin
from tests.adapters.test_peft_parity import text_to_learn
from tests.tiny import tiny, tiny_tokenizer
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


def test_the_model_itself_without_an_optimizer_is_refused(tmp_path: Path) -> None:
    """Trainer builds an optimizer of the frozen base: the first step is an error that names the module, and nothing has changed."""
    bank = veneer.attach(tiny("llama"))
    bank.add("a", METHODS["dora"], seed=1)
    before = values(bank.model)
    with (
        pytest.raises(AdapterError, match=r'inside bank\.use\("a"\) holds no parameter.*bank\.module\("a"\)'),
        bank.use("a"),
    ):
        run(bank.model, tmp_path)
    assert values(bank.model) == before


@pytest.mark.parametrize("arch", ["gpt2", "bert", "mixtral", "t5"])
def test_an_optimizer_of_the_frozen_base_is_refused(arch: str) -> None:
    """In a loop of one's own too, in a mix and beside the base; outside the context, or without an adapter to train, nothing is said."""
    model: Any = tiny(arch)
    frozen = torch.optim.SGD(model.parameters(), lr=0.1)
    bank = veneer.attach(model)
    for name in "ab":
        bank.add(name, LoRA(r=2))
    with (
        bank.use([None, {"a": 0.5, "b": 0.5}]),
        pytest.raises(AdapterError, match="holds no parameter that can be trained"),
    ):
        frozen.step()
    frozen.step()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    own = torch.optim.AdamW(bank.parameters("a"), lr=0.1)
    with bank.use("a"):
        other.step()
        own.step()
    bank["a"].requires_grad_(False)
    with bank.use("a"):
        frozen.step()


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=2),
        DoRA(r=2),
        LoRA(r=2, init_lora_weights="gaussian", target_modules=("embed_tokens", "q_proj"), use_rslora=True),
        LoRA(r=2, modules_to_save=("lm_head",), trainable_token_indices=(3, 4), bias="all"),
    ],
    ids=["lora", "dora", "embedding", "overrides"],
)
def test_an_adapter_that_nothing_has_moved_is_told(method: Any, tmp_path: Path) -> None:
    """Saving warns; after one tensor has moved, whichever, it does not."""
    bank = veneer.attach(tiny("llama"))
    adapter = bank.add("a", method, seed=3)
    with pytest.warns(UserWarning, match=r'adapter "a" is as bank\.add made it, .*bank\.parameters\("a"\)'):
        bank.save("a", tmp_path / "a")
    keys = dict.fromkeys(key for _, key, _ in adapter.named_tensors())
    for number, key in enumerate(keys):
        bank = veneer.attach(tiny("llama"))
        parameter = next(value for _, name, value in bank.add("a", method, seed=3).named_tensors() if name == key)
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bank.save("a", tmp_path / str(number))


def sft(model: Any, folder: Path, *, resume: str | None = None, **options: Any) -> Any:
    """Six steps of trl's SFTTrainer on conversations with the defaults of its own; returns it."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    pairs = [({"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"it is {i}"}) for i in range(12)]
    arguments = trl.SFTConfig(
        str(folder),
        **{"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no", **options},
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
    )
    rows = datasets.Dataset.from_list([{"messages": list(pair)} for pair in pairs])
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "kind"), [("llama", "lora"), ("gemma3", "dora")])
def test_sft_trainer_does_with_it_what_it_does_with_peft(arch: str, kind: str, tmp_path: Path) -> None:
    """trl computes the output layer itself, from the body of the model: under the adapter, with PEFT's losses; it resumes."""
    model: Any = tiny(arch)
    plain = copy.deepcopy(model)
    bank = veneer.attach(model)
    bank.add("a", METHODS[kind], seed=1)
    theirs = peft_twin(plain, bank["a"])
    before = values(model)
    ours = sft(bank.module("a"), tmp_path / "ours", save_strategy="steps", save_steps=3)
    other = sft(theirs, tmp_path / "theirs")
    assert course(ours) == pytest.approx(course(other), abs=1e-4) and course(ours)[-1] < 0.9 * course(ours)[0]
    assert values(model) == before
    again = veneer.attach(tiny(arch))
    again.add("a", METHODS[kind], seed=1)
    resumed = sft(again.module("a"), tmp_path / "ours", resume=str(tmp_path / "ours" / "checkpoint-3"))
    assert course(resumed)[-1] == pytest.approx(course(ours)[-1], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_cannot_train_the_output_layer(tmp_path: Path) -> None:
    """Its loss would not see an adapter there, which is an error; transformers' Trainer sees it."""
    bank = veneer.attach(tiny("llama", tie_word_embeddings=False))
    bank.add("a", LoRA(r=2, target_modules=("q_proj", "lm_head")))
    with pytest.raises(AdapterError, match=r'"a" acts on the output layer'):
        sft(bank.module("a"), tmp_path)
    assert course(run(bank.module("a"), tmp_path, max_steps=2))[1] > 0


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
