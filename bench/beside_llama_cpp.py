"""Compare exported GGUF adapters in llama.cpp with our own forward: the most likely token at every position of a text.

    python -m bench.beside_llama_cpp --python PYTHON [--work runs/llama-cpp]

PYTHON is an interpreter with llama-cpp-python (``pip install llama-cpp-python``; the build needs cmake and a compiler).
The base is the embedded model, dequantised into an fp32 GGUF file so both sides have the same weights. The adapters are LoRA, rsLoRA,
other ranks and alphas at some sites, a weighted mix of the three, and a DoRA cut to rank 64, compared with its own approximation.
Prints the share of positions with the same most likely token, and the same for the base alone; exits 1 below 99 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor

from veneer.adapters import Adapter, DoRA, LoRA
from veneer.checkpoints import attach, read_adapter
from veneer.cli.main import main as veneer
from veneer.compose.combine import combine
from veneer.deltas.parents import Parent, copy_as
from veneer.evaluate.general import general_text, pieces
from veneer.models.embedded import find_embedded
from veneer.models.load import load_base

BASE = "smollm2-135m"
METHODS = {
    "lora": LoRA(r=8, lora_alpha=16),
    "rslora": LoRA(r=16, lora_alpha=8, use_rslora=True),
    "pattern": LoRA(r=4, lora_alpha=8, rank_pattern={"q_proj": 2, "down_proj": 7}, alpha_pattern={"up_proj": 20.0}),
    "dora": DoRA(r=8, lora_alpha=16),
}
SPREAD = 0.01


def main() -> int:
    """Export, run both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/llama-cpp"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = load_base(BASE, dtype="float32")
    plain_gguf(find_embedded(BASE), file := args.work / "base.gguf")
    rows = [list(piece.ids) for piece in pieces(general_text(), base.tokenizer, length=256, count=5)]
    (args.work / "ids.json").write_text(json.dumps(rows))
    bank = attach(base.model)
    for seed, (name, method) in enumerate(METHODS.items()):
        bank.add(name, method, seed=seed)
        _stir(bank[name], seed)
        bank.save(name, args.work / name, base_name=BASE)
    ours_of = lambda route: _ours(bank, route, rows)  # noqa: E731
    plain, worst = ours_of(None), 1.0
    print(f"{'adapter':<20} {'same top-1':>10} {'base alone':>11} {'difference':>13} {'change':>7}")
    for name, words, more, route in cases(args.work, bank):
        out = args.work / f"{name}.gguf"
        out.unlink(missing_ok=True)
        assert veneer(["export", *words, "--to", "gguf", "--out", str(out), *more, "--json"]) == 0
        peer = Path(__file__).with_name("peer_llama_cpp.py")
        result = args.work / f"{name}.npy"
        subprocess.run(
            [args.python, str(peer), str(file), str(out), str(args.work / "ids.json"), str(result)], check=True
        )
        theirs, ours = torch.from_numpy(numpy.load(result)), ours_of(route)
        same, unmoved = (float((x.argmax(-1) == ours.argmax(-1)).float().mean()) for x in (theirs, plain))
        apart, moved = float((theirs - ours).abs().max()), float((ours - plain).abs().max())
        print(f"{name:<20} {same:>10.2%} {unmoved:>11.2%} {apart:>13.2g} {moved:>7.2g}", flush=True)
        worst = min(worst, same)
    print(f"minimum: {worst:.2%} of {sum(map(len, rows))} positions")
    return int(worst < 0.99)


def cases(work: Path, bank: Any) -> list[tuple[str, list[str], list[str], Any]]:
    """(name, exported targets, flags, our equivalent route)."""
    mix = {"lora": 0.5, "rslora": -0.25, "pattern": 1.0}
    named: list[tuple[str, list[str], list[str], Any]] = [
        (n, [str(work / n)], [], n) for n in ("lora", "rslora", "pattern")
    ]
    named.append(("lora-f16", [str(work / "lora")], ["--dtype", "f16"], "lora"))
    named.append(("mix", [f"{work / name}:{weight}" for name, weight in mix.items()], [], mix))
    weights = {name: site.weight_2d for name, site in bank.sites.items()}
    cut = combine(
        "sum", [Parent(read_adapter(work / "dora", "dora"))], weights=weights.__getitem__, rank=64, form="lora"
    )
    bank.insert(copy_as(cut.adapter, "dora-as-lora"))
    named.append(("dora-rank-64", [str(work / "dora")], ["--rank", "64"], "dora-as-lora"))
    return named


def plain_gguf(source: Path, out: Path) -> None:
    """Write the same model with every tensor in fp32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, numpy.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stir(adapter: Adapter, seed: int) -> None:
    """Give an adapter random values, large enough to change the most likely tokens."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for _, key, value in adapter.named_tensors():
            size = 0.02 * value.abs().mean() if key == "lora_magnitude_vector" else SPREAD
            value.add_(size * torch.randn(value.shape, generator=generator))
    adapter.requires_grad_(False)


def _ours(bank: Any, route: Any, rows: list[list[int]]) -> Tensor:
    with bank.use(route, training=False), torch.no_grad():
        return torch.cat([bank.model(input_ids=torch.tensor([row])).logits[0] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
