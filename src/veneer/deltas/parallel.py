"""Work on several sites at a time: small decompositions use a second core far worse than a second site does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_AT_ONCE = 2
"""Sites at a time; each needs the memory of its dense matrices."""


def map_sites(function: Callable[[str], T], sites: Sequence[str]) -> list[T]:
    """The function's results for all sites, in order, computed two at a time with half of torch's threads each."""
    threads = torch.get_num_threads()
    if threads < _AT_ONCE:
        return [function(site) for site in sites]
    torch.set_num_threads(threads // _AT_ONCE)
    try:
        with ThreadPoolExecutor(_AT_ONCE, initializer=torch.set_num_threads, initargs=(threads // _AT_ONCE,)) as pool:
            return list(pool.map(function, sites))
    finally:
        torch.set_num_threads(threads)
