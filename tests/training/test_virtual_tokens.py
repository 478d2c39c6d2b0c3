"""Prefix and prompt tuning: outputs equal to PEFT's, mixed batches, training, and refusals where no sequence can be lengthened."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, World, apart, digest, examples, options

from veneer import train
from veneer.adapters import Adapter, Bank, LoRA, Method, PrefixTuning, PromptTuning
from veneer.adapters.runtime.route import Route
from veneer.adapters.sequence import lengthen, running
from veneer.checkpoints import attach
from veneer.checkpoints.peft.folders import read_adapter
from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import AdapterError, BaseModelError, CheckpointError, ConfigError, RouteError, TargetError
from veneer.evaluate.losses import example_losses
from veneer.models.flat import FlatRunner
from veneer.models.load import Base, load_base
from veneer.serve.generation import TextGenerator
from veneer.training.loop.step import Stepper

METHODS = {"prefix": PrefixTuning(num_virtual_tokens=3), "prompt": PromptTuning(num_virtual_tokens=4)}


def trained(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter with larger random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return adapter


def losses(bank: Bank, runner: FlatRunner, rows: list[Example], mixes: list[Any]) -> torch.Tensor:
    """The summed loss of each row, each under a route of its own, in one batch."""
    batch = make_batch(rows, "rows")
    parsed = [Route.parse(mix).mixes[0] for mix in mixes]
    batch, before = lengthen(bank, batch, parsed)
    owners = torch.arange(len(rows)).repeat_interleave(batch.offsets.diff())
    with torch.no_grad(), running(runner, before), bank.use(Route.tokens(mixes, owners), training=False):
        logits = runner.logits(batch)
    found_T = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none", ignore_index=-100)
    return torch.zeros(len(rows)).index_add_(0, owners, found_T * batch.weights)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize("name", METHODS)
def test_outputs_equal_those_of_peft(arch: str, name: str, tmp_path: Path) -> None:
    """A folder written here and loaded by PEFT, and the other way: the same loss of a row within 1e-5, grouped keys, windows, soft caps."""
    from peft import PeftModel

    model = tiny(arch)
    bank, runner = attach(model), FlatRunner(model)
    trained(bank.add("a", METHODS[name]))
    bank.save("a", tmp_path / "ours", task_type="CAUSAL_LM")
    (row,) = examples(1, longest=14, shortest=14)
    ours = float(losses(bank, runner, [row], ["a"])[0])
    base = float(losses(bank, runner, [row], [None])[0])
    bank.detach()
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    ids = torch.tensor([row.ids])
    logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row) :]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none") @ torch.tensor(
        row.weights[1:]
    )
    assert ours == pytest.approx(expected.item(), rel=1e-5) and abs(ours - base) > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    fresh = attach(tiny(arch))
    fresh.load(tmp_path / "theirs", name="b")
    assert float(losses(fresh, FlatRunner(fresh.model), [row], ["b"])[0]) == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_rows_of_all_kinds_share_a_batch(arch: str) -> None:
    """Prefix, prompt, LoRA, LoRA with a prefix, both and base rows in one batch: each as alone within 2e-6."""
    model = tiny(arch)
    bank, runner = attach(model), FlatRunner(model)
    for seed, (name, method) in enumerate({**METHODS, "lora": LoRA(r=2)}.items()):
        trained(bank.add(name, method), seed)
    mixes: list[Any] = [
        "prefix",
        "prompt",
        None,
        "lora",
        {"lora": 1.0, "prefix": 1.0},
        {"prefix": 1.0, "prompt": 1.0},
        "prompt",
    ]
    rows = examples(len(mixes))
    mixed = losses(bank, runner, rows, mixes)
    alone = [losses(bank, runner, [row], [mix])[0] for row, mix in zip(rows, mixes, strict=True)]
    assert torch.allclose(mixed, torch.stack(alone), rtol=2e-6, atol=0)
    base = losses(bank, runner, rows, [None] * len(rows))
    changed = (mixed - base).abs() > 1e-3
    assert changed.tolist() == [mix is not None for mix in mixes]


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_a_mixed_batch_are_those_alone(name: str) -> None:
    """A job trained beside others gets its own gradient; evaluation and training agree on the loss."""
    world = World()
    for seed, (other, method) in enumerate({**METHODS, "lora": LoRA(r=2)}.items()):
        trained(world.bank.add(other, method), seed)
    stepper = Stepper(world.runner, world.bank)
    rows = [(other, row) for other, row in zip([*METHODS, "lora"] * 3, examples(9), strict=True)]
    random.Random(0).shuffle(rows)

    def gradient(chosen: list[tuple[str, Example]]) -> tuple[list[torch.Tensor], float]:
        for parameter in [p for each in world.bank for p in world.bank[each].parameters()]:
            parameter.grad = None
        found = stepper.forward_backward(make_batch([row for _, row in chosen], [job for job, _ in chosen]))[name]
        return [parameter.grad.clone() for parameter in world.bank[name].parameters()], found.loss  # type: ignore[union-attr]

    own = [(job, row) for job, row in rows if job == name]
    (mixed, loss), (alone, same) = gradient(rows), gradient(own)
    assert apart(mixed, alone) < 1e-5 and loss == pytest.approx(same, rel=1e-6) and float(alone[0].abs().max()) > 0
    measured = example_losses(world.runner, [row for _, row in own], bank=world.bank, route=name)
    assert float(measured.sums.sum()) == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_and_resumes_with_the_same_bits(name: str, place: Path, base: Base, tmp_path: Path) -> None:
    """On top of a LoRA adapter, with activation checkpointing: stopped and resumed, the run ends as the one that was never stopped."""
    train(options(place, tmp_path / "lora", steps=4), base=base, console=QUIET)
    own = {"name": "a", "method": name, "num_virtual_tokens": 3, "valid": (place / "valid.jsonl",), "eval_every": 6}
    more = {
        "on_top_of": (tmp_path / "lora",),
        "activation_checkpointing": True,
        "learning_rate": 0.1,
        "lora_dropout": 0.0,
        "r": 16,
    }
    result = train(options(place, tmp_path / "whole", **own, **more), base=base, console=QUIET)
    (job,) = result.jobs.values()
    assert job.losses[-1][1] < job.losses[0][1]
    train(options(place, tmp_path / "part", **own, **more), base=base, console=QUIET)
    train(options(place, tmp_path / "part", **own, **more), base=base, console=QUIET, resume_from="step-00000010")
    assert digest(tmp_path / "whole") == digest(tmp_path / "part")


@pytest.mark.parametrize("name", METHODS)
def test_a_head_is_saved_with_the_virtual_tokens(name: str, tmp_path: Path) -> None:
    """The head that a task trains beside a prefix or a prompt is in the folder, here and for PEFT; one tensor less is refused."""
    from peft import PeftModel

    tiny("llama").save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", dtype="float32", task="classification")
    bank = attach(base.model)
    adapter = trained(bank.add("a", METHODS[name], outputs=3))
    bank.save("a", tmp_path / "a")
    again = bank.load(tmp_path / "a", name="again")
    tensors, others = ({(site, key): value for site, key, value in one.named_tensors()} for one in (adapter, again))
    assert len(tensors) == 2 and all(torch.equal(value, others[key]) for key, value in tensors.items())
    theirs = PeftModel.from_pretrained(tiny_classifier(tmp_path / "base", 3), tmp_path / "a")
    head = theirs.base_model.score.modules_to_save["default"].weight  # type: ignore[union-attr, operator]
    assert torch.equal(head, again.overrides["score"]["weight"])
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    del stored["base_model.score.weight"]
    save_file(stored, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"modules_to_save declares .*score.* which the file has no tensors for"):
        bank.load(tmp_path / "a", name="broken")


def tiny_classifier(folder: Path, labels: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


def test_other_calls_of_the_model_are_refused() -> None:
    """A call whose batch was not lengthened would run without the adapter; nothing can be merged, weighted or joined."""
    model = tiny("llama")
    bank, runner = attach(model), FlatRunner(model)
    for name in ("a", "b"):
        trained(bank.add(name, PromptTuning(num_virtual_tokens=2)))
    with bank.use("a"), pytest.raises(RouteError, match="prompt tuning lengthens the sequence"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(AdapterError, match="it changes the sequence and no weight"):
        bank.merged_state_dict("a")
    with pytest.raises(AdapterError, match="which lengthens the sequence, and generation cannot do that"):
        TextGenerator(model, tiny_tokenizer(), bank).write("hello", "a")
    for mix in ({"a": 0.5}, {"a": 1.0, "b": 1.0}):
        with pytest.raises(RouteError, match="cannot be weighted or joined"):
            losses(bank, runner, examples(1), [mix])


@pytest.mark.parametrize(
    ("arch", "method", "message"),
    [
        ("mamba", PrefixTuning(), "whose layers all have keys and values of one size"),
        ("deepseek_v3", PrefixTuning(), "whose layers all have keys and values of one size"),
        ("llama", PromptTuning(target_modules=("q_proj",)), "prompt tuning adapts no layer"),
    ],
)
def test_bases_and_options_that_do_not_fit(arch: str, method: Method, message: str) -> None:
    """One sentence, before anything is trained."""
    with pytest.raises(TargetError, match=message):
        attach(tiny(arch)).add("a", method)


def test_a_base_on_padded_rows_is_refused() -> None:
    """BLOOM runs on padded rows, which virtual tokens have no form for."""
    model = tiny("bloom")
    bank, runner = attach(model), FlatRunner(model)
    bank.add("a", PromptTuning(num_virtual_tokens=2))
    with pytest.raises(BaseModelError, match="cannot take virtual tokens"):
        losses(bank, runner, examples(1), ["a"])


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"num_virtual_tokens": 5}, None, "num_virtual_tokens: the settings say 5"),
        ({"num_layers": 7}, None, "the settings say 2 x 7 layers"),
        ({"token_dim": 4, "num_layers": 8}, None, "the base has 2 layers of 16"),
        ({}, float("nan"), "not finite"),
    ],
)
def test_bad_folders_are_refused(settings: dict[str, Any], change: float | None, message: str, tmp_path: Path) -> None:
    """A prefix of another size or base, and numbers that are not finite; without a base the folder is read as it is."""
    import json

    bank = attach(tiny("llama"))
    trained(bank.add("a", METHODS["prefix"]))
    bank.save("a", tmp_path / "a")
    read = read_adapter(tmp_path / "a")
    assert [tuple(p.shape) for p in read.parameters()] == [(3, 4, 16)] and read.method.name == "prefix"
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    if change is not None:
        weights = tmp_path / "a" / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors["prompt_embeddings"][0, 0] = change
        save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=message):
        bank.load(tmp_path / "a", name="b")


def test_the_number_of_virtual_tokens_is_bounded() -> None:
    """At least one."""
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        PrefixTuning(num_virtual_tokens=0)
