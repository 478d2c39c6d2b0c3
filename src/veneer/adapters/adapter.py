"""An adapter: a name, a frozen method and its tensors by site. It is an object, not a state of a model.

It can be made, loaded, saved, composed and inspected without a model in memory. Tensors are exact-rank masters in fp32 (fp64 on an fp64
base); layers compute with casts of them, so an optimizer sees the masters only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.methods import Method
from veneer.errors import AdapterError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
BASE_NAME = "base"


class Adapter:
    """A trained, or trainable, change to a base.

    Attributes:
        name: its name in routes.
        method: an instance of `LoRA`, `DoRA` or another `Method`, frozen.
        tensors: {site: {tensor name: Parameter}} of the method's own, in PEFT's names and shapes.
        overrides: {site: {"weight", "bias", "rows" or "lora_bias": Parameter}}; two sites may share a Parameter.
        tokens: the tokens of the overridden rows, by site.
        kinds: the layer kind of each site.
        parts: the projections that it changes of fused layers, by site; their other outputs have rows of zeros and are not trained.
        seed: seed of the initialiser and of dropout.
        draws: number of training passes that have drawn dropout so far.
        expert_tokens: number of tokens that each expert of a stack was trained on, by the stack's name, int64 [experts].
        meta: what its file says of its origin.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        tensors: Mapping[str, Mapping[str, Tensor]],
        kinds: Mapping[str, str],
        *,
        overrides: Mapping[str, Mapping[str, Tensor]] | None = None,
        tokens: Mapping[str, tuple[int, ...]] | None = None,
        alphas: Mapping[str, float] | None = None,
        seed: int = 0,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = check_name(name)
        self.method = method
        self.tensors = _parameters(tensors)
        self.overrides = _parameters(overrides or {})
        self.tokens = dict(tokens or {})
        self.kinds = dict(kinds)
        self._alphas = dict(alphas or {})
        self.parts: dict[str, tuple[str, ...]] = {}
        self._held: dict[tuple[int, int], tuple[nn.Parameter, Tensor, Tensor]] = {}
        """{(id of a tensor, dimension): (the tensor, the indices that are held there, their values)}."""
        self.seed = seed
        self.draws = 0
        self.expert_tokens: dict[str, Tensor] = {}
        self.meta: dict[str, Any] = dict(meta or {})

    def __repr__(self) -> str:
        sizes = f"{len(self.tensors)} sites, {self.num_parameters():,} parameters"
        return f"Adapter({self.name!r}, {self.method.name}, {sizes})"

    def rank(self, site: str) -> int:
        """Rank at a site: the length of A's first dimension, or zero for a method without factors."""
        return self.method.rank(self.tensors[site])

    def alpha(self, site: str) -> float:
        """lora_alpha at a site, alpha_pattern applied."""
        if site in self._alphas:
            return self._alphas[site]
        return self.method.alpha(site)

    def scale(self, site: str) -> float:
        """s in W + s B A at a site; one for a method without a scale."""
        return self.method.scaling(self.rank(site), self.alpha(site))

    def replace_sites(self, sites: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Put other sites in the place of some: {site: {new site: its tensors}}. Scales and kinds go along."""
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for site, held in self.tensors.items():
            if site not in sites:
                tensors[site] = held
                continue
            alpha, kind = self.alpha(site), self.kinds.pop(site)
            for name, values in sites[site].items():
                tensors[name], self._alphas[name], self.kinds[name] = values, alpha, kind
        self.tensors = _parameters(tensors)

    def follows_at(self, site: Site) -> bool:
        """True if the adapter acts on an output head through the factors of the embedding that the head is tied to."""
        return self.method.ensure_weight_tying and site.tied_to in self.tensors and site.name not in self.tensors

    def sites(self, survey: Survey) -> list[Site]:
        """Sites whose forward the adapter takes part in, tied heads and layers with overrides included."""
        found = [survey.site(name) for name in dict.fromkeys([*self.tensors, *self.overrides])]
        return found + [site for site in survey.sites.values() if self.follows_at(site)]

    def named_tensors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(site, name, tensor) of everything that the adapter holds, low-rank changes first; a shared tensor comes once."""
        seen: set[int] = set()
        for table in (self.tensors, self.overrides):
            for site, tensors in table.items():
                for key, value in tensors.items():
                    if id(value) not in seen:
                        seen.add(id(value))
                        yield site, key, value

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every tensor of the adapter, site by site, once."""
        for _, _, value in self.named_tensors():
            yield value

    def num_parameters(self) -> int:
        """Number of trainable values."""
        held = sum(values.numel() for _, _, values in self._held.values())
        return sum(parameter.numel() for parameter in self.parameters()) - held

    def hold_half(self) -> None:
        """Hold the second half of the ranks at every site: it gets no gradient, and `settle` undoes what weight decay does to it."""
        for tensors in self.tensors.values():
            for key, dim in (("lora_A", 0), ("lora_B", 1)):
                if key in tensors:
                    half = tensors[key].shape[dim] // 2
                    self._hold(tensors[key], dim, torch.arange(half, 2 * half))

    @property
    def counters(self) -> tuple[int, dict[str, Tensor]]:
        """(draws, expert_tokens): what training passes have counted. Assign it to undo passes."""
        return self.draws, dict(self.expert_tokens)

    @counters.setter
    def counters(self, values: tuple[int, Mapping[str, Tensor]]) -> None:
        self.draws, tokens = values
        self.expert_tokens = dict(tokens)

    def tokens_at(self, site: str) -> int | None:
        """Number of tokens that the expert which a site belongs to was trained on; None for a site of no stack of experts."""
        stack, _, expert = site.rpartition(".")[0].rpartition(".")
        tokens = self.expert_tokens.get(stack)
        return None if tokens is None or not expert.isdigit() else int(tokens[int(expert)])

    def hold_outputs(self, site: str, outputs_O: Tensor) -> None:
        """Hold the numbers of some outputs at a site (True in ``outputs_O``): those of a fused layer's other parts get no gradients."""
        per_output = self.method.output_rows(self.tensors[site], slice(0, 0))
        for key, parameter in self.tensors[site].items():
            if not len(per_output[key]):
                self._hold(parameter, 0, outputs_O.nonzero().squeeze(1))

    def _hold(self, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
        index = index.to(parameter.device)
        self._held[id(parameter), dim] = parameter, index, parameter.detach().index_select(dim, index)
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient.index_fill(dim, index.to(gradient.device), 0.0))

    def settle(self) -> None:
        """Put held numbers back, which an optimizer's weight decay moves without a gradient."""
        for (_, dim), (parameter, index, values) in self._held.items():
            if parameter.requires_grad and not parameter.is_meta:
                device = parameter.device
                parameter.data.index_copy_(dim, index.to(device), values.to(device))

    def requires_grad_(self, on: bool = True) -> Adapter:
        """Let gradients reach the adapter's tensors, or not."""
        for parameter in self.parameters():
            parameter.requires_grad_(on)
        return self

    def rename_layers(self, names: Mapping[str, str]) -> None:
        """Give layers other names, in place: {name: new name}."""
        tables: tuple[dict[str, Any], ...] = (
            *(self.tensors, self.overrides, self.tokens, self.kinds, self._alphas),
            self.parts,
        )
        for table in tables:
            held = {names.get(layer, layer): value for layer, value in table.items()}
            table.clear()
            table.update(held)

    def delta_2d(self, site: str, weight_2d: Tensor | None = None) -> Tensor:
        """W' - W at a site, dense [out, in], computed in fp32 or wider. DoRA needs the base weight ``weight_2d`` [out, in].

        Raises AdapterError where the base weight is needed and not given.
        """
        if weight_2d is None and self.method.needs_base_weights:
            raise AdapterError(
                f"{self.name}: the change of a {self.method.label} adapter at {site} depends on the base weight; pass it"
            )
        return self.method.delta(self.tensors[site], self.scale(site), weight_2d)


def new_adapter(
    name: str,
    method: Method,
    sites: list[Site],
    *,
    seed: int,
    overrides: Mapping[str, Mapping[str, Tensor]] | None = None,
    tokens: Mapping[str, tuple[int, ...]] | None = None,
) -> Adapter:
    """A fresh adapter over ``sites`` that leaves the base's output exactly as it is; in fp32, or in fp64 where the base is.

    Each site has its own random stream, so that the values at one site do not depend on which others are adapted.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    method = method.fitted(sites) if sites else method
    for site in sites:
        dtype = torch.promote_types(site.dtype, torch.float32)
        generator = torch.Generator().manual_seed(stream_seed(seed, site.name))
        tensors[site.name] = method.init(site, generator, dtype)
    if method.shares_experts:
        share_outer(tensors, [site.name for site in sites if site.stack is not None])
    kinds = {site.name: site.kind for site in sites}
    adapter = Adapter(name, method.of_new_adapter(), tensors, kinds, overrides=overrides, tokens=tokens, seed=seed)
    if method.holds_half:
        adapter.hold_half()
    return adapter


def share_outer(tensors: dict[str, dict[str, Tensor]], experts: Iterable[str]) -> None:
    """Give the experts' sites of a stack one factor on the hidden side, that of the first with this shape.

    experts: names of sites in stacks.
    """
    shared: dict[tuple[object, ...], Tensor] = {}
    for name in experts:
        stack, _, part = name.rsplit(".", 2)
        key = "lora_B" if part == "down_proj" else "lora_A"
        held = tensors[name][key]
        tensors[name][key] = shared.setdefault((stack, part, held.shape), held)


def stream_seed(*parts: object) -> int:
    """A 63-bit seed that depends on its parts alone, the same in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_name(name: str) -> str:
    """The name, if it is valid in routes, files and URLs.

    Raises AdapterError otherwise.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BASE_NAME:
        raise AdapterError(
            f"{name!r} cannot name an adapter: expected 1 to 128 letters, digits, dots, dashes or underscores that begin with a "
            f'letter or digit, and not "{BASE_NAME}", which means the base itself'
        )
    return name


def _parameters(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, nn.Parameter]]:
    """The same tables with every tensor a Parameter; a tensor that occurs twice stays one."""
    made: dict[int, nn.Parameter] = {}
    for table in tensors.values():
        for value in table.values():
            if id(value) not in made:
                made[id(value)] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
    return {site: {key: made[id(value)] for key, value in table.items()} for site, table in tensors.items()}
