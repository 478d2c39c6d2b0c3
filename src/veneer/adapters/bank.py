"""The bank: every adapter that is attached to one base, and how they are used.

    bank = attach(model)
    bank.add("sql", LoRA(r=16)); bank.load("runs/style/adapter", name="style")
    with bank.use(["sql", None, {"sql": 0.7, "style": 0.3}]):
        model(**batch)

Which adapters act is an argument of the batch: `use` holds a route for the length of its context, owned by one thread, and nothing else
in the model changes. Adding, loading and removing cost in proportion to the adapter's own tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer._html import html_table
from veneer.adapters.adapter import Adapter, check_name, new_adapter
from veneer.adapters.call_check import CallMonitor
from veneer.adapters.compatibility import check_fit, check_overrides, check_tying
from veneer.adapters.layers.fused import outside
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.merge import merged_state_dict, unties
from veneer.adapters.methods import Method
from veneer.adapters.module import adapter_module
from veneer.adapters.overrides import fresh_head, fresh_overrides
from veneer.adapters.patches import Patches
from veneer.adapters.runtime.route import Route, RouteLike
from veneer.adapters.runtime.runtime import Runtime
from veneer.adapters.runtime.tracker import RouteTracker
from veneer.adapters.targets import parts_of
from veneer.adapters.training_checks import is_untouched, optimizers_checked
from veneer.errors import AdapterError, RouteError


class FolderFormat(Protocol):
    """Reads adapters from folders and writes them; passed in, so that this package depends on no file format."""

    def find(self, path: Path) -> tuple[str, Path]:
        """(name, folder) of the adapter that a path means."""
        ...

    def read(self, path: Path, name: str, bank: Bank, **options: Any) -> Adapter:
        """The adapter in a folder, checked against the bank's sites."""
        ...

    def write(self, adapter: Adapter, path: Path, bank: Bank, **options: Any) -> None:
        """Write an adapter as a folder."""
        ...

    def not_portable(self, method: Method, bank: Bank) -> dict[str, str]:
        """{site: reason} for the sites whose change by this method is not read by other programs."""
        ...


class Bank:
    """Adapters attached to one base. Made by `attach`; ended by `detach`.

    Attributes:
        model: the base.
        survey: its sites; also as ``sites``, ``uncovered``, ``tied`` and ``vector_layers`` (layers without a matrix, such as norms).
        runtime: what adapted layers read.
    """

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
        self.survey = survey
        self.sites: dict[str, Site] = survey.sites
        self.uncovered: dict[str, str] = survey.uncovered
        self.tied: dict[str, tuple[str, ...]] = survey.tied
        self.vector_layers: dict[str, Site] = survey.vector_layers
        self._adapters: dict[str, Adapter] = {}
        monitor = CallMonitor(model, survey, self._adapters, called=called, rows_known=rows_known)
        self.runtime = Runtime(self._adapters, RouteTracker(self._adapters, monitor), self)
        self._patches = Patches(model, self.runtime, {**survey.sites, **survey.stacks})
        self._folders = folders
        self._detached = False

    @property
    def fast_path(self) -> bool:
        """True if layers may use the fast path; otherwise all use the plain one."""
        return self.runtime.fast_path

    @fast_path.setter
    def fast_path(self, on: bool) -> None:
        self.runtime.fast_path = on

    # What is in the bank

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they came."""
        return list(self._adapters)

    def __repr__(self) -> str:
        methods = {name: adapter.method for name, adapter in self._adapters.items()}
        adapters = ", ".join(f"{name}: {method.label} {method.size}".rstrip() for name, method in methods.items())
        ended = ", detached" if self._detached else ""
        return f"Bank({type(self.model).__name__}, {len(self.sites)} sites, {adapters or 'no adapters'}{ended})"

    def _repr_html_(self) -> str:
        rows = [
            (name, adapter.method.label, adapter.method.size, len(adapter.tensors), f"{adapter.num_parameters():,}")
            for name, adapter in self._adapters.items()
        ]
        ended = ", detached" if self._detached else ""
        caption = f"{type(self.model).__name__}, {len(self.sites)} sites{ended}"
        return html_table(("adapter", "method", "size", "sites", "parameters"), rows, caption)

    def __getitem__(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except (KeyError, TypeError):
            have = ", ".join(self._adapters) or "none"
            raise AdapterError(f'the bank has no adapter "{name}"; it has: {have}') from None

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def sites_of(self, name: str) -> list[Site]:
        """Sites whose forward an adapter takes part in, a tied head and layers with overrides included."""
        return self[name].sites(self.survey)

    # Adapters in and out

    def add(self, name: str, method: Method, *, seed: int = 0, outputs: int | None = None) -> Adapter:
        """Put a fresh adapter into the bank; until it is trained, it leaves the base's output as it is, to the bit.

        Args:
            name: its name in routes.
            method: its method with the options.
            seed: seed of its initial values and of dropout.
            outputs: number of outputs of a head of its own, on a classifier (``load_base(..., task="classification")``).

        Raises:
            TargetError: a pattern matches nothing.
            AdapterError: the name is taken or unfit, or the base has no head.
        """
        given: object = method
        if not isinstance(given, Method):
            found = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
            raise AdapterError(
                f"bank.add takes the adapter's method with its options, such as LoRA(r=16); found {found}"
            )
        self._check_free(name)
        # Experts are most of a mixture's layers, so they are not left out.
        left_out = [site for site in self.not_portable(method) if self.sites[site].stack is None]
        chosen = method.choose(self.survey, left_out=left_out)
        overrides, tokens = fresh_overrides(self.model, self.survey, method, chosen)
        if outputs is not None:
            overrides |= self._fresh_head(outputs, seed)
        check_tying(method, [*chosen, *overrides], self.sites)
        if method.ensure_weight_tying:
            # A head that was chosen too takes the embedding's factors, as in PEFT, and none of its own.
            chosen = [site for site in chosen if self.survey.site(site).tied_to not in chosen]
        # As in PEFT, a layer whose weight is overridden is not adapted too.
        own = [site for site in chosen if "weight" not in overrides.get(site, ())]
        sites = [site for site in map(self.survey.site, own) if method.tensor_names(site.kind)]
        adapter = new_adapter(name, method, sites, seed=seed, overrides=overrides, tokens=tokens)
        check_overrides(adapter, self.survey)
        parts = {site.name: parts_of(site, method) for site in sites if method.low_rank}
        adapter.parts = {name: found for name, found in parts.items() if found is not None}
        return self._install(adapter)

    def _fresh_head(self, outputs: int, seed: int) -> dict[str, dict[str, Tensor]]:
        if not any(self.survey.site(name).is_classifier for name in self.survey.head):
            raise AdapterError(
                f"{type(self.model).__name__} has no head for classes; load the base with one: "
                'load_base(name, task="classification")'
            )
        return fresh_head(self.survey, outputs, seed)

    def insert(self, adapter: Adapter) -> Adapter:
        """Put an existing adapter into the bank, after checking its tensors against this base.

        Raises AdapterError with every site that is missing or of another shape, or if another library changed the model.
        """
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                f"bank.insert takes an Adapter, found {type(adapter).__name__}; bank.load reads one from a folder"
            )
        self._check_free(adapter.name)
        self.check_fit(adapter)
        return self._install(adapter)

    def _install(self, adapter: Adapter) -> Adapter:
        self._patches.check()
        for name, chosen in adapter.parts.items():
            adapter.hold_outputs(name, outside(self.sites[name], chosen))
        self._place(adapter)  # before anything is changed: memory may be full
        self._adapters[adapter.name] = adapter
        self.runtime.tracker.plans.clear()
        for site in adapter.sites(self.survey):
            self._patches.install(site, adapter)
        return adapter

    def _place(self, adapter: Adapter) -> None:
        """Move a new adapter's tensors to its layers at once, so that an optimizer's state is made and restored there."""
        devices = {name: self._device(name, adapter) for name in (*adapter.tensors, *adapter.overrides)}
        places = (*devices.values(), *(parameter.device for parameter in adapter.parameters()))
        if not any(place.type == "meta" for place in places):
            self._ready(adapter, devices)

    def not_portable(self, method: Method) -> dict[str, str]:
        """{site: reason} for the sites at which other programs cannot read this method's change from a saved folder. ``all-linear``
        leaves out those of them that are modules of the base."""
        return {} if self._folders is None else self._folders.not_portable(method, self)

    def check_fit(self, adapter: Adapter) -> None:
        """Raise AdapterError unless every tensor of the adapter fits the site that it names; TargetError where its tying cannot be."""
        check_fit(adapter, self.survey)
        check_tying(adapter.method, [*adapter.tensors, *adapter.overrides], self.sites)

    def remove(self, name: str) -> None:
        """Take an adapter out; layers that no other adapter acts on are restored.

        Raises RouteError while a route that uses it is active.
        """
        sites = self.sites_of(name)
        tracker = self.runtime.tracker
        if name in tracker.names_in_use():
            raise RouteError(f'adapter "{name}" is in use by an active route; leave its context first')
        self._patches.check()
        for site in sites:
            self._patches.uninstall(site, name)
        tracker.monitor.forget(name)
        tracker.plans.clear()
        tracker.inputs.prune()
        self.runtime.frozen.forget(name)
        del self._adapters[name]

    def load(self, path: str | os.PathLike[str], name: str | None = None, **options: Any) -> Adapter:
        """Read an adapter into the bank, strictly.

        Args:
            path: a PEFT folder, its .safetensors file, a run (its best adapter), what `train` returned, or a hub id.
            name: by default that of the folder or run.
            options: ``force`` and ``convert``, as for commands.

        Raises:
            CheckpointError: everything that is wrong with the folder.
            AdapterError: the name is taken, or the adapter does not fit.
        """
        _check_path(path, "load")
        default, folder = self._format().find(Path(path))
        name = name or default
        self._check_free(name)
        return self.insert(self._format().read(folder, name, self, **options))

    def save(self, name: str, path: str | os.PathLike[str], **options: Any) -> None:
        """Write an adapter as a folder that PEFT can load, with a receipt. Warns if nothing has trained it since `add`."""
        _check_path(path, "save")
        if is_untouched(self[name], self.model, self.survey):
            warnings.warn(
                f'adapter "{name}" is as bank.add made it, so the folder {path} will change nothing: no optimizer step has moved any of '
                f'its tensors; give your optimizer bank.parameters("{name}"), or the training loop of a library bank.module("{name}")',
                stacklevel=2,
            )
        self[name].settle()
        self._format().write(self[name], Path(path), self, **options)

    # Training

    def parameters(self, name: str) -> list[nn.Parameter]:
        """An adapter's tensors, for an optimizer."""
        return list(self[name].parameters())

    def parameter_groups(self, name: str, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of an adapter: B at ``loraplus_lr_ratio`` times the rate of the rest (LoRA+)."""
        adapter = self[name]
        fast: dict[int, nn.Parameter] = {}
        ratio = 1.0
        for site, tensors in adapter.tensors.items():
            names, ratio = adapter.method.lr_ratio_tensors(adapter.kinds[site])
            fast |= {id(tensors[name]): tensors[name] for name in names}
        rest = [p for p in adapter.parameters() if id(p) not in fast]
        groups = [{"params": rest, "lr": lr}, {"params": list(fast.values()), "lr": lr * ratio}]
        return groups if fast else groups[:1]

    def module(self, name: str) -> nn.Module:
        """The base under one adapter, as a module whose parameters and state_dict are the adapter's, for transformers' Trainer or any other
        loop that zeroes, clips and saves the module that it is given."""
        return adapter_module(self, name)

    # Use

    @contextmanager
    def use(
        self,
        route: RouteLike,
        *,
        repeat: int = 1,
        keep: Tensor | None = None,
        training: bool | None = None,
        windows: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> Iterator[Bank]:
        """Route every call of the model inside this context.

        Args:
            route: an adapter's name, None for the base, a mix {name: weight}, a list of these row by row, or `Route.tokens(...)`.
            repeat: consecutive rows of the batch for each entry of a list, as beam search makes them.
            keep: indices of the tokens that the head receives, if it does not receive all [K].
            training: whether adapters drop out; by default the layers' own train() and eval() modes.
            windows: by adapter, where the batch is a part of one whose dropout masks it shares: (first of the adapter's tokens,
                tokens here, tokens in all).

        Raises:
            RouteError: another thread's route is active.
            AdapterError: a name is not in the bank, or an optimizer that holds nothing to train takes a step in the context.
        """
        parsed = Route.parse(route, repeat)
        if self._detached and parsed.names:
            raise AdapterError("this bank is detached from its model, so its adapters would do nothing; attach again")
        devices: dict[str, torch.device] = {}
        for name in parsed.names:
            self._ready(self[name], devices)
        with (
            optimizers_checked([self[name] for name in parsed.names]),
            self.runtime.tracker.hold(parsed, keep, training, windows),
        ):
            yield self

    # The end

    def merged_state_dict(self, route: RouteLike) -> dict[str, Tensor]:
        """The base's state_dict with the adapters of a one-row route, a weighted mix too, merged in: the base's names, and new
        tensors for what changes; the others are the model's own."""
        return merged_state_dict(self.model, self.survey, self._one_mix(route))

    def unties(self, route: RouteLike) -> list[tuple[str, ...]]:
        """Groups of modules whose shared weight comes apart when ``route`` is merged."""
        return unties(self.survey, self._one_mix(route))

    def detach(self) -> None:
        """Restore the model to the bit. The adapters stay in this object. `fast_modules` are taken off after it.

        Raises RouteError while a route is active.
        """
        if self.runtime.tracker.context is not None:
            raise RouteError("the bank cannot be detached while a route is active; leave its context first")
        self._patches.check()
        self._patches.remove_all()
        self.runtime.tracker.plans.clear()
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
        if name in self._adapters:
            raise AdapterError(f'the bank already has an adapter "{name}"; remove it first, or choose another name')

    def _ready(self, adapter: Adapter, devices: dict[str, torch.device]) -> None:
        """Move an adapter's tensors to where its layers are, in place, so that optimizers keep hold of them.

        ``devices`` holds where layers are, as far as known. Raises AdapterError where the model has lost a layer that it had, or
        where a tensor has no values.
        """
        for table in (adapter.tensors, adapter.overrides):
            for name, tensors in table.items():
                device = devices.get(name)
                if device is None:
                    device = devices[name] = self._device(name, adapter)
                for key, parameter in tensors.items():
                    if parameter.device != device:
                        self._move(adapter, f"{name}.{key}", parameter, device)
        adapter.settle()

    def _device(self, name: str, adapter: Adapter) -> torch.device:
        site = self.sites.get(name) or self.vector_layers[name]
        if not site.is_current():
            raise AdapterError(
                f'{name}: the model has another layer here than when the bank was attached, so adapter "{adapter.name}" would '
                "do nothing there; detach and attach again after changing the model"
            )
        return site.device

    def _move(self, adapter: Adapter, name: str, parameter: nn.Parameter, device: torch.device) -> None:
        if parameter.is_meta:
            raise AdapterError(
                f'{name} of adapter "{adapter.name}" has a shape but no values, since it was made on a base without '
                "weights; remove it and add it again now that the base has them"
            )
        parameter.data = parameter.data.to(device)

    def _one_mix(self, route: RouteLike) -> list[tuple[Adapter, float]]:
        parsed = Route.parse(route)
        if not parsed.uniform:
            raise RouteError("merging takes a route of one row: a name, or a weighted mix {name: weight}")
        for name in parsed.names:
            self[name].settle()
        return [(self[name], weight) for name, weight in parsed.mixes[0]]


def _check_path(path: object, verb: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise AdapterError(f"bank.{verb} takes the path of a folder; found {type(path).__name__}")
