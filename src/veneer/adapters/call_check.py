"""CallMonitor: checks while the model runs that adapted layers are called and that the order of the batch's rows is known.

If the dry run at attach settled both, little is left to do. A model whose inputs could not be guessed is checked when it is first
called: the layers of its adapters must run, and before the first route row by row the batch itself serves as the dry run's input. Some
models skip layers in training only (Mamba's fused kernel), which only training shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.dry_run import dry_run, equal_rows, rows_of
from veneer.adapters.layers.site import Site, Survey
from veneer.errors import TargetError, listed

_ENOUGH_CALLS = 32
"""Number of training passes after which a layer that is dropped at random has certainly been called."""


class CallMonitor:
    """Facts about one model's calls. ``called``, ``rows_known``: set by the dry run at attach."""

    def __init__(
        self, model: nn.Module, survey: Survey, adapters: Mapping[str, Adapter], *, called: bool, rows_known: bool
    ) -> None:
        self.model = model
        self.survey = survey
        self.adapters = adapters
        self.called = called
        self.rows_known = rows_known
        self._uses: dict[tuple[str, bool], int] = {}
        self._calls_at_start: dict[str, dict[str, int]] = {}

    def find_rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find out how a batch's rows lie in each layer's input, if that is not known yet; adapters must not act meanwhile."""
        rows = rows_of(args, kwargs)
        if self.rows_known or rows < 2:
            return
        try:
            dry_run(self.model, self.survey, equal_rows(args, rows), equal_rows(kwargs, rows), rows)
        except Exception:
            # The model raises the same in the call itself, or else its layers report that they do not know.
            return
        self.rows_known = True

    def after_call(self, names: Sequence[str], training: bool) -> None:
        """Check after a call of the whole model under these adapters that their layers were called.

        Raises TargetError where no dry run was possible and the first call skips a layer, or where training keeps skipping one.
        """
        for name in names:
            number = self._uses[name, training] = self._uses.get((name, training), 0) + 1
            if number == 1 and not self.called:
                self._require_calls(name, {})
            if not training:
                continue
            if number == 1:
                self._calls_at_start[name] = {site.name: site.calls for site in self._sites(name)}
            elif number == _ENOUGH_CALLS:
                self._require_calls(name, self._calls_at_start.pop(name, {}))

    def forget(self, name: str) -> None:
        """Forget an adapter that left the bank."""
        for training in (False, True):
            self._uses.pop((name, training), None)
        self._calls_at_start.pop(name, None)

    def _sites(self, name: str) -> Iterator[Site]:
        hosts = {site.host.name: site.host for site in self.adapters[name].sites(self.survey)}
        return (site for site in hosts.values() if not site.is_selected)

    def _require_calls(self, name: str, before: Mapping[str, int]) -> None:
        silent = [site.name for site in self._sites(name) if site.calls <= before.get(site.name, 0)]
        if silent:
            raise TargetError(
                f'the model ran without calling {listed(silent)}, so adapter "{name}" did nothing there; leave these sites out '
                "(exclude_modules), or attach with example= inputs under which they are called"
            )
