"""Folders of mlx-lm and LitGPT with something wrong in them: one error that names it, or the adapter that was meant; nothing between."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.checkpoints.helpers import file_bytes, read_file
from tests.tiny import tiny
from torch import Tensor

from veneer.adapters import Adapter, attach
from veneer.checkpoints import PeftFolders
from veneer.checkpoints.foreign.factors import program_of
from veneer.checkpoints.foreign.litgpt import read_litgpt
from veneer.checkpoints.foreign.mlx import read_mlx
from veneer.cli._targets import adapter_folders
from veneer.cli.main import main
from veneer.errors import CheckpointError, VeneerError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q_1, UP_0 = Q.replace("0", "1"), UP.replace("1", "0")
A = {site: draw(3, 32, seed=seed) for seed, site in enumerate((Q, UP, Q_1, UP_0))}
B = {site: draw(64 if "up" in site else 32, 3, seed=seed + 4) for seed, site in enumerate(A)}
SCALE = 5.0
HERE = {Q: "transformer.h.0.attn.qkv", UP: "transformer.h.1.mlp.fc_2"}
HERE |= {Q_1: "transformer.h.1.attn.qkv", UP_0: "transformer.h.0.mlp.fc_2"}
TENSORS: dict[str, Tensors] = {
    "mlx": {f"{s}.lora_a": A[s].T for s in A} | {f"{s}.lora_b": B[s].T for s in B},
    "litgpt": {f"{HERE[s]}.lora_A": A[s] for s in A} | {f"{HERE[s]}.lora_B": B[s] for s in B},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mlx": {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": SCALE, "dropout": 0.0}},
    "litgpt": {"lora_r": 3, "lora_alpha": 15, "lora_dropout": 0.0, "lora_query": True, "lora_key": False}
    | {"lora_value": False, "lora_projection": False, "lora_mlp": True, "lora_head": False},
}
FILES = {
    "mlx": ("adapters.safetensors", "adapter_config.json"),
    "litgpt": ("lit_model.lora.safetensors", "hyperparameters.yaml"),
}
DIALECTS = tuple(FILES)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def sites(model: Any) -> Any:
    bank = attach(model)
    bank.detach()
    return bank.sites


def write(folder: Path, dialect: str, tensors: Tensors, settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    weights, config = FILES[dialect]
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / weights)
    (folder / config).write_text(json.dumps(settings) if dialect == "mlx" else yaml.safe_dump(settings))
    return folder


def read(folder: Path, dialect: str, sites: Any, model: Any) -> Adapter:
    program_of(folder)
    if dialect == "mlx":
        return read_mlx(folder, "x", sites)[0]
    return read_litgpt(folder, "x", sites, model.config.to_dict())[0]


def wrong(adapter: Adapter, scale: float = SCALE) -> float:
    """The largest difference of an adapter's change from the one that was written."""
    return max(
        float((adapter.delta_2d(site) - scale * B[site] @ A[site]).abs().max()) if site in adapter.tensors else 1.0
        for site in A
    )


def first(tensors: Tensors, part: str, change: Callable[[Tensor], Tensor]) -> Tensors:
    """The tensors with one factor changed."""
    key = next(key for key in tensors if key.lower().endswith(part))
    return {**tensors, key: change(tensors[key])}


def named(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): value for key, value in tensors.items()}


def cut(tensor: Tensor) -> Tensor:
    return tensor[:2] if len(tensor) == 3 else tensor[:, :2]


BAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN": (lambda t: first(t, "lora_a", lambda v: v * float("nan")), "not finite"),
    "infinite": (lambda t: first(t, "lora_b", lambda v: v / 0), "not finite"),
    "a factor too few": (lambda t: dict(list(t.items())[1:]), "has no lora_a|only one of its two factors"),
    "nothing": (lambda t: {}, "holds no tensors"),
    "A and B of all layers exchanged": (
        lambda t: {_exchanged(k): v for k, v in t.items()},
        "declares rank 3, and",
    ),
    "all transposed": (lambda t: {k: v.T for k, v in t.items()}, "declares rank 3, and|no multiple"),
    "A of a lower rank": (lambda t: first(t, "lora_a", cut), "expected shape|no multiple"),
    "B of a lower rank": (lambda t: first(t, "lora_b", cut), "declares rank 3|no multiple"),
    "both of a lower rank": (
        lambda t: {k: cut(v) for k, v in t.items()},
        "declares rank 3, and the tensors have rank 2",
    ),
    "other widths": (
        lambda t: first(t, "lora_a", lambda v: torch.cat([v, v], v.shape.index(32))),
        "expected shape|64 inputs",
    ),
    "one dimension": (lambda t: first(t, "lora_a", torch.flatten), "1 dimensions|is not a factor"),
    "three dimensions": (lambda t: first(t, "lora_a", lambda v: v[None]), "experts|is not a factor"),
    "no rows": (lambda t: first(t, "lora_a", lambda v: v[:0]), "expected 1 to 4 sizes of at least 1"),
    "whole numbers": (
        lambda t: {k: (100 * v).to(torch.int8) for k, v in t.items()},
        "expected dtype F32, F16, BF16, found I8",
    ),
    "a tensor too many": (lambda t: {**t, "norm.weight": torch.ones(32)}, "norm.weight is no"),
    "a block too far": (lambda t: named(named(t, "layers.0", "layers.9"), "h.0", "h.9"), "no such layer|no such block"),
    "another layer": (
        lambda t: named(named(t, "q_proj", "query"), "qkv", "query"),
        "no such layer|no layer that corresponds",
    ),
    "a layer under two names": (
        lambda t: {**t, **named(named(t, "model.layers", "layers"), "h.0", "h.00")},
        "under two names",
    ),
    "a block missing": (
        lambda t: {k: v for k, v in t.items() if "s.0." not in k and "h.0." not in k},
        r"has no factors of model\.layers\.0\..* \(block 0\), .*it is incomplete",
    ),
    "a layer of a block missing": (
        lambda t: {k: v for k, v in t.items() if "s.1.self" not in k and "h.1.attn" not in k},
        r"model\.layers\.1\.self_attn\.q_proj \(block 1\)",
    ),
    "never trained": (lambda t: {k: 0 * v for k, v in t.items()}, "changes nothing"),
    "out of proportion": (lambda t: {k: 1e30 * v for k, v in t.items()}, "the change has a norm of up to"),
    "the layers of a setting missing": (
        lambda t: {k: v for k, v in t.items() if "mlp" in k},
        "says lora_query, and|^$",
    ),
}


def _exchanged(key: str) -> str:
    ends = {".lora_a": ".lora_b", ".lora_b": ".lora_a", ".lora_A": ".lora_B", ".lora_B": ".lora_A"}
    return key[:-7] + ends[key[-7:]]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", BAD)
def test_wrong_tensors_are_named(tmp_path: Path, dialect: str, case: str, sites: Any, model: Any) -> None:
    """An error of the package that says what was found."""
    change, says = BAD[case]
    if dialect == "mlx" and says.endswith("|^$"):
        pytest.skip("mlx-lm's settings name no layers")
    folder = write(tmp_path / "a", dialect, change(TENSORS[dialect]), SETTINGS[dialect])
    with pytest.raises(CheckpointError, match=says):
        read(folder, dialect, sites, model)


SAME: dict[str, Callable[[Tensors], Tensors]] = {
    "as written": dict,
    "in another order": lambda t: dict(reversed(t.items())),
    "in half precision": lambda t: {k: v.half() for k, v in t.items()},
    "in bf16": lambda t: {k: v.bfloat16() for k, v in t.items()},
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", SAME)
def test_harmless_differences_read_the_same(tmp_path: Path, dialect: str, case: str, sites: Any, model: Any) -> None:
    """The change is the one that was written, to the precision that it was written in."""
    folder = write(tmp_path / "a", dialect, SAME[case](TENSORS[dialect]), SETTINGS[dialect])
    for file in folder.iterdir():
        if file.suffix != ".safetensors":  # a mark and Windows' line ends, as an editor leaves them
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert wrong(read(folder, dialect, sites, model)) < (1e-6 if case in ("as written", "in another order") else 2e-3)


MLX_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"fine_tune_type": "dora"}, r"says fine_tune_type dora, and no layer has a magnitude"),
    ({"fine_tune_type": "banana"}, "fine_tune_type is banana; expected lora or dora"),
    ({"lora_parameters": {"rank": 8, "scale": 5.0}}, "declares rank 8, and the tensors have rank 3"),
    ({"lora_parameters": {"rank": "3", "scale": 5.0}}, "declares rank 3, and"),
    ({"lora_parameters": {"rank": True, "scale": 5.0}}, "declares rank True"),
    ({"lora_parameters": {"rank": 3, "scale": "5"}}, "does not say the scale"),
    ({"lora_parameters": {"rank": 3, "scale": True}}, "does not say the scale"),
    ({"lora_parameters": [3]}, "does not say the scale"),
    ({"lora_parameters": {"rank": 3, "scale": 0}}, "the scale is 0"),
    ({"lora_parameters": {"rank": 3, "scale": 1e9}}, r"the scale is 1e\+09"),
]
LITGPT_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"lora_r": 8}, "declares rank 8, and the tensors have rank 3"),
    ({"lora_r": "three"}, "declares rank three"),
    ({"lora_alpha": "15"}, "does not say lora_alpha"),
    ({"lora_alpha": True}, "does not say lora_alpha"),
    ({"lora_alpha": [15]}, "does not say lora_alpha"),
    ({"lora_alpha": float("nan")}, "the scale is nan"),
    ({"lora_alpha": float("inf")}, "the scale is inf"),
    ({"lora_alpha": -15}, "the scale is -5"),
    ({"lora_key": True}, "are not those of query and key"),
    ({"lora_projection": True}, "says lora_projection, and .* has no factors of attn.proj"),
    ({"lora_head": True}, "says lora_head, and .* has no factors of lm_head"),
]


@pytest.mark.parametrize(
    ("dialect", "change", "says"),
    [("mlx", *case) for case in MLX_SETTINGS] + [("litgpt", *case) for case in LITGPT_SETTINGS],
)
def test_wrong_settings_are_named(
    tmp_path: Path, dialect: str, change: dict[str, Any], says: str, sites: Any, model: Any
) -> None:
    """Settings that contradict the tensors, or say no scale, are refused."""
    folder = write(tmp_path / "a", dialect, TENSORS[dialect], {**SETTINGS[dialect], **change})
    with pytest.raises(CheckpointError, match=says):
        read(folder, dialect, sites, model)


def test_a_folder_above_names_those_inside(tmp_path: Path) -> None:
    """The folders with adapters are named, of both programs."""
    for dialect in DIALECTS:
        write(tmp_path / dialect, dialect, TENSORS[dialect], SETTINGS[dialect])
    with pytest.raises(CheckpointError, match=r"it contains litgpt, mlx: give one, such as .*litgpt"):
        program_of(tmp_path)


@pytest.mark.parametrize("file", [*(FILES[dialect][0] for dialect in DIALECTS), "pytorch_adapter.bin"])
def test_commands_say_whose_folder_it_is(tmp_path: Path, file: str, model: Any) -> None:
    """A folder of another program, given as an adapter, is recognised with and without settings beside it."""
    says = (
        "is a pickle of AdapterHub" if file.endswith("bin") else r"is an adapter of .*; convert it first: veneer import"
    )
    (tmp_path / file).write_bytes(b"x")
    bank = attach(model, folders=PeftFolders())
    with pytest.raises(CheckpointError, match=says):
        bank.load(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        adapter_folders(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=says):
        bank.load(tmp_path)
    bank.detach()


IMAGE_TOOLS: dict[str, dict[str, tuple[int, ...]]] = {
    "style.safetensors": {"lora_te_encoder_layers_0_q_proj.lora_down.weight": (4, 32), "lora_te_0.alpha": (1,)},
    "pytorch_lora_weights.safetensors": {"unet.down_blocks.0.to_q.lora_A.weight": (4, 32)},
    "flux.safetensors": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": (32, 4)},
    "loha.safetensors": {"lora_unet_mid_block.hada_w1_a": (32, 4), "lora_unet_mid_block.hada_w1_b": (4, 32)},
}


@pytest.mark.parametrize("file", IMAGE_TOOLS)
def test_files_of_image_tools_are_refused_in_a_sentence(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and its folder, given to `import` and `inspect`, with what is expected instead."""
    save_file({key: torch.ones(shape) for key, shape in IMAGE_TOOLS[file].items()}, tmp_path / file)
    for given in (tmp_path, tmp_path / file):
        for words in (
            ["import", str(given), "--base", "base", "--out", str(tmp_path / "out")],
            ["inspect", str(given)],
        ):
            assert main(words) == 1
            said = capsys.readouterr().err
            assert "adapter" in said and "bug in veneer" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_random_damage_is_refused_or_read_right(tmp_path: Path, dialect: str, sites: Any, model: Any) -> None:
    """Bytes cut, flipped, repeated or exchanged in the header and the settings: the package's error, or the change that was written."""
    folder = write(tmp_path / "a", dialect, TENSORS[dialect], SETTINGS[dialect])
    weights, config = (folder / name for name in FILES[dialect])
    header, data = read_file(weights)
    whole = {weights: file_bytes(header, data), config: config.read_bytes()}
    rng = random.Random(5)
    refused = 0
    for _ in range(120):
        for file, content in whole.items():
            file.write_bytes(content)
        file = rng.choice((weights, config))
        content = bytearray(whole[file])
        end = len(content) - (len(data) if file == weights else 0)  # damaged numbers cannot be told from others
        at = rng.randrange(end)
        kind = rng.randrange(4)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at:at] = content[at : at + rng.randrange(1, 30)]
        else:
            other = rng.randrange(end)
            content[at], content[other] = content[other], content[at]
        file.write_bytes(content)
        try:
            adapter = read(folder, dialect, sites, model)
        except VeneerError:
            refused += 1
            continue
        # A digit of the scale may have become another digit; the factors may not.
        assert wrong(adapter, adapter.scale(UP)) < 1e-6 and (file == config or adapter.scale(UP) == SCALE)
    assert refused > 60
