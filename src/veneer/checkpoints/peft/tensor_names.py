"""Names of tensors in a PEFT folder: which layer, and which of its tensors.

    base_model.model.<layer>.lora_A.weight                                factors of a linear layer, Conv1D or convolution
    base_model.model.<layer>.lora_B.weight                                (lora_B.bias with lora_bias)
    base_model.model.<layer>.lora_embedding_A, lora_embedding_B           factors of an embedding
    base_model.model.<layer>.lora_magnitude_vector                        DoRA's magnitude (older: .weight behind it)
    base_model.model.<layer>.token_adapter.trainable_tokens_delta         rows of some tokens
    base_model.model.<layer>.base_layer.weight, .base_layer.bias          a base weight beside factors at the same layer
    base_model.model.<layer>.weight, .bias                                whole weights: modules_to_save, trained biases

Older folders carry the adapter's name inside (``lora_A.default.weight``). A folder made outside PEFT may lack the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "base_model.model."
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
LOW_RANK = (*FACTORS, MAGNITUDE)
MAX_LENGTH, MAX_DEPTH = 1024, 64
ROWS = "trainable_tokens_delta"


@dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart.

    kind: "low_rank" (``tensor`` is one of LOW_RANK), "lora_bias", "rows", or "whole" (``tensor`` is weight or bias). beside: whether it
    names the base layer under an adapter (``base_layer``).
    """

    site: str
    tensor: str
    kind: str
    beside: bool = False
    adapter: str | None = None
    prefixed: bool = True


def parse_key(name: str) -> Key | None:
    """A name taken apart, or None where it is no name of a PEFT folder."""
    if len(name) > MAX_LENGTH or name.count(".") > MAX_DEPTH:
        return None
    prefixed = name.startswith(PREFIX)
    parts = name.removeprefix(PREFIX).split(".")
    if not all(parts):
        return None
    for at in range(len(parts) - 1, -1, -1):
        word, tail = parts[at], parts[at + 1 :]
        site = ".".join(parts[:at])
        if word in LOW_RANK:
            return _low_rank(site, word, tail, prefixed)
        if word == "token_adapter" and tail[:1] == [ROWS] and len(tail) <= 2:
            return Key(site, ROWS, "rows", adapter=tail[1] if len(tail) == 2 else None, prefixed=prefixed)
    if len(parts) >= 2 and parts[-1] in ("weight", "bias"):
        beside = len(parts) >= 3 and parts[-2] == "base_layer"
        return Key(".".join(parts[: -2 if beside else -1]), parts[-1], "whole", beside, prefixed=prefixed)
    return None


def _low_rank(site: str, word: str, tail: list[str], prefixed: bool) -> Key | None:
    layered = word in ("lora_A", "lora_B")
    if tail == ["weight"] and word in ("lora_embedding_A", "lora_embedding_B"):
        return None
    if layered and tail[-1:] == ["bias"] and word == "lora_B" and len(tail) <= 2:
        return Key(site, "lora_bias", "lora_bias", adapter=tail[0] if len(tail) == 2 else None, prefixed=prefixed)
    if tail[-1:] == ["weight"] and word not in ("lora_embedding_A", "lora_embedding_B"):
        tail = tail[:-1]
    elif layered:
        return None
    if len(tail) > 1:
        return None
    return Key(site, word, "low_rank", adapter=tail[0] if tail else None, prefixed=prefixed)


def key_of(site: str, tensor: str) -> str:
    """The name under which PEFT stores a low-rank tensor of a layer."""
    return f"{PREFIX}{site}{'.' if site else ''}{tensor}" + (".weight" if tensor in ("lora_A", "lora_B") else "")
