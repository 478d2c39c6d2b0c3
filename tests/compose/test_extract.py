"""Adapters from two sets of full weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compose.made import saved, trained
from tests.devices import PretendDevice
from tests.tiny import CHATML, tiny_tokenizer
from torch import Tensor, nn

from veneer.adapters import Adapter, DoRA, LoRA, attach
from veneer.checkpoints import attach as attach_with_folders
from veneer.checkpoints import read_adapter
from veneer.checkpoints.base_files import skeleton
from veneer.cli.main import main
from veneer.compose.extract import Extraction, extract
from veneer.errors import ComposeError, TargetError
from veneer.merge.folder import merge_to_folder


def dense(adapter: Adapter, site: str, model: nn.Module) -> Tensor:
    bank = attach(model)
    try:
        return adapter.delta_2d(site, bank.sites[site].weight_2d.double()).double()
    finally:
        bank.detach()


def tuned_fully(folder: Path, model: nn.Module, spread: float = 0.02) -> Path:
    """A copy whose every parameter moved, with a falling spectrum."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                u, s, vt = torch.linalg.svd(noise, full_matrices=False)
                noise = u @ torch.diag(s * 0.8 ** torch.arange(len(s))) @ vt
                noise = noise + 0.3 * parameter * torch.rand(parameter.shape[0], 1, generator=generator)
            parameter.add_(noise * spread)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def found(base: Path, tuned: Path, **options: object) -> Extraction:
    return extract(skeleton(base), skeleton(tuned), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_known_change_comes_back(tmp_path: Path, arch: str) -> None:
    """A merged rank-8 adapter is extracted to rounding level, at its rank, by rank and by energy alike."""
    model = saved(tmp_path / "base", arch)
    adapter = trained(model, LoRA(r=8))
    merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "tuned")
    for wish in ({"rank": 8}, {"energy": 1 - 1e-9}):
        made = found(tmp_path / "base", tmp_path / "tuned", **wish)
        assert {site.rank for site in made.sites} <= {7, 8} and made.outside == {}
        assert made.kept > 1 - 1e-8
        for site in adapter.tensors:
            wanted = dense(adapter, site, model)
            assert float((dense(made.adapter, site, model) - wanted).norm() / wanted.norm()) < 2e-5
    deeper = found(tmp_path / "base", tmp_path / "tuned", rank=32)
    assert all(site.singular_values[0] > 1e3 * site.singular_values[8] for site in deeper.sites)


def test_a_head_that_the_files_name_otherwise(tmp_path: Path) -> None:
    """GPT-NeoX's head, embed_out in the files, is extracted as the model's lm_head, with a record of the base's weight."""
    model = saved(tmp_path / "base", "gpt_neox")
    adapter = trained(model, LoRA(r=4, lora_alpha=8, target_modules=("lm_head", "dense")))
    merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "tuned")
    back = found(tmp_path / "base", tmp_path / "tuned", rank=4, target_modules=("lm_head", "dense"))
    assert set(back.adapter.tensors) == set(adapter.tensors) == set(back.base_entries["base"])
    wanted = dense(adapter, "lm_head", model)
    assert float((dense(back.adapter, "lm_head", model) - wanted).norm() / wanted.norm()) < 1e-5


def test_a_known_dora_change_comes_back(tmp_path: Path) -> None:
    """A merged DoRA adapter, whose change has full rank, is found at its own rank by fitting gain and factors in turn."""
    model = saved(tmp_path / "base", hidden_size=96, intermediate_size=128)
    adapter = trained(model, DoRA(r=4, target_modules=("o_proj", "up_proj", "down_proj")))
    merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "tuned")
    wish = {"rank": 4, "target_modules": ["o_proj", "up_proj", "down_proj"]}
    made = found(tmp_path / "base", tmp_path / "tuned", method="dora", **wish)
    assert made.kept > 1 - 1e-8
    for site in adapter.tensors:
        wanted = dense(adapter, site, model)
        assert float((dense(made.adapter, site, model) - wanted).norm() / wanted.norm()) < 1e-4
    assert found(tmp_path / "base", tmp_path / "tuned", **wish).kept < 0.99


def test_the_rank_optimum_and_its_figures(tmp_path: Path) -> None:
    """Every site takes the dense SVD's optimum; kept share, ratio and spectrum are those of the dense change."""
    model = saved(tmp_path / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = found(tmp_path / "base", tuned_fully(tmp_path / "tuned", model), rank=6)
    for site in made.sites:
        change = (model.get_submodule(site.site).weight - before[f"{site.site}.weight"]).detach().double()
        s = torch.linalg.svdvals(change)
        own = made.adapter.tensors[site.site]
        stored = own["lora_B"].detach().double() @ own["lora_A"].detach().double()
        assert float((change - stored).norm()) == pytest.approx(float(s[6:].norm()), rel=1e-6)
        assert site.kept == pytest.approx(float(s[:6].square().sum() / s.square().sum()), rel=1e-6)
        assert torch.allclose(torch.tensor(site.singular_values).double(), s[:6], rtol=1e-5)
        assert site.ratio == pytest.approx(float(s.norm() / before[f"{site.site}.weight"].norm()), rel=1e-5)
    assert {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"} <= set(made.outside)
    assert 0 < made.outside_share < 1


def test_dora_is_never_worse(tmp_path: Path) -> None:
    """At the same rank the DoRA form keeps at least as much at every site, and its figure is that of the stored adapter."""
    model = saved(tmp_path / "base")
    twin = saved(tmp_path / "twin")
    tuned = tuned_fully(tmp_path / "tuned", model)
    low, high = (found(tmp_path / "base", tuned, rank=4, method=method) for method in ("lora", "dora"))
    for one, other in zip(low.sites, high.sites, strict=True):
        assert other.kept >= one.kept - 1e-9
        change = (model.get_submodule(one.site).weight - twin.get_submodule(one.site).weight).detach().double()
        lost = (dense(high.adapter, one.site, twin) - change).norm() / change.norm()
        assert 1 - float(lost) ** 2 == pytest.approx(other.kept, abs=1e-5)
    assert high.kept > low.kept + 0.005


def test_more_rank_keeps_more(tmp_path: Path) -> None:
    """The kept share grows with rank to all of it, and a share of energy takes the least rank that reaches it."""
    model = saved(tmp_path / "base")
    tuned = tuned_fully(tmp_path / "tuned", model)
    shares = [found(tmp_path / "base", tuned, rank=rank).kept for rank in (1, 2, 4, 8, 16, 32)]
    assert shares == sorted(shares) and shares[-1] > 1 - 1e-12
    made = found(tmp_path / "base", tuned, energy=0.9)
    for site in made.sites:
        assert site.kept >= 0.9
        fewer = found(tmp_path / "base", tuned, rank=max(1, site.rank - 1), target_modules=site.site)
        assert site.rank == 1 or fewer.sites[0].kept < 0.9


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder loads strictly onto the base, its receipt knows that base, and the report says what is not covered."""
    model = saved(tmp_path / "base")
    tuned = tuned_fully(tmp_path / "tuned", model)
    words = ["extract", "--base", f"{tmp_path}/base", "--tuned", str(tuned), "--rank", "4"]
    assert main([*words, "--out", f"{tmp_path}/a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "LoRA adapter of rank 4 at 14 sites" in lines[0] and "not included" in lines[2]
    attach_with_folders(saved(tmp_path / "again")).load(tmp_path / "a", name="a")
    assert read_adapter(tmp_path / "a").meta["receipt"]["made_by"]["tuned"] == str(tuned)
    assert (
        main([*words, "--out", f"{tmp_path}/b", "--method", "dora", "--target-modules", "q_proj,v_proj", "--json"]) == 0
    )
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 4
    from veneer.errors import CheckpointError

    with pytest.raises(CheckpointError, match="not the base"):
        attach_with_folders(saved(tmp_path / "other", seed=4)).load(tmp_path / "a", name="a")


def test_an_extracted_adapter_converses_like_the_tuned_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter of an instruct model has its chat template and stops where it does; with other tokens it has neither."""
    base, tuned = tmp_path / "base", tuned_fully(tmp_path / "tuned", saved(tmp_path / "base"))
    plain = tiny_tokenizer()
    plain.chat_template, plain.eos_token = None, "<|endoftext|>"
    plain.save_pretrained(base)
    tiny_tokenizer().save_pretrained(tuned)
    command = ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", "2", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "the chat template is that of the tuned model" in capsys.readouterr().out
    adapter = read_adapter(tmp_path / "out")
    assert adapter.meta["template"] == CHATML and adapter.meta["receipt"]["stop_tokens"] == {"<|im_end|>": 2}
    assert main(["generate", str(tmp_path / "out"), "one", "--max-tokens", "2"]) == 0
    assert "using the chat template in the adapter folder" in capsys.readouterr().err
    more = tiny_tokenizer()
    more.add_tokens(["<|more|>"])
    more.save_pretrained(tuned)
    assert main([*command, str(tmp_path / "other")]) == 0
    adapter = read_adapter(tmp_path / "other")
    assert adapter.meta["template"] is None and "stop_tokens" not in adapter.meta["receipt"]


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models that do not match, no difference, wishes that make no sense."""
    model = saved(tmp_path / "base")
    saved(tmp_path / "wide", intermediate_size=48)
    base = tmp_path / "base"
    with pytest.raises(ComposeError, match="not a fine-tuned copy"):
        found(base, tmp_path / "wide", rank=2)
    with pytest.raises(ComposeError, match="same weights at all 14 sites"):
        found(base, base, rank=2)
    for wish in ({}, {"rank": 0}, {"rank": 10**6}, {"energy": 1.5}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(ComposeError, match=r"rank|energy"):
            found(base, base, **wish)
    with pytest.raises(TargetError, match="matches nothing"):
        found(base, base, rank=2, target_modules="q_porj")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")  # type: ignore[operator]
    with pytest.raises(ComposeError, match=r"up_proj: the weights hold values that are not finite"):
        found(base, tmp_path / "nan", rank=2)
    assert main(["extract", "--base", str(base), "--tuned", str(base), "--out", f"{tmp_path}/x"]) == 2
    assert "either --rank R or --energy X" in capsys.readouterr().err


def test_what_lies_outside_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors that no adapter covers are found under whatever name the files have; those that one model lacks, or has in another shape,
    are named; values that are not finite are refused there too."""
    tuned = tuned_fully(tmp_path / "tuned", saved(tmp_path / "base"))
    held = load_file(tuned / "model.safetensors")

    def changed(name: str, tensors: dict[str, Tensor], **config: int) -> Path:
        shutil.copytree(tuned, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((tuned / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(settings | config))
        return tmp_path / name

    whole = found(tmp_path / "base", tuned, rank=2)
    bare = changed("bare", {key.removeprefix("model."): value for key, value in held.items()})
    assert found(tmp_path / "base", bare, rank=2).outside == whole.outside and not whole.unlike
    wide = {key: torch.cat([v, v[:8]]) if v.shape[0] == 320 else v for key, v in held.items()}
    wider = changed("wider", wide, vocab_size=328)
    assert set(found(tmp_path / "base", wider, rank=2).unlike) == {"model.embed_tokens.weight", "lm_head.weight"}
    words = ["extract", "--base", f"{tmp_path}/base", "--rank", "2", "--out", f"{tmp_path}/out"]
    assert main([*words, "--tuned", str(wider)]) == 0
    assert "only one model has them or their shapes differ: " in capsys.readouterr().out
    without = changed("without", {key: value for key, value in held.items() if key != "model.norm.weight"})
    assert found(tmp_path / "base", without, rank=2).unlike == ["model.norm.weight"]
    broken = changed("broken", {key: v * float("nan") if key == "model.norm.weight" else v for key, v in held.items()})
    with pytest.raises(
        ComposeError, match=r"model\.norm\.weight: the tensor, or the base's, holds values that are not finite"
    ):
        found(tmp_path / "base", broken, rank=2)
    assert main([*words, "--tuned", str(tuned), "--target-modules", ","]) == 2
    assert "--target-modules: expected names of layers" in capsys.readouterr().err


def test_a_gain_alone(tmp_path: Path) -> None:
    """Rows that are only scaled are a DoRA adapter whose factors do nothing, and the report has the rank that is stored."""
    model = saved(tmp_path / "base")
    with torch.no_grad():
        for site in ("q_proj", "up_proj"):
            for name, value in model.named_parameters():
                if site in name:
                    value.mul_(torch.linspace(0.5, 1.5, len(value)).unsqueeze(1))
    model.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    made = found(tmp_path / "base", tmp_path / "tuned", rank=4, method="dora")
    assert made.kept > 1 - 1e-9
    assert all(site.rank == made.adapter.rank(site.site) for site in made.sites)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_device_finds_the_same(tmp_path: Path, method: str) -> None:
    """Decompositions run on the device, no tensor meets one of the CPU, and the adapter is that of the CPU."""
    tuned = tuned_fully(tmp_path / "tuned", saved(tmp_path / "base", "llama"))
    here = found(tmp_path / "base", tuned, rank=4, method=method)
    with PretendDevice() as place:
        there = found(tmp_path / "base", tuned, rank=4, method=method, device="cuda:0")
        assert all(place.of(p) == torch.device("cpu") for p in there.adapter.parameters())
        assert place.moves and place.reads
    pairs = zip(here.adapter.parameters(), there.adapter.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs) and here.kept == there.kept
