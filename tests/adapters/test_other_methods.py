"""Methods with tensors of their own that are not of low rank: IA3, bottleneck adapters and VeRA."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.adapters.made import CASES, bits, merged_model, nudge, portrait, values
from tests.checkpoints.helpers import load_peft, outputs
from tests.tiny import tiny
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

import veneer
from veneer.adapters import IA3, BitFit, Houlsby, LoRA, Method, Pfeiffer, VeRA, attach
from veneer.checkpoints import read_adapter
from veneer.checkpoints.inspect import view
from veneer.errors import AdapterError, CheckpointError, TargetError

LAYERS = [name for name in CASES if name.startswith(("linear", "conv1d"))]
METHODS: dict[str, Method] = {
    "ia3": IA3(target_modules="layer"),
    "ia3 of inputs": IA3(target_modules="layer", feedforward_modules="layer"),
    "houlsby": Houlsby(target_modules="layer", bottleneck_size=3),
    "pfeiffer": Pfeiffer(target_modules="layer", bottleneck_size=2, non_linearity="swish"),
    "vera": VeRA(target_modules="layer", vera_rank=4),
}


@pytest.mark.parametrize(("kind", "name"), list(itertools.product(METHODS, LAYERS)))
def test_every_layer_kind(kind: str, name: str) -> None:
    """A new adapter changes no bit, a moved one computes what the merged layer does or says why none does; nothing stays behind."""
    case, method = CASES[name], METHODS[kind]
    model, x = case.model(), case.input()
    before, expected = portrait(model), model(x)
    bank = attach(model)
    adapter = bank.add("a", method)
    held = values(model)
    with bank.use("a"):
        assert torch.equal(bits(model(x)), bits(expected))
        model(x).square().sum().backward()
    first = {*method.trained_first("linear")}
    reached = {key for _, key, p in adapter.named_tensors() if p.grad is not None and bool(p.grad.any())}
    assert reached == first
    nudge(adapter)
    with bank.use("a"), torch.no_grad():
        found = model(x)
    assert (found - expected).abs().max() > 1e-2
    if method.no_delta:
        with pytest.raises(AdapterError, match="cannot be merged: its change is a non-linear function"):
            bank.merged_state_dict("a")
    else:
        assert (merged_model(bank, "a")(x) - found).norm() <= 3e-6 * found.norm()
    assert torch.equal(model(x), expected) and values(model) == held
    bank.remove("a")
    assert portrait(model) == before


def test_rows_of_one_batch_are_as_each_alone() -> None:
    """Base, LoRA, BitFit, IA3, VeRA and bottleneck rows, and mixes, are within 2e-6 of each alone; a NaN stays in its row."""
    model = tiny("opt")
    bank = veneer.attach(model)
    methods: dict[str, Method] = {
        "lora": LoRA(r=2),
        "bitfit": BitFit(),
        "ia3": IA3(),
        "houlsby": Houlsby(bottleneck_size=4),
        "pfeiffer": Pfeiffer(bottleneck_size=4),
        "vera": VeRA(vera_rank=8),
    }
    for seed, (name, method) in enumerate(methods.items()):
        nudge(bank.add(name, method, seed=seed), by=0.05, seed=seed)
    routes: list[Any] = [*methods, None, {"ia3": 0.5, "lora": 0.25}, {"houlsby": 1.0, "vera": -0.5}]
    ids = torch.randint(1, 60, (len(routes), 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with bank.use(routes):
            together = model(input_ids=ids).logits
        for row, route in enumerate(routes):
            with bank.use(route):
                alone = model(input_ids=ids[row : row + 1]).logits[0]
            assert (together[row] - alone).abs().max() <= 2e-6, route
        for row, name in enumerate(("houlsby", "ia3")):
            kept = [p.detach().clone() for p in bank[name].parameters()]
            for p in bank[name].parameters():
                p.fill_(torch.nan)
            with bank.use(routes):
                again = model(input_ids=ids).logits
            reached = [
                n for n, route in enumerate(routes) if name in ({route} if isinstance(route, str) else route or {})
            ]
            clean = [n for n in range(len(routes)) if n not in reached]
            assert len(reached) == 2 and torch.equal(again[clean], together[clean]), row
            assert all(bool(again[n].isnan().any()) for n in reached)
            for p, value in zip(bank[name].parameters(), kept, strict=True):
                p.copy_(value)


COUNTS = {
    (1024, 24): (835_968, 6_343_680, 811_392, 3_171_840),
    (768, 12): (313_536, 2_379_264, 304_320, 1_189_632),
    (768, 6): (156_768, 1_189_632, 152_160, 594_816),
    (512, 4): (69_696, 528_896, 67_648, 264_448),
    (256, 4): (34_880, 264_704, 33_856, 132_352),
    (128, 2): (8_736, 66_304, 8_480, 33_152),
}
BITFIT = {
    (1024, 24): 271_360,
    (768, 12): 102_144,
    (768, 6): 51_456,
    (512, 4): 23_040,
    (256, 4): 11_520,
    (128, 2): 2_944,
}


@pytest.mark.parametrize(("width", "layers"), COUNTS)
def test_counts_of_six_encoders(width: int, layers: int) -> None:
    """Houlsby with 8 and 64, Pfeiffer with 16 and 64, BitFit: the LoRA paper's formulas, without the classification head."""
    config = RobertaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=4 * width
    )
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    bank = attach(model)
    methods = [
        *(Houlsby(bottleneck_size=n) for n in (8, 64)),
        *(Pfeiffer(bottleneck_size=n) for n in (16, 64)),
        BitFit(),
    ]
    found = [bank.add(f"a{n}", method).num_parameters() for n, method in enumerate(methods)]
    assert tuple(found) == (*COUNTS[width, layers], BITFIT[width, layers])


@pytest.mark.parametrize("method", [IA3(), VeRA(vera_rank=6, projection_prng_key=5)], ids=["ia3", "vera"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_peft_reads_the_folder(method: Method, arch: str, tmp_path: Path) -> None:
    """The output of PEFT with the written folder is ours to 1e-5; the folder reads back to the bit, with the method's options."""
    bank = veneer.attach(tiny(arch))
    nudge(bank.add("a", method))
    with bank.use("a"):
        expected = outputs(bank.model)
    bank.save("a", tmp_path / "a")
    again = bank.load(tmp_path / "a", name="b")
    assert again.method == bank["a"].method and again.meta["notes"] == []
    with bank.use("b"):
        assert torch.equal(outputs(bank.model), expected)
    assert (outputs(load_peft(tiny(arch), tmp_path / "a")) - expected).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["ia3", "vera", "vera without projections"])
def test_a_folder_of_peft_is_read(kind: str, arch: str, tmp_path: Path) -> None:
    """What PEFT made and saved computes the same here to 1e-5."""
    targets = {"llama": ["k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}[arch]
    conv1d = arch == "gpt2"
    if kind == "ia3":
        config: Any = peft.IA3Config(target_modules=targets, feedforward_modules=targets[1:], fan_in_fan_out=conv1d)
    else:
        saved = kind == "vera"
        config = peft.VeraConfig(
            r=5, target_modules=targets, projection_prng_key=7, save_projection=saved, fan_in_fan_out=conv1d
        )
    theirs: Any = peft.get_peft_model(tiny(arch), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    expected = outputs(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    bank = veneer.attach(tiny(arch))
    if kind.endswith("projections"):
        with pytest.raises(CheckpointError, match="neither the projections of VeRA nor their size"):
            read_adapter(tmp_path / "theirs")
    bank.load(tmp_path / "theirs", name="a")
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= 1e-5


def test_a_bottleneck_is_what_its_paper_says() -> None:
    """Hooks that apply U f(D h + d) + u + h to the output layers of attention and feed-forward give the same logits."""
    model = tiny("bert")
    bank = veneer.attach(model)
    adapter = nudge(bank.add("a", Houlsby(bottleneck_size=5, non_linearity="gelu")))
    with bank.use("a"):
        expected = outputs(model)
    assert {site.rpartition("layer.")[2][2:] for site in adapter.tensors} == {"attention.output.dense", "output.dense"}
    plain = tiny("bert")
    for site, held in adapter.tensors.items():
        down, d, up, u = (held[key].detach() for key in held)

        def after(_: Any, __: Any, h: Tensor, w: tuple[Tensor, ...] = (down, d, up, u)) -> Tensor:
            return h + torch.nn.functional.gelu(h @ w[0].T + w[1]) @ w[2].T + w[3]

        plain.get_submodule(site).register_forward_hook(after)
    assert (outputs(plain) - expected).abs().max() <= 2e-6


@pytest.mark.parametrize(
    "method",
    [
        Houlsby(bottleneck_size=3),
        Houlsby(bottleneck_size=3, modules_to_save=("input_layernorm",)),  # with its norms, as the paper trains it
        Pfeiffer(bottleneck_size=2, layers_to_transform=(1,)),
    ],
)
def test_a_bottleneck_is_saved_and_inspected(method: Method, tmp_path: Path) -> None:
    """A folder reads back to the bit, with and without the base; a tensor of another width is refused."""
    bank = veneer.attach(tiny("llama"))
    nudge(bank.add("a", method))
    with bank.use("a"):
        expected = outputs(bank.model)
    bank.save("a", tmp_path / "a")
    again = bank.load(tmp_path / "a", name="b")
    assert again.method == method and again.meta["notes"] == []
    with bank.use("b"):
        assert torch.equal(outputs(bank.model), expected)
    assert len(again.overrides) == (2 if method.modules_to_save else 0)
    found = view(again, bank)
    assert found.method == method.label and len(found.sites) == len(again.tensors) and found.sites[0].norm > 0
    assert read_adapter(tmp_path / "a").method.name == method.name
    other = veneer.attach(tiny("llama", hidden_size=48))
    with pytest.raises(CheckpointError, match="adapter_down"):
        other.load(tmp_path / "a")


def test_damaged_projections_are_refused(tmp_path: Path) -> None:
    """Projections that are not those of the key would give another function: the file is refused."""
    bank = veneer.attach(tiny("llama"))
    nudge(bank.add("a", VeRA(vera_rank=4)))
    bank.save("a", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"projection_prng_key": 0', '"projection_prng_key": 1'))
    with pytest.raises(CheckpointError, match="is not the projection that projection_prng_key"):
        bank.load(tmp_path / "a", name="b")


def test_bad_requests_are_one_sentence() -> None:
    """A model without such layers, stacked experts, and composition say what is missing."""
    bank = veneer.attach(tiny("mixtral"))
    with pytest.raises(TargetError, match="Pfeiffer finds no layer for the feed forward output of this model's blocks"):
        bank.add("a", Pfeiffer())
    bank = veneer.attach(tiny("llama"))
    nudge(bank.add("a", IA3()))
    from veneer.deltas.delta import site_delta

    with pytest.raises(AdapterError, match="it scales whole rows or columns of the weights, which has full rank"):
        site_delta(bank["a"], next(iter(bank["a"].tensors)))
