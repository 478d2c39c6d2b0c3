"""EVA: LoRA's A begins with the directions of most variance in each layer's inputs on the training rows (Paischer et al. 2024, 2410.07170).

    X [n, in]   inputs of a layer at the supervised tokens of the first rows, centred;   A = first right singular vectors of X,  B = 0
    ranks       the layers share the budget of sum(r): each direction is kept in the order of its share of its layer's variance

The components are kept up to date over batches of rows as in incremental PCA (Ross et al. 2008), with a randomized decomposition (Halko et
al. 2011), so that no covariance is held. B is zero, so the adapter is plain LoRA and nothing of it is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import Bank
from veneer.adapters.layers.site import Site
from veneer.adapters.methods import LowRankMethod
from veneer.adapters.targets import as_list, by_pattern
from veneer.data.batch import make_batch, packed
from veneer.data.example import Example
from veneer.errors import TargetError
from veneer.models.flat import FlatRunner

ROWS = 512
"""Inputs of each layer that go into one update."""
UPDATES = 8
_TOKENS = 2048
_POWER = 4


@dataclass
class Components:
    """The principal components of the rows seen so far, at most ``count`` of them."""

    count: int
    vectors_KD: Tensor | None = None
    values_K: Tensor | None = None
    seen: int = 0
    mean_D: Tensor | None = None
    squared: float = 0.0
    """Summed squared distance of the rows from their mean."""

    def update(self, rows_ND: Tensor, generator: torch.Generator) -> None:
        """Take more rows."""
        n = len(rows_ND)
        mean_D = rows_ND.mean(0)
        centred = rows_ND - mean_D
        self.squared += float(centred.double().square().sum())
        if self.vectors_KD is None or self.values_K is None or self.mean_D is None:
            stacked, self.mean_D = centred, mean_D
        else:
            shift_D = (self.seen * n / (self.seen + n)) ** 0.5 * (self.mean_D - mean_D)
            self.squared += float(shift_D.double().square().sum())
            stacked = torch.cat([self.values_K[:, None] * self.vectors_KD, centred, shift_D[None]])
            self.mean_D = self.mean_D + (mean_D - self.mean_D) * (n / (self.seen + n))
        self.seen += n
        self.values_K, self.vectors_KD = largest(stacked, self.count, generator)

    def shares(self) -> list[float]:
        """The share of each component in the variance."""
        assert self.values_K is not None
        total = self.squared or 1.0
        return [float(value) ** 2 / total for value in self.values_K]


def largest(rows_ND: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(values [K], right vectors [K, D]) of the largest singular values, by subspace iteration from a random start."""
    size = min(2 * count, *rows_ND.shape)
    start = torch.randn(rows_ND.shape[1], size, generator=generator).to(rows_ND)
    basis = torch.linalg.qr(rows_ND @ start)[0]
    for _ in range(_POWER):
        basis = torch.linalg.qr(rows_ND @ torch.linalg.qr(rows_ND.T @ basis)[0])[0]
    _, values, vectors = torch.linalg.svd(basis.T @ rows_ND, full_matrices=False)
    return values[:count], vectors[:count]


def explained(method: LowRankMethod, bank: Bank, runner: FlatRunner, examples: Sequence[Example], seed: int) -> Eva:
    """The method and the first factors of a new adapter on these training rows.

    Raises TargetError for layers that are not linear layers of their own, which have no inputs of their own to look at.
    """
    left_out = [name for name in bank.not_portable(method) if bank.sites[name].stack is None]
    sites = [bank.survey.site(name) for name in method.choose(bank.survey, left_out=left_out)]
    wrong = next((site for site in sites if site.kind not in ("linear", "conv1d") or site.stack is not None), None)
    if wrong is not None:
        raise TargetError(
            f"{wrong.name}: eva looks at the inputs of linear layers; found a layer of the kind {wrong.kind}"
            f"{' in a stack of experts' if wrong.stack is not None else ''}; leave it out (exclude_modules), or choose another "
            "init_lora_weights"
        )
    budgets = {site.name: by_pattern(method.rank_pattern, site.name, method.r) for site in sites}
    watch = _Inputs(sites, {name: round(r * method.eva_rho) for name, r in budgets.items()}, seed)
    with watch.hooked(), torch.no_grad(), bank.use(None, training=False):
        for part in packed(examples, _TOKENS):
            batch = make_batch(part, "rows")
            keep = torch.arange(batch.tokens) if part[0].labels else batch.weights.nonzero().squeeze(1)
            watch.cells = runner.prepare(batch).layout.cell[keep]
            runner.hidden(batch)
            if watch.enough():
                break
    watch.flush()
    ranks = shared_ranks({name: watch.of(name).shares() for name in budgets}, sum(budgets.values()))
    return Eva.of(method, budgets, ranks, {name: watch.of(name).vectors_KD for name in budgets})


def shared_ranks(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """The rank of each layer: the ``budget`` largest shares of all layers, each counted where it is."""
    every = sorted(((share, name) for name, each in shares.items() for share in each), key=lambda one: -one[0])
    ranks = dict.fromkeys(shares, 0)
    for _, name in every[:budget]:
        ranks[name] += 1
    return ranks


@dataclass(frozen=True)
class Eva:
    """A method with the ranks that EVA chose, and the first A of each site."""

    method: LowRankMethod
    factors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        method: LowRankMethod,
        budgets: Mapping[str, int],
        ranks: Mapping[str, int],
        vectors: Mapping[str, Tensor | None],
    ) -> Eva:
        """Layers of rank 0 are left out; a layer's lora_alpha grows with its rank, so that its scale stays."""
        kept = {name: r for name, r in ranks.items() if r}
        scales = {name: method.scaling(budgets[name], method.alpha(name)) for name in kept}
        per_alpha = {name: method.scaling(r, 1.0) for name, r in kept.items()}
        chosen: dict[str, Any] = {
            "exclude_modules": (*as_list(method.exclude_modules), *(name for name, r in ranks.items() if not r)),
            "rank_pattern": kept,
            "alpha_pattern": {name: scales[name] / per_alpha[name] for name in kept},
            "init_lora_weights": "kaiming_uniform",
            "eva_rho": type(method).model_fields["eva_rho"].default,
        }
        factors = {name: found[:r] for name, r in kept.items() if (found := vectors[name]) is not None}
        return cls(method.model_copy(update=chosen), factors)

    def fill(self, bank: Bank, name: str) -> None:
        """Write the factors into the new adapter of this name."""
        with torch.no_grad():
            for site, a in self.factors.items():
                bank[name].tensors[site]["lora_A"].copy_(a)


@dataclass
class _Inputs:
    """Collects the inputs of layers during forwards. Layers that read the same tensor share their components.

    cells: the positions that count. rows: inputs since the last update. shared_with: layer -> the first layer that reads the same tensor.
    last_input: (layer, tensor) of the last call.
    """

    sites: Sequence[Site]
    counts: Mapping[str, int]
    seed: int
    cells: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    components: dict[str, Components] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    shared_with: dict[str, str] = field(default_factory=dict)
    updates: int = 0
    last_input: tuple[str, Tensor] | None = None

    def of(self, name: str) -> Components:
        """The components of a layer's inputs."""
        return self.components[self.shared_with[name]]

    def hooked(self) -> ExitStack:
        """A context in which the layers' inputs are collected."""
        stack = ExitStack()
        for site in self.sites:
            stack.callback(site.module.register_forward_pre_hook(self._hook(site.name)).remove)
        return stack

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if (
                self.last_input is not None
                and self.last_input[1] is x
                and self.shared_with.get(name, self.last_input[0]) == self.last_input[0]
            ):
                self.shared_with[name] = self.last_input[0]
                return
            self.shared_with.setdefault(name, name)
            self.last_input = (name, x)
            self.rows.setdefault(name, []).append(x.detach().flatten(0, -2)[self.cells.to(x.device)].float().cpu())

        return take

    def enough(self) -> bool:
        """True if no more rows are wanted; whole updates are made on the way."""
        self.last_input = None
        if sum(map(len, next(iter(self.rows.values()), []))) >= ROWS:
            self.flush()
        return self.updates >= UPDATES

    def flush(self) -> None:
        """Update the components with the rows at hand."""
        for name, parts in self.rows.items():
            rows = torch.cat(parts)
            if not len(rows):
                continue
            wanted = max(count for other, count in self.counts.items() if self.shared_with[other] == name)
            components = self.components.setdefault(name, Components(min(wanted, rows.shape[1])))
            components.update(rows, torch.Generator().manual_seed(self.seed))
        self.updates += bool(self.rows)
        self.rows, self.last_input = {}, None
