"""CallMonitor: is what an adapter acts on really called, and do rows reach it in order? Asked while the model runs.

Where the probe at attach could settle both there is little left to do. A model whose inputs it could not guess is looked at when it
is first called: the layers of its adapters must run, and before a first route row by row the batch itself serves as the probe's
input. Some models take a shorter way in training that passes layers by (Mamba's fused kernel), which only training shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from veneer.adapters.layers.dry_run import equal_rows, is_selected, probe, rows_of
from veneer.adapters.layers.site import Site, Survey
from veneer.errors import TargetError

if TYPE_CHECKING:
    from veneer.adapters.bank import Bank
    from veneer.adapters.runtime.forward import AdaptedForward

_ENOUGH_CALLS = 32
"""So many training passes that a layer which is dropped at random has surely come up."""


class CallMonitor:
    """What is known of one model's calls. called, rows_known: what the probe at attach has settled."""

    def __init__(self, bank: Bank, survey: Survey, *, called: bool, rows_known: bool) -> None:
        self.bank = bank
        self.survey = survey
        self.called = called
        self.rows_known = rows_known
        self._uses: dict[tuple[str, bool], int] = {}
        self._calls_at_start: dict[str, dict[str, int]] = {}

    def find_rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a batch is routed row by row: find out how its rows lie in each layer's input, if that is not known yet."""
        rows = rows_of(args, kwargs)
        if self.rows_known or rows < 2:
            return
        state = self.bank.traffic.state
        state.muted = True
        try:
            probe(self.bank.model, self.survey, equal_rows(args, rows), equal_rows(kwargs, rows), rows)
        except Exception:
            # The model raises the same in the call itself, or else its layers say that they do not know.
            return
        finally:
            state.muted = False
        self.rows_known = True

    def after_call(self, training: bool) -> None:
        """The whole model was called: were the layers of its adapters?

        Raises TargetError where no probe was possible and the first call passes a layer by, or where training keeps passing one by.
        """
        lease = self.bank.traffic.lease
        for name in () if lease is None else lease.route.names:
            number = self._uses[name, training] = self._uses.get((name, training), 0) + 1
            if number == 1 and not self.called:
                self._require_calls(name, {})
            if not training:
                continue
            if number == 1:
                self._calls_at_start[name] = {site.name: host.calls for site, host in self._hosts(name)}
            elif number == _ENOUGH_CALLS:
                self._require_calls(name, self._calls_at_start.pop(name, {}))

    def forget(self, name: str) -> None:
        """An adapter left the bank."""
        for training in (False, True):
            self._uses.pop((name, training), None)
        self._calls_at_start.pop(name, None)

    def _hosts(self, name: str) -> Iterator[tuple[Site, AdaptedForward]]:
        for site in self.bank.sites_of(name):
            host = self.bank.wiring.host(site)
            if host is not None and not is_selected(site):
                yield site, host

    def _require_calls(self, name: str, before: Mapping[str, int]) -> None:
        silent = [site.name for site, host in self._hosts(name) if host.calls <= before.get(site.name, 0)]
        if silent:
            shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
            raise TargetError(
                f'the model ran without calling {shown}, so adapter "{name}" did nothing there; leave these sites out '
                "(exclude_modules), or attach with example= inputs under which they are called"
            )
