"""Chooses an adapter's sites by patterns over site names. A pattern that matches nothing is an error.

    all-linear          every linear layer of the blocks, not the head, save those that PEFT cannot read from a folder
    all                 every layer of the body that the method takes: without the head
    q_proj              a name: the last part of a path, or any tail of it ("self_attn.q_proj")
    model.layers.*.mlp.*   a glob over the whole path or a tail of it
    re:.*\\.(q|v)_proj   a regular expression that must match the whole path
    mlp.experts        a module of stacked experts: all its experts' layers (mlp.experts.7.up_proj is one of them)
    q_proj             also a part of a fused linear layer (qkv_proj): the layer's other outputs stay as they are
    experts.gate_up_proj   a fused parameter of stacked experts: its parts in every expert

A pattern that matches nothing is an error which lists near misses and what the model has; all such patterns are told at once.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from veneer.adapters.layers.site import Site
from veneer.config import MethodOptions
from veneer.errors import Problems, TargetError, listed

ALL_LINEAR, ALL = "all-linear", "all"
T = TypeVar("T")


def as_list(patterns: str | Iterable[str]) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matches(pattern: str, path: str) -> bool:
    """True if a pattern of any kind but ``all-linear`` matches this path."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    if any(char in pattern for char in "*?["):
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
    return path == pattern or path.endswith(f".{pattern}")


def select(
    layers: Mapping[str, Site],
    options: MethodOptions,
    kinds: Collection[str],
    *,
    left_out: Collection[str] = (),
    uncovered: Mapping[str, str] | None = None,
    tables: Mapping[str, Mapping[str, object]] | None = None,
    by_part: bool = False,
) -> list[str]:
    """Names of the layers that ``options`` asks for, in the model's order.

    Args:
        layers: the layers to choose from: a survey's sites, perhaps with its vector layers.
        options: the options.
        kinds: layer kinds that the method acts on.
        left_out: what ``all-linear`` does not take.
        uncovered: layers that cannot be adapted, with the reason.
        tables: options by pattern, such as rank_pattern, whose patterns must match something too.
        by_part: a pattern may name a projection that a fused layer holds.

    Raises TargetError naming every pattern that matches nothing and every layer that cannot be adapted, with the reason.
    """
    problems = Problems()
    chosen: set[str] = set()
    for pattern in _valid(as_list(options.target_modules), problems):
        if pattern == ALL_LINEAR:
            chosen |= _all_linear(layers, left_out, problems)
        elif pattern == ALL:
            chosen |= _all(layers, kinds, problems)
        else:
            chosen |= _one(pattern, layers, uncovered or {}, kinds, problems, by_part=by_part)
    for pattern in _valid(as_list(options.exclude_modules), problems):
        excluded = {name for name in chosen if _names(pattern, layers[name])}
        if not excluded and not (by_part and any(_names_part(pattern, layers[name]) for name in chosen)):
            near = _near(pattern, {name: layers[name] for name in chosen})
            problems.add(f'exclude_modules: "{pattern}" matches none of the sites that target_modules chose{near}')
        chosen -= excluded
    chosen -= {name for name in chosen if by_part and parts_of(layers[name], options) == ()}
    chosen = _only_layers(chosen, layers, options.layers_to_transform, problems)
    if not chosen and not problems:
        problems.add("no site is left after exclude_modules and layers_to_transform")
    for label, table in (tables or {}).items():
        for pattern in _valid(table, problems):
            if not any(matches(pattern, name) for name in chosen):
                near = _near(pattern, {name: layers[name] for name in chosen})
                problems.add(f'{label}: "{pattern}" matches none of the adapted sites{near}')
    problems.raise_if_any(TargetError, "the adapter's sites cannot be chosen")
    return [name for name in layers if name in chosen]


def by_pattern(table: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern in ``table`` that names ``path``."""
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def _all_linear(layers: Mapping[str, Site], left_out: Collection[str], problems: Problems) -> set[str]:
    linear = [
        site for site in layers.values() if site.kind in ("linear", "conv1d") and not (site.is_head or site.is_router)
    ]
    in_blocks = [site for site in linear if site.in_block] or linear
    found = {site.name for site in in_blocks if not site.reason and site.name not in left_out}
    if not found:
        what = "no linear layer" + (" that PEFT reads from a folder" if left_out else "")
        problems.add(f'target_modules: "{ALL_LINEAR}" finds {what}; the model has {_inventory(layers)}')
    return found


def _all(layers: Mapping[str, Site], kinds: Collection[str], problems: Problems) -> set[str]:
    found = {
        site.name
        for site in layers.values()
        if site.in_body and site.kind in kinds and not (site.reason or site.is_router or site.stack is not None)
    }
    if not found:
        problems.add(f'target_modules: "{ALL}" finds no layer of a kind that this method takes')
    return found


def _one(
    pattern: str,
    layers: Mapping[str, Site],
    uncovered: Mapping[str, str],
    kinds: Collection[str],
    problems: Problems,
    *,
    by_part: bool,
) -> set[str]:
    found = {name for name, site in layers.items() if _names(pattern, site) or (by_part and _names_part(pattern, site))}
    for name in sorted(found):
        if layers[name].reason:
            problems.add(f'target_modules: "{pattern}" names {name}, which cannot be adapted: {layers[name].reason}')
        elif layers[name].kind not in kinds:
            problems.add(
                f'target_modules: "{pattern}" names {name}, a {layers[name].kind} layer, which this method does not take'
            )
    refused = {name: why for name, why in uncovered.items() if matches(pattern, name) and name not in layers}
    for name, why in sorted(refused.items()):
        problems.add(f'target_modules: "{pattern}" names {name}, which cannot be adapted: {why}')
    if not found and not refused:
        problems.add(
            f'target_modules: "{pattern}" matches nothing{_near(pattern, layers)}; the model has {_inventory(layers)}'
        )
    return found


def _names(pattern: str, site: Site) -> bool:
    """True if a pattern matches a site, or the module of stacked experts or the fused parameter that it is a part of."""
    return any(matches(pattern, path) for path in (site.name, *site.within))


def _names_part(pattern: str, site: Site) -> bool:
    """True if a pattern matches a projection that a fused layer holds."""
    return any(matches(pattern, path) for path in site.part_paths())


def parts_of(site: Site, options: MethodOptions) -> tuple[str, ...] | None:
    """The projections of a chosen fused layer that an adapter changes; None for a whole layer."""
    if not site.parts:
        return None
    wanted, unwanted = as_list(options.target_modules), as_list(options.exclude_modules)
    whole = any(pattern in (ALL_LINEAR, ALL) or _names(pattern, site) for pattern in wanted)
    paths = site.part_paths().items()
    found = {part for path, part in paths if whole or any(matches(pattern, path) for pattern in wanted)}
    found -= {part for path, part in paths if any(matches(pattern, path) for pattern in unwanted)}
    return None if len(found) == len(site.parts) else tuple(part for part in site.parts if part in found)


def _valid(patterns: Iterable[str], problems: Problems) -> Iterator[str]:
    """The patterns without regular expressions that cannot be compiled, which become problems."""
    for pattern in patterns:
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            text = f'"{pattern}" is not a regular expression: {error}'
            if text not in problems:
                problems.add(text)
        else:
            yield pattern


def _only_layers(
    chosen: set[str], layers: Mapping[str, Site], blocks: tuple[int, ...] | None, problems: Problems
) -> set[str]:
    if blocks is None:
        return chosen
    have = {layers[name].block for name in chosen} - {None}
    for layer in blocks:
        if layer not in have:
            span = f"{min(have)} to {max(have)}" if have else "none"  # type: ignore[type-var]
            problems.add(f"layers_to_transform: block {layer} holds none of the chosen sites (blocks: {span})")
    return {name for name in chosen if layers[name].block in blocks}


def _near(pattern: str, sites: Mapping[str, Site]) -> str:
    tails = sorted({name.rpartition(".")[2] for name in sites} | set(sites) | {ALL_LINEAR})
    close = difflib.get_close_matches(pattern, tails, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _inventory(sites: Mapping[str, Site]) -> str:
    """The model's layers by the last part of their name: "q_proj (30), up_proj (30)"."""
    counts = Counter(name.rpartition(".")[2] or "the model itself" for name in sites)
    if not counts:
        return "no layer that an adapter can act on"
    return listed((f"{name} ({count})" for name, count in counts.most_common()), 24)
