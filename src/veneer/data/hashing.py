"""Fingerprints of what a run learnt from and of how text became tokens, for the receipt in an adapter's file.

    data_hash       SHA-256 over the examples as the model saw them: ids, weights and their order
    template_hash   SHA-256 over the tokenizer and the chat template: the same hash, the same tokens for the same row

The data's hash is of tokens and not of the file, so that it is the same for rows moved from CSV to JSON lines, and
another when the mask is.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from typing import Any

from veneer.data.chat.template import template_source
from veneer.data.example import Example
from veneer.data.rows.readers import Source

__all__ = ["data_hash", "file_hash", "template_hash"]


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256, in hexadecimal, of examples in their order; where they come from has no part in it."""
    digest = hashlib.sha256(b"veneer examples 1\n")
    for example in examples:
        n = len(example.ids)
        digest.update(struct.pack(f"<q{n}q{n}d", n, *example.ids, *example.weights))
    return digest.hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256, in hexadecimal, of a file's bytes, unzipped where it is gzipped."""
    digest = hashlib.sha256()
    with Source(path).open() as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def template_hash(tokenizer: Any, template: str | None = None) -> str:
    """SHA-256, in hexadecimal, of a tokenizer and the chat template that is used with it.

    Settings that are no part of how text becomes tokens (truncation, padding, the folder's name) have no part in it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(spec, dict):
        spec = {key: value for key, value in spec.items() if key not in ("truncation", "padding", "version")}
    parts = {
        "tokenizer": spec,
        "tokens": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "template": template_source(tokenizer, template=template),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
