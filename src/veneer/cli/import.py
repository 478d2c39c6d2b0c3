"""``veneer import FOLDER --base MODEL --out DIR``: convert an adapter of mlx-lm or LitGPT to a PEFT folder.

mlx-lm    a folder with adapters.safetensors and adapter_config.json, as mlx_lm.lora writes it
LitGPT    a folder with lit_model.lora.safetensors and hyperparameters.yaml. LitGPT's own lit_model.pth.lora is a
          pickle and is never opened; the error message shows how to convert it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import note
from veneer.cli._output import as_json, print_lines
from veneer.cli._parser import add_force, add_json, number

if TYPE_CHECKING:
    from veneer.adapters import Adapter
    from veneer.checkpoints.base_files import Skeleton


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="adapter folder of mlx-lm or LitGPT")
    parser.add_argument("--base", required=True, metavar="MODEL", help="base model of the adapter")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the new adapter")
    parser.add_argument("--name", metavar="NAME", help="name of the new adapter (default: the name of its folder)")
    parser.add_argument(
        "--scale",
        type=number("a number above 0", lambda value: value > 0),
        metavar="X",
        help="lora_alpha / r, if the adapter folder does not contain it",
    )
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert the adapter, write it and report on it."""
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.base_files import base_folder, skeleton
    from veneer.checkpoints.foreign.factors import program_of
    from veneer.checkpoints.model_folder import check_free
    from veneer.deltas.parents import records_of

    check_free(args.out)
    program = program_of(args.folder)
    base = skeleton(base_folder(args.base))
    adapter, model = _read(program, args, base)
    for remark in adapter.meta["notes"]:
        note(f"{args.folder}: {remark}")
    made_by: dict[str, Any] = {"operation": "import", "from": program, **({"model": model} if model else {})}
    receipt = {"made_by": made_by, "base": records_of(base, adapter.tensors)}
    task = "CAUSAL_LM" if type(base.model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None
    write_adapter(adapter, args.out, base_name=args.base, task_type=task, receipt=receipt)
    report = {"out": str(args.out), **made_by, "method": adapter.method.name, "parameters": adapter.num_parameters()}
    report["sites"] = {site: {"rank": adapter.rank(site), "scale": adapter.scale(site)} for site in adapter.tensors}
    if args.json:
        print(as_json(report))
    else:
        print_lines(_lines(adapter, report, args.base))
    return 0


def _read(program: str, args: argparse.Namespace, base: Skeleton) -> tuple[Adapter, str | None]:
    from veneer.checkpoints.foreign.litgpt import read_litgpt
    from veneer.checkpoints.foreign.mlx import read_mlx

    name = args.name or args.out.resolve().name
    if program == "mlx-lm":
        return read_mlx(args.folder, name, base.sites, scale=args.scale, force=args.force)
    return read_litgpt(args.folder, name, base.sites, base.folder.config, scale=args.scale, force=args.force)


def _lines(adapter: Adapter, report: dict[str, Any], base: str) -> list[str]:
    ranks = ", ".join(map(str, sorted({adapter.rank(site) for site in adapter.tensors})))
    scales = ", ".join(sorted({f"{adapter.scale(site):.4g}" for site in adapter.tensors}))
    lines = [
        f"converted a {adapter.method.label} adapter of {report['from']}, rank {ranks} and scale {scales} at "
        f"{len(adapter.tensors)} sites ({adapter.num_parameters():,} parameters), to a PEFT folder in {report['out']}"
    ]
    if report.get("model"):
        lines.append(
            f"the adapter was trained on {report['model']}; its files do not show whether {base} has the same weights"
        )
    return lines
