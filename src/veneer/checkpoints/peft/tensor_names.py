"""Names of tensors in a PEFT folder: the layer, and which of its tensors.

    base_model.model.<layer>.lora_A.weight                                factors of a linear layer, Conv1D or convolution
    base_model.model.<layer>.lora_B.weight                                (lora_B.bias with lora_bias)
    base_model.model.<layer>.lora_embedding_A, lora_embedding_B           factors of an embedding
    base_model.model.<layer>.lora_magnitude_vector                        a vector per output (older: .weight behind it)
    base_model.model.<layer>.token_adapter.trainable_tokens_delta         rows of some tokens
    base_model.model.<layer>.base_layer.weight, .base_layer.bias          a base parameter beside factors at the same layer
    base_model.model.<layer>.weight, .bias                                a parameter: modules_to_save, trained biases

Older folders carry the adapter's name inside (``lora_A.default.weight``). A folder made outside PEFT may lack the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from veneer.adapters.methods import METHODS
from veneer.adapters.wrappers import WRAPPERS
from veneer.checkpoints.base_view import BaseView
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.portable import stored_sites
from veneer.checkpoints.tensors import Entry, Header

PREFIX = "base_model.model."
MAX_LENGTH, MAX_DEPTH = 1024, 64
_PARALLEL = "module."
"""In front of all names that were saved through DataParallel or DistributedDataParallel."""
TOKEN_ROWS = "trainable_tokens_delta"
_LAYERS, _PARAMETERS = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
FACTORS = (*_LAYERS, *_PARAMETERS)
VECTORS = frozenset(name for method in METHODS.values() for name in method().tensor_names("linear")) - {*FACTORS}
"""Names of the tensors that hold one number per output."""


SHARED = frozenset(name for method in METHODS.values() for name in method.shared_names)
"""Names of tensors that belong to no layer."""


@dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart.

    Attributes:
        kind: "low_rank" (``tensor`` is in FACTORS or VECTORS), "lora_bias", "rows", "whole" (``tensor`` is weight or bias), or "shared"
            (``tensor`` is in SHARED, and belongs to no layer).
        beside: it names the base layer under an adapter (``base_layer``).
        adapter: the adapter's name, in older folders.
    """

    site: str
    tensor: str
    kind: str
    beside: bool = False
    adapter: str | None = None
    prefixed: bool = True


def read_keys(header: Header, found: Findings) -> list[tuple[Key, Entry]]:
    """Every tensor of a file with its name taken apart; names that no adapter has are refused."""
    keys: list[tuple[Key, Entry]] = []
    known: dict[tuple[str, str], str] = {}
    for entry in header.entries:
        key = parse_key(entry.name)
        if key is None:
            found.refuse(not_of_an_adapter(entry.name))
            continue
        keys.append((key, entry))
        if key.kind == "low_rank":
            other = known.setdefault((key.site, key.tensor), entry.name)
            if other != entry.name:
                found.refuse(f"{shown(entry.name)} and {shown(other)} are the same tensor of the same layer")
    low_rank = [key for key, _ in keys if key.kind == "low_rank"]
    adapters = sorted({key.adapter for key in low_rank if key.adapter is not None})
    if len(adapters) > 1:
        found.refuse(
            f"the file holds {len(adapters)} adapters ({listed(adapters)}); expected one: save each in its own folder"
        )
    if bare := sum(not key.prefixed for key in low_rank):
        found.note(f"{bare} tensor names lack the prefix {PREFIX} and are taken as paths in the base")
    if not header.entries:
        found.refuse("the file holds no tensor")
    return keys


def today(
    keys: list[tuple[Key, Entry]], base: BaseView, found: Findings
) -> tuple[list[tuple[Key, Entry]], dict[str, str]]:
    """The keys with today's names of their layers, and {layer: its name in the file} where that is another one.

    Layers that were renamed since the file was written have the names of transformers' table; those of a text model are found in the
    language model inside a multimodal one, and the other way.
    """
    renamed, nested = base.current_layers({key.site for key, _ in keys})
    changed = {**nested, **renamed}
    if not changed:
        return keys, {}
    ours = stored_sites(base.model, renamed.values())  # the names under which a folder of this version has them
    older = {old: new for old, new in renamed.items() if ours.get(new) != old}
    for table, what in (
        (older, "are named as in an earlier version"),
        (nested, "are those of another model of this family"),
    ):
        if table:
            old, new = next(iter(sorted(table.items())))
            found.note(f"the file's layers {what}: {shown(old)} is read as {new} ({len(table):,} layers)")
    made = [(replace(key, site=changed.get(key.site, key.site)), entry) for key, entry in keys]
    known: dict[tuple[str, str, str], str] = {}
    for key, entry in made:
        other = known.setdefault((key.site, key.tensor, key.kind), entry.name)
        if other != entry.name:
            found.refuse(f"{shown(entry.name)} and {shown(other)} are the same tensor of the same layer")
    return made, {new: old for old, new in changed.items()}


def parse_key(name: str) -> Key | None:
    """A name taken apart, or None if a PEFT folder has no such name."""
    if len(name) > MAX_LENGTH or name.count(".") > MAX_DEPTH:
        return None
    if name in SHARED:
        return Key("", name, "shared")
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix(_PARALLEL)
    prefixed = name.startswith(PREFIX)
    parts = name.removeprefix(PREFIX).split(".")
    if not all(parts):
        return None
    for at in range(len(parts) - 1, -1, -1):
        word, tail = parts[at], parts[at + 1 :]
        site = ".".join(parts[:at])
        if word in FACTORS or word in VECTORS:
            return _low_rank(site, word, tail, prefixed)
        if word == "token_adapter" and tail[:1] == [TOKEN_ROWS] and len(tail) <= 2:
            return Key(site, TOKEN_ROWS, "rows", adapter=tail[1] if len(tail) == 2 else None, prefixed=prefixed)
    if len(parts) >= 2 and parts[-1] in ("weight", "bias"):
        beside = len(parts) >= 3 and parts[-2] == "base_layer"
        return Key(".".join(parts[: -2 if beside else -1]), parts[-1], "whole", beside, prefixed=prefixed)
    return None


def _low_rank(site: str, word: str, tail: list[str], prefixed: bool) -> Key | None:
    if tail[-1:] == ["bias"] and word == "lora_B" and len(tail) <= 2:
        return Key(site, "lora_bias", "lora_bias", adapter=tail[0] if len(tail) == 2 else None, prefixed=prefixed)
    if tail[-1:] == ["weight"] and word not in _PARAMETERS:
        tail = tail[:-1]
    elif word in _LAYERS or tail == ["weight"]:
        return None
    return Key(site, word, "low_rank", adapter=tail[0] if tail else None, prefixed=prefixed) if len(tail) < 2 else None


def key_of(site: str, tensor: str) -> str:
    """The name under which PEFT stores a low-rank tensor of a layer."""
    return f"{PREFIX}{site}{'.' if site else ''}{tensor}" + (".weight" if tensor in _LAYERS else "")


def not_of_an_adapter(name: str) -> str:
    """The reason that a tensor of this name is refused."""
    if name.startswith(("lora_unet_", "lora_te", "unet.", "text_encoder.")):
        return f"tensor {shown(name)} is named as diffusion tools do it; expected PEFT's names ({PREFIX}<layer>.lora_A.weight)"
    why = ", and no adapter may change a weight of the base" if name.endswith((".weight", ".bias")) else ""
    return f"tensor {shown(name)} is not part of a LoRA or DoRA adapter{why}"
