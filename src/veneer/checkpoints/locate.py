"""The adapters that a path means: the one answer for ``bank.load``, training options and every command.

    out/                               a PEFT folder                        out
    out/adapter_model.safetensors      a file of one                        out
    runs/a/                            a run of one job                     a
    runs/a/adapter/, runs/a/best/      a folder of a run                    a
    runs/a/, runs/a/best/              a run of several jobs                one adapter per job, named after it
    parts/                             a folder of PEFT folders             one adapter per folder
    organisation/adapter               a repository on the hub              adapter

What is on this disk goes before the hub.
A run means its best adapter where that has a lower held-out loss than the last one, and else the last.

Boundary: looks at names and receipts only, and imports no torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from veneer.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTIZED = ("nf4", "fp4", "int8")
"""Formats of a quantized base."""
_LARGEST_HEADER = 16 << 20
_OTHER_PROGRAMS = {"adapters.safetensors": "mlx-lm", "lit_model.lora.safetensors": "LitGPT"}
_ADAPTER_HUB = "pytorch_adapter.bin"
_HUB_FILES = (CONFIG, WEIGHTS, "adapters.safetensors", "*.jinja")
"""Those of PEFT and mlx-lm; pickles are not downloaded."""
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NO_PLACE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOENT, errno.ENOTDIR)
"""Errors of a text that is not the path of anything."""
_IN_A_RUN = ("adapter", "best", "last", "final")


def adapters_at(path: Path) -> dict[str, Path]:
    """{name: folder} of every adapter that a path means; empty if there is none.

    A path that names nothing on this disk and reads as a hub id is looked up on the hub.

    Raises:
        CheckpointError: the path cannot be read: no permission, say, or a failing disk.
    """
    try:
        if looks_like_hub_id(path):
            on_hub = hub_adapter(path.as_posix())
            return {} if on_hub is None else {path.name: on_hub}
        return _adapters_at(path)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in _NO_PLACE:
            return {}
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error
    except (ValueError, RuntimeError):  # a NUL, links in a circle
        return {}


def _adapters_at(path: Path) -> dict[str, Path]:
    if path.name == WEIGHTS and path.is_file():
        path = path.parent
    if is_adapter(path):
        return {adapter_name(path): path}
    if (path / WEIGHTS).is_file():
        return {}  # a damaged adapter folder; an adapter inside it is another one
    if is_adapter(path / "adapter"):
        return {path.resolve().name: better_adapter(path / "adapter", path / "best")}
    if below := _named(path.glob(f"adapters/*/{CONFIG}")):
        return {name: better_adapter(last, path / "best" / name) for name, last in below.items()}
    holds_else = is_run(path) or (path / "config.json").is_file()
    return {} if holds_else else _named(path.glob(f"*/{CONFIG}"))


def find_adapter(path: Path) -> tuple[str, Path]:
    """(name, folder) of the one adapter that a path means.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = adapters_at(path)
    if not found and looks_like_hub_id(path):
        raise CheckpointError(why_not_on_hub(path.as_posix()))
    if not found:
        remedy = named_inside(path) or "give an adapter folder, or a run that has written one"
        raise CheckpointError(f"{path} holds no adapter ({CONFIG}); {remedy}")
    if len(found) > 1:
        first = next(iter(found.values()))
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(found)}); give the folder of one, such as {first}"
        )
    return next(iter(found.items()))


def why_not(path: Path, typed: str | None = None) -> str:
    """The reason why a path means no adapter, with the remedy for the likely mistake."""
    typed = str(path) if typed is None else typed
    if path.suffix in _WEIGHT_FILES:
        return f"{typed}: expected a folder with {CONFIG}, found a file of weights; give its folder, {path.parent}"
    if path.is_file():
        return f"{typed} is a file, not a base or an adapter folder; give prompts with --file and examples with --data"
    if looks_like_hub_id(path):
        return why_not_on_hub(typed)
    if other := of_another_program(path):
        return other
    problem = f"contains no adapter ({CONFIG})" if path.exists() else "no such folder"
    return f"{typed}: {problem}; {named_inside(path) or 'give an adapter folder, or a run that has written one'}"


def named_inside(path: Path) -> str:
    """The folders in a folder that hold adapters, as the remedy of a message; empty if there are none."""
    try:
        found = sorted(child for child in path.iterdir() if child.is_dir() and adapters_at(child))
    except (OSError, ValueError):  # ValueError: no path has a zero byte, and a folder in it that cannot be read
        return ""
    return f"it contains {', '.join(one.name for one in found[:8])}: give one, such as {found[0]}" if found else ""


def of_another_program(path: Path) -> str:
    """The reason why an adapter in another program's format is not read as it is, with the remedy; empty for any other path."""
    for file, program in _OTHER_PROGRAMS.items():
        if (path / file).is_file():
            return (
                f"{path} is an adapter of {program}; convert it first: veneer import {path} --base MODEL --out FOLDER"
            )
    if (path / _ADAPTER_HUB).is_file():
        return (
            f"{path / _ADAPTER_HUB} is a pickle of AdapterHub, which can run code when it is opened, and is not read; train the adapter "
            "with PEFT or Veneer, or save its merged model and use veneer extract"
        )
    return ""


def looks_like_hub_id(path: Path) -> bool:
    """True if nothing is at the path and it reads as ``organisation/model``; a name in a folder that exists is a local one."""
    return _HUB_ID.fullmatch(path.as_posix()) is not None and not os.path.lexists(path) and not path.parent.is_dir()


def hub_adapter(name: str) -> Path | None:
    """The folder of a repository on the hub, from the local hub cache or downloaded into it; None if it holds no adapter or cannot be had.

    HF_HOME, HF_HUB_OFFLINE and the login of the hub's client apply, as for bases.

    Raises:
        CheckpointError: its files cannot be written into the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return None
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise CheckpointError(
                f"{name} cannot be written into the hub cache: {error.strerror or error}; free some space, or set HF_HOME"
            ) from error
        return None
    return folder if (folder / CONFIG).is_file() else None


def why_not_on_hub(name: str) -> str:
    """The reason why `hub_adapter` gives none, with the remedy."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return f"{name}: no such folder; an adapter of the hub needs its client: pip install huggingface_hub"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name}: no such folder, and no adapter of that name in the local hub cache; HF_HUB_OFFLINE is set, so unset it, or download "
            f"the adapter where there is a network: hf download {name} --local-dir FOLDER"
        )
    return (
        f"{name}: no such folder, and the hub gives out no adapter of that name; check the spelling and the network, log in with "
        "hf auth login if the repository is private, or give a folder"
    )


def adapter_of_job(run: Path, job: str) -> Path | None:
    """The folder of the adapter that one job of a run means, or None before its last one is written."""
    folders = ((run / "adapters" / job, run / "best" / job), (run / "adapter", run / "best"))
    return next((better_adapter(last, best) for last, best in folders if is_adapter(last)), None)


def better_adapter(last: Path, best: Path) -> Path:
    """``best`` if its held-out loss is known and lower than that of ``last``, else ``last``."""
    steps, loss = trained(best)
    last_steps, last_loss = trained(last)
    lower = loss is not None and steps != last_steps and (last_loss is None or loss < last_loss)
    return best if lower else last


def choice_note(path: Path, folder: Path) -> str | None:
    """A remark if ``path`` is a run that means ``folder``, its best adapter and not the last one."""
    if folder == path:
        return None
    last = next(
        (one for one in (folder.parent / "adapter", folder.parents[1] / "adapters" / folder.name) if is_adapter(one)),
        None,
    )
    if last is None or last == folder:
        return None
    (steps, loss), (last_steps, last_loss) = trained(folder), trained(last)
    if steps == last_steps:
        return None
    end = "" if last_loss is None else f": {last_loss:.4f}"
    return (
        f"{path}: this is its best adapter, of step {steps} with a held-out loss of {loss:.4f}; the last one, of step {last_steps}{end}, "
        f"is {last}"
    )


def trained(folder: Path) -> tuple[int | None, float | None]:
    """(steps, held-out loss) in the receipt of an adapter; None for what it does not say."""
    receipt = receipt_at(folder)
    steps, loss = receipt.get("steps"), receipt.get("held_out_loss")
    known = float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None
    return steps if isinstance(steps, int) else None, known


def task_of_adapter(folder: Path) -> str:
    """The task of an adapter: that of its receipt, or else of PEFT's ``task_type``; sft for adapters without a head."""
    recorded = receipt_at(folder).get("task")
    if isinstance(recorded, str):
        return recorded
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig")).get("task_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "sft"  # reading the adapter reports what is wrong
    return {"SEQ_CLS": "classification", "TOKEN_CLS": "token-classification"}.get(str(kind), "sft")


def head_refusal(name: str, folder: Path) -> str:
    """The reason why an adapter cannot generate text because it has a head; empty if it has none."""
    task = task_of_adapter(folder)
    if task == "sft":
        return ""
    return f"{name} has a head for {task}, and text is generated by a language model; use veneer predict"


def receipt_at(folder: Path) -> dict[str, Any]:
    """The receipt of a folder, unverified; empty if there is none that can be read."""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _LARGEST_HEADER else {}
        receipt = json.loads(header["__metadata__"]["veneer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


def trained_format(receipts: Iterable[Mapping[str, Any]]) -> str | None:
    """The quantized format of the base on which all adapters were trained; None if it was plain, differs or is not known."""
    found = set()
    for receipt in receipts:
        records = receipt.get("base")
        of_base = records.values() if isinstance(records, Mapping) else ()
        formats = {record.get("dtype") for record in of_base if isinstance(record, Mapping)}.intersection(QUANTIZED)
        found.add(formats.pop() if len(formats) == 1 else None)  # other layers of such a base, as its head, are plain
    return found.pop() if len(found) == 1 else None


def adapter_name(folder: Path) -> str:
    """The default name of an adapter: that of its folder, or of the run for a folder such as ``best``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in _IN_A_RUN else folder.name


def is_adapter(path: Path) -> bool:
    """A path is a PEFT folder."""
    return (path / CONFIG).is_file()


def is_run(path: Path) -> bool:
    """A path is the folder of a training run."""
    return (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()


def _named(configs: Iterable[Path]) -> dict[str, Path]:
    return {file.parent.name: file.parent for file in sorted(configs)}
