"""Twenty-odd shapes of adapter folders as people publish them, rebuilt by PEFT: both ways to 1e-5, or a refusal that names the reason."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import TARGETS, load_peft, outputs, peft_model, save_peft, stir
from tests.tiny import tiny

import veneer
from veneer.errors import CheckpointError

LIMIT = 1e-5
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
QV = {"target_modules": ["q_proj", "v_proj"]}
Shape = tuple[str, dict[str, Any], dict[str, Any]]

SHAPES: dict[str, Shape] = {
    # name: (architecture, its options, PEFT's settings)
    "instruction tuning, all linear": (
        "llama",
        UNTIED,
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.05},
    ),
    "regex target": ("llama", UNTIED, {"target_modules": r".*\.(q_proj|v_proj|down_proj)"}),
    "regex over some layers": ("llama", UNTIED, {"target_modules": r"model\.layers\.1\.mlp\..*_proj"}),
    "rank and alpha patterns": (
        "llama",
        UNTIED,
        {**QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    ),
    "regex rank pattern": ("llama", UNTIED, {**QV, "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2}}),
    "layers to transform": ("llama", UNTIED, {**QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "one layer to transform": ("gpt2", {}, {"target_modules": ["c_attn"], "layers_to_transform": 0}),
    "excluded modules": ("llama", UNTIED, {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]}),
    "rsLoRA of high rank": ("llama", UNTIED, {**QV, "r": 48, "use_rslora": True, "lora_alpha": 16}),
    "DoRA with biases": ("opt", {}, {"target_modules": ["q_proj", "fc1", "fc2"], "use_dora": True}),
    "trained head": ("llama", UNTIED, {**QV, "modules_to_save": ["lm_head"]}),
    "trained embeddings and head": ("llama", UNTIED, {**QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "trained embedding, tied": ("llama", TIED, {**QV, "modules_to_save": ["embed_tokens"]}),
    "trained embedding that stays tied": (
        "llama",
        TIED,
        {**QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "trained norms": ("llama", UNTIED, {**QV, "modules_to_save": ["embed_tokens", "input_layernorm", "norm"]}),
    "adapted tied embedding": ("llama", TIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "adapted embedding that stays tied": (
        "llama",
        TIED,
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "adapted head": ("llama", UNTIED, {"target_modules": ["lm_head", "q_proj"]}),
    "trainable tokens": ("llama", UNTIED, {**QV, "trainable_token_indices": [3, 9, 7]}),
    "trainable tokens, tied": ("llama", TIED, {**QV, "trainable_token_indices": [6, 17]}),
    "trainable tokens by layer": (
        "llama",
        UNTIED,
        {**QV, "trainable_token_indices": {"embed_tokens": [8], "lm_head": [9, 10]}},
    ),
    "trainable tokens, scaled embedding": ("gemma3", UNTIED, {**QV, "trainable_token_indices": [6, 8]}),
    "trainable tokens of GPT-2": ("gpt2", {}, {"target_modules": ["c_attn"], "trainable_token_indices": [5, 6]}),
    "sequence classification": ("llama_classifier", UNTIED, {**QV, "task_type": "SEQ_CLS"}),
    "sequence classification of BERT": (
        "bert_classifier",
        {},
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "classification with a pooler": (
        "bert_classifier",
        {},
        {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]},
    ),
    "image classification": (
        "vit",
        {},
        {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
    ),
    "biases of adapted layers": ("opt", {}, {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "all biases": ("opt", {}, {"target_modules": ["q_proj"], "bias": "all"}),
    "all biases of BERT": ("bert", {}, {"target_modules": ["query"], "bias": "all"}),
    "all biases of GPT-2": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "all"}),
    "a bias of B": ("llama", UNTIED, {**QV, "lora_bias": True}),
    "convolution with DoRA": ("vit", {}, {"target_modules": ["projection"], "use_dora": True}),
    "a parameter as target": ("llama", UNTIED, {**QV, "target_parameters": ["lm_head.weight"]}),
    "orthogonal start": ("llama", UNTIED, {**QV, "init_lora_weights": "orthogonal"}),
    "mixture of experts, attention only": ("mixtral", UNTIED, {"target_modules": ["q_proj", "k_proj"]}),
    "T5's attention": ("t5", {}, {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
}


def t5_outputs(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 19).reshape(2, 7)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
    return logits


@pytest.mark.parametrize("name", SHAPES)
def test_it_crosses_both_ways(name: str, tmp_path: Path) -> None:
    """PEFT's folder in ours, ours in PEFT: the same logits to 1e-5; the base and the neighbours in a batch are untouched."""
    arch, options, settings = SHAPES[name]
    run: Callable[[Any], torch.Tensor] = t5_outputs if arch == "t5" else outputs
    theirs = peft_model(tiny(arch, **options), **settings)
    expected = run(theirs)
    save_peft(theirs, tmp_path / "theirs")
    base = tiny(arch, **options)
    plain = run(base)
    bank = veneer.attach(base)
    bank.load(tmp_path / "theirs", name="a")
    with bank.use("a"):
        ours = run(base)
    with bank.use(["a", None]):
        mixed = run(base)
    assert (expected - plain).abs().max() > 1e-3
    assert (ours - expected).abs().max() <= LIMIT
    assert (mixed[0] - ours[0]).abs().max() <= LIMIT and (mixed[1] - plain[1]).abs().max() <= LIMIT
    assert torch.equal(run(base), plain)
    bank.save("a", tmp_path / "ours")
    assert (run(load_peft(tiny(arch, **options), tmp_path / "ours")) - expected).abs().max() <= LIMIT
    other = veneer.attach(tiny(arch, **options))
    assert other.load(tmp_path / "ours", name="b").meta["notes"] == []
    with other.use("b"):
        assert torch.equal(run(other.model), ours)


def grown(arch: str = "llama", size: int = 330, **options: Any) -> Any:
    """A tiny base whose vocabulary was resized, the new rows the same each time."""
    model = tiny(arch, **{**UNTIED, **options})
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(size)
    return model.eval()


def test_a_resized_vocabulary_says_how_to_resize_the_base(tmp_path: Path) -> None:
    """New tokens, embeddings and head trained whole: refused on the small base with the remedy, equal to 1e-5 on the resized one."""
    theirs = peft_model(grown(), **QV, modules_to_save=["embed_tokens", "lm_head"])
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "a")
    bank = veneer.attach(tiny("llama", **UNTIED))
    with pytest.raises(
        CheckpointError,
        match=r"330 rows, the base's has 320.*resize the base first: model\.resize_token_embeddings\(330\)",
    ):
        bank.load(tmp_path / "a")
    bank = veneer.attach(grown())
    bank.load(tmp_path / "a")
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= LIMIT
    bank.save("a", tmp_path / "b")
    assert (outputs(load_peft(grown(), tmp_path / "b")) - expected).abs().max() <= LIMIT


def test_new_tokens_rows_say_how_to_resize_the_base(tmp_path: Path) -> None:
    """Rows of tokens that the base does not have."""
    theirs = peft_model(grown(), **QV, trainable_token_indices=[325, 6])
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a row for token 325, the base has 320"):
        veneer.attach(tiny("llama", **UNTIED)).load(tmp_path / "a")
    bank = veneer.attach(grown())
    bank.load(tmp_path / "a")
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= LIMIT


def test_undeclared_embeddings_are_refused_and_can_be_taken(tmp_path: Path) -> None:
    """PEFT writes embeddings of a resized base undeclared, and overwrites the base by them; here they are the adapter's own, if forced."""
    theirs = peft_model(grown(), **QV)
    stir(theirs, "embed_tokens", "lm_head")
    expected = outputs(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    base = grown()
    plain = outputs(base)
    bank = veneer.attach(base)
    with pytest.raises(
        CheckpointError, match=r"(?s)differs from the base's own weight.*force=.embeddings., or --force embeddings"
    ):
        bank.load(tmp_path / "a")
    adapter = bank.load(tmp_path / "a", force="embeddings")
    assert set(adapter.overrides) == {"model.embed_tokens", "lm_head"}
    with bank.use("a"):
        assert (outputs(base) - expected).abs().max() <= LIMIT
    assert torch.equal(outputs(base), plain)
    bank.save("a", tmp_path / "b")
    assert (outputs(load_peft(grown(), tmp_path / "b")) - expected).abs().max() <= LIMIT


def test_a_forced_embedding_beside_factors_keeps_both(tmp_path: Path) -> None:
    """An adapted embedding whose base was retrained: factors and weight are both the adapter's."""
    theirs = peft_model(tiny("llama", **UNTIED), target_modules=["embed_tokens", "q_proj"])
    stir(theirs, "embed_tokens.base_layer")
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "a")
    bank = veneer.attach(tiny("llama", **UNTIED))
    bank.load(tmp_path / "a", force="embeddings")
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= LIMIT
    bank.save("a", tmp_path / "b")
    assert (outputs(load_peft(tiny("llama", **UNTIED), tmp_path / "b")) - expected).abs().max() <= LIMIT
    merged = tiny("llama", **UNTIED)
    merged.load_state_dict(bank.merged_state_dict("a"))
    assert (outputs(merged) - expected).abs().max() <= LIMIT


REFUSALS: dict[str, tuple[Shape, str]] = {
    "activated LoRA": (
        ("llama", UNTIED, {**QV, "alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}),
        "alora_invocation_tokens: not supported",
    ),
    "layer replication": (
        ("llama", UNTIED, {**QV, "layer_replication": [[0, 2], [1, 2]]}),
        "layer_replication: not supported",
    ),
    "parameters that are not experts": (
        ("mixtral", UNTIED, {"target_parameters": ["embed_tokens.weight"], "target_modules": []}),
        "embed_tokens",
    ),
    "regex in alpha_pattern": (
        ("llama", UNTIED, {**QV, "alpha_pattern": {"(q|v)_proj": 5}}),
        "needs a regular expression",
    ),
    "another method": (("llama", UNTIED, {}), 'expected "LORA"'),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_had_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """The message names the setting or the layer and the reason."""
    (arch, options, settings), says = REFUSALS[name]
    if name == "another method":
        from peft import LoHaConfig, get_peft_model

        model = get_peft_model(tiny(arch, **options), LoHaConfig(target_modules=["k_proj"]))
    else:
        model = peft_model(tiny(arch, **options), **settings)
    save_peft(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=says):
        veneer.attach(tiny(arch, **options)).load(tmp_path / "a")


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "changed", "says"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            {"modules_to_save": None},
            "lm_head.weight differs from the base's own weight",
        ),
        ({"modules_to_save": ["norm"]}, {"modules_to_save": None}, "norm.weight is not part of"),
        (
            {},
            {"modules_to_save": ["lm_head"]},
            "modules_to_save declares lm_head.weight, which the file has no tensors for",
        ),
        (
            {"trainable_token_indices": [4, 5]},
            {"trainable_token_indices": None},
            "trainable_tokens_delta is not part of",
        ),
        (
            {"trainable_token_indices": [4, 5]},
            {"trainable_token_indices": [4]},
            "has 2 rows, trainable_token_indices names 1 tokens",
        ),
        ({"trainable_token_indices": [4, 5]}, {"trainable_token_indices": [4, 4]}, "expected distinct tokens"),
        ({"trainable_token_indices": [4, 5]}, {"trainable_token_indices": [4, 320]}, "a row for token 320"),
        (
            {"trainable_token_indices": [4, 5]},
            {"trainable_token_indices": [-1, 5]},
            "expected distinct tokens|greater than or equal to 0",
        ),
        (
            {"trainable_token_indices": [4, 5]},
            {"trainable_token_indices": {"lm_head": [4, 5]}},
            "does not name model.embed_tokens",
        ),
        ({"lora_bias": True}, {"lora_bias": False}, "lora_B.bias is not part of"),
    ],
)
def test_settings_and_tensors_must_agree_on_what_is_its_own(
    settings: Any, changed: Any, says: str, tmp_path: Path
) -> None:
    """Whole layers, rows and biases land only where the settings declare them, and all that is declared must be there."""
    save_peft(peft_model(tiny("llama", **UNTIED), **QV, **settings), tmp_path / "a")
    change(tmp_path / "a", **changed)
    with pytest.raises(CheckpointError, match=says):
        veneer.attach(tiny("llama", **UNTIED)).load(tmp_path / "a")


def test_a_head_has_its_own_number_of_labels(tmp_path: Path) -> None:
    """A classifier's head with another number of labels than the base's computes as in PEFT; one of another width is refused."""
    theirs = peft_model(tiny("bert_classifier", num_labels=5), target_modules=["query"], task_type="SEQ_CLS")
    save_peft(theirs, tmp_path / "a")
    model = tiny("bert_classifier")
    model.bert.load_state_dict(tiny("bert_classifier", num_labels=5).bert.state_dict())
    bank = veneer.attach(model)
    bank.load(tmp_path / "a")
    with bank.use("a"):
        expected = outputs(load_peft(tiny("bert_classifier", num_labels=5), tmp_path / "a"))
        assert (outputs(model) - expected).abs().max() <= 1e-5
    with pytest.raises(CheckpointError, match="the head was trained on a base with 32 features, this one has 48"):
        veneer.attach(tiny("bert_classifier", hidden_size=48)).load(tmp_path / "a")


def test_own_values_train_save_and_load(tmp_path: Path) -> None:
    """What `bank.add` makes of the options is what PEFT reads."""
    from veneer import LoRA

    for number, options in enumerate(
        (
            {"modules_to_save": ("lm_head", "norm")},
            {"trainable_token_indices": (5, 9)},
            {"bias": "all"},
            {"bias": "lora_only"},
            {"lora_bias": True},
            {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
        )
    ):
        arch = "opt" if "bias" in options else "llama"
        bank = veneer.attach(tiny(arch, **TIED))
        adapter = bank.add("a", LoRA(r=2, target_modules=("q_proj",), **options))
        stir(torch.nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
        with bank.use("a"):
            expected = outputs(bank.model)
        bank.save("a", tmp_path / str(number))
        assert (outputs(load_peft(tiny(arch, **TIED), tmp_path / str(number))) - expected).abs().max() <= LIMIT
        other = veneer.attach(tiny(arch, **TIED))
        again = other.load(tmp_path / str(number), name="a")
        assert {place: set(own) for place, own in again.overrides.items()} == {
            place: set(own) for place, own in adapter.overrides.items()
        }
        assert again.num_parameters() == adapter.num_parameters()
        with other.use("a"):
            assert torch.equal(outputs(other.model), expected)


def test_what_is_its_own_is_not_composed(tmp_path: Path) -> None:
    """Adding up changes would lose a head of the adapter's own: refused, and told."""
    from veneer.compose.combine import combine
    from veneer.deltas.parents import Parent
    from veneer.errors import ComposeError

    save_peft(peft_model(tiny("llama", **UNTIED), **QV, modules_to_save=["lm_head"]), tmp_path / "a")
    adapter = veneer.attach(tiny("llama", **UNTIED)).load(tmp_path / "a")
    with pytest.raises(
        ComposeError, match=r'the adapter "a" overrides parameters of the base at lm_head, which cannot be composed'
    ):
        combine("sum", [Parent(adapter)])


LEGACY: dict[str, Callable[[str], str]] = {
    "the adapter's name inside": lambda key: key.replace(".lora_A.weight", ".lora_A.default.weight").replace(
        ".lora_B.weight", ".lora_B.default.weight"
    ),
    "magnitude as a layer": lambda key: key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "magnitude with the name": lambda key: key.replace(
        ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"
    ),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize(("name", "arch"), [*zip(LEGACY, ("llama", "gpt2", "qwen3", "gemma3"), strict=True)])
def test_older_names_load(name: str, arch: str, tmp_path: Path) -> None:
    """Names that earlier versions and other programs wrote mean the same; a missing prefix is told."""
    from safetensors.torch import load_file, save_file

    theirs = peft_model(tiny(arch), target_modules=TARGETS[arch], use_dora=True)
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({LEGACY[name](key): value for key, value in load_file(path).items()}, path)
    bank = veneer.attach(tiny(arch))
    notes = bank.load(tmp_path / "a").meta["notes"]
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= LIMIT
    assert any("lack the prefix" in note for note in notes) == (name == "no prefix")


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        (
            "qwen3",
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\..*)",
        ),
        ("gpt2", r"^transformer\.h\.\d+\.(attn|mlp)\.c_proj$"),
        ("gemma3", "all-linear"),
        ("phi3", ["model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"]),
    ],
    ids=["alternatives", "anchors", "keyword", "full names"],
)
def test_targets_that_other_programs_write(arch: str, targets: Any, tmp_path: Path) -> None:
    """The tensors say which layers there are, whatever the settings call them; an edited expression is not evaluated."""
    theirs = peft_model(tiny(arch), target_modules=TARGETS[arch])
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(file.read_text())
    if isinstance(targets, list):
        settings |= {"target_modules": targets + [name.replace("self_attn.qkv", "mlp.gate_up") for name in targets]}
    else:
        settings |= {"target_modules": targets}
    file.write_text(json.dumps(settings))
    bank = veneer.attach(tiny(arch))
    bank.load(tmp_path / "a")
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensors_of_half_precision_load_as_masters(dtype: torch.dtype, tmp_path: Path) -> None:
    """fp16 and bf16 folders are read into fp32 masters, exactly."""
    from safetensors.torch import load_file, save_file

    save_peft(peft_model(tiny("llama"), **QV), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    halves = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(halves, path)
    adapter = veneer.attach(tiny("llama")).load(tmp_path / "a")
    for site, own in adapter.tensors.items():
        for key, value in own.items():
            assert value.dtype == torch.float32
            assert torch.equal(value.detach(), halves[f"base_model.model.{site}.{key}.weight"].float())
