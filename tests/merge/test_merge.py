"""Merging into folders: the numbers, the shards, what comes apart, and the report of what rounding cost."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compose.made import METHODS, saved, trained
from torch import Tensor

from veneer.adapters import Adapter, DoRA, LoRA, attach
from veneer.checkpoints.base_files import skeleton
from veneer.checkpoints.model_folder import ModelFolder, write_model
from veneer.errors import BaseModelError, CheckpointError, ComposeError
from veneer.merge.fidelity import compare_logits
from veneer.merge.folder import MergeReport, merge_to_folder
from veneer.models.load import load_base

IDS = torch.arange(3, 40).reshape(1, -1)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def logits(folder: Path) -> Tensor:
    return load_base(folder, dtype="float32").model(input_ids=IDS)[0]


def adapted(folder: Path, mix: dict[str, float], *adapters: Adapter) -> Tensor:
    model = load_base(folder, dtype="float32").model
    bank = attach(model)
    for adapter in adapters:
        bank.insert(adapter)
    with bank.use(mix), torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "gemma3", "phi3", "gpt_neox", "mixtral", "gpt_oss"])
def test_merged_model_computes_the_adapted_one(tmp_path: Path, arch: str, method: str) -> None:
    """A merge in fp32, loaded by transformers, has the adapted model's logits within 1e-5."""
    settings = METHODS[method]
    if method == "pattern" and arch not in ("llama", "gemma3"):
        settings = LoRA(r=4, lora_alpha=8, rank_pattern={"*.0.*": 2}, alpha_pattern={"*.1.*": 20.0})
    model = saved(tmp_path / "base", arch)
    adapter = trained(model, settings)
    report = merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out")
    expected = adapted(tmp_path / "base", {"a": 1.0}, adapter)
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(tmp_path / "base"), expected, atol=1e-2)
    assert report.error < 1e-4 and len(report.sites) == len(adapter.tensors)


def test_mixes_of_methods(tmp_path: Path) -> None:
    """A weighted mix merges to what the same mix computes as a route."""
    model = saved(tmp_path / "base")
    parts = [trained(model, METHODS["dora"], name="a"), trained(model, METHODS["rslora"], name="b", seed=3)]
    merge_to_folder([(parts[0], 0.7), (parts[1], -0.3)], skeleton(tmp_path / "base"), tmp_path / "out")
    assert torch.allclose(
        logits(tmp_path / "out"), adapted(tmp_path / "base", {"a": 0.7, "b": -0.3}, *parts), atol=1e-5
    )


def test_shards(tmp_path: Path) -> None:
    """Small shards get an index, hold every tensor once and load as one file would."""
    model = saved(tmp_path / "base")
    base = skeleton(tmp_path / "base")
    mix = [(trained(model), 1.0)]
    merge_to_folder(mix, base, tmp_path / "one")
    merge_to_folder(mix, base, tmp_path / "many", shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(tmp_path / "one"))
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    merge_to_folder(mix, skeleton(tmp_path / "many"), tmp_path / "again", shard_bytes=50_000)
    assert set(weights(tmp_path / "again")) == set(weights(tmp_path / "one"))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["embedding", "head"])
def test_tied_weights_come_apart(tmp_path: Path, arch: str, side: str) -> None:
    """Changing one side of a tied weight writes both, says so in config and report, and leaves the other side as it was."""
    model = saved(tmp_path / "base", arch, tie_word_embeddings=True)
    group = next(iter(attach(model).tied.values()))
    assert len(group) == 2
    site = group[0] if side == "embedding" else group[1]
    adapter = trained(model, LoRA(r=2, lora_alpha=4, target_modules=(site,)))
    report = merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out")
    assert report.untied == [list(group)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.allclose(logits(tmp_path / "out"), adapted(tmp_path / "base", {"a": 1.0}, adapter), atol=1e-5)
    other = group[1] if side == "embedding" else group[0]
    merged = load_base(tmp_path / "out", dtype="float32").model
    assert torch.equal(merged.get_submodule(other).weight, model.get_submodule(other).weight)


def test_tied_weights_stay_one_where_both_change(tmp_path: Path) -> None:
    """An adapter that acts on both sides through the same factors keeps them tied."""
    model = saved(tmp_path / "base", tie_word_embeddings=True)
    method = LoRA(r=2, lora_alpha=4, target_modules=("embed_tokens",), ensure_weight_tying=True)
    adapter = trained(model, method)
    report = merge_to_folder([(adapter, 0.5)], skeleton(tmp_path / "base"), tmp_path / "out")
    assert report.untied == [] and "lm_head.weight" not in weights(tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), adapted(tmp_path / "base", {"a": 0.5}, adapter), atol=1e-5)


def test_a_prefix_that_the_files_lack(tmp_path: Path) -> None:
    """A checkpoint saved from the model without its head names weights without the prefix, and merges all the same."""
    model = saved(tmp_path / "base", "gpt2")
    file = tmp_path / "base" / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    adapter = trained(model, LoRA(r=2, target_modules=("c_attn", "wte")))
    merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), adapted(tmp_path / "base", {"a": 1.0}, adapter), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_names_that_transformers_changes_while_loading(tmp_path: Path, tied: bool) -> None:
    """GPT-NeoX's head is embed_out in the files and lm_head in the model: it is read from there, and merged shards load with the adapted
    model's logits, also where the files hold the head beside the embedding that it is tied to."""
    model = saved(tmp_path / "base", "gpt_neox", tie_word_embeddings=tied)
    if tied:
        file = tmp_path / "base" / "model.safetensors"
        held = load_file(file)
        save_file(
            held | {"embed_out.weight": held["gpt_neox.embed_in.weight"].clone()}, file, metadata={"format": "pt"}
        )
    assert "embed_out.weight" in weights(tmp_path / "base")
    adapter = trained(model, LoRA(r=2, lora_alpha=4, target_modules=("lm_head", "dense")))
    report = merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out", shard_bytes=9_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert "embed_out.weight" in weights(tmp_path / "out") and "lm_head.weight" not in weights(tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out"), adapted(tmp_path / "base", {"a": 1.0}, adapter), atol=1e-5)
    assert bool(report.untied) == tied and "lm_head" in {site.site for site in report.sites}


def slow_figures(base: Tensor, delta: Tensor) -> tuple[float, float, float]:
    """(error, kept, unchanged) element by element, in Python's own doubles."""
    error = along = size = 0.0
    unmoved = 0
    for w, d in zip(base.flatten().tolist(), delta.flatten().tolist(), strict=True):
        kept = float(torch.tensor(w + d).bfloat16()) - w
        error += (kept - d) ** 2
        along += kept * d
        size += d * d
        unmoved += kept == 0
    return (error / size) ** 0.5, along / size, unmoved / delta.numel()


@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.003, 0.001])
def test_report_is_right_in_bf16(tmp_path: Path, ratio: float) -> None:
    """At every size of change the reported error and kept part are within 1 % of a slow computation from the written files."""
    model = saved(tmp_path / "base", dtype=torch.bfloat16, hidden_size=64, num_attention_heads=4)
    adapter = trained(model, LoRA(r=8, lora_alpha=8, target_modules=("down_proj",)), size=0.3)
    before = weights(tmp_path / "base")
    for site, own in adapter.tensors.items():
        with torch.no_grad():
            own["lora_B"] *= ratio * before[f"{site}.weight"].float().norm() / (own["lora_B"] @ own["lora_A"]).norm()
    report = merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out", allow_rounding=True)
    after = weights(tmp_path / "out")
    for site in report.sites:
        base, delta = before[f"{site.site}.weight"].float(), adapter.delta_2d(site.site)
        error, kept, unchanged = slow_figures(base, delta)
        assert site.error == pytest.approx(error, rel=0.01)
        assert site.kept == pytest.approx(kept, rel=0.01)
        assert site.unchanged == pytest.approx(unchanged, rel=0.01)
        assert site.ratio == pytest.approx(ratio, rel=0.01)
        assert torch.equal(after[f"{site.site}.weight"], (base + delta).bfloat16())
    low, high = {0.1: (0.01, 0.03), 0.01: (0.1, 0.25), 0.003: (0.35, 0.6), 0.001: (0.65, 0.95)}[ratio]
    assert low < report.error < high


def rounded_away(folder: Path) -> tuple[Adapter, Path]:
    model = saved(folder / "base", dtype=torch.bfloat16)
    return trained(model, LoRA(r=4, lora_alpha=4), size=0.001), folder / "base"


def test_a_fine_tune_is_not_rounded_away_unasked(tmp_path: Path) -> None:
    """A merge that would lose most of the change is refused with its figures and the ways out, and leaves nothing behind."""
    adapter, base = rounded_away(tmp_path)
    with pytest.raises(ComposeError, match=r"round the fine-tune away.*--dtype float32.*--residual.*--allow-rounding"):
        merge_to_folder([(adapter, 1.0)], skeleton(base), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    report = merge_to_folder([(adapter, 1.0)], skeleton(base), tmp_path / "out", allow_rounding=True)
    assert report.error > 0.6 and report.kept < 0.8


def test_the_ways_out_keep_the_fine_tune(tmp_path: Path) -> None:
    """fp32 keeps all of the change, stochastic rounding keeps it on average, a residual adapter brings back what is low-rank."""
    adapter, base = rounded_away(tmp_path)
    mix, written = [(adapter, 1.0)], []
    nearest = merge_to_folder(mix, skeleton(base), tmp_path / "n", allow_rounding=True)
    wide = merge_to_folder(mix, skeleton(base), tmp_path / "w", dtype=torch.float32)
    assert wide.error < 1e-3 and {t.dtype for t in weights(tmp_path / "w").values()} == {torch.float32}
    chance = merge_to_folder(mix, skeleton(base), tmp_path / "s", rounding="stochastic")
    assert nearest.kept < 0.9 and chance.kept == pytest.approx(1.0, abs=0.05)
    again = merge_to_folder(mix, skeleton(base), tmp_path / "s2", rounding="stochastic")
    assert again.sites == chance.sites
    report = merge_to_folder(
        mix, skeleton(base), tmp_path / "r", residual=32, write_residual=lambda made, _: written.append(made)
    )
    assert report.left is not None and report.left < 1e-3 < report.error
    assert torch.allclose(
        adapted(tmp_path / "r", {"residual": 1.0}, *written), adapted(base, {"a": 1.0}, adapter), atol=1e-5
    )


def test_stochastic_rounding_is_right_on_average() -> None:
    """Each rounded value is one of the two neighbours, and their mean over draws is the value itself."""
    from veneer.merge.rounding import round_to

    value = torch.tensor([1.001, -1.001, 3e-5, -7.77, 1e30])
    draws = torch.stack(
        [round_to(value, torch.bfloat16, torch.Generator().manual_seed(i)).double() for i in range(4000)]
    )
    assert all(len(draws[:, i].unique()) <= 2 for i in range(5))
    assert torch.allclose(draws.mean(0) / value, torch.ones(5, dtype=torch.float64), atol=3e-4)


def test_logits_are_compared(tmp_path: Path) -> None:
    """The probe gives the largest difference to the adapted model, 1e-5 of it in fp32, and the size of the change beside it."""
    model = saved(tmp_path / "base", dtype=torch.bfloat16)
    mix = [(trained(model), 1.0)]
    merge_to_folder(mix, skeleton(tmp_path / "base"), tmp_path / "bf16")
    merge_to_folder(mix, skeleton(tmp_path / "base"), tmp_path / "fp32", dtype=torch.float32)
    coarse = compare_logits(tmp_path / "base", tmp_path / "bf16", mix)
    fine = compare_logits(tmp_path / "base", tmp_path / "fp32", mix)
    assert coarse is not None and fine is not None
    assert fine.merged < 1e-5 * fine.scale < coarse.merged < coarse.change
    assert fine.same_top == 1.0 and fine.positions == 48
    with pytest.raises(ComposeError, match="does not compute what the adapted one does"):
        compare_logits(tmp_path / "base", tmp_path / "fp32", [(mix[0][0], 0.5)])


def test_a_failed_check_leaves_nothing(tmp_path: Path) -> None:
    """The check sees the whole folder; when it raises, no folder appears."""
    model = saved(tmp_path / "base")

    def check(folder: Path, report: MergeReport) -> None:
        assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
        raise ComposeError("no")

    with pytest.raises(ComposeError, match="no"):
        merge_to_folder([(trained(model), 1.0)], skeleton(tmp_path / "base"), tmp_path / "out", check=check)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_merge_that_was_killed(tmp_path: Path) -> None:
    """kill -9 in the middle leaves no folder of that name; the next merge clears what was left, but not what another process writes."""
    saved(tmp_path / "base")
    body = (
        "import os, signal, sys; from pathlib import Path; from veneer.checkpoints.model_folder import ModelFolder, write_model\n"
        "base, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "with write_model(ModelFolder(base), out, {}, shard_bytes=1) as writer:\n"
        "    for number, (key, tensor) in enumerate(ModelFolder(base).tensors()):\n"
        "        writer.put(key, tensor)\n"
        "        number == 3 and os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-c", body, str(tmp_path / "base"), str(tmp_path / "out")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    left = list(tmp_path.glob(".unfinished-out-*"))
    assert len(left) == 1 and any(left[0].iterdir()) and not (tmp_path / "out").exists()
    base = ModelFolder(tmp_path / "base")
    with write_model(base, tmp_path / "out", base.config), write_model(base, tmp_path / "out-b", base.config):
        assert not left[0].exists()
        both = set(tmp_path.glob(".unfinished-*"))
        with contextlib.suppress(CheckpointError), write_model(base, tmp_path / "out", base.config):
            assert both < set(tmp_path.glob(".unfinished-*"))
            raise CheckpointError("enough")
        assert set(tmp_path.glob(".unfinished-*")) == both
    assert not list(tmp_path.glob(".unfinished-*"))


def test_bad_inputs_are_one_error(tmp_path: Path) -> None:
    """Missing sites, other shapes, NaN, a place that is taken, a quantized base: one error that names each."""
    model = saved(tmp_path / "base")
    base = skeleton(tmp_path / "base")
    wide = trained(saved(tmp_path / "wide", hidden_size=64, num_hidden_layers=3))
    with pytest.raises(ComposeError) as caught:
        merge_to_folder([(wide, 1.0)], base, tmp_path / "out")
    assert "model.layers.2.mlp.up_proj: the base has no such layer" in str(caught.value)
    assert "q_proj.lora_A: expected shape (4, 32), found (4, 64)" in str(caught.value)
    broken = trained(model)
    with torch.no_grad():
        broken.tensors["model.layers.0.mlp.up_proj"]["lora_A"][0, 0] = float("nan")
    with pytest.raises(ComposeError, match=r"up_proj\.lora_A holds values that are not finite"):
        merge_to_folder([(broken, 1.0)], base, tmp_path / "out")
    with pytest.raises(CheckpointError, match="a folder that is not empty"):
        merge_to_folder([(trained(model), 1.0)], base, tmp_path / "wide")
    with pytest.raises(ComposeError, match="nothing to merge"):
        merge_to_folder([], base, tmp_path / "out")
    huge = trained(model, DoRA(r=2))
    with torch.no_grad():
        huge.tensors["model.layers.0.mlp.up_proj"]["lora_magnitude_vector"] *= 1e6
    with pytest.raises(ComposeError, match=r"does not fit the range of torch\.float16"):
        merge_to_folder([(huge, 1.0)], base, tmp_path / "out", dtype=torch.float16)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(BaseModelError, match="quantized with x"):
        skeleton(tmp_path / "base")


def test_encoder_decoders_do_not_come_apart(tmp_path: Path) -> None:
    """T5 scales its logits by whether they are tied, so untying it is refused; other sites merge."""
    model = saved(tmp_path / "base", "t5", tie_word_embeddings=True)
    adapter = trained(model, LoRA(r=2, target_modules=("lm_head",)))
    with pytest.raises(ComposeError, match="encoder-decoder"):
        merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out")
    merge_to_folder(
        [(trained(model, LoRA(r=2, target_modules=("q",))), 1.0)], skeleton(tmp_path / "base"), tmp_path / "out"
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
