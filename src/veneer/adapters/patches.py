"""Patches: adapted forwards and hooks on a model, and their removal without a trace.

A layer is changed by one instance attribute (``forward``), a container by hooks, the model itself by one more attribute
(``zero_grad``). No class, name, parameter or buffer is touched. While an adapter is installed the base is frozen: its parameters require
no gradient. Removal restores the attributes that stood there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.adapters.runtime.experts import AdaptedExperts
from veneer.adapters.runtime.forward import AdaptedForward
from veneer.adapters.runtime.mixture import AdaptedMixture, AdaptedRouter
from veneer.adapters.runtime.runtime import Runtime
from veneer.adapters.runtime.tracker import RouteTracker
from veneer.errors import AdapterError


class Patches:
    """The changes that a bank has made to its model."""

    def __init__(self, model: nn.Module, runtime: Runtime, sites: Mapping[str, Site]) -> None:
        self.model = model
        self.runtime = runtime
        self._sites = sites
        self._containers: dict[str, int] = {}
        self._frozen: tuple[str, ...] = ()
        self._zero_grad: ZeroGrad | None = None

    def check(self) -> None:
        """Raise AdapterError where another bank or library has patched a layer that this bank is about to change."""
        other = runtime_of(self.model)
        if other is not None and other is not self.runtime:
            raise AdapterError("another bank acts on this model; use it (veneer.bank_of(model)), or detach it first")
        for name, layer in self.runtime.layers.items():
            if layer.site.module.__dict__.get("forward") is not layer:
                raise AdapterError(
                    f"the forward of {name or 'the model'} was replaced after an adapter was put there (by a hook of another "
                    "library?); take that off first"
                )

    def install(self, site: Site, adapter: Adapter) -> None:
        """Let an adapter act at a site."""
        layers = self.runtime.layers
        for host in site.hosts:
            layer = layers.get(host.name)
            if layer is None:
                if not layers:
                    self._freeze()
                host.calls = 0
                layer = layers[host.name] = _forward_of(site, host)(
                    host, self.runtime, host.module.__dict__.get("forward")
                )
                host.module.forward = layer
                for path in _ancestors(host.name):
                    self._containers[path] = self._containers.get(path, 0) + 1
                    if self._containers[path] == 1:
                        self._hook(path)
            layer.admit(site, adapter)

    def uninstall(self, site: Site, name: str) -> None:
        """Remove an adapter from a site; when the last one leaves, the layer is restored."""
        for host in site.hosts:
            layer = self.runtime.layers.get(host.name)
            if layer is None:
                continue
            layer.release(site, name)
            if layer.adapters:
                continue
            del self.runtime.layers[host.name]
            _put_back(host.module, "forward", layer)
            for path in _ancestors(host.name):
                self._containers[path] -= 1
                if not self._containers[path]:
                    del self._containers[path]
                    self._unhook(path)
            if not self.runtime.layers:
                self._thaw()

    def remove_all(self) -> None:
        """Restore the whole model."""
        for layer in self.runtime.layers.values():
            _put_back(layer.site.module, "forward", layer)
        for path in self._containers:
            self._unhook(path)
        self.runtime.layers.clear()
        self._containers.clear()
        self._thaw()

    def _freeze(self) -> None:
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for _, parameter in trained:
            parameter.requires_grad = False  # not requires_grad_(): lazy parameters refuse methods
        self._frozen = tuple(name for name, _ in trained)
        self._zero_grad = ZeroGrad(self.model, self.runtime.adapters, self.model.__dict__.get("zero_grad"))
        self.model.zero_grad = self._zero_grad  # type: ignore[method-assign]

    def _thaw(self) -> None:
        known = dict(self.model.named_parameters())
        for name in self._frozen:
            if name in known:
                known[name].requires_grad = True
        self._frozen = ()
        _put_back(self.model, "zero_grad", self._zero_grad)
        self._zero_grad = None

    def _hook(self, path: str) -> None:
        """Watch a container, and its direct children: in a recomputed block the first to see its input may be a norm."""
        module, tracker = self.model.get_submodule(path), self.runtime.tracker
        module.register_forward_pre_hook(Watch(tracker, path, opens=True), with_kwargs=True, prepend=True)
        module.register_forward_hook(Leave(tracker, path), always_call=True)
        for name, child in self._beside(module, path):
            child.register_forward_pre_hook(Watch(tracker, name), with_kwargs=True)

    def _unhook(self, path: str) -> None:
        """Remove this bank's hooks, found by what they are: their handles would not survive a copy of the model."""
        module, tracker = self.model.get_submodule(path), self.runtime.tracker
        for watched in (module, *(child for _, child in self._beside(module, path))):
            for key, hook in list(watched._forward_pre_hooks.items()):
                if isinstance(hook, Watch) and hook.tracker is tracker:
                    del watched._forward_pre_hooks[key]
                    watched._forward_pre_hooks_with_kwargs.pop(key, None)
            for key, after in list(watched._forward_hooks.items()):
                if isinstance(after, Leave) and after.tracker is tracker:
                    del watched._forward_hooks[key]
                    watched._forward_hooks_always_called.pop(key, None)

    def _beside(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """Children of a container that are not sites and contain none."""
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if below not in self._sites and not any(True for _ in child.children()):
                yield below, child


class Watch:
    """Forward pre-hook of a module around sites, whose call begins a pass (``opens``), or beside them in a block."""

    def __init__(self, tracker: RouteTracker, path: str, *, opens: bool = False) -> None:
        self.tracker = tracker
        self.path = path
        self.opens = opens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tracker.enter(self.path, args, kwargs, opens=self.opens)


class Leave(Watch):
    """Forward hook of a module that contains sites, run after an exception too: its call is over."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        tracker = self.tracker
        if not tracker.leave(self.path) or self.path or output is None:
            return
        context = tracker.context  # read once: its owner may leave it now
        if context is not None:
            tracker.monitor.after_call(context.route.names, module.training)


class ZeroGrad:
    """The model's own ``zero_grad``, extended to the adapters' gradients: they are not parameters of the model, and a loop that clears
    gradients through the model would accumulate them from step to step."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], inner: Callable[..., None] | None) -> None:
        self.model = model
        self.adapters = adapters
        self.inner = inner

    def __call__(self, set_to_none: bool = True) -> None:
        if self.inner is not None:
            self.inner(set_to_none)
        else:
            type(self.model).zero_grad(self.model, set_to_none)
        for adapter in self.adapters.values():
            for parameter in adapter.parameters():
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = parameter.grad.detach().zero_()


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime of the adapters on this model, or None while there are none."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, AdaptedForward):
            return forward.runtime
    return None


def _forward_of(site: Site, host: Site) -> type[AdaptedForward]:
    """The class of the forward of a host of a site."""
    if host is site.mixture:
        return AdaptedMixture
    if site.stack is not None:
        return AdaptedExperts
    return AdaptedForward if site.layer_kind.is_layer else AdaptedRouter


def _ancestors(name: str) -> Iterator[str]:
    """Paths of the modules around a site, the root ("") among them, the site itself not."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _put_back(module: nn.Module, key: str, ours: Any) -> None:
    """Remove an attribute of ours from a module and restore the one that stood on the instance before, if any."""
    if ours is None:
        return
    before = ours.inner
    if module.__dict__.get(key) is ours:
        if before is None:
            del module.__dict__[key]
        else:
            setattr(module, key, before)
