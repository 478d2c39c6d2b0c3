"""``veneer demo``: train, evaluate and compare an adapter on the embedded model, in a few minutes and without downloads.

The task is to write the first sentence of a function's docstring. The examples come from Python's standard library;
entire modules are held out. The demo writes an ordinary run, as ``veneer train`` does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._output import print_lines
from veneer.cli._parser import at_least
from veneer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from veneer.adapters import Bank
    from veneer.evaluate.losses import LossDifference, Losses
    from veneer.models.load import Base

NAME = "docstrings"
_SHOWN_ROWS, _SHOWN_ANSWERS = 2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="folder for the run (default: runs/demo)")
    parser.add_argument(
        "--steps", type=at_least(1), default=70, metavar="N", help="number of optimizer steps (default: 70)"
    )
    parser.add_argument("--method", choices=("lora", "dora"), default="lora", help="adapter method (default: lora)")
    parser.add_argument(
        "--examples", type=at_least(2), default=96, metavar="N", help="number of held-out functions (default: 96)"
    )
    parser.add_argument("--fresh", action="store_true", help="delete the earlier demo in the folder and start over")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    began = time.monotonic()
    out = Path(args.out)
    _check_folder(out)
    _head("The data")
    files = _write_data(out, args.examples, fresh=args.fresh)
    from veneer.checkpoints import attach
    from veneer.models.load import load_base
    from veneer.training.process_memory import highest

    _head("The base")
    base = load_base("smollm2-135m")
    count = sum(parameter.numel() for parameter in base.model.parameters())
    print(
        f"SmolLM2-135M-Instruct, {count / 1e6:.1f} million parameters in {str(base.dtype).removeprefix('torch.')}, frozen."
    )
    _show_rows(base, files["train"])

    _head("Training")
    adapter = _train(args, out, files, base)

    bank = attach(base.model)
    bank.load(adapter, name=NAME)
    bank[NAME].requires_grad_(False)
    _head("Result")
    before, after, difference = _evaluate(base, bank, files["valid"])
    share = 100 * (before.mean - after.mean) / before.mean
    print(f"held-out loss of the base     {before.mean:.3f}")
    print(f"held-out loss of the adapter  {after.mean:.3f}  ({share:.0f} % lower)")
    print(
        f"difference {difference.mean:+.3f} (95 % interval {difference.low:+.3f} to {difference.high:+.3f}, "
        f"paired over {len(before.sums)} functions)"
    )
    _side_by_side(base, bank, files["valid"])

    _head("Costs")
    _sizes(base, bank, adapter)
    print(
        f"The demo took {(time.monotonic() - began) / 60:.1f} minutes and at most {highest() / 1e9:.2f} GB of memory."
    )
    _head("Next steps")
    _next_steps(out, files, adapter)
    return 0


def _write_data(out: Path, examples: int, *, fresh: bool) -> dict[str, Path]:
    """Write the training and held-out examples as two files in the folder of the run."""
    from veneer.data.stdlib_docs import stdlib_pairs

    if fresh and out.exists():
        shutil.rmtree(out)
    train, valid = stdlib_pairs()
    chosen = valid[:: max(1, len(valid) // examples)][:examples]
    files = {name: out / "data" / f"{name}.jsonl" for name in ("train", "valid")}
    _write_rows(out, {files["train"]: train, files["valid"]: chosen})
    modules = {row["module"] for row in train}
    print_lines(
        [
            f"Training: {len(train):,} functions from {len(modules)} modules of the standard library of Python "
            f"{sys.version_info.major}.{sys.version_info.minor}. "
            f"Held out: {len(chosen)} functions from {len({row['module'] for row in valid})} other modules."
        ]
    )
    return files


def _check_folder(out: Path) -> None:
    """Raise ConfigError if the folder contains anything but an earlier demo, which would be overwritten."""
    from veneer.data.stdlib_docs import INSTRUCTION

    rows = out / "data" / "train.jsonl"
    if out.is_dir() and not any(out.iterdir()):
        return
    if rows.is_file():
        with rows.open(encoding="utf-8", errors="replace") as file:
            if INSTRUCTION in file.readline(1 << 16):
                return
    if out.exists():
        problem = "contains something other than an earlier demo" if out.is_dir() else "is a file"
        raise ConfigError(f"{out} {problem}; choose another folder with --out")


def _write_rows(out: Path, rows_of: Mapping[Path, Sequence[Mapping[str, Any]]]) -> None:
    """Write all files, or none of them if one cannot be written (CheckpointError)."""
    from contextlib import suppress

    from veneer._files import replace_text

    made = [folder for folder in (out / "data", out, *out.parents) if not folder.exists()]
    try:
        (out / "data").mkdir(parents=True, exist_ok=True)
        for path, rows in rows_of.items():
            replace_text(
                path, "".join(json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in rows)
            )
    except OSError as error:
        if made:
            for path in rows_of:
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise CheckpointError(f"{out} cannot be written: {error.strerror}; choose another folder with --out") from error


def _show_rows(base: Base, file: Path) -> None:
    from veneer.data.chat.render import Renderer
    from veneer.data.preview import plain_text, rich_text, shown_tokens, summary
    from veneer.data.rows.row import Row

    renderer = Renderer(base.tokenizer)
    print("Two of the examples, with the trained tokens marked:\n")
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(400), lines, strict=False)]
    rows.sort(key=lambda row: len(row["messages"][0]["content"]))
    for row in rows[60 : 60 + _SHOWN_ROWS]:
        rendered = renderer.render(Row.chat("example", row["messages"]))[0]
        shown = shown_tokens(rendered, renderer.encoder)
        if sys.stdout.isatty():
            from rich.console import Console

            Console().print(rich_text(shown))
        else:
            print(plain_text(shown))
        print(f"({summary(rendered)})\n")


def _train(args: argparse.Namespace, out: Path, files: dict[str, Path], base: Base) -> Path:
    from veneer.training import train

    result = train(
        {
            "data": (files["train"],),
            "valid": (files["valid"],),
            "out": out,
            "name": NAME,
            "method": args.method,
            "r": 16,
            "learning_rate": 5e-4,
            "batch_size": 7,
            "tokens_per_pass": 768,
            "steps": args.steps,
            "warmup_steps": 5,
            "eval_every": max(1, (args.steps + 1) // 2),
            "plan": False,
        },
        base=base,
    )
    return result.best


def _evaluate(base: Base, bank: Bank, file: Path) -> tuple[Losses, Losses, LossDifference]:
    from veneer.data.chat.render import Renderer
    from veneer.data.dataset import load_examples
    from veneer.evaluate.losses import compare, example_losses
    from veneer.models.flat import FlatRunner
    from veneer.training.run.console import Console

    examples, _ = load_examples([file], Renderer(base.tokenizer))
    runner = FlatRunner(base.model)
    screen = Console()

    def progress(who: str) -> Callable[[int], None]:
        return lambda done: screen.progress(f"evaluated {who} on {done} of {len(examples)} functions")

    before = example_losses(runner, examples, bank=bank, progress=progress("the base"))
    after = example_losses(runner, examples, bank=bank, route=NAME, progress=progress("the adapter"))
    screen.clear()
    return before, after, compare(after, before)


def _side_by_side(base: Base, bank: Bank, file: Path) -> None:
    from veneer.serve.engine.request import SamplingParams
    from veneer.serve.generation import text_generator

    generator = text_generator(base, bank)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: len(row["messages"][0]["content"]))
    step = max(1, len(rows) // (_SHOWN_ANSWERS + 1))
    shown = rows[step : step * (_SHOWN_ANSWERS + 1) : step]
    prompts = [row["messages"][:1] for row in shown]
    answers = generator.write_many(  # all in one batch, under the base and under the adapter
        [*prompts, *prompts], [*[None] * len(shown), *[NAME] * len(shown)], SamplingParams(max_tokens=32)
    )
    for row, plain, adapted in zip(shown, answers[: len(shown)], answers[len(shown) :], strict=True):
        code = row["messages"][0]["content"].split("\n\n", 1)[1]
        print("\n" + "\n".join(f"    {line}" for line in code.splitlines()[:6]))
        print(f"  {'base':<8} {_one_line(plain)}\n  {'adapter':<8} {_one_line(adapted)}")
        print(f"  {'truth':<8} {row['messages'][1]['content']}")


def _one_line(answer: str) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= 100 else text[:97] + "..."


def _sizes(base: Base, bank: Bank, adapter: Path) -> None:
    size = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    held = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    print(f"The adapter has {size / 1e6:.1f} MB, {100 * size / held:.1f} % of the {held / 1e6:.0f} MB of the base.")
    print(f"Merging it into the weights changes the logits by at most {_merge_error(base, bank):.2g} in fp32.")


def _merge_error(base: Base, bank: Bank) -> float:
    """Return the largest difference between the logits with the adapter attached and merged, both in fp32."""
    import torch

    from veneer.training.process_memory import give_back

    give_back()
    text = "def area(radius):\n    return 3.14159 * radius ** 2\n"
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])  # type: ignore[misc]
    base.model.float()
    with torch.no_grad():
        with bank.use(NAME, training=False):
            adapted = base.model(ids).logits
        merged = bank.merged_state_dict(NAME)
        plain = torch.func.functional_call(base.model, merged, (ids,), tie_weights=False).logits
    return float((adapted - plain).abs().max())


def _next_steps(out: Path, files: dict[str, Path], adapter: Path) -> None:
    """Print commands to continue with; the first one puts ``veneer`` on the PATH if it is not there."""
    run, train, valid = (shlex.quote(str(path)) for path in (out, files["train"], files["valid"]))
    activate = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("veneer") is None and activate.is_file():
        near = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        print(f"  source {shlex.quote(str(near))}")
    for line in (
        f"veneer chat {run}",
        f'veneer generate {run} --compare "What does os.path.join do?"',
        f"veneer evaluate {run} --data {valid} --general",
        f"veneer merge {run} --out {shlex.quote(f'{out}-merged')}",
        f"veneer inspect {shlex.quote(str(adapter))}",
        f"veneer train {train} --valid {valid} --method dora --out runs/dora",
    ):
        print(f"  {line}")


def _head(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
