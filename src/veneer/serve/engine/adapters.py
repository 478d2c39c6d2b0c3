"""The adapters of an engine: on disk, in memory, or in the bank, where they run.

A name stands for the version that was loaded last. A sequence holds the versions that it began with, so one that is replaced or unloaded
goes on answering it and leaves when its last sequence has ended. In the bank a version has a name of its own, made from its content.
The bank takes ``in_bank`` adapters, memory ``in_memory``; beyond, the one that was used longest ago leaves, unless it is pinned or a
sequence runs with it. One that left memory is read again, in a thread, when a sequence waits for it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from veneer.adapters import Bank
from veneer.adapters.adapter import Adapter, check_name
from veneer.checkpoints import PeftFolders
from veneer.checkpoints.locate import head_refusal
from veneer.checkpoints.receipt import stop_tokens
from veneer.errors import AdapterError, VeneerError
from veneer.serve.engine.request import AdapterStatus, GenerationRequest, Mix


@dataclass(eq=False)
class AdapterVersion:
    """One content under one name.

    Attributes:
        name: as requests name it. bank_name: as the bank does.
        version: hash of the content.
        stops: the tokens with which it learnt to end its answers, {text: id}.
        template: the chat template that it was trained with; None if it is the base's.
        trained: its tensors may change, so its keys and values are not reused. prepared: what `AdapterStore.prepare` made of it.
        held: sequences that have not ended; running: those of them that are in the batch.
        current: False once the name stands for another content, or for none.
        failure: why it could not be read again.
    """

    name: str
    bank_name: str
    version: str
    path: Path | None
    adapter: Adapter | None
    bytes: int
    rank: int
    method: str
    stops: dict[str, int] = field(default_factory=dict)
    template: str | None = None
    trained: bool = False
    prepared: Any = None
    pinned: bool = False
    held: int = 0
    running: int = 0
    current: bool = True
    in_bank: bool = False
    loading: bool = False
    failure: VeneerError | None = None
    used: int = 0


@dataclass(frozen=True)
class AdapterLimits:
    """Adapters that are kept in the bank and in memory, beyond those that are in use."""

    in_bank: int = 64
    in_memory: int = 256


@dataclass(eq=False)
class AdapterStore:
    """The adapters of one bank. ``wake`` is called when one has been read, ``prepare`` with each that is. Methods that
    change the bank belong to the engine's thread."""

    bank: Bank | None
    limits: AdapterLimits
    wake: Callable[[], None] = lambda: None
    prepare: Callable[[Adapter], Any] | None = None
    loads: int = 0
    evictions: int = 0
    _current: dict[str, AdapterVersion] = field(default_factory=dict)
    _versions: list[AdapterVersion] = field(default_factory=list)
    _clock: count[int] = field(default_factory=lambda: count(1))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        for name in self.bank.names if self.bank is not None else ():
            assert self.bank is not None
            one = self._version(name, None, self.bank[name])
            one.bank_name, one.in_bank, one.pinned = name, True, True
            self._current[name] = one
            self._versions.append(one)

    # From any thread

    def load(self, name: str, path: Path, *, pinned: bool) -> AdapterStatus:
        """Read and check a folder in this thread, and let the name stand for it."""
        check_name(name)
        one = self._version(name, path, self._read(name, path))
        one.pinned = pinned
        with self._lock:
            old = self._current.get(name)
            if old is not None and old.version == one.version:
                old.path, old.pinned, old.failure, old.template = path, pinned, None, one.template
                return _status(old)
            if old is not None:
                old.current = False
            before = [each for each in self._versions if each.bank_name == one.bank_name]
            if before:  # it comes back while sequences still run with it
                template, one = one.template, before[0]
                one.current, one.path, one.pinned, one.failure, one.template = True, path, pinned, None, template
            else:
                self._versions.append(one)
            self._current[name] = one
            self.loads += 1
            self._shrink_memory()
        return _status(one)

    def unload(self, name: str) -> None:
        """Let the name stand for nothing."""
        with self._lock:
            self._find(name).current = False
            del self._current[name]
        self.wake()

    def hold(self, mix: Mix) -> tuple[AdapterVersion, ...]:
        """The present versions of a mix's adapters, kept until `release`."""
        with self._lock:
            found = tuple(self._find(name) for name, _ in mix)
            for one in found:
                if one.adapter is not None:  # one that was read here has been checked
                    _check_servable(one.adapter)
            for one in found:
                one.held += 1
        return found

    def without_zeros(self, request: GenerationRequest) -> GenerationRequest:
        """The request without adapters of weight 0, which change neither text nor cache. Unknown names raise AdapterError."""
        if all(weight for _, weight in request.mix):
            return request
        with self._lock:
            for name, _ in request.mix:
                self._find(name)
        return replace(request, mix=tuple((name, weight) for name, weight in request.mix if weight))

    def release(self, versions: Items[AdapterVersion]) -> None:
        """A sequence has ended."""
        with self._lock:
            for one in versions:
                one.held -= 1

    def status(self) -> list[AdapterStatus]:
        """The adapters that names stand for."""
        with self._lock:
            return [_status(one) for one in self._current.values()]

    def _find(self, name: str) -> AdapterVersion:
        try:
            return self._current[name]
        except KeyError:
            have = ", ".join(self._current) or "none"
            raise AdapterError(f'no adapter is named "{name}"; there are: {have}') from None

    def _version(self, name: str, path: Path | None, adapter: Adapter) -> AdapterVersion:
        version = content_hash(adapter)
        return AdapterVersion(
            name,
            f"{name[:111]}.{version[:16]}",
            version,
            path,
            adapter,
            bytes=sum(p.numel() * p.element_size() for p in adapter.parameters()),
            rank=max((adapter.rank(site) for site in adapter.tensors), default=0),
            method=adapter.method.label,
            stops=stop_tokens(adapter),
            template=adapter.meta.get("template"),
            trained=any(p.requires_grad for p in adapter.parameters()),
            prepared=None if self.prepare is None else self.prepare(adapter),
        )

    def _read(self, name: str, path: Path) -> Adapter:
        if self.bank is None:
            raise AdapterError("this engine has no bank, so it takes no adapters; attach one to its base")
        folders = PeftFolders()
        folder = folders.find(Path(path))[1]
        if reason := head_refusal(name, folder):
            raise AdapterError(reason)
        adapter = folders.read(folder, name, self.bank)
        self.bank.check_fit(adapter)
        _check_servable(adapter)
        return adapter.requires_grad_(False)

    # From the engine's thread

    def enter_batch(self, versions: Items[AdapterVersion]) -> bool:
        """Bring the adapters of a sequence that is to run into the bank, where they stay until `leave_batch`; False if one of them is
        still being read.

        Raises:
            VeneerError: one could not be read again.
            Exception: one could not be put into the bank, for example because memory is full.
        """
        with self._lock:
            for one in versions:
                if one.failure is not None:
                    raise one.failure
                one.used = next(self._clock)
                if one.adapter is None and not one.loading:
                    threading.Thread(target=self._reread, args=(one,), daemon=True).start()
                    one.loading = True  # once there is a thread that ends it
            if any(one.adapter is None for one in versions):
                return False
            for one in versions:
                one.running += 1  # first, so that none of them leaves the bank for another
            try:
                for one in versions:
                    self._into_bank(one)
            except BaseException:
                self.leave_batch(versions)
                raise
        return True

    def leave_batch(self, versions: Items[AdapterVersion]) -> None:
        """A sequence has left the batch."""
        with self._lock:
            for one in versions:
                one.running -= 1

    def sweep(self) -> None:
        """Drop versions that no name stands for and no sequence holds."""
        with self._lock:
            for one in [one for one in self._versions if not one.current and not one.held]:
                self._out_of_bank(one)
                self._versions.remove(one)

    def _into_bank(self, one: AdapterVersion) -> None:
        if one.in_bank:
            return
        assert self.bank is not None and one.adapter is not None
        self._shrink_bank()
        one.adapter.name = one.bank_name
        self.bank.insert(one.adapter)
        one.in_bank = True

    def _shrink_bank(self) -> None:
        here = [one for one in self._versions if one.in_bank]
        idle = sorted((one for one in here if not one.running and not one.pinned), key=lambda one: one.used)
        for one in idle[: max(0, len(here) + 1 - self.limits.in_bank)]:
            self._out_of_bank(one)
            self.evictions += 1

    def _out_of_bank(self, one: AdapterVersion) -> None:
        if one.in_bank:
            assert self.bank is not None
            self.bank.remove(one.bank_name)
            one.in_bank = False

    def _shrink_memory(self) -> None:
        here = [one for one in self._versions if one.adapter is not None]
        idle = [one for one in here if not one.in_bank and not one.held and not one.pinned and one.path is not None]
        for one in sorted(idle, key=lambda one: one.used)[: max(0, len(here) - self.limits.in_memory)]:
            one.adapter = one.prepared = None
            self.evictions += 1

    def _reread(self, one: AdapterVersion) -> None:
        """Read a version that left memory, in a thread of its own."""
        failure: VeneerError | None = None
        adapter: Adapter | None = None
        prepared: Any = None
        try:
            assert one.path is not None
            adapter = self._read(one.name, one.path)
            prepared = None if self.prepare is None else self.prepare(adapter)
            if content_hash(adapter) != one.version:
                failure = AdapterError(
                    f"{one.path}: the folder holds another adapter than when {one.name} was loaded; load it again"
                )
        except VeneerError as error:
            failure = error
        except Exception as error:
            failure = AdapterError(f"{one.path}: {one.name} could not be read again: {error}; load it again")
        with self._lock:
            one.loading, one.failure = False, failure
            if failure is None:
                one.adapter, one.prepared = adapter, prepared
                self.loads += 1
                self._shrink_memory()
        self.wake()


def content_hash(adapter: Adapter) -> str:
    """SHA-256 of an adapter's method and tensors, whatever its name and file."""
    digest = hashlib.sha256(repr(sorted(adapter.method.model_dump().items(), key=str)).encode())
    for site, name, value in sorted(adapter.named_tensors(), key=lambda entry: entry[:2]):
        digest.update(f"{site}.{name} {tuple(value.shape)} {value.dtype} {adapter.tokens.get(site)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for site in sorted(adapter.tensors):
        digest.update(f"{site} {adapter.scale(site)!r}\n".encode())
    return digest.hexdigest()


def _check_servable(adapter: Adapter) -> None:
    """Raise AdapterError for an adapter that changes the sequence: the engine's cache holds the tokens of requests alone."""
    if adapter.method.virtual_tokens:
        raise AdapterError(
            f'"{adapter.name}" is a {adapter.method.label} adapter, which lengthens the sequence, and generation cannot do that; '
            "generate with PEFT from its folder, or train a method that changes layers, such as lora"
        )


def _status(one: AdapterVersion) -> AdapterStatus:
    place: Literal["disk", "memory", "bank"] = "bank" if one.in_bank else "disk" if one.adapter is None else "memory"
    return AdapterStatus(
        one.name,
        one.path,
        one.version,
        place,
        one.method,
        one.rank,
        one.bytes,
        one.pinned,
        one.running,
        one.held - one.running,
        one.template,
    )
