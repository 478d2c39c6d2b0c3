"""Time and memory of composing and extracting, each in its own process.

    python -m bench.compose [--work runs/bench-compose]

compose    8 adapters of rank 16 on all linear layers of a 1.1B-shaped model (22 blocks, 2048 wide, 5632 in the MLP, 4 key-value heads):
           the exact sum, and the sum cut to rank 16; the limits are 30 s and 2 GB
extract    an adapter of rank 16 from the embedded model and a copy with every weight changed; the limit is 60 s

Measures the whole command, from the interpreter's start to the folder on disk. Exits 1 above a limit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from veneer.adapters import Adapter, LoRA
from veneer.checkpoints import write_adapter
from veneer.checkpoints.base_files import base_folder

SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (256, 2048),
    "self_attn.v_proj": (256, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (5632, 2048),
    "mlp.up_proj": (5632, 2048),
    "mlp.down_proj": (2048, 5632),
}
BLOCKS, RANK, COUNT = 22, 16, 8


def main() -> int:
    """Create the inputs, run the commands and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-compose"))
    parser.add_argument("--prepare", action="store_true", help="only create the inputs")
    args = parser.parse_args()
    adapters = [args.work / f"adapter-{i}" for i in range(COUNT)]
    for i, folder in enumerate(adapters):
        if not folder.is_dir():
            write_adapter(_adapter(f"adapter-{i}", i), folder)
    _tuned(args.work / "tuned")
    if args.prepare:
        return 0
    words = [str(folder) for folder in adapters]
    slow = False
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, command, seconds, gigabytes in (
        ("compose: exact sum", ["compose", *words], 30, 2.0),
        ("compose: sum cut to rank 16", ["compose", *words, "--rank", "16"], 30, 2.0),
        (
            "extract: rank 16",
            ["extract", "--base", "smollm2-135m", "--tuned", str(args.work / "tuned"), "--rank", "16"],
            60,
            None,
        ),
    ):
        out = args.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        took, peak = _measured([sys.executable, "-m", "veneer", *command, "--out", str(out)])
        limit = f"{seconds} s" + ("" if gigabytes is None else f", {gigabytes:g} GB")
        print(f"{name:<28} {took:6.1f} s  {peak:5.2f} GB   (limit {limit})", flush=True)
        slow = slow or took > seconds or (gigabytes is not None and peak > gigabytes)
    return int(slow)


def _measured(command: list[str]) -> tuple[float, float]:
    """(seconds, peak GB) of a command."""
    code = f"import resource, subprocess, sys\nsubprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL)\n"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    began = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - began, int(output) * unit / 1e9


def _adapter(name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors, kinds = {}, {}
    for block in range(BLOCKS):
        for part, (out, in_) in SHAPES.items():
            site = f"model.layers.{block}.{part}"
            a, b = (0.02 * torch.randn(*shape, generator=generator) for shape in ((RANK, in_), (out, RANK)))
            tensors[site], kinds[site] = {"lora_A": a, "lora_B": b}, "linear"
    return Adapter(name, LoRA(r=RANK, lora_alpha=32), tensors, kinds)


def _tuned(folder: Path) -> None:
    """Write a copy of the embedded model with every matrix changed by a hundredth."""
    if folder.is_dir():
        return
    base = base_folder("smollm2-135m")
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(0)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        moved = {
            key: value + 0.01 * value.std() * torch.randn(value.shape, generator=generator)
            if value.dim() == 2
            else value
            for key, value in tensors.items()
        }
        file.unlink()
        save_file(moved, file, metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
