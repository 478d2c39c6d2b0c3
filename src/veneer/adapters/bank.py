"""The bank: every adapter that is attached to one base, and the door through which they are used.

    bank = attach(model)
    bank.add("sql", LoRA(r=16)); bank.load("runs/style/adapter", name="style")
    with bank.use(["sql", None, {"sql": 0.7, "style": 0.3}]):
        model(**batch)

Slot 0 is the base; each adapter has a slot of its own. Which adapters act is an argument of the batch: `use` holds a route for the
length of its context, under one owner, and nothing else in the model changes. Adding, loading and removing cost in proportion to
the adapter's own tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter, check_name, new_adapter
from veneer.adapters.attach import Patches
from veneer.adapters.call_check import CallMonitor
from veneer.adapters.compatibility import check_fit, check_tying
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.merge import merged_state_dict, unties
from veneer.adapters.methods import Method
from veneer.adapters.module import adapter_module
from veneer.adapters.overrides import fresh_own
from veneer.adapters.runtime.route import Mix, Route, RouteLike
from veneer.adapters.runtime.tracker import RouteTracker
from veneer.adapters.targets import select
from veneer.errors import AdapterError, RouteError


class FolderFormat(Protocol):
    """How adapters are read from and written to folders; handed in, so that this room knows no file format."""

    def find(self, path: Path) -> tuple[str, Path]:
        """(name, folder) of the adapter that a path means."""
        ...

    def read(self, path: Path, name: str, bank: Bank, **options: Any) -> Adapter:
        """The adapter in a folder, checked against the bank's sites."""
        ...

    def write(self, adapter: Adapter, path: Path, bank: Bank, **options: Any) -> None:
        """Write an adapter as a folder."""
        ...


class Bank:
    """Adapters attached to one base. Made by `attach`; ended by `detach`."""

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        *,
        called: bool,
        rows_known: bool,
        folders: FolderFormat | None = None,
    ) -> None:
        self.model = model
        self.sites: dict[str, Site] = survey.sites
        self.uncovered: dict[str, str] = survey.uncovered
        self.tied: dict[str, tuple[str, ...]] = survey.tied
        self.vector_layers: dict[str, Site] = survey.vector_layers
        """Layers without a host where an adapter can have values of its own (norms)."""
        self.fused = True
        """Whether layers may take the fast form; off, all take the plain one."""
        self.traffic = RouteTracker(self)
        self.wiring = Patches(self)
        self.lookout = CallMonitor(self, survey, called=called, rows_known=rows_known)
        self._folders = folders
        self._slots: dict[str, Adapter] = {}
        self._numbers: dict[str, int] = {}
        self._next_slot = 1
        self._detached = False

    # What is in the bank

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they came."""
        return list(self._slots)

    def __getitem__(self, name: str) -> Adapter:
        try:
            return self._slots[name]
        except KeyError:
            have = ", ".join(self._slots) or "none"
            raise AdapterError(f'the bank has no adapter "{name}"; it has: {have}') from None

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def slot(self, name: str | None) -> int:
        """The slot of an adapter; 0 is the base."""
        return 0 if name is None else self._numbers[self[name].name]

    def sites_of(self, name: str) -> list[Site]:
        """Sites whose forward an adapter takes part in, a tied head and places with values of its own among them."""
        adapter = self[name]
        names = dict.fromkeys([*adapter.tensors, *adapter.overrides])
        sites = [self.sites.get(name) or self.vector_layers[name] for name in names]
        if adapter.method.ensure_weight_tying:
            sites += [site for site in self.sites.values() if site.tied_to is not None and adapter.follows_at(site)]
        return sites

    # Adapters in and out

    def add(self, name: str, method: Method, *, seed: int = 0) -> Adapter:
        """Put a fresh adapter into the bank; until it is trained, it leaves the base's output as it is, to the bit.

        Raises TargetError for patterns that match nothing, AdapterError for a name that is taken or unfit.
        """
        self._check_free(name)
        chosen = select(self.lookout.survey, method, method.kinds)
        own, tokens = fresh_own(self.model, self.lookout.survey, method, chosen)
        check_tying(method, [*chosen, *own], self.sites)
        if method.ensure_weight_tying:
            # A head that was chosen too takes the embedding's factors, as in PEFT, and none of its own.
            chosen = [site for site in chosen if self.sites[site].tied_to not in chosen]
        # As in PEFT, a layer that is trained whole is not adapted too.
        sites = [self.sites[site] for site in chosen if "weight" not in own.get(site, ())]
        return self.insert(new_adapter(name, method, sites, seed=seed, overrides=own, tokens=tokens))

    def insert(self, adapter: Adapter) -> Adapter:
        """Put an existing adapter into the bank, after holding its tensors against this base.

        Raises AdapterError with every site that is missing or of another shape, or if the model is not this bank's to change.
        """
        self._check_free(adapter.name)
        self.check_fit(adapter)
        self.wiring.check()
        self._slots[adapter.name] = adapter
        self._numbers[adapter.name] = self._next_slot
        self._next_slot += 1
        self.traffic.charts.clear()
        for site in self.sites_of(adapter.name):
            self.wiring.install(site, adapter.name)
        return adapter

    def check_fit(self, adapter: Adapter) -> None:
        """Raise AdapterError unless every tensor of the adapter fits the site that it names; TargetError where its tying cannot be."""
        check_fit(adapter, self.sites, self.vector_layers)
        check_tying(adapter.method, [*adapter.tensors, *adapter.overrides], self.sites)

    def remove(self, name: str) -> None:
        """Take an adapter out; layers that no other adapter acts on go back to what they were.

        Raises RouteError while a route that uses it is active.
        """
        sites = self.sites_of(name)
        if name in self.traffic.names_in_use():
            raise RouteError(f'adapter "{name}" is in use by an active route; leave its context first')
        self.wiring.check()
        for site in sites:
            self.wiring.uninstall(site, name)
        self.lookout.forget(name)
        self.traffic.charts.clear()
        del self._slots[name], self._numbers[name]

    def load(self, path: str | Path, name: str | None = None, **options: Any) -> Adapter:
        """Read an adapter into the bank, strictly. ``path`` is a PEFT folder, its .safetensors file, or a run.

        ``name`` defaults to the name of the folder or run.
        """
        default, folder = self._format().find(Path(path))
        name = name or default
        self._check_free(name)
        return self.insert(self._format().read(folder, name, self, **options))

    def save(self, name: str, path: str | Path, **options: Any) -> None:
        """Write an adapter as a folder that PEFT can load, with a receipt."""
        self._format().write(self[name], Path(path), self, **options)

    # Training

    def parameters(self, name: str) -> list[nn.Parameter]:
        """An adapter's tensors, for an optimizer."""
        return list(self[name].parameters())

    def parameter_groups(self, name: str, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of an adapter: B at ``loraplus_lr_ratio`` times the rate of the rest (LoRA+)."""
        adapter = self[name]
        ratio = adapter.method.loraplus_lr_ratio
        fast = [
            p for own in adapter.tensors.values() for key, p in own.items() if key in ("lora_B", "lora_embedding_B")
        ]
        known = {id(p) for p in fast}
        rest = [p for p in adapter.parameters() if id(p) not in known]
        return [{"params": rest, "lr": lr}, {"params": fast, "lr": lr * ratio}]

    def module(self, name: str) -> nn.Module:
        """The base under one adapter, as a module whose parameters and state_dict are the adapter's: what transformers' Trainer, or any
        other loop that zeroes, clips and saves by the module it is given, has to be given."""
        return adapter_module(self, name)

    # Use

    @contextmanager
    def use(
        self, route: RouteLike, *, repeat: int = 1, keep: Tensor | None = None, training: bool | None = None
    ) -> Iterator[Bank]:
        """Route every call of the model inside this context.

        route: an adapter's name, None for the base, a mix {name: weight}, a list of these row by row, or `Route.tokens(...)`.
        repeat: consecutive rows of the batch for each entry of a list, as beam search makes them.
        keep: which tokens the head sees, where it does not see all [K].
        training: whether adapters drop out; by default what the layers' own train() and eval() say.

        Raises RouteError while another owner's route is active; AdapterError for names that are not in the bank.
        """
        parsed = Route.parse(route, repeat)
        if self._detached and parsed.names:
            raise AdapterError("this bank is detached from its model, so its adapters would do nothing; attach again")
        devices: dict[str, torch.device] = {}
        for name in parsed.names:
            self._ready(self[name], devices)
        with self.traffic.hold(parsed, keep, training):
            yield self

    # The end

    def merged_state_dict(self, route: RouteLike) -> dict[str, Tensor]:
        """The base's state_dict with the adapters of a one-row route, a weighted mix too, merged in: the base's names, new tensors."""
        return merged_state_dict(self, self._one_mix(route))

    def unties(self, route: RouteLike) -> list[tuple[str, ...]]:
        """Groups of modules whose shared weight comes apart when ``route`` is merged."""
        return unties(self, self._one_mix(route))

    def detach(self) -> None:
        """Take everything off the model: it is to the bit what it was before `attach`. The adapters stay in this object.

        Raises RouteError while a route is active.
        """
        if self.traffic.lease is not None:
            raise RouteError("the bank cannot be detached while a route is active; leave its context first")
        self.wiring.check()
        self.wiring.remove_all()
        self.traffic.charts.clear()
        self._detached = True

    # Inside

    def _format(self) -> FolderFormat:
        if self._folders is None:
            raise AdapterError("this bank was attached without a folder format; use veneer.attach")
        return self._folders

    def _check_free(self, name: str) -> None:
        check_name(name)
        if self._detached:
            raise AdapterError("this bank is detached from its model; attach again for a new one")
        if name in self._slots:
            raise AdapterError(f'the bank already has an adapter "{name}"; remove it first, or choose another name')

    def _ready(self, adapter: Adapter, devices: dict[str, torch.device]) -> None:
        """Move an adapter's tensors to where its layers are, in place, so that optimizers keep hold of them.

        devices: where layers are, as far as they were looked at. Raises AdapterError where the model has lost a layer that it had, or
        where a tensor has no values.
        """
        for table in (adapter.tensors, adapter.overrides):
            for name, own in table.items():
                device = devices.get(name)
                if device is None:
                    device = devices[name] = self._device(name, adapter)
                for key, parameter in own.items():
                    if parameter.device != device:
                        self._move(adapter, f"{name}.{key}", parameter, device)

    def _device(self, name: str, adapter: Adapter) -> torch.device:
        site = self.sites.get(name) or self.vector_layers[name]
        if not site.stands():
            raise AdapterError(
                f'{name}: the model has another layer here than when the bank was attached, so adapter "{adapter.name}" would '
                "do nothing there; detach and attach again after changing the model"
            )
        return site.weight.device

    def _move(self, adapter: Adapter, name: str, parameter: nn.Parameter, device: torch.device) -> None:
        if parameter.is_meta:
            raise AdapterError(
                f'{name} of adapter "{adapter.name}" has a shape but no values, since it was made on a base without '
                "weights; remove it and add it again now that the base has them"
            )
        parameter.data = parameter.data.to(device)

    def _one_mix(self, route: RouteLike) -> Mix:
        parsed = Route.parse(route)
        if not parsed.uniform:
            raise RouteError("merging takes a route of one row: a name, or a weighted mix {name: weight}")
        for name in parsed.names:
            self[name]
        return parsed.mixes[0]
