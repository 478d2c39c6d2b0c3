"""``veneer export ADAPTER --to peft|gguf|ollama|card --out PATH``: an adapter for another program, or its card.

peft      a folder that PEFT loads, with a receipt; PiSSA and OLoRA folders become the change that they are
gguf      one file that llama.cpp loads beside the base's GGUF file (--lora FILE)
ollama    a folder with that file and a Modelfile
card      a model card in Markdown
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._json import as_json
from veneer.cli._mix import Entry, base_of, parse_mix
from veneer.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from veneer.adapters import Adapter
    from veneer.checkpoints.base_files import Skeleton
    from veneer.deltas.parents import Parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("adapter", nargs="+", metavar="ADAPTER", help="a folder, or a weighted mix: a:0.7 b:0.3")
    parser.add_argument("--to", required=True, choices=("peft", "gguf", "ollama", "card"), help="what to write")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="file (gguf, card) or folder (peft, ollama)"
    )
    parser.add_argument("--base", metavar="MODEL", help="the base (default: the one that the adapter's folder names)")
    parser.add_argument(
        "--dtype",
        choices=("f32", "f16", "bf16"),
        default="f32",
        help="gguf, ollama: numbers of the factors (default f32)",
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="gguf, ollama: write DoRA, or a mix, as its best LoRA of this rank"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="MODEL",
        help="ollama: the base that the Modelfile names (default: its GGUF file)",
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="card: the run whose command and figures it shows")
    parser.add_argument("--force", action="append", default=[], metavar="WHAT", help="override a check, such as base")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Write what was asked for."""
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank: expected 1 or more, found {args.rank}")
    from veneer.deltas.parents import read_parents

    entries = parse_mix(args.adapter)
    if args.to == "peft":
        return _peft(args, entries)
    parents = read_parents(entries, force=args.force)
    if args.to == "card":
        report = _card(args, parents, entries[0][0])
    else:
        report = _gguf(args, parents)
    print(as_json(report) if args.json else "\n".join(_lines(report)))
    return 0


def _peft(args: argparse.Namespace, entries: Sequence[Entry]) -> int:
    """Load one adapter onto its base, converted where it must be, and write it as a folder of its own."""
    from veneer.checkpoints import attach, receipt
    from veneer.checkpoints.model_folder import check_free
    from veneer.cli._target import base_named_in
    from veneer.models.load import load_base

    folder, name, weight = entries[0]
    if len(entries) > 1 or weight != 1:
        raise ConfigError("--to peft takes one adapter as it is; for a weighted mix use veneer compose")
    check_free(args.out)
    model = args.base or base_named_in(folder)
    bank = attach(load_base(model, dtype="float32").model)
    adapter = bank.load(folder, name=name, force=args.force, convert=True)
    origin = {key: value for key, value in (adapter.meta["receipt"] or {}).items() if key not in receipt.MADE_ANEW}
    bank.save(name, args.out, base_name=model, receipt=origin, template=adapter.meta["template"])
    report = {
        "to": "peft",
        "file": str(args.out),
        "bytes": sum(file.stat().st_size for file in args.out.iterdir()),
        "error": 0.0,
        "sites": len(adapter.tensors),
        "notes": adapter.meta["notes"],
    }
    print(as_json(report) if args.json else "\n".join(_lines(report)))
    return 0


def _gguf(args: argparse.Namespace, parents: Sequence[Parent]) -> dict[str, Any]:
    from veneer.checkpoints.base_files import base_folder, fit, skeleton
    from veneer.checkpoints.foreign.gguf import layout_of, write_gguf
    from veneer.checkpoints.model_folder import check_free
    from veneer.deltas.parents import check_base

    name = base_of(parents, args.base)
    file = args.out / "adapter.gguf" if args.to == "ollama" else args.out
    check_free(args.out)
    source = _source(args, name) if args.to == "ollama" else None
    base = skeleton(base_folder(name))
    for adapter in {id(parent.adapter): parent.adapter for parent in parents}.values():
        fit(adapter, base)
        if "base" not in args.force:
            check_base(adapter, base.weight_2d, name)
    tied = any(group for group in base.survey.tied.values())
    layout = layout_of(base.folder.config, tied=tied)
    adapter, error = _as_lora(parents, base, args.rank)
    size = write_gguf(adapter, file, layout, dtype=args.dtype, base_name=name)
    report = {
        "to": args.to,
        "file": str(file),
        "bytes": size,
        "dtype": args.dtype,
        "error": error,
        "family": layout.family,
    }
    if source is not None:
        modelfile = args.out / "Modelfile"
        modelfile.write_text(f"FROM {source}\nADAPTER ./adapter.gguf\n", encoding="utf-8")
        report |= {"modelfile": str(modelfile), "from": source}
    return report


def _as_lora(parents: Sequence[Parent], base: Skeleton, rank: int | None) -> tuple[Adapter, float]:
    """One LoRA adapter that does what the parents do together, and how far it is from them.

    A LoRA adapter alone is taken as it is, and a mix of LoRA adapters is one exactly; what has gains is approximated, if asked.
    """
    from veneer.compose.combine import combine

    alone = parents[0].adapter
    gains = any(parent.adapter.method.needs_base_weights for parent in parents)
    if len(parents) == 1 and parents[0].weight == 1 and not gains and rank is None:
        return alone, 0.0
    if gains and rank is None:
        raise ExportError(
            f'"{next(p.adapter.name for p in parents if p.adapter.method.needs_base_weights)}" is a DoRA adapter, '
            "and a GGUF adapter holds LoRA: "
            "give --rank R for its best approximation, whose error is told, or merge it (veneer merge) and convert the whole model"
        )
    name = "-".join(parent.adapter.name for parent in parents)[:100]
    made = combine("sum", parents, name=name, weights=base.weight_2d, rank=rank, form="lora")
    return made.adapter, made.error


def _source(args: argparse.Namespace, base: str) -> str:
    """What the Modelfile calls the base: what was given, or the GGUF file that the base is."""
    from veneer.models.sources import resolve

    if args.source:
        if any(letter in args.source for letter in "\r\n"):
            raise ConfigError("--from: expected one line")
        return str(args.source)
    found = resolve(base)
    if not found.gguf:
        raise ConfigError(
            f"{base} is no GGUF file; say with --from what Ollama shall load: a name such as llama3.2, or a .gguf file"
        )
    return str(found.path.resolve())


def _card(args: argparse.Namespace, parents: Sequence[Parent], folder: Path) -> dict[str, Any]:
    from veneer._files import replace_text
    from veneer.checkpoints.model_folder import check_free
    from veneer.compose.card import model_card
    from veneer.deltas.parents import base_name

    if len(parents) > 1:
        raise ConfigError("a card is of one adapter; compose the mix first (veneer compose)")
    check_free(args.out)
    command, figures = _of_run(args.run, parents[0].adapter.name)
    base = args.base or base_name([parents[0].adapter])
    text = model_card(parents[0].adapter, base=base, command=command, metrics=figures, folder=str(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(args.out, text)
    return {"to": "card", "file": str(args.out), "bytes": len(text.encode()), "error": 0.0}


def _of_run(folder: Path | None, job: str) -> tuple[str | None, dict[str, Any]]:
    """The command of a run and the last figures of one of its jobs; nothing where no run is given."""
    if folder is None:
        return None, {}
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--run {folder}: there is no config.yaml, so this is no run; give a run's folder")
    figures: dict[str, Any] = {}
    files = {file.stem: file for file in (folder / "metrics").glob("*.jsonl")}
    for file in [files.get(job, next(iter(files.values())))] if files else []:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            figures |= {key: value for key, value in row.items() if isinstance(value, int | float) and key != "time"}
    return f"veneer train {folder / 'config.yaml'}", figures


def _lines(report: dict[str, Any]) -> list[str]:
    from veneer.cli._table import percent

    lines = [f"wrote {report['file']} ({report['bytes']:,} bytes)"]
    if report["error"]:
        lines.append(f"it differs from the exact change by {percent(report['error'])}")
    if "modelfile" in report:
        lines.append(
            f"wrote {report['modelfile']} (FROM {report['from']}); ollama create NAME -f {report['modelfile']}"
        )
    elif report["to"] == "gguf":
        lines.append(f"llama.cpp loads it beside a GGUF base of the family {report['family']}: --lora {report['file']}")
    return [*lines, *(f"note: {note}" for note in report.get("notes", ()))]
