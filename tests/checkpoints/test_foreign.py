"""Adapters in the formats of mlx-lm and LitGPT, written here as these programs write them, become PEFT folders that act the same."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.compose.made import saved
from torch import Tensor, nn

from veneer.checkpoints import attach, read_adapter
from veneer.cli.main import main

IDS = torch.arange(3, 40).reshape(1, -1)
Make = Callable[..., Path]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_changes(model: nn.Module, changes: dict[str, Tensor]) -> Tensor:
    """Logits of a model whose weights were moved by hand."""
    before = {name: model.get_submodule(name).weight.detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight.add_(change)
        logits: Tensor = model(input_ids=IDS)[0]
        for name, weight in before.items():
            model.get_submodule(name).weight.copy_(weight)
    return logits


def imported(folder: Path, tmp_path: Path, model: nn.Module, *more: str) -> Tensor:
    """Logits of the base with what ``veneer import`` makes of a folder."""
    out = tmp_path / "imported"
    assert main(["import", str(folder), "--base", str(tmp_path / "base"), "--out", str(out), *more]) == 0
    bank = attach(model)
    bank.load(out, name="theirs")
    with bank.use("theirs"), torch.no_grad():
        logits: Tensor = model(input_ids=IDS)[0]
    bank.detach()
    return logits


def mlx_folder(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "adapters.safetensors")
    parameters = {"rank": 3, "scale": 5.0, "dropout": 0.1}
    found = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "org/base", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(found))
    return folder


def litgpt_folder(folder: Path, tensors: dict[str, Tensor], which: str = "q", **settings: Any) -> Path:
    """The tensors with factors of zero for the layers that they leave out in one of the two blocks, which LitGPT always adapts both."""
    folder.mkdir(exist_ok=True)
    other = {"h.0.": "h.1.", "h.1.": "h.0."}
    twins = {re.sub(r"h\.[01]\.", lambda at: other[at[0]], key): 0 * value for key, value in tensors.items()}
    tensors = {**twins, **tensors}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "lit_model.lora.safetensors")
    flags = {f"lora_{name}": name[0] in which for name in ("query", "key", "value")}
    found = {"precision": "bf16-true", "lora_r": 3, "lora_alpha": 12, "lora_dropout": 0.05, **flags, **settings}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in found.items() if value is not None]
    (folder / "hyperparameters.yaml").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_lm(tmp_path: Path, dora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """lora_a [in, r] and lora_b [r, out] times the scale are added to the weight; under DoRA each row gets its magnitude m."""
    model = saved(tmp_path / "base")
    tensors: dict[str, Tensor] = {}
    changes = {}
    widths = {"self_attn.q_proj": 32, "mlp.up_proj": 64, "self_attn.v_proj": 16}
    for seed, (block, (name, width)) in enumerate(itertools.product(range(2), widths.items())):
        site = f"model.layers.{block}.{name}"
        a, b = draw(32, 3, seed=seed), draw(3, width, seed=seed + 10)
        tensors |= {f"{site}.lora_a": a, f"{site}.lora_b": b}
        weight = model.get_submodule(site).weight.detach()
        moved = weight + 5 * (a @ b).T
        if dora:
            m = weight.norm(dim=1) * (1 + 0.3 * torch.rand(width, generator=torch.Generator().manual_seed(seed)))
            tensors[f"{site}.m"] = m
            moved = (m / moved.norm(dim=1))[:, None] * moved
        changes[site] = moved - weight
    folder = mlx_folder(tmp_path / "theirs", tensors, fine_tune_type="dora" if dora else "lora")
    wanted = with_changes(model, changes)
    assert torch.allclose(imported(folder, tmp_path, model), wanted, atol=1e-5)
    said = capsys.readouterr().out
    assert (
        f"a {'DoRA' if dora else 'LoRA'} adapter of mlx-lm, rank 3 and scale 5 at 6 sites" in said
        and "org/base" in said
    )
    receipt = read_adapter(tmp_path / "imported").meta["receipt"]
    assert receipt["made_by"] == {"operation": "import", "from": "mlx-lm", "model": "org/base"}
    assert set(receipt["base"]) == set(changes)


def test_mlx_lm_embeddings(tmp_path: Path) -> None:
    """An embedding's factors lie the other way round, and act on the head that is tied to it."""
    model = saved(tmp_path / "base", tie_word_embeddings=True)
    a, b = draw(320, 2), draw(2, 32, seed=1)
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    folder = mlx_folder(tmp_path / "theirs", tensors, lora_parameters={"rank": 2, "scale": 5.0})
    wanted = with_changes(model, {"model.embed_tokens": 5 * a @ b})
    assert torch.allclose(imported(folder, tmp_path, model), wanted, atol=1e-5)


def qkv(parts: dict[str, int], inputs: int = 32, r: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """LitGPT's fused factors of some of q, k and v with so many rows each, and the change that each of them makes at alpha 12."""
    factors = {
        part: (draw(r, inputs, seed=i), draw(rows, r, seed=i + 7)) for i, (part, rows) in enumerate(parts.items())
    }
    a, b = (torch.cat([pair[side] for pair in factors.values()]) for side in (0, 1))
    return a, b, {part: 4 * b @ a for part, (a, b) in factors.items()}


@pytest.mark.parametrize("which", ["qkv", "qv", "k"])
def test_litgpt_with_three_projections(tmp_path: Path, which: str) -> None:
    """The fused q, k, v of grouped heads come apart into the base's own layers; MLP, output and head follow by name."""
    model = saved(tmp_path / "base")
    rows = {"q": 32, "k": 16, "v": 16}
    a, b, changed = qkv({part: rows[part] for part in which})
    tensors = {"transformer.h.1.attn.qkv.lora_A": a, "transformer.h.1.attn.qkv.lora_B": b}
    changes = {f"model.layers.1.self_attn.{part}_proj": change for part, change in changed.items()}
    others = {
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    for seed, (part, name) in enumerate(others.items()):
        layer = model.get_submodule(f"model.layers.0.{name}")
        a, b = draw(3, layer.in_features, seed=seed), draw(layer.out_features, 3, seed=seed + 20)
        tensors |= {f"transformer.h.0.{part}.lora_A": a, f"transformer.h.0.{part}.lora_B": b}
        changes[f"model.layers.0.{name}"] = 4 * b @ a
    a, b = draw(3, 32, seed=3), draw(384, 3, seed=5)  # the vocabulary is padded from 320
    tensors |= {"lm_head.lora_A": a, "lm_head.lora_B": b}
    changes["lm_head"] = 4 * b[:320] @ a
    folder = litgpt_folder(tmp_path / "theirs", tensors, which)
    assert torch.allclose(imported(folder, tmp_path, model), with_changes(model, changes), atol=2e-5)


@pytest.mark.parametrize("which", ["qkv", "qv"])
@pytest.mark.parametrize("arch", ["phi3", "gpt_neox"])
def test_litgpt_with_one_fused_layer(tmp_path: Path, arch: str, which: str) -> None:
    """Where the base has q, k and v in one layer, each part acts on its own rows, in the order that the base has them."""
    model = saved(tmp_path / "base", arch)
    if arch == "phi3":
        rows, site = {"q": 32, "k": 16, "v": 16}, "model.layers.1.self_attn.qkv_proj"
        where = {"q": list(range(32)), "k": list(range(32, 48)), "v": list(range(48, 64))}
    else:
        rows, site = dict.fromkeys("qkv", 32), "gpt_neox.layers.1.attention.query_key_value"
        where = {p: [24 * head + 8 * i + j for head in range(4) for j in range(8)] for i, p in enumerate("qkv")}
    a, b, changed = qkv({part: rows[part] for part in which})
    change = torch.zeros_like(model.get_submodule(site).weight)
    for part in which:
        change[where[part]] = changed[part]
    changes, tensors = {site: change}, {"transformer.h.1.attn.qkv.lora_A": a, "transformer.h.1.attn.qkv.lora_B": b}
    if arch == "phi3":
        a, b = draw(3, 32, seed=30), draw(64, 3, seed=31)
        tensors |= {"transformer.h.0.mlp.fc_2.lora_A": a, "transformer.h.0.mlp.fc_2.lora_B": b}
        changes["model.layers.0.mlp.gate_up_proj"] = torch.cat([torch.zeros(64, 32), 4 * b @ a])
    folder = litgpt_folder(tmp_path / "theirs", tensors, which)
    assert torch.allclose(imported(folder, tmp_path, model), with_changes(model, changes), atol=2e-5)


def test_settings_that_shapes_replace(tmp_path: Path) -> None:
    """Without hyperparameters the scale is given by hand, and shapes say which of q, k and v there are where only one answer fits."""
    model = saved(tmp_path / "base")
    a, b, changed = qkv({"k": 16, "v": 16})
    tensors = {"transformer.h.1.attn.qkv.lora_A": a, "transformer.h.1.attn.qkv.lora_B": b}
    folder = litgpt_folder(tmp_path / "theirs", tensors, "kv")
    (folder / "hyperparameters.yaml").unlink()
    changes = {f"model.layers.1.self_attn.{part}_proj": change / 2 for part, change in changed.items()}
    assert torch.allclose(imported(folder, tmp_path, model, "--scale", "2"), with_changes(model, changes), atol=1e-5)


Q, UP, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens"
PAIR = {f"{Q}.lora_a": draw(32, 3), f"{Q}.lora_b": draw(3, 32)}
MLX_MISTAKES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "layer": (
        {"model.layers.9.x.lora_a": draw(4, 3), "model.layers.9.x.lora_b": draw(3, 4)},
        {},
        "base has no such layer",
    ),
    "shape": ({**PAIR, f"{Q}.lora_a": draw(3, 32)}, {}, "lora_A: expected shape (32, 32), found (32, 3)"),
    "half": ({f"{Q}.lora_a": draw(32, 3)}, {}, "has no lora_b"),
    "experts": ({"x.lora_a": draw(4, 3, 2), "x.lora_b": draw(4, 2, 3)}, {}, "of a layer of experts"),
    "name": ({**PAIR, "model.norm.weight": draw(32)}, {}, "is not part of an adapter"),
    "not finite": ({**PAIR, f"{Q}.lora_b": draw(3, 32) / 0}, {}, "not finite"),
    "zero": ({**PAIR, f"{Q}.lora_b": torch.zeros(3, 32)}, {}, "changes nothing"),
    "mixed": (
        {**PAIR, f"{UP}.lora_a": draw(32, 3), f"{UP}.lora_b": draw(3, 64), f"{Q}.m": draw(32)},
        {},
        "others none",
    ),
    "full": (PAIR, {"fine_tune_type": "full"}, "veneer extract"),
    "no scale": (PAIR, {"lora_parameters": {"rank": 3}}, "give it with --scale X"),
    "alpha": (PAIR, {"lora_parameters": {"rank": 3, "alpha": 16, "scale": 10.0}}, "say which with --scale X"),
    "negative": (PAIR, {"lora_parameters": {"rank": 3, "scale": -1.0}}, "the scale is -1"),
    "dora embedding": (
        {f"{EMBED}.lora_a": draw(320, 2), f"{EMBED}.lora_b": draw(2, 32), f"{EMBED}.m": draw(320)},
        {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 5.0}},
        "one magnitude per token",
    ),
}
MLX_MISTAKES |= {
    "blocks": (
        {f"model.layers.1.self_attn.q_proj.lora_{half}": PAIR[f"{Q}.lora_{half}"] for half in "ab"},
        {},
        "has no factors of model.layers.0.self_attn.q_proj (block 0), and has those of their like in other blocks: it is incomplete",
    ),
    "more blocks": (
        {
            f"model.layers.{block}.self_attn.q_proj.lora_{half}": PAIR[f"{Q}.lora_{half}"]
            for half in "ab"
            for block in (0, 1)
        },
        {"num_layers": 1},
        "the last 1 blocks are adapted (num_layers), and it has factors of model.layers.0.self_attn.q_proj",
    ),
    "a gap": (PAIR, {"num_layers": None}, "block 1"),
}
AT = "transformer.h.0"
QV = {f"{AT}.attn.qkv.lora_A": draw(6, 32), f"{AT}.attn.qkv.lora_B": draw(48, 3)}
LITGPT_MISTAKES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "flags": (QV, {"lora_key": True, "lora_value": True}, "are not those of query and key and value"),
    "untold": (QV, {"lora_query": None}, "do not say which of q, k and v"),
    "no alpha": (QV, {"lora_value": True, "lora_alpha": None}, "does not say lora_alpha"),
    "block": ({key.replace("h.0", "h.7"): value for key, value in QV.items()}, {}, "has no such block"),
    "half": ({f"{AT}.attn.qkv.lora_A": draw(6, 32)}, {}, "only one of its two factors"),
    "old": ({key.replace("qkv", "attn"): value for key, value in QV.items()}, {}, "before 0.5"),
    "name": ({**QV, f"{AT}.attn.qkv.linear.weight": draw(64, 32)}, {}, "is not a factor"),
    "layer": (
        {f"{AT}.mlp.fc.lora_A": draw(3, 32), f"{AT}.mlp.fc.lora_B": draw(64, 3)},
        {},
        "no layer that corresponds",
    ),
    "rows": ({**QV, f"{AT}.attn.qkv.lora_A": draw(5, 32)}, {}, "no multiple of"),
    "inputs": ({**QV, f"{AT}.attn.qkv.lora_A": draw(6, 31)}, {"lora_value": True}, "it has 31 inputs"),
}


@pytest.mark.parametrize(
    ("make", "mistake"),
    [(mlx_folder, mistake) for mistake in MLX_MISTAKES] + [(litgpt_folder, mistake) for mistake in LITGPT_MISTAKES],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, make: Make, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake is one error that names it, with nothing written."""
    saved(tmp_path / "base")
    tensors, settings, says = (MLX_MISTAKES if make is mlx_folder else LITGPT_MISTAKES)[mistake]
    folder = make(tmp_path / "theirs", tensors, **settings)
    assert main(["import", str(folder), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert says in said and "bug in veneer" not in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "blocks", "done"),
    [
        ({"num_layers": 1}, (1,), True),
        ({"num_layers": -1}, (0, 1), True),
        ({"num_layers": None}, (1,), True),
        ({"num_layers": 16}, (0, 1), True),
        ({"num_layers": 16}, (1,), False),
        ({"num_layers": 1}, (0,), False),
    ],
)
def test_blocks_that_the_settings_ask_for(
    settings: dict[str, Any], blocks: tuple[int, ...], done: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last blocks, all of them, or those from the first one in the file; others are missing, and --force config takes the rest."""
    saved(tmp_path / "base")
    tensors = {
        f"model.layers.{b}.self_attn.q_proj.lora_{half}": PAIR[f"{Q}.lora_{half}"] for b in blocks for half in "ab"
    }
    folder = mlx_folder(tmp_path / "theirs", tensors, **settings)
    words = ["import", str(folder), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    assert main(words) == (0 if done else 1)
    said = capsys.readouterr()
    if not done:
        assert "it is incomplete (force=" in said.err and not (tmp_path / "out").exists()
        assert main([*words, "--force", "config"]) == 0 and "overridden" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "scale"), [(mlx_folder, 1e-30), (litgpt_folder, 1e-30), (mlx_folder, 1e-7), (mlx_folder, 1e-3)]
)
def test_factors_that_change_nothing_are_told(
    make: Make, scale: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Factors that were scaled down to nothing are read, and one sentence says that they change nothing."""
    saved(tmp_path / "base")
    if make is mlx_folder:
        tensors = {
            f"model.layers.{b}.self_attn.q_proj.lora_{half}": scale * PAIR[f"{Q}.lora_{half}"]
            for b in (0, 1)
            for half in "ab"
        }
    else:
        tensors = {key.replace(".h.0", f".h.{b}"): scale * value for key, value in QV.items() for b in (0, 1)}
    folder = make(tmp_path / "theirs", tensors, **({} if make is mlx_folder else {"lora_value": True}))
    assert main(["import", str(folder), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert ("so nothing that can be measured changes" in said) == (scale < 1e-3)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert ("so nothing that can be measured changes" in capsys.readouterr().out) == (scale < 1e-3)


def test_folders_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pickles are not opened and the way to convert them is told; PEFT folders and empty ones are answered; so is a wrong --scale."""
    saved(tmp_path / "base")
    for name, says in (
        ("lit_model.pth.lora", "save_file(torch.load('lit_model.pth.lora', weights_only=True)['model']"),
        ("adapter_model.safetensors", "nothing has to be imported"),
        ("adapters.npz", "from before 2024-04"),
        ("readme.txt", "holds no adapter that is known"),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"\x80\x04.")
        words = ["import", str(folder), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
        assert main(words) == 1
        assert says in capsys.readouterr().err
    assert main([*words, "--scale", "0"]) == 2
    assert main(["import", str(tmp_path / "gone"), *words[2:]]) == 1
    assert "does not exist" in capsys.readouterr().err
