"""Merging what is an adapter's own: heads, embeddings, norms, biases and token rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compose.made import saved, trained
from torch import Tensor

from veneer.adapters import Adapter, LoRA, attach
from veneer.checkpoints import attach as attach_with_folders
from veneer.checkpoints.base_files import skeleton
from veneer.cli.main import main
from veneer.compose.combine import combine
from veneer.deltas.parents import Parent
from veneer.errors import ComposeError
from veneer.merge.folder import merge_to_folder
from veneer.models.load import load_base

IDS = torch.arange(3, 40).reshape(1, -1)
OWN = {
    "head": LoRA(r=2, modules_to_save=("lm_head",)),
    "norms": LoRA(r=2, modules_to_save=("norm", "input_layernorm")),
    "embedding": LoRA(r=2, modules_to_save=("embed_tokens",)),
    "rows": LoRA(r=2, trainable_token_indices=(5, 3, 17)),
    "both": LoRA(r=2, modules_to_save=("embed_tokens",), ensure_weight_tying=True),
}


def adapted(folder: Path, mix: dict[str, float], *adapters: Adapter) -> Tensor:
    bank = attach(load_base(folder, dtype="float32").model)
    for adapter in adapters:
        bank.insert(adapter)
    with bank.use(mix), torch.no_grad():
        return bank.model(input_ids=IDS)[0]


@pytest.mark.parametrize(
    ("what", "tied"), [(what, tied) for what in OWN for tied in (False, True) if tied or what != "both"]
)
def test_own_values_merge(tmp_path: Path, what: str, tied: bool) -> None:
    """A merge holds the adapter's own values, alone and in a mix, comes apart where it must, and reloads to the same logits."""
    model = saved(tmp_path / "base", tie_word_embeddings=tied)
    one, other = trained(model, OWN[what], name="a"), trained(model, LoRA(r=3), name="b", seed=4)
    report = merge_to_folder([(one, 0.7), (other, 0.5)], skeleton(tmp_path / "base"), tmp_path / "out")
    found = load_base(tmp_path / "out", dtype="float32").model(input_ids=IDS)[0]
    wanted = adapted(tmp_path / "base", {"a": 0.7, "b": 0.5}, one, other)
    assert torch.allclose(found, wanted, atol=2e-5, rtol=1e-5)
    assert bool(report.untied) == (tied and what in ("head", "embedding"))
    assert {place for place in one.overrides if place in {site.site for site in report.sites}} or what == "norms"


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"bias": "all"}])
def test_biases_merge(tmp_path: Path, options: dict[str, str]) -> None:
    """Trained biases merge too, a shared one under the name that the files have."""
    model = saved(tmp_path / "base", "bert")
    adapter = trained(model, LoRA(r=2, target_modules=("query", "decoder"), **options))  # type: ignore[arg-type]
    assert adapter.overrides
    merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "base"), tmp_path / "out")
    found = load_base(tmp_path / "out", dtype="float32").model(input_ids=IDS)[0]
    assert torch.allclose(found, adapted(tmp_path / "base", {"a": 1.0}, adapter), atol=2e-5)


def test_a_bias_of_b_needs_a_bias_in_the_base(tmp_path: Path) -> None:
    """It is added to the layer's bias; where the base has none, that is said."""
    model = saved(tmp_path / "base", "bert")
    adapter = trained(model, LoRA(r=2, target_modules=("query",), lora_bias=True))
    merge_to_folder([(adapter, 0.5)], skeleton(tmp_path / "base"), tmp_path / "out")
    found = load_base(tmp_path / "out", dtype="float32").model(input_ids=IDS)[0]
    assert torch.allclose(found, adapted(tmp_path / "base", {"a": 0.5}, adapter), atol=2e-5)
    plain = saved(tmp_path / "plain", "llama")
    adapter = trained(plain, LoRA(r=2, target_modules=("q_proj",), lora_bias=True))
    with pytest.raises(ComposeError, match=r'the base has no "model.layers.0.self_attn.q_proj.bias"'):
        merge_to_folder([(adapter, 1.0)], skeleton(tmp_path / "plain"), tmp_path / "x")


def test_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with modules_to_save merges from the command line; composing it is refused by name."""
    model = saved(tmp_path / "base")
    bank = attach_with_folders(model)
    bank.insert(trained(saved(tmp_path / "t"), OWN["head"]))
    bank.save("a", tmp_path / "a", base_name=str(tmp_path / "base"))
    assert main(["merge", f"{tmp_path}/a", "--out", f"{tmp_path}/out"]) == 0, capsys.readouterr().err
    assert "logits: at most" in capsys.readouterr().out
    assert main(["compose", f"{tmp_path}/a", "--out", f"{tmp_path}/c"]) == 1
    assert (
        "overrides parameters of the base at lm_head, which cannot be composed; merge it with veneer merge"
        in capsys.readouterr().err
    )
    with pytest.raises(ComposeError, match="cannot be composed"):
        combine("sum", [Parent(trained(saved(tmp_path / "u"), OWN["norms"]))])
