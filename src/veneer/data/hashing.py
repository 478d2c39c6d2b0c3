"""Hashes of the training data and of the tokenizer with its chat template, for the receipt in an adapter file.

    data_hash       SHA-256 of the examples as the model sees them: ids, weights, sequences, labels and order
    template_hash   SHA-256 of the tokenizer and the chat template: equal hashes give equal tokens for a row

The data hash covers tokens instead of files, so it stays the same if rows move from CSV to JSON lines, and changes with
the mask.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from typing import Any

from veneer.data.chat.template import template_source
from veneer.data.example import Example

__all__ = ["data_hash", "template_hash"]


def data_hash(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of examples in their order, as hexadecimal; their sources are not part of it."""
    digest = hashlib.sha256(b"veneer examples 1\n")
    for example in examples:
        n = len(example.ids)
        digest.update(struct.pack(f"<q{n}q{n}d", n, *example.ids, *example.weights))
        digest.update(struct.pack(f"<{len(example.lengths)}q", *example.lengths))
        if example.labels:
            digest.update(struct.pack(f"<q{n}d", example.second, *example.labels))
        if not example.desirable:
            digest.update(b"undesirable")
    return digest.hexdigest()


def template_hash(tokenizer: Any, template: str | None = None) -> str:
    """Return the SHA-256 of a tokenizer and the chat template used with it, as hexadecimal.

    Settings that do not affect tokenization (truncation, padding, the folder's name) are not part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(spec, dict):
        spec = {key: value for key, value in spec.items() if key not in ("truncation", "padding", "version")}
    parts = {
        "tokenizer": spec,
        "tokens": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "template": _template(tokenizer, template),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _template(tokenizer: Any, template: str | None) -> Any:
    own = getattr(tokenizer, "chat_template", None)
    if template is None and isinstance(own, dict) and "default" not in own:  # several templates, none of them chosen
        return own
    return template_source(tokenizer, template=template)
