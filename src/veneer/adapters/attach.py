"""Surgery: putting hosts and hooks on a model, and taking them off again without a trace.

A layer is changed by one instance attribute (``forward``), a container by hooks, the model itself by one attribute more
(``zero_grad``). Nothing else is touched: no class, no name, no parameter, no buffer. While an adapter is on it, the base is frozen: its
parameters require no gradient. Taking off restores what stood there before, by keeping it, never by computing back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.adapters.layers.dry_run import NEVER_CALLED, ROWS, equal_rows, example_inputs, probe, rows_of
from veneer.adapters.layers.site import Site, Survey, survey
from veneer.adapters.runtime.forward import AdaptedForward
from veneer.adapters.runtime.tracker import Enter, Leave, Watch
from veneer.errors import AdapterError
from veneer.models.fast_modules import unfuse

if TYPE_CHECKING:
    from veneer.adapters.bank import Bank, FolderFormat


class Patches:
    """What a bank has put on its model, and for which adapters."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._hosts: dict[str, AdaptedForward] = {}
        self._containers: dict[str, int] = {}
        self._frozen: tuple[str, ...] = ()
        self._zero_grad: ZeroGrad | None = None

    def host(self, site: Site) -> AdaptedForward | None:
        """What stands at a site, if anything does."""
        return self._hosts.get(site.name)

    def check(self) -> None:
        """Raise AdapterError where another bank or library has put itself on a layer that this bank is about to change."""
        other = bank_of(self.bank.model)
        if other is not None and other is not self.bank:
            raise AdapterError("another bank acts on this model; use it (veneer.bank_of(model)), or detach it first")
        for name, host in self._hosts.items():
            if host.site.module.__dict__.get("forward") is not host:
                raise AdapterError(
                    f"the forward of {name or 'the model'} was replaced after an adapter was put there (by a hook of another "
                    "library?); take that off first"
                )

    def install(self, site: Site, name: str) -> None:
        """Let the adapter ``name`` act at a site."""
        host = self._hosts.get(site.name)
        if host is not None:
            host.users[name] = None
            return
        if not self._hosts:
            self._freeze()
        host = self._hosts[site.name] = AdaptedForward(site, self.bank, site.module.__dict__.get("forward"))
        host.users[name] = None
        site.module.forward = host
        for path in _ancestors(site.name):
            self._containers[path] = self._containers.get(path, 0) + 1
            if self._containers[path] == 1:
                _hook(self.bank.model, self.bank, path)

    def uninstall(self, site: Site, name: str) -> None:
        """The adapter ``name`` leaves a site; when the last one does, the layer is what it was."""
        host = self._hosts.get(site.name)
        if host is None:
            return
        host.users.pop(name, None)
        if host.users:
            return
        del self._hosts[site.name]
        _restore(host)
        for path in _ancestors(site.name):
            self._containers[path] -= 1
            if not self._containers[path]:
                del self._containers[path]
                _unhook(self.bank.model, self.bank, path)
        if not self._hosts:
            self._thaw()

    def remove_all(self) -> None:
        """Take everything off the model."""
        for host in self._hosts.values():
            _restore(host)
        for path in self._containers:
            _unhook(self.bank.model, self.bank, path)
        unfuse(self.bank.model)
        self._hosts.clear()
        self._containers.clear()
        self._thaw()

    def _freeze(self) -> None:
        own = [(name, parameter) for name, parameter in self.bank.model.named_parameters() if parameter.requires_grad]
        for _, parameter in own:
            parameter.requires_grad = False  # not requires_grad_(): lazy parameters refuse methods
        self._frozen = tuple(name for name, _ in own)
        self._zero_grad = ZeroGrad(self.bank, self.bank.model.__dict__.get("zero_grad"))
        self.bank.model.zero_grad = self._zero_grad  # type: ignore[method-assign]

    def _thaw(self) -> None:
        known = dict(self.bank.model.named_parameters())
        for name in self._frozen:
            if name in known:
                known[name].requires_grad = True
        self._frozen = ()
        if self._zero_grad is not None:
            _put_back(self.bank.model, "zero_grad", self._zero_grad)
        self._zero_grad = None


class ZeroGrad:
    """The model's own ``zero_grad``, and the adapters' gradients with it: they are no parameters of the model's, and a loop that clears by
    the model would add them up from step to step."""

    def __init__(self, bank: Bank, inner: Callable[..., None] | None) -> None:
        self.bank = bank
        self.inner = inner

    def __call__(self, set_to_none: bool = True) -> None:
        model = self.bank.model
        if self.inner is not None:
            self.inner(set_to_none)
        else:
            type(model).zero_grad(model, set_to_none)
        for name in self.bank:
            for parameter in self.bank.parameters(name):
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = parameter.grad.detach().zero_()


def attach(model: nn.Module, *, example: dict[str, Any] | None = None, folders: FolderFormat | None = None) -> Bank:
    """Make any ``nn.Module`` ready for adapters. The model goes on being used as before, and is not changed until one is added;
    from then on its own parameters are frozen, until the last adapter leaves or the bank is detached.

    example: keyword arguments for one forward, for the probe of a model whose inputs cannot be guessed; best with two rows or more.
    Raises AdapterError if a bank is attached already, or if the model cannot be called with ``example``.
    """
    from veneer.adapters.bank import Bank  # the bank itself needs this file

    if not isinstance(model, nn.Module):
        raise AdapterError(f"attach takes a torch.nn.Module; found {type(model).__name__}")
    if bank_of(model) is not None:
        raise AdapterError("this model has a bank attached already; use it (veneer.bank_of(model)), or detach it first")
    found = survey(model)
    called, rows_known = _try_out(model, found, example)
    return Bank(model, found, called=called, rows_known=rows_known, folders=folders)


def bank_of(model: nn.Module) -> Bank | None:
    """The bank whose adapters are on this model, or None while no adapter is on it."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, AdaptedForward):
            return forward.bank
    return None


def _try_out(model: nn.Module, found: Survey, example: dict[str, Any] | None) -> tuple[bool, bool]:
    """Probe the model: (whether it is known which layers are called, whether it is known how rows lie)."""
    if example is not None:
        rows = rows_of((), example)
        try:
            inputs: Any = equal_rows(example, rows)
        except TypeError:
            inputs, rows = example, 1
        try:
            probe(model, found, (), inputs, rows)
        except Exception as error:
            raise AdapterError(f"the model cannot be called with example=: {type(error).__name__}: {error}") from error
    else:
        inputs = example_inputs(model)
        if inputs is None:
            return False, False
        rows = ROWS
        try:
            probe(model, found, (), inputs, rows)
        except Exception:
            # The guess was wrong; then the first real batch is looked at instead.
            return False, False
    for site in found.every():
        if not site.layout:
            site.reason = NEVER_CALLED
    if rows > 1:
        return True, True
    for site in found.every():
        site.layout = ""
    return True, False


def _ancestors(name: str) -> Iterator[str]:
    """Paths of the modules around a site, the root ("") among them, the site itself not."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _restore(host: AdaptedForward) -> None:
    _put_back(host.site.module, "forward", host)


def _put_back(module: nn.Module, key: str, ours: AdaptedForward | ZeroGrad) -> None:
    """Take an attribute of ours off a module; what stood on the instance before, if anything, comes back."""
    if module.__dict__.get(key) is not ours:
        return
    if ours.inner is None:
        del module.__dict__[key]
    else:
        setattr(module, key, ours.inner)


def _hook(model: nn.Module, bank: Bank, path: str) -> None:
    """Watch a container, and what stands directly in it: in a recomputed block the first to see its input may be a norm."""
    module = model.get_submodule(path)
    module.register_forward_pre_hook(Enter(bank, path), with_kwargs=True, prepend=True)
    module.register_forward_hook(Leave(bank, path), always_call=True)
    for name, child in _beside(module, path, bank):
        child.register_forward_pre_hook(Watch(bank, name), with_kwargs=True)


def _unhook(model: nn.Module, bank: Bank, path: str) -> None:
    """Remove this bank's hooks, found by what they are: their handles would not survive a copy of the model."""
    module = model.get_submodule(path)
    for watched in (module, *(child for _, child in _beside(module, path, bank))):
        for key, hook in list(watched._forward_pre_hooks.items()):
            if isinstance(hook, Watch) and hook.bank is bank:
                del watched._forward_pre_hooks[key]
                watched._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, after in list(watched._forward_hooks.items()):
            if isinstance(after, Leave) and after.bank is bank:
                del watched._forward_hooks[key]
                watched._forward_hooks_always_called.pop(key, None)


def _beside(module: nn.Module, path: str, bank: Bank) -> Iterator[tuple[str, nn.Module]]:
    """Children of a container that hold no sites of their own and are none."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if below not in bank.sites and not any(True for _ in child.children()):
            yield below, child
