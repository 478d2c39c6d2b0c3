"""``veneer export ADAPTER --to peft|vllm|gguf|ollama|card --out PATH``: convert an adapter, or write its model card.

peft      a PEFT folder with a receipt; PiSSA and OLoRA adapters become changes of the original base
vllm      a PEFT folder of plain LoRA, which vLLM serves, and the command to serve it with
gguf      a file that llama.cpp loads beside the base's GGUF file (--lora FILE); with --merged the whole model as one file
ollama    a folder with that file and a Modelfile
card      a model card in Markdown
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._output import as_json, difference_from, print_lines
from veneer.cli._parents import Entry, base_of, checked_base, parse_mix, stops_of
from veneer.cli._parser import add_force, add_json, at_least
from veneer.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from veneer.adapters import Adapter
    from veneer.checkpoints.base_files import Skeleton
    from veneer.deltas.parents import Parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", nargs="+", metavar="ADAPTER", help="an adapter, or a weighted mix: a:0.7 b:0.3")
    parser.add_argument("--to", required=True, choices=("peft", "vllm", "gguf", "ollama", "card"), help="output format")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="PATH",
        help="output file (gguf, card) or folder (peft, vllm, ollama)",
    )
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the one named in the adapter folder)")
    parser.add_argument(
        "--dtype",
        choices=("f32", "f16", "bf16"),
        default="f32",
        help="gguf, ollama: data type of the factors (default: f32)",
    )
    parser.add_argument(
        "--rank",
        type=at_least(1),
        metavar="R",
        help="vllm, gguf, ollama: write the best LoRA approximation of this rank; needed for DoRA",
    )
    parser.add_argument(
        "--experts",
        choices=("separate", "fused"),
        default="separate",
        help="peft: tensors of each expert, as vLLM and SGLang read them, or fused ones for PEFT's target_parameters "
        "(default: separate)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="MODEL",
        help="ollama: base model named in the Modelfile (default: the base's GGUF file)",
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="gguf: write the whole model with the adapters merged, from the base's GGUF file",
    )
    parser.add_argument(
        "--quantize",
        choices=("q8_0", "q4_k_m"),
        help="gguf with --merged: format of the matrices in place of --dtype; q4_k_m needs llama.cpp's llama-quantize",
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="card: run whose command and metrics the card shows")
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the output and report on it."""
    from veneer.deltas.parents import read_parents

    if args.merged and args.to != "gguf":
        raise ConfigError(f"--merged goes with --to gguf, found --to {args.to}; veneer merge writes a merged folder")
    if args.quantize and not args.merged:
        raise ConfigError("--quantize needs --merged: adapters are written in --dtype")
    entries = parse_mix(args.adapter)
    if args.to == "peft":
        report = _peft(args, entries)
    else:
        parents = read_parents(entries, force=args.force)
        if args.to == "card":
            report = _card(args, parents, entries[0][0])
        elif args.merged:
            report = _merged_gguf(args, parents)
        else:
            report = _vllm(args, parents) if args.to == "vllm" else _gguf(args, parents)
    if args.json:
        print(as_json(report))
    else:
        print_lines(_lines(report))
    return 0


@status("converting")
def _peft(args: argparse.Namespace, entries: Sequence[Entry]) -> dict[str, Any]:
    """Load one adapter onto its base, converting it if needed, and write it as a new folder."""
    from veneer.checkpoints import attach, receipt
    from veneer.checkpoints.model_folder import check_free
    from veneer.cli._targets import base_named_in
    from veneer.models.load import load_base

    folder, name, weight = entries[0]
    if len(entries) > 1 or weight != 1:
        raise ConfigError("--to peft converts one adapter without a weight; use veneer compose for a weighted mix")
    check_free(args.out)
    model = args.base or base_named_in(folder)
    bank = attach(load_base(model, dtype="float32").model)
    adapter = bank.load(folder, name=name, force=args.force, convert=True)
    origin = {key: value for key, value in (adapter.meta["receipt"] or {}).items() if key not in receipt.MADE_ANEW}
    bank.save(name, args.out, base_name=model, receipt=origin, template=adapter.meta["template"], experts=args.experts)
    return {
        "to": "peft",
        "file": str(args.out),
        "bytes": sum(file.stat().st_size for file in args.out.iterdir()),
        "error": 0.0,
        "sites": len(adapter.tensors),
        "notes": adapter.meta["notes"],
    }


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""


def _vllm(args: argparse.Namespace, parents: Sequence[Parent]) -> dict[str, Any]:
    """Write the adapters as one PEFT folder of plain LoRA."""
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.model_folder import check_free
    from veneer.models.embedded import public_name

    check_free(args.out)
    whole = next((parent.adapter for parent in parents if parent.adapter.overrides), None)
    if whole is not None:
        raise ExportError(
            f'"{whole.name}" has whole tensors beside its factors ({", ".join(list(whole.overrides)[:3])}), and vLLM loads factors only; '
            "merge it instead (veneer merge)"
        )
    name, base = checked_base(parents, args.base, args.force)
    adapter, error = _as_lora(parents, base, args.rank)
    rank = max(adapter.rank(site) for site in adapter.tensors)
    most = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if most is None:
        raise ExportError(
            f"the adapter has rank {rank}, and vLLM takes at most {VLLM_RANKS[-1]}; give a smaller --rank, or merge it"
        )
    template = parents[0].adapter.meta.get("template") if len(parents) == 1 else None
    write_adapter(adapter, args.out, base_name=name, template=template)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    modules = shlex.quote(f"{args.out.name}={args.out}")
    command = (
        f"vllm serve {shlex.quote(public_name(name))} --enable-lora --max-lora-rank {most} --lora-modules {modules}"
    )
    if template is not None:
        command += f" --chat-template {shlex.quote(str(args.out / 'chat_template.jinja'))}"
    return {"to": "vllm", "file": str(args.out), "bytes": size, "error": error, "rank": rank, "command": command}


def _gguf(args: argparse.Namespace, parents: Sequence[Parent]) -> dict[str, Any]:
    from veneer.checkpoints.foreign.gguf import layout_of, write_gguf
    from veneer.checkpoints.model_folder import check_free

    file = args.out / "adapter.gguf" if args.to == "ollama" else args.out
    check_free(args.out)
    source = _ollama_base(args, base_of(parents, args.base)) if args.to == "ollama" else None
    name, base = checked_base(parents, args.base, args.force)
    layout = layout_of(base.folder.config, tied=any(base.survey.tied.values()))
    adapter, error = _as_lora(parents, base, args.rank)
    stops, own = stops_of(parents, base.folder.path)
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
        lines = [f"FROM {source}", "ADAPTER ./adapter.gguf", *(f"PARAMETER stop {json.dumps(text)}" for text in stops)]
        modelfile.write_text("\n".join([*lines, ""]), encoding="utf-8")
        report |= {"modelfile": str(modelfile), "from": source}
    report["notes"] = _generation_notes(args.to, parents, {t: i for t, i in stops.items() if i not in own})
    return report


@status("merging")
def _merged_gguf(args: argparse.Namespace, parents: Sequence[Parent]) -> dict[str, Any]:
    """Write the base's GGUF file with the merged weights in it."""
    from veneer.checkpoints.foreign.gguf import layout_of, merged_weights
    from veneer.checkpoints.foreign.gguf_model import write_gguf_model
    from veneer.checkpoints.model_folder import check_free
    from veneer.models.sources import resolve

    check_free(args.out)
    found = resolve(base_of(parents, args.base))
    if not found.gguf:
        raise ConfigError(
            f"{found.path} is not a GGUF file, whose tokenizer and sizes the new file takes; give one with --base, or merge into a folder "
            "(veneer merge) and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    _, base = checked_base(parents, args.base, args.force)
    layout = layout_of(base.folder.config, tied=any(base.survey.tied.values()))
    mix = [(parent.adapter, parent.weight) for parent in parents]
    changed = merged_weights(mix, layout, base.weight_2d)
    form = args.quantize or args.dtype
    size, error = write_gguf_model(found.path, args.out, changed, form=form)
    return {"to": "gguf", "file": str(args.out), "bytes": size, "format": form, "weights_error": error, "error": 0.0}


def _generation_notes(to: str, parents: Sequence[Parent], other: dict[str, int]) -> list[str]:
    """Remarks about what the output cannot hold: the adapters' chat template, and for llama.cpp the stop tokens beyond the base's."""
    notes = []
    if any(parent.adapter.meta.get("template") for parent in parents):
        notes.append(
            "the adapter was trained with the chat template in its folder, which this format cannot hold; render prompts with it"
        )
    if other and to == "gguf":
        # llama.cpp has two such keys, and also knows usual end tokens by their text.
        options = [
            f"--override-kv tokenizer.ggml.{key}_token_id=int:{i}"
            for key, i in zip(("eot", "eom"), other.values(), strict=False)
        ]
        notes.append(
            f"answers end with {', '.join(other)}, which is not an end token of the base; if llama.cpp generates past it, add "
            f"{' '.join(options)}"
        )
    return notes


@status("converting")
def _as_lora(parents: Sequence[Parent], base: Skeleton, rank: int | None) -> tuple[Adapter, float]:
    """Return one LoRA adapter for the weighted parents, and its relative error.

    Low-rank changes alone are exact. A change that depends on the base weights is approximated, if ``rank`` allows it.
    """
    from veneer.compose.combine import combine

    not_low_rank = [p.adapter for p in parents if p.adapter.method.needs_base_weights]
    if len(parents) == 1 and parents[0].weight == 1 and not not_low_rank and rank is None:
        return parents[0].adapter, 0.0
    if not_low_rank and rank is None:
        raise ExportError(
            f'"{not_low_rank[0].name}" is a {not_low_rank[0].method.label} adapter, and this format can only hold '
            "LoRA; give --rank R for its best approximation, whose error is reported, "
            "or merge it (veneer merge) and convert the merged model"
        )
    name = "-".join(parent.adapter.name for parent in parents)[:100]
    made = combine("sum", parents, name=name, weights=base.weight_2d, rank=rank, form="lora")
    return made.adapter, made.error


def _ollama_base(args: argparse.Namespace, base: str) -> str:
    """Return the base for the Modelfile: the given name, or the base's GGUF file."""
    from veneer.models.sources import resolve

    if args.source:
        if any(letter in args.source for letter in "\r\n"):
            raise ConfigError("--from: expected one line")
        return str(args.source)
    found = resolve(base)
    if not found.gguf:
        raise ConfigError(
            f"{base} is not a GGUF file; name the base for Ollama with --from: a model such as llama3.2, or a .gguf file"
        )
    return str(found.path.resolve())


def _card(args: argparse.Namespace, parents: Sequence[Parent], folder: Path) -> dict[str, Any]:
    from veneer._files import replace_text
    from veneer.checkpoints.model_folder import check_free
    from veneer.checkpoints.peft.card import model_card
    from veneer.checkpoints.receipt import receipt_of
    from veneer.deltas.parents import base_name

    if len(parents) > 1:
        raise ConfigError("a model card describes one adapter; compose the mix first (veneer compose)")
    check_free(args.out)
    command, metrics = _run_info(args.run, parents[0].adapter.name)
    base = args.base or base_name([parents[0].adapter])
    adapter = parents[0].adapter
    text = model_card(
        adapter, base=base, receipt=receipt_of(adapter), command=command, metrics=metrics, folder=str(folder)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(args.out, text)
    return {"to": "card", "file": str(args.out), "bytes": len(text.encode()), "error": 0.0}


def _run_info(folder: Path | None, job: str) -> tuple[str | None, dict[str, Any]]:
    """Return the command of a run and the last metrics of one of its jobs."""
    if folder is None:
        return None, {}
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--run {folder}: not a run: there is no config.yaml")
    metrics: dict[str, Any] = {}
    files = {file.stem: file for file in (folder / "metrics").glob("*.jsonl")}
    for file in [files.get(job, next(iter(files.values())))] if files else []:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            metrics |= {key: value for key, value in row.items() if isinstance(value, int | float) and key != "time"}
    return f"veneer train {folder / 'config.yaml'}", metrics


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"wrote {report['file']} ({report['bytes']:,} bytes)"]
    if report["error"]:
        lines.append(f"it {difference_from('the exact change', report['error'])}")
    if "modelfile" in report:
        lines += [
            f"wrote {report['modelfile']} (FROM {report['from']})",
            f"create the model with: ollama create NAME -f {report['modelfile']}",
        ]
    elif report["to"] == "vllm":
        lines.append(f"serve it with: {report['command']}")
    elif "weights_error" in report:
        lines.append(
            f"the merged weights are off by {report['weights_error']:.2%} in this format before any further step"
        )
        lines.append(f"use it with: llama-cli -m {report['file']}")
    elif report["to"] == "gguf":
        lines.append(f"use it with the base in GGUF: llama-cli -m BASE.gguf --lora {report['file']}")
    return [*lines, *(f"note: {note}" for note in report.get("notes", ()))]
