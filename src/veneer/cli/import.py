"""``veneer import FOLDER --base MODEL --out DIR``: an adapter of mlx-lm or LitGPT as a PEFT folder.

mlx-lm    a folder with adapters.safetensors and adapter_config.json, as mlx_lm.lora leaves it
LitGPT    a folder with lit_model.lora.safetensors and hyperparameters.yaml (its own lit_model.pth.lora is a pickle, which is not
          opened here; the command says how to convert it)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._json import as_json
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.adapters import Adapter
    from veneer.checkpoints.base_files import Skeleton


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the adapter's folder, as mlx-lm or LitGPT left it")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the base that it was trained on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new adapter's folder")
    parser.add_argument("--name", metavar="NAME", help="the new adapter's name (default: the folder's)")
    parser.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="factor on B A, where the folder's own settings do not say it (lora_alpha / r)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert, write, and say what it is now."""
    if args.scale is not None and not (math.isfinite(args.scale) and args.scale > 0):
        raise ConfigError(f"--scale: expected a number above 0, found {args.scale:g}")
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.base_files import base_folder, skeleton
    from veneer.checkpoints.foreign.factors import program_of
    from veneer.checkpoints.model_folder import check_free
    from veneer.deltas.parents import records_of

    check_free(args.out)
    program = program_of(args.folder)
    base = skeleton(base_folder(args.base))
    adapter, model = _read(program, args, base)
    made_by: dict[str, Any] = {"operation": "import", "from": program, **({"model": model} if model else {})}
    receipt = {"made_by": made_by, "base": records_of(base, adapter.tensors)}
    task = "CAUSAL_LM" if type(base.model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None
    write_adapter(adapter, args.out, base_name=args.base, task_type=task, receipt=receipt)
    report = {"out": str(args.out), **made_by, "method": adapter.method.name, "parameters": adapter.num_parameters()}
    report["sites"] = {site: {"rank": adapter.rank(site), "scale": adapter.scale(site)} for site in adapter.tensors}
    print(as_json(report) if args.json else "\n".join(_lines(adapter, report, args.base)))
    return 0


def _read(program: str, args: argparse.Namespace, base: Skeleton) -> tuple[Adapter, str | None]:
    from veneer.checkpoints.foreign.litgpt import read_litgpt
    from veneer.checkpoints.foreign.mlx import read_mlx

    name = args.name or args.out.resolve().name
    if program == "mlx-lm":
        return read_mlx(args.folder, name, base.sites, scale=args.scale)
    return read_litgpt(args.folder, name, base.sites, base.folder.config, scale=args.scale)


def _lines(adapter: Adapter, report: dict[str, Any], base: str) -> list[str]:
    ranks, scales = ({adapter.rank(s) for s in adapter.tensors}, {f"{adapter.scale(s):.4g}" for s in adapter.tensors})
    kind = adapter.method.label
    lines = [
        f"a {kind} adapter of {report['from']}, rank {', '.join(map(str, sorted(ranks)))} and scale {', '.join(sorted(scales))} at "
        f"{len(adapter.tensors)} sites, {adapter.num_parameters():,} parameters, now a PEFT folder in {report['out']}"
    ]
    if report.get("model"):
        lines.append(
            f"it says that it was trained on {report['model']}; that {base} has the same weights cannot be seen from its files"
        )
    return lines
