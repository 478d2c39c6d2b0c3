"""VeRA: W' = W + diag(b) B diag(d) A with A and B random, frozen and shared by all layers (Kopiczko et al. 2024, arXiv 2310.11454).

Trained are d [r], which starts at ``d_initial``, and b [out], which starts at zero. A [r, widest input] and B [widest output, r] follow
from ``projection_prng_key`` as in PEFT: uniform within sqrt(6 / fan_in), drawn one after the other. Each layer takes their first columns
and rows. They are not tensors of the adapter: equal keys and sizes give the same projections, which are kept once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer._options.other_methods import VeRAOptions
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site
from veneer.adapters.methods.base import Method, Shapes

B, D = "vera_lambda_b", "vera_lambda_d"
SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"


@lru_cache(maxsize=8)
def projections(
    key: int, rank: int, out: int, in_: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) of a key, drawn in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(key)
    with torch.inference_mode(False), torch.no_grad():
        drawn = []
        for shape in ((rank, in_), (out, rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        return drawn[0].to(device, dtype), drawn[1].to(device, dtype)


@final
class VeRA(Method, VeRAOptions):
    """Trained vectors around shared random projections."""

    name: ClassVar[str] = "vera"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    tags: ClassVar[tuple[str, ...]] = ("vera",)
    peft_type: ClassVar[str] = "VERA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights", "bias"}
    )
    beyond_peft: ClassVar[tuple[str, ...]] = (*Method.beyond_peft, "projection_size")
    least_dimensions: ClassVar[tuple[int, ...]] = (1, 1)
    shared_names: ClassVar[tuple[str, ...]] = (SHARED_A, SHARED_B)
    learning_rate_factor: ClassVar[float] = 10.0
    needs_base_weights: ClassVar[bool] = True
    no_low_rank: ClassVar[str] = (
        "its factors are shared by all layers; merge it, and extract low-rank factors of the merged model"
    )

    projection_size: tuple[int, int] | None = None
    """Outputs and inputs of the shared projections, by the widest layers; set when the adapter is made."""

    @property
    def label(self) -> str:
        return "VeRA"

    @property
    def size(self) -> str:
        return f"vera_rank={self.vera_rank}"

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        return (B, D)

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        return {B: (geometry.out,), D: (found[D][0],)}

    def geometry(self, kind: str, found: Shapes) -> Geometry:
        return Geometry(kind, found[B][0], 1)

    def fitted(self, sites: Sequence[Site]) -> VeRA:
        """The projections are as wide as the widest layers."""
        shapes = [site.geometry for site in sites]
        return self.model_copy(update={"projection_size": (max(g.out for g in shapes), max(g.in_ for g in shapes))})

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        device = "meta" if site.is_empty else "cpu"
        b = torch.zeros(site.geometry.out, dtype=dtype, device=device)
        return {B: b, D: torch.full((self.vera_rank,), self.d_initial, dtype=dtype, device=device)}

    def trained_first(self, kind: str) -> tuple[str, ...]:
        return (B,)

    def zero_at_start(self, kind: str) -> str:
        return B

    def _factors(self, like: Tensor, out: int, in_: int) -> tuple[Tensor, Tensor]:
        assert self.projection_size is not None
        device = str(like.device)
        a, b = projections(self.projection_prng_key, self.vera_rank, *self.projection_size, like.dtype, device)
        return a[:, :in_], b[:out]

    def change(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        a, b = self._factors(y, y.shape[-1], x.shape[-1])
        return tensors[B] * F.linear(tensors[D] * F.linear(x, a), b)

    def delta(self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None) -> Tensor:
        assert weight_2d is not None
        wide = weight_2d.new_empty(0, dtype=torch.promote_types(weight_2d.dtype, torch.float32))
        a, b = self._factors(wide, len(tensors[B]), weight_2d.shape[1])
        return tensors[B].detach().to(wide).unsqueeze(1) * (b @ (tensors[D].detach().to(wide).unsqueeze(1) * a))

    def changes_nothing(self, tensors: Mapping[str, Tensor]) -> bool:
        return not bool(tensors[B].any())

    def shared(self) -> dict[str, Tensor]:
        """The projections, which PEFT stores with the vectors."""
        if self.projection_size is None:
            raise ValueError(
                "the file has neither the projections of VeRA nor their size (save_projection was false); save it with them"
            )
        return dict(
            zip(
                self.shared_names,
                projections(self.projection_prng_key, self.vera_rank, *self.projection_size),
                strict=True,
            )
        )

    def peft_settings(self, tensors: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Any]:
        return {
            "r": self.vera_rank,
            "projection_prng_key": self.projection_prng_key,
            "d_initial": self.d_initial,
            "save_projection": True,
            "vera_dropout": 0.0,
            "init_weights": True,
            "bias": "none",
        }

    @classmethod
    def options_of(cls, settings: Mapping[str, Any], shared: Shapes) -> dict[str, Any]:
        found = {key: settings[key] for key in ("projection_prng_key", "d_initial") if key in settings}
        size = (shared[SHARED_B][0], shared[SHARED_A][-1]) if shared.keys() >= {SHARED_A, SHARED_B} else None
        return {**found, "vera_rank": settings.get("r", 256), "projection_size": size}
