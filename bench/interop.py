"""Compare adapters of mlx-lm and LitGPT, run by those programs, with the folders that ``veneer import`` makes of them.

    python -m bench.interop --mlx PYTHON --litgpt PYTHON [--work runs/interop] [--real]

PYTHON is an interpreter with the program: ``pip install 'mlx[cpu]' mlx-lm``, ``pip install litgpt safetensors``.
For each family a tiny random base is saved; the other program adds an adapter with random values (bench/peer_mlx.py, bench/peer_litgpt.py),
saves it in its format and reports its logits; then Veneer and PEFT run the imported folder. --real adds the embedded model. Prints the
largest difference of logits and the largest change that the adapter makes; exits 1 above 1e-4 of the largest logit (both programs sum in
another order than torch).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.tiny import tiny, tiny_tokenizer
from torch import Tensor

from veneer.checkpoints import attach
from veneer.checkpoints.base_files import base_folder
from veneer.cli.main import main as veneer
from veneer.models.load import load_base

CASES = {
    "mlx": (
        ("llama", "lora"),
        ("llama", "dora"),
        ("llama", "embedding"),
        ("phi3", "lora"),
        ("olmo2", "lora"),
    ),
    "litgpt": (
        ("llama", "qv"),
        ("llama", "all"),
        ("gpt_neox", "all"),
        ("gpt_neox", "qk"),
        ("phi3", "all"),
        ("phi3", "qv"),
    ),
}
REAL = {"mlx": (("real", "lora"), ("real", "dora")), "litgpt": (("real", "qv"), ("real", "all"))}
IDS = [list(range(270, 307))]
"""Ordinary tokens of every vocabulary. Control tokens amplify the embedded model's rounding to 1e-4 of its logits."""


def main() -> int:
    """Run every case of the given programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx", metavar="PYTHON")
    parser.add_argument("--litgpt", metavar="PYTHON")
    parser.add_argument("--work", type=Path, default=Path("runs/interop"))
    parser.add_argument("--real", action="store_true", help="also run the embedded model")
    args = parser.parse_args()
    if not (args.mlx or args.litgpt):
        parser.error("give the interpreter of at least one program")
    worst = 0.0
    print(
        f"{'program':<8} {'base':<9} {'adapter':<10} {'sites':>5} {'change':>9} {'ours':>9} {'PEFT':>9}   (largest logit 1)"
    )
    for program, python in (("mlx", args.mlx), ("litgpt", args.litgpt)):
        for arch, kind in [*CASES[program], *(REAL[program] if args.real else ())] if python else []:
            worst = max(worst, case(program, python, arch, kind, args.work / f"{program}-{arch}-{kind}"))
    print(f"largest difference: {worst:.1e}")
    return int(worst > 1e-4)


def case(program: str, python: str, arch: str, kind: str, work: Path) -> float:
    """Compare one adapter. Returns the larger difference, relative to the largest logit."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    base = _base(arch, work / "base")
    peer = Path(__file__).with_name(f"peer_{program}.py")
    subprocess.run([python, str(peer), str(base), str(work / "theirs"), arch, kind], check=True)
    if program == "litgpt":
        _convert(python, work)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = veneer(["import", str(work / "theirs"), "--base", str(base), "--out", str(work / "ours")])
    assert code == 0, said.getvalue()
    expected = load_file(work / "theirs.logits.safetensors")
    size = float(expected["adapted"].abs().max())
    plain, ours, peft, sites = _logits(base, work / "ours")
    assert float((plain - expected["base"]).abs().max()) < 1e-4 * size, "the two programs do not even agree on the base"
    change, *apart = (
        float((x - y).abs().max()) / size
        for x, y in ((ours, plain), (ours, expected["adapted"]), (peft, expected["adapted"]))
    )
    print(f"{program:<8} {arch:<9} {kind:<10} {sites:>5} {change:>9.1e} {apart[0]:>9.1e} {apart[1]:>9.1e}", flush=True)
    return max(apart)


def _base(arch: str, folder: Path) -> Path:
    if arch == "real":
        return base_folder("smollm2-135m")
    sizes = {"phi3": {"sliding_window": None, "pad_token_id": 0}, "gpt_neox": {"intermediate_size": 128}}
    with _silent():
        tiny(arch, **sizes.get(arch, {})).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def _convert(python: str, work: Path) -> None:
    """Check that the pickle is refused, and that the command in the message works."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert veneer(["import", str(work / "theirs"), "--base", str(work), "--out", str(work / "no")]) == 1
    command = re.search(r"python (-c \".*\")", said.getvalue())
    assert command is not None, said.getvalue()
    subprocess.run([str(Path(python).absolute()), *shlex.split(command[1])], check=True, cwd=work / "theirs")


def _logits(base: Path, folder: Path) -> tuple[Tensor, Tensor, Tensor, int]:
    from peft import PeftModel

    ids = torch.tensor(IDS)
    with torch.no_grad(), _silent():
        model = load_base(base, dtype="float32").model
        plain = model(input_ids=ids)[0]
        bank = attach(model)
        adapter = bank.load(folder, name="theirs")
        with bank.use("theirs"):
            ours = model(input_ids=ids)[0]
        sites = len(adapter.tensors)
        bank.detach()
        return plain, ours, PeftModel.from_pretrained(model, str(folder))(input_ids=ids)[0], sites


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
