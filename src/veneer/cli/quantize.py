"""``veneer quantize BASE --to nf4 [--calibrate ROWS] --out DIR``: write a base with quantized weights."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from veneer._terminal import counted, status
from veneer.checkpoints.locate import QUANTIZED
from veneer.cli._output import as_json, percent, print_lines, table
from veneer.cli._parser import add_device, add_json, add_sites, at_least
from veneer.cli._row_arguments import add_format_arguments, pairs_of
from veneer.cli.merge import parse_size
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.checkpoints.quantized_folder import Calibrated, QuantizeReport
    from veneer.models.quantized.scheme import Scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("base", metavar="BASE", help="base model: a hub id, a folder, a GGUF file or smollm2-135m")
    parser.add_argument("--to", required=True, choices=QUANTIZED, help="format of the linear layers' weights")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the quantized model")
    parser.add_argument(
        "--single", action="store_true", help="keep the scales of nf4 and fp4 in float32 (no double quantization)"
    )
    parser.add_argument(
        "--experts", action="store_true", help="quantize stacked experts too; only Veneer reads such a folder"
    )
    parser.add_argument(
        "--calibrate",
        metavar="ROWS",
        help="file of examples: round so that the layers' outputs on them change little (GPTQ); takes the base in memory, and minutes",
    )
    parser.add_argument(
        "--calibrate-tokens", type=at_least(128), metavar="N", help="tokens of the examples to use (default: 8192)"
    )
    add_format_arguments(parser)
    add_device(parser)
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of a Hub model")
    parser.add_argument(
        "--shard-size", default="2GB", metavar="SIZE", help="maximum size of a file, such as 500MB (default: 2GB)"
    )
    add_sites(parser, "least accurate")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Quantize the base, write it and report the error."""
    from veneer.checkpoints.base_files import base_folder, skeleton
    from veneer.checkpoints.model_folder import check_free
    from veneer.checkpoints.quantized_folder import check_quantizable, quantize_to_folder
    from veneer.models.quantized.scheme import Scheme

    if args.calibrate is None:
        given = {
            "--calibrate-tokens": args.calibrate_tokens,
            "--columns": args.columns,
            "--format": args.format != "auto",
        }
        for flag in (flag for flag, value in given.items() if value):
            raise ConfigError(f"{flag} is about calibration examples; give them with --calibrate ROWS, or leave it out")
    shard_bytes = parse_size(args.shard_size)
    check_free(args.out)
    scheme = Scheme(args.to, double=args.to != "int8" and not args.single)
    base = skeleton(base_folder(args.base, args.revision))
    check_quantizable(base, scheme)  # before minutes of calibration
    calibrated = None if args.calibrate is None else _calibrated(args, scheme)
    report = status("quantizing")(quantize_to_folder)(
        base, args.out, scheme, shard_bytes=shard_bytes, experts=args.experts, calibrated=calibrated
    )
    if args.json:
        print(as_json(asdict(report)))
    else:
        print_lines(_lines(report, args.sites))
    return 0


def _calibrated(args: argparse.Namespace, scheme: Scheme) -> Calibrated:
    """The base in memory, quantized with regard to its inputs on the rows."""
    from veneer.checkpoints.quantized_folder import CALIBRATION_TOKENS, calibrate, draw
    from veneer.config import TrainOptions
    from veneer.models.load import load_base
    from veneer.training.run.setup import context_of, load_data

    columns = pairs_of("--columns", args.columns)
    rows = TrainOptions(data=(Path(args.calibrate),), format=args.format, columns=columns, truncate="end")
    with status("loading"):
        base = load_base(args.base, revision=args.revision, device=args.device)
        data = load_data(rows, base, context_of(base))
    with status("calibrating"):
        return calibrate(base, draw(data.train, args.calibrate_tokens or CALIBRATION_TOKENS), scheme)


def _lines(report: QuantizeReport, count: int) -> list[str]:
    sizes = f"{report.before / 1e9:.2f} GB to {report.after / 1e9:.2f} GB"
    experts = f" and {report.stacks} parameters of stacked experts" if report.stacks else ""
    rows = [[name, percent(error)] for name, error in nlargest(count, report.layers.items(), key=itemgetter(1))]
    lines = [
        f"quantized {len(report.layers) - report.stacks} linear layers{experts} to {report.format} in {report.out}: {sizes}",
        f"the weights differ from the exact ones by {percent(report.error)} of their norm",
        "",
        *table(["least accurate layers", "error"], rows),
    ]
    if report.calibration is not None:
        tokens, examples = report.calibration["tokens"], report.calibration["examples"]
        lines[1] += (
            f"; the values were chosen by the layers' outputs on {tokens:,} tokens of {counted(examples, 'example')}"
        )
    if report.experts:
        lines += [
            "",
            f"the stacked experts ({report.experts / 1e9:.2f} GB) are as they were, since transformers reads quantized linear layers only; "
            "--experts quantizes them, for Veneer alone",
        ]
    if report.plain:
        lines += ["", f"not quantized, since the files hold them in another shape: {', '.join(report.plain[:5])}"]
    return lines
