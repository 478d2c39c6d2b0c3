"""Checks of an adapter against a base: its tensors against the sites that they name, all problems in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.methods import Method
from veneer.adapters.overrides import problems_of
from veneer.errors import AdapterError, Problems, TargetError


def check_fit(adapter: Adapter, survey: Survey) -> None:
    """Raise AdapterError unless the adapter has tensors, and every one of them fits the site that it names."""
    _raise_if_any(adapter, fit_problems(adapter, survey))


def check_overrides(adapter: Adapter, survey: Survey) -> None:
    """`check_fit` for an adapter whose factors were made for this base."""
    _raise_if_any(adapter, _override_problems(adapter, survey))


def fit_problems(adapter: Adapter, survey: Survey) -> list[str]:
    """The reasons that tensors of an adapter do not fit the sites that they name."""
    found = [problem for name in adapter.tensors for problem in _problems_at(adapter, name, survey.sites.get(name))]
    return found + _override_problems(adapter, survey)


def tensor_problems(method: Method, site: Site, tensors: Mapping[str, Tensor]) -> list[str]:
    """The reasons that tensors are not those of a method at a site."""
    name, names = site.name, method.tensor_names(site.kind)
    found = [f"{name}: {method.name} has a tensor {key} here, which is missing" for key in names if key not in tensors]
    found += [f"{name}: {method.name} has no tensor {key}" for key in tensors if key not in names]
    if found:
        return found
    expected = method.tensor_shapes(site.geometry, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return [
        f"{name}.{key}: expected shape {expected[key]}, found {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
        if tuple(tensor.shape) != expected[key]
    ]


def _override_problems(adapter: Adapter, survey: Survey) -> list[str]:
    return [problem for name in adapter.overrides for problem in problems_of(adapter, name, survey.find(name))]


def _raise_if_any(adapter: Adapter, found: Iterable[str]) -> None:
    problems = Problems()
    if not adapter.tensors and not adapter.overrides:
        problems.add("it has no tensors, so it would do nothing")
    for problem in found:
        problems.add(problem)
    problems.raise_if_any(AdapterError, f'adapter "{adapter.name}" does not fit this base')


def _problems_at(adapter: Adapter, name: str, site: Site | None) -> list[str]:
    tensors = adapter.tensors[name]
    if site is None:
        return [f"{name}: the base has no such layer"]
    kind = adapter.kinds.get(name)
    if site.kind != kind:
        return [f"{name}: the base has a {site.kind} layer here, the adapter is for a {kind} layer"]
    found = [f"{name}: {site.reason}"] if site.reason else []
    return found + tensor_problems(adapter.method, site, tensors)


def check_tying(method: Method, names: list[str], sites: Mapping[str, Site]) -> None:
    """Raise TargetError where an adapter must act on a tied head through its embedding and cannot."""
    if not method.ensure_weight_tying:
        return
    if not method.serves_tied_head and not method.modules_to_save:
        raise TargetError(
            "ensure_weight_tying: a DoRA magnitude belongs to one side of the layer and cannot be shared with the head"
        )
    if not any(site.tied_to in names for site in sites.values() if site.tied_to is not None):
        raise TargetError(
            "ensure_weight_tying: none of the chosen sites is an embedding that shares its weight with the head"
        )
