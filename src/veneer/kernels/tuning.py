"""Constants that were chosen by measurement, on 2 cores with AVX512-BF16 unless a line says otherwise."""

from __future__ import annotations

__all__ = [
    "CROSS_ENTROPY_BLOCK_BYTES",
    "CROSS_ENTROPY_CHUNK_BYTES",
    "CROSS_ENTROPY_CHUNK_TOKENS",
    "EXACT_SUM_ROWS",
    "GPU_CHUNK_SHARE",
    "GPU_CROSS_ENTROPY_CHUNK_BYTES",
    "LONGEST_NATIVE_SEGMENT",
    "ONE_THREAD_NUMBERS",
]

ONE_THREAD_NUMBERS = 2**14
"""Elementwise kernels use one thread up to this many numbers: waking another thread takes as long as the work."""

LONGEST_NATIVE_SEGMENT = 4096
"""Attention in C++ takes segments up to this many tokens; beyond, its partial sums of dK and dV are no longer small."""

CROSS_ENTROPY_CHUNK_BYTES = 48 * 2**20
"""Size of the logits of one chunk of tokens; larger chunks are no faster and raise the peak memory."""

CROSS_ENTROPY_CHUNK_TOKENS = 64
"""Smallest chunk of tokens: below it, the product with the output head is no longer efficient."""

GPU_CROSS_ENTROPY_CHUNK_BYTES = 2**30
"""The same limit on a GPU, where a small chunk reads the head's weight again for little work; an estimate, not yet measured."""

GPU_CHUNK_SHARE = 32
"""A chunk takes at most this part of a GPU's memory."""

CROSS_ENTROPY_BLOCK_BYTES = 2**21
"""Size of the rows that the softmax in torch takes at once on a CPU: about the second-level cache of one core."""

EXACT_SUM_ROWS = 16
"""In fp32, products with fewer rows than this lose a digit in a CPU's matrix library with two threads; they are padded with zero rows."""
