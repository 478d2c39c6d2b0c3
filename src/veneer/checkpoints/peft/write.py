"""An adapter becomes a PEFT folder: settings, tensors with a receipt, and a model card; read back before it counts as written.

    adapter_config.json          what PEFT, vLLM and others build the layers from
    adapter_model.safetensors    the tensors in fp32, the receipt in its metadata
    README.md                    a model card
    chat_template.jinja          the chat template, where it is another than the base's

``target_modules``, ``rank_pattern`` and ``alpha_pattern`` are chosen so that PEFT gives exactly these layers these ranks and scales.
The same adapter gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from veneer._version import __version__
from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.checkpoints import receipt as receipts
from veneer.checkpoints.files import Folder, write_folder
from veneer.checkpoints.findings import listed
from veneer.checkpoints.locate import CONFIG, WEIGHTS
from veneer.checkpoints.logit_check import logits_record
from veneer.checkpoints.peft.overrides_out import own_settings, stored_own
from veneer.checkpoints.peft.patterns import names_for, table_for
from veneer.checkpoints.peft.read import MAX_CONFIG, TEMPLATE
from veneer.checkpoints.peft.settings import settings_for
from veneer.checkpoints.peft.tensor_names import MAGNITUDE, key_of
from veneer.checkpoints.tensors import digest, read_header, read_tensors, to_buffers
from veneer.errors import CheckpointError

CARD = "README.md"
T = TypeVar("T", int, float)
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def write_adapter_folder(
    adapter: Adapter,
    path: Path,
    bank: Bank | None,
    *,
    base_name: str | None = None,
    task_type: str | None = None,
    receipt: Mapping[str, Any] | None = None,
    logits: bool = False,
    template: str | None = None,
) -> None:
    """Write ``adapter`` as the folder ``path``, or over the adapter that is there.

    base_name, task_type: what PEFT calls base_model_name_or_path and task_type; by default what the model says of itself, or what the
    adapter's own folder said. receipt: more entries for the receipt (template, tokenizer and data hashes, say). logits: run the model
    once and record eight numbers of the adapter's logits, for ``veneer inspect --verify``; the adapter must be in the bank.
    template: a chat template that is not the base's own, kept beside the tensors.

    Raises CheckpointError when the place cannot be written, or what was written does not read back equal.
    """
    tensors = stored_tensors(adapter, bank)
    checksum = digest(tensors)
    settings = _settings(adapter, bank, base_name, task_type)
    extra = dict(receipt or {})
    if logits and bank is not None:
        extra["logits"] = logits_record(bank, adapter.name)
    note = receipts.make_receipt(adapter, bank, checksum, extra)
    metadata = {"format": "pt", receipts.KEY: json.dumps(note, sort_keys=True, separators=(",", ":"))}
    config = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    files: dict[str, Sequence[bytes | memoryview]] = {
        CARD: [_card(adapter, settings, note.get("notes", ())).encode()],
        WEIGHTS: to_buffers(tensors, metadata),
        CONFIG: [config],
    }
    if template is not None:
        files[TEMPLATE] = [template.encode()]
    write_folder(path, files)
    _read_back(path, config, checksum)


def stored_tensors(adapter: Adapter, bank: Bank | None) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names and in PEFT's shapes, fp32 (an fp64 master is rounded)."""
    tensors: dict[str, Tensor] = {}
    for site, own in adapter.tensors.items():
        for name, value in own.items():
            stored = value.detach().to(torch.float32)
            if name == MAGNITUDE and adapter.kinds[site] == "conv2d":
                stored = stored.reshape(1, -1, 1, 1)
            tensors[key_of(site, name)] = stored.contiguous()
        for head in _tied_heads(adapter, site, bank):
            # PEFT keeps the head's factors beside the embedding's, transposed.
            tensors[key_of(head, "lora_A")] = own["lora_embedding_B"].detach().float().T.contiguous()
            tensors[key_of(head, "lora_B")] = own["lora_embedding_A"].detach().float().T.contiguous()
    return tensors | stored_own(adapter, bank)


def _tied_heads(adapter: Adapter, site: str, bank: Bank | None) -> list[str]:
    if not adapter.method.ensure_weight_tying or bank is None:
        return []
    return [name for name in bank.tied.get(site, ()) if bank.sites[name].tied_to == site]


def _settings(adapter: Adapter, bank: Bank | None, base_name: str | None, task_type: str | None) -> dict[str, Any]:
    method, sites = adapter.method, list(adapter.tensors)
    ranks = {site: adapter.rank(site) for site in sites}
    alphas = {site: adapter.alpha(site) for site in sites}
    r = _usual(method.r, ranks.values())
    alpha = _usual(method.lora_alpha, alphas.values())
    before = adapter.meta.get("settings") or {}
    every = [path for path, _ in bank.model.named_modules()] if bank is not None else []
    return settings_for(
        r=r,
        lora_alpha=alpha,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        **method.peft_flags(),
        init_lora_weights="gaussian" if method.init_lora_weights == "gaussian" else True,
        target_modules=names_for(sites, every) if every else sorted(sites),
        rank_pattern=table_for(ranks, r),
        alpha_pattern=table_for(alphas, alpha),
        fan_in_fan_out="conv1d" in adapter.kinds.values() and "linear" not in adapter.kinds.values(),
        ensure_weight_tying=method.ensure_weight_tying,
        own=own_settings(adapter, bank),
        base_name=base_name or _base_name(bank) or before.get("base_model_name_or_path"),
        task_type=task_type or _task(bank) or _task_before(adapter, before),
    )


def _usual(declared: T, values: Iterable[T]) -> T:
    """The declared value if any site has it, else the most common one."""
    counts = Counter(values)
    return declared if declared in counts or not counts else counts.most_common(1)[0][0]


def _base_name(bank: Bank | None) -> str | None:
    name = getattr(bank.model, "name_or_path", None) if bank is not None else None
    return name if isinstance(name, str) and name else None


def _task(bank: Bank | None) -> str | None:
    """PEFT's task type of a generating model. Classifiers get none: under theirs PEFT expects a trained head in the file."""
    name = type(bank.model).__name__ if bank is not None else ""
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _task_before(adapter: Adapter, before: Mapping[str, Any]) -> str | None:
    """The task that the adapter's own folder named. A classifier's needs a head in the file."""
    task = before.get("task_type")
    needs_head = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    return task if isinstance(task, str) and (adapter.overrides or not needs_head) else None


def _card(adapter: Adapter, settings: Mapping[str, Any], notes: Iterable[str]) -> str:
    base = settings["base_model_name_or_path"]
    method = adapter.method.label
    ranks = Counter(adapter.rank(site) for site in adapter.tensors)
    shown = ", ".join(f"{rank} ({count} sites)" for rank, count in sorted(ranks.items()))
    lines = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), "library_name: peft", "tags:"]
    lines += [f"- {tag}" for tag in ("veneer", *adapter.method.tags)]
    lines += ["---", "", f"# {adapter.name}", "", f"A {method} adapter{f' for `{base}`' if base else ''}.", ""]
    lines += [
        f"- sites: {len(adapter.tensors)}",
        f"- rank: {shown}",
        *([f"- layers, biases or rows of its own: {listed(adapter.overrides, 8)}"] if adapter.overrides else []),
        f"- parameters: {adapter.num_parameters():,}",
        *(f"- {note}" for note in notes),
        f"- written by Veneer {__version__}; the metadata of `{WEIGHTS}` holds its receipt (`veneer inspect` shows it)",
        "",
        "```python",
        "bank = veneer.attach(model)",
        f'bank.load("this/folder", name="{adapter.name}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _read_back(path: Path, config: bytes, checksum: str) -> None:
    with Folder(path) as folder:
        same = folder.read(CONFIG, MAX_CONFIG) == config
        with folder.open(WEIGHTS) as (file, size):
            where = str(path / WEIGHTS)
            same = same and read_tensors(file, read_header(file, size, where), where)[1] == checksum
    if not same:
        raise CheckpointError(
            f"{path} does not read back as it was written; the disk may be failing: write to another one"
        )
