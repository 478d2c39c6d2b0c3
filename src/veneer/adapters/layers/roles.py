"""The part that a linear layer has in its block: keys and values, the attention's output, the feed-forward's output.

The parts are found by structure and by the usual names: in every block the last linear layer of an attention module writes its output, the
last one outside of attention that of the feed-forward layers. Keys and values are projections of those names, or fused with the queries.
"""

from __future__ import annotations

from collections.abc import Iterable

from veneer.adapters.layers.site import Site

KEY_VALUE, ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT = "key_value", "attention_output", "feed_forward_output"
_KEYS_VALUES = frozenset(
    ["k_proj", "v_proj", "key", "value", "k", "v", "key_proj", "value_proj", "k_lin", "v_lin", "to_k", "to_v"]
)
_FUSED = frozenset(["c_attn", "query_key_value", "qkv_proj", "in_proj", "Wqkv", "qkv"])


def mark_roles(sites: Iterable[Site]) -> None:
    """Set the role of the linear layers in blocks."""
    last: dict[tuple[str, str], Site] = {}
    for site in sites:
        if site.kind not in ("linear", "conv1d") or not site.in_block or site.is_router or site.stack is not None:
            continue
        block, attention = _place(site)
        last[block, attention] = site
        if attention and site.name.rpartition(".")[2] in _KEYS_VALUES | _FUSED:
            site.role = KEY_VALUE
    for (_, attention), site in last.items():
        if not site.role:
            site.role = ATTENTION_OUTPUT if attention else FEED_FORWARD_OUTPUT


def _place(site: Site) -> tuple[str, str]:
    """(path of the block, path of the attention module in it, or an empty string)."""
    before, number, inside = site.name.partition(f".{site.block}.")
    parts = inside.split(".")[:-1]
    at = next((at for at, part in enumerate(parts) if "attn" in part.lower() or "attention" in part.lower()), None)
    return before + number, "" if at is None else ".".join(parts[: at + 1])
