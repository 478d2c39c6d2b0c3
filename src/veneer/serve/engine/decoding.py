"""The runner for decoders that a kernel computes whole: single tokens go through it, pieces of prompts through the flat runner."""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from veneer.adapters import Bank
from veneer.adapters.adapter import Adapter
from veneer.kernels.cpp_library import supported
from veneer.kernels.decoding import (
    LINEARS,
    DecoderKernel,
    DecoderWeights,
    LayerWeights,
    LowRankLayer,
    LowRankTable,
)
from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.models.flat import FlatRunner
from veneer.serve.engine.runner import PagedRunner, Reference, choose_runner, rows_wanted
from veneer.serve.engine.scheduler import Chunk
from veneer.serve.runner_record import RunnerRecord


class DecodingRunner:
    """Sequences that decode in one call of the kernel, all others in one flat call."""

    paged = True
    reason = ""

    def __init__(
        self, model: Any, bank: Bank | None, paged: PagedRunner, kernel: DecoderKernel, positions: int
    ) -> None:
        self._paged = paged
        self._kernel = kernel
        self._bank = bank
        self._places = decoder_modules(model)
        self._layers = 1 + max(layer for layer, _ in self._places.values())
        self._dtype = next(model.parameters()).dtype
        self._cos, self._sin = rotation_table(model, positions)

    def run(self, chunks: Items[Chunk]) -> tuple[Tensor, list[int]]:
        """See `StepRunner`. Rows stand in the order of the chunks."""
        single = [chunk for chunk in chunks if self._takes(chunk)]
        if not single:
            return self._paged.run(chunks)
        decoded = self._decode(single)
        if len(single) == len(chunks):
            return decoded, [1] * len(chunks)
        others = [chunk for chunk in chunks if not self._takes(chunk)]
        logits, counts = self._paged.run(others)
        rows = iter(logits.split(counts))
        ones = iter(decoded.split(1))
        found = [next(ones) if self._takes(chunk) else next(rows).float() for chunk in chunks]
        return torch.cat(found), [len(one) for one in found]

    def _takes(self, chunk: Chunk) -> bool:
        one = chunk.count == 1 and rows_wanted(chunk) == 1
        return one and all(version.prepared is not None for version in chunk.sequence.adapters)

    def _decode(self, chunks: Items[Chunk]) -> Tensor:
        at = torch.tensor([chunk.start for chunk in chunks])
        sequences = [chunk.sequence for chunk in chunks]
        mixes = [
            [(version.prepared, weight) for version, (_, weight) in zip(one.adapters, one.request.mix, strict=True)]
            for one in sequences
        ]
        return self._kernel.step(
            [one.tokens[chunk.start] for chunk, one in zip(chunks, sequences, strict=True)],
            [chunk.start + 1 for chunk in chunks],
            [one.blocks for one in sequences],
            self._cos[at],
            self._sin[at],
            mixes,
        )

    @torch.no_grad()
    def prepare(self, adapter: Adapter) -> LowRankTable | None:
        """An adapter's factors for the kernel; None where it acts elsewhere too, or is being trained."""
        assert self._bank is not None
        trained = any(parameter.requires_grad for parameter in adapter.parameters())
        sites = adapter.sites(self._bank.survey)
        if (
            trained
            or adapter.overrides
            or not adapter.method.low_rank
            or any(site.name not in adapter.tensors for site in sites)
        ):
            return None
        parts: dict[tuple[int, str], LowRankLayer] = {}
        for site in sites:
            place = self._places.get(id(site.module))
            if place is None:
                return None
            tensors, scale, method = adapter.tensors[site.name], adapter.scale(site.name), adapter.method
            a, b = (tensors[name].detach() for name in method.tensor_names(site.kind)[:2])
            norm = method.norm(tensors, site.weight_2d, site.squared_norms(), scale)
            s = None if norm is None else method.magnitude_scale(tensors, norm)
            b = b * scale if s is None else b * (scale * s).to(b.dtype)[:, None]
            parts[place] = LowRankLayer(a, b, None if s is None else s - 1)
        return LowRankTable(self._layers, parts, self._dtype)


def fastest_runner(
    model: Any, bank: Bank | None, cache: Any, vocabulary: int, positions: int, record: RunnerRecord | None = None
) -> Any:
    """The fastest runner that computes a text piece by piece as the model computes it whole.

    Args:
        model: a causal language model.
        bank: its adapters.
        cache: the engine's blocks.
        vocabulary: number of tokens of the model.
        positions: number of positions of a text.
        record: where the result of the checks is kept. A base that the kernel decodes is not checked again.

    Raises:
        BaseModelError: the model does not generate text.
    """
    known = record.read() if record is not None and supported() else {}
    if known.get("runner") == DecodingRunner.__name__:
        with suppress(Exception):  # a record that does not fit is ignored
            return _from_record(model, bank, cache, positions, known)
    reference = Reference(model, bank, cache, vocabulary)
    runner = choose_runner(model, bank, cache, reference)
    if not isinstance(runner, PagedRunner) or not supported() or cache.scale is None:
        return runner
    made = _decoding_runner(model, bank, runner, cache, positions)
    if made is None or not reference.agrees(reference.error(made)):
        return runner
    if record is not None:
        start = runner.flat.first_position
        record.write({"runner": DecodingRunner.__name__, "first_position": start, "cache": cache.geometry()})
    return made


def _from_record(model: Any, bank: Bank | None, cache: Any, positions: int, known: dict[str, Any]) -> DecodingRunner:
    """The runner that passed the checks, with blocks as those made them."""
    flat = FlatRunner(model, probe=False)
    flat.first_position = int(known["first_position"])
    cache.restore(known["cache"], next(model.parameters()))
    made = _decoding_runner(model, bank, PagedRunner(flat, bank, cache), cache, positions)
    if made is None:
        raise ValueError("the record is of another model")
    return made


def _decoding_runner(
    model: Any, bank: Bank | None, paged: PagedRunner, cache: Any, positions: int
) -> DecodingRunner | None:
    """The runner with the kernel, or None if the kernel has no form of this model."""
    weights = decoder_weights(model, cache.scale)
    if weights is None or len(weights.layers) != len(cache.layers):
        return None
    return DecodingRunner(
        model, bank, paged, DecoderKernel(weights, cache.layers, cache.size, cache.reaches), positions
    )


def decoder_modules(model: Any) -> dict[int, tuple[int, str]]:
    """{id of a linear module: (layer, its name in `LINEARS`)}; empty where the model has other parts."""
    try:
        return {
            id(module): (number, name)
            for number, layer in enumerate(model.model.layers)
            for name, module in _linears(layer).items()
        }
    except AttributeError:
        return {}


def decoder_weights(model: Any, scale: float) -> DecoderWeights | None:
    """The weights of a decoder in Llama's form whose scores are multiplied by ``scale``; None where the model has other parts."""
    try:
        body, head = model.model, model.get_output_embeddings()
        first = body.layers[0]
        size = int(first.self_attn.head_dim)
        if getattr(head, "bias", None) is not None or _extra(first):
            return None
        found = DecoderWeights(
            [_layer(layer) for layer in body.layers],
            body.embed_tokens.weight.detach(),
            body.norm.weight.detach(),
            head.weight.detach(),
            heads=first.self_attn.q_proj.out_features // size,
            groups=first.self_attn.k_proj.out_features // size,
            size=size,
            eps=_eps(first.input_layernorm),
            scale=scale,
        )
    except (AttributeError, IndexError, TypeError):
        return None
    return found if found.fits() else None


@torch.no_grad()
def rotation_table(model: Any, positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [positions, D] in fp32, as the model rounds them."""
    weight = model.model.embed_tokens.weight
    cos, sin = model.model.rotary_emb(weight[:1, None], torch.arange(positions)[None])
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def _linears(layer: Any) -> dict[str, Any]:
    attention, gated = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return dict(zip(LINEARS, (*modules, gated.gate_proj, gated.up_proj, gated.down_proj), strict=True))


def _extra(layer: Any) -> bool:
    """True if a layer has parts that the kernel does not know."""
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    inner = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    weighted = {name.split(".")[0] for name, _ in layer.named_parameters()}
    attention = {name.split(".")[0] for name, _ in layer.self_attn.named_parameters()}
    return not weighted <= known or not attention <= inner


def _layer(layer: Any) -> LayerWeights:
    linears = _linears(layer)
    attention = layer.self_attn
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return LayerWeights(
        {
            name: quantized_weight(module) if quantized_layer(module) else module.weight.detach()
            for name, module in linears.items()
        },
        {name: None if module.bias is None else module.bias.detach() for name, module in linears.items()},
        layer.input_layernorm.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
        *(None if norm is None else norm.weight.detach() for norm in norms),
    )


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
