"""Adapters as GGUF files, which llama.cpp and programs built on it load beside a GGUF base.

    <base tensor>.lora_a   [r, in]      <base tensor>.lora_b   [out, r]      in fp32, fp16 or bf16
    general.type = adapter, adapter.type = lora, adapter.lora.alpha = one number for the whole file

llama.cpp scales a pair by alpha / r, with one alpha for all and r the pair's own, so B takes the scale s of its site:

    B_file = s * (r / alpha) * B

which also holds rsLoRA, and ranks or alphas that differ between sites. Families whose base file has the rows of q and k in another order
(llama's rotary embedding pairs neighbours, the model's pairs halves) get the rows of B in that order too.

Boundary: LoRA at linear layers. Names and orders are known for the families below; what a file cannot hold is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer._files import replacing
from veneer._version import __version__
from veneer.adapters.adapter import Adapter
from veneer.adapters.methods import factors_2d
from veneer.errors import ExportError, Problems

FAMILIES: Mapping[str, tuple[str, bool]] = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "SmolLM3ForCausalLM": ("smollm3", True),
    "GraniteForCausalLM": ("granite", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False),
    "Phi3ForCausalLM": ("phi3", False),
    "GPT2LMHeadModel": ("gpt2", False),
    "Gemma3ForConditionalGeneration": ("gemma3", False),
    "LlavaForConditionalGeneration": ("llama", True),
    "Qwen2VLForConditionalGeneration": ("qwen2vl", False),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2vl", False),
    "Qwen3VLForConditionalGeneration": ("qwen3vl", False),
}
"""Model class -> (GGUF's name of the family, the rows of q and k are reordered)."""
_TEXT_PARTS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Model type of the text part in a multimodal model of several families -> the class whose layout it has."""
_TEXT_PREFIX = re.compile(r"^(model\.)?(language_model|text_model)\.(model\.)?")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GgufLayout:
    """The layout of a base in GGUF: family, number of blocks and heads, and a head that shares the embedding's weight (tied)."""

    family: str
    blocks: int
    heads: int
    key_value_heads: int
    reorders: bool
    tied: bool

    def name(self, site: str) -> str | None:
        """GGUF's name of a site's weight, or None where the family has none. The file of a multimodal model has its text part."""
        import gguf

        site = _TEXT_PREFIX.sub("model.", site).replace("model.lm_head", "lm_head")
        family = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family)
        found = gguf.get_tensor_name_map(family, self.blocks).get_name(f"{site}.weight", try_suffixes=(".weight",))
        return None if found is None else str(found)

    def rows(self, name: str, b_OR: Tensor) -> Tensor:
        """The rows of B in the order of the base file's rows."""
        last = name.split(".")[-2]
        if not self.reorders or last not in ("attn_q", "attn_k"):
            return b_OR
        return interleaved(b_OR, self.heads if last == "attn_q" else self.key_value_heads)


def layout_of(config: Mapping[str, Any], *, tied: bool) -> GgufLayout:
    """The layout of the base that a config.json describes.

    Raises ExportError for families that are not known here.
    """
    name = (config.get("architectures") or ["a model of no class"])[0]
    if name not in FAMILIES:
        raise ExportError(
            f"{name} is not one of the supported GGUF families ({', '.join(FAMILIES)}); merge the adapter "
            "(veneer merge) and convert the whole model instead"
        )
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    if text is not config and FAMILIES[name][0] == "llama":  # a multimodal class with text parts of several families
        name = (text.get("architectures") or [_TEXT_PARTS.get(str(text.get("model_type")), name)])[0]
        if name not in FAMILIES:
            raise ExportError(
                f"the text part {name} is not one of the supported GGUF families; merge the adapter (veneer merge) and convert the "
                "whole model instead"
            )
    family, reorders = FAMILIES[name]
    config = text
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    if not isinstance(blocks, int) or not isinstance(heads, int):
        raise ExportError("the base's config.json does not say how many layers and attention heads it has")
    return GgufLayout(family, blocks, heads, config.get("num_key_value_heads") or heads, reorders, tied)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from the model's order (the two halves of each head) to llama's (their members in turn); [heads * d, ...]."""
    size = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, size, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_factors(adapter: Adapter, layout: GgufLayout, alpha: float) -> dict[str, tuple[Tensor, Tensor]]:
    """{GGUF name of the base tensor: (lora_a [r, in], lora_b [out, r])} in fp32, B with the scale of its site.

    Raises ExportError that names every site which a GGUF adapter cannot hold.
    """
    problems = Problems()
    if adapter.method.needs_base_weights:
        problems.add(
            f"it is a {adapter.method.label} adapter, and GGUF adapters are LoRA: give --rank R for the best approximation, or merge it"
        )
    for layer, overrides in adapter.overrides.items():
        problems.add(f"{layer}: it overrides {' and '.join(overrides)}, which a GGUF adapter cannot hold; merge it")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site, tensors in adapter.tensors.items():
        name = layout.name(site)
        if problem := _unfit(adapter, site, name, layout):
            problems.add(f"{site}: {problem}")
        elif not adapter.method.needs_base_weights:
            assert name is not None
            a_RK, b_OR = factors_2d(dict(tensors), torch.float64)
            scale = adapter.scale(site) * a_RK.shape[0] / alpha
            found[name] = (a_RK.float().contiguous(), (scale * layout.rows(name, b_OR)).float().contiguous())
    problems.raise_if_any(ExportError, f'the adapter "{adapter.name}" cannot become a GGUF file')
    return found


def merged_weights(
    mix: Sequence[tuple[Adapter, float]], layout: GgufLayout, weights: Callable[[str], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """{GGUF name of the base tensor: a function that computes its merged weight [out, in] in the file's order of rows}.

    ``weights`` gives a site's base weight. Raises ExportError that names every site which a merged file cannot hold.
    """
    problems = Problems()
    by_site: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, weight in mix:
        for layer, overrides in adapter.overrides.items():
            problems.add(f"{layer}: {adapter.name} overrides {' and '.join(overrides)}")
        for site in adapter.tensors:
            by_site.setdefault(site, []).append((adapter, weight))
    found: dict[str, Callable[[], Tensor]] = {}
    for site, parts in by_site.items():
        name = layout.name(site)
        if problem := _unfit(parts[0][0], site, name, layout):
            problems.add(f"{site}: {problem}")
            continue
        assert name is not None
        found[name] = partial(_merged, site, name, parts, layout, weights)
    problems.raise_if_any(
        ExportError, "the adapters cannot be merged into a GGUF file; merge them into a folder (veneer merge)"
    )
    return found


def _merged(
    site: str,
    name: str,
    parts: Sequence[tuple[Adapter, float]],
    layout: GgufLayout,
    weights: Callable[[str], Tensor],
) -> Tensor:
    weight_OK = weights(site).detach().double()
    total = weight_OK.clone()
    for adapter, factor in parts:
        tensors = {key: value.detach() for key, value in adapter.tensors[site].items()}
        total += factor * adapter.method.delta(tensors, adapter.scale(site), weight_OK)
    return layout.rows(name, total)


def write_gguf(
    adapter: Adapter, path: Path, layout: GgufLayout, *, dtype: str = "f32", base_name: str | None = None
) -> int:
    """Write an adapter as a GGUF file in one step, and read it back; returns its size in bytes.

    dtype: a key of `DTYPES`. Raises ExportError for what a GGUF adapter cannot hold.
    """
    if dtype not in DTYPES:
        raise ExportError(f"the dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    ranks = sorted(adapter.rank(site) for site in adapter.tensors)
    alpha = float(ranks[len(ranks) // 2]) if ranks else 1.0
    factors = gguf_factors(adapter, layout, alpha)
    stored = {
        f"{name}.{part}": value.to(DTYPES[dtype])
        for name, pair in factors.items()
        for part, value in zip(("lora_a", "lora_b"), pair, strict=True)
    }
    for key, value in stored.items():
        if not bool(torch.isfinite(value).all()):
            raise ExportError(f"{key} does not fit the range of {dtype}; use f32")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        _write(beside, adapter.name, layout.family, alpha, stored, base_name)
        _check(beside, stored)
    return path.stat().st_size


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and fields of a GGUF file with plain floating-point tensors."""
    import gguf
    import numpy

    reader = gguf.GGUFReader(path)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for entry in reader.tensors:
        shape = [int(size) for size in reversed(entry.shape)]
        raw = torch.from_numpy(numpy.array(entry.data).reshape(-1).view(numpy.uint8).copy())
        tensors[entry.name] = raw.view(kinds[entry.tensor_type.name]).reshape(shape)
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def _unfit(adapter: Adapter, site: str, name: str | None, layout: GgufLayout) -> str:
    """The reason that a site cannot be in a GGUF adapter; empty if it can."""
    kind = adapter.kinds[site]
    if kind not in ("linear", "conv1d"):
        return f"a GGUF adapter cannot hold {kind} layers; merge it"
    if name is None:
        return f"GGUF's {layout.family} has no tensor for this layer; merge it"
    if name == "output.weight" and layout.tied:
        return "the base's head shares the embedding's weight, which GGUF holds once; merge it"
    return ""


def _write(
    path: Path, name: str, family: str, alpha: float, stored: Mapping[str, Tensor], base_name: str | None
) -> None:
    import gguf

    kinds = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16}
    writer = gguf.GGUFWriter(path, family)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_description(f"written by Veneer {__version__}")
    if base_name:
        writer.add_string("adapter.base_model", base_name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in stored.items():
        kind = kinds.get(value.dtype, gguf.GGMLQuantizationType.BF16)
        array = value.numpy() if value.dtype in kinds else value.view(torch.uint8).numpy()
        writer.add_tensor(key, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(path: Path, stored: Mapping[str, Tensor]) -> None:
    found, _ = read_gguf(path)
    if set(found) != set(stored) or not all(torch.equal(found[key], value) for key, value in stored.items()):
        raise ExportError(f"{path} does not read back as it was written; check the disk")
