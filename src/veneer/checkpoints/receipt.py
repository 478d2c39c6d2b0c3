"""Receipts: the origin of an adapter, stored in its file and verified when it is loaded.

A receipt is JSON in the metadata of ``adapter_model.safetensors``, where other programs ignore it:

    tensors   SHA-256 over all names, dtypes, shapes and bytes: a flipped bit is detected
    base      for each adapted base weight: SHA-256 of the stored tensor with name, shape and dtype, and a sketch of it
    probes    for each site: the adapter's change applied to a fixed vector; later changes of the settings are detected
    options, method     what adapter_config.json has no name for
    own                 the overrides: layer, tensor, and the names that share it
    experts, parts, kinds   names of experts, parts of fused layers, and layers that are not linear
    seed, version, base_name, and the hashes of template, tokenizer and data that the caller knows

A sketch is eight numbers, P (W v): v a fixed vector of signs, P eight sums with fixed signs over all outputs. It changes in proportion
to the weight. If the hashes differ, it separates the same weights in another precision (differences near the rounding) from quantised
copies and other revisions (percents) and from other weights (of the size of the sketch). If the receipt's dtype is narrower, the weights
are rounded to it first. A probe is P ((W' - W) v) in fp32, with the magnitude; no model runs. Signs come from SHAKE-256 of the site's
name.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer._version import __version__
from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site
from veneer.adapters.methods import factors_2d
from veneer.checkpoints.base_view import BaseView, named
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.tensors import dtype_name
from veneer.errors import BaseModelError
from veneer.kernels.versions import mark_of
from veneer.models.fingerprint import tensor_fingerprint, weight_fingerprints
from veneer.models.load import Base

KEY = "veneer"
FORMAT = 1
NUMBERS = 8
ROUNDED = "beyond rounding its weights are the same"
"""The end of a note about a base that differs in dtype only."""
MADE_ANEW = {
    "format",
    "version",
    "seed",
    "tensors",
    "options",
    "method",
    "own",
    "experts",
    "parts",
    "kinds",
    "base",
    "base_name",
    "probes",
    "logits",
}
"""Entries that are computed on every save; the caller gives the others."""
_ROWS = 1024
_TOLERANCE = 1e-3
_SUMS = 1e-5
_QUANTIZED = {"nf4": 0.35, "fp4": 0.45, "int8": 0.05}
"""Largest distance of sketches of a weight and its quantized form: eight sums differ by about as much as the weights, at most thrice."""
_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Receipt = dict[str, Any]
Record = dict[str, Any]
Sketches = Callable[..., list[float]]  # (weight, name, dtype or None), as `sketch_of`
_WEIGHTS: WeakKeyDictionary[nn.Module, tuple[object, Record]] = WeakKeyDictionary()


def make_receipt(adapter: Adapter, base: BaseView, digest: str, extra: Mapping[str, Any] | None = None) -> Receipt:
    """The receipt of an adapter whose file's tensors have ``digest``. An unknown base leaves out the entries that need it."""
    receipt: Receipt = {
        **(extra or {}),
        "format": FORMAT,
        "version": __version__,
        "seed": adapter.seed,
        "tensors": digest,
    }
    receipt["options"] = _options_beyond_peft(adapter)
    if not adapter.method.flags:
        receipt["method"] = adapter.method.name
    if adapter.overrides:
        receipt["own"] = _override_record(adapter)
    if names := base.expert_names(adapter.tensors):
        receipt["experts"] = names
    if adapter.parts:
        receipt["parts"] = {base.written_name(site): list(parts) for site, parts in adapter.parts.items()}
    receipt["kinds"] = {site: kind for site, kind in adapter.kinds.items() if kind == "conv1d"}
    if base.sites:
        receipt["base"] = weight_records(base, adapter.tensors)
    if (base.sites or not adapter.method.needs_base_weights) and not adapter.method.no_delta:
        receipt["probes"] = {name: probe(adapter, name, _weight(base, name)) for name in adapter.tensors}
    return receipt


def verify(
    receipt: Receipt,
    adapter: Adapter,
    digest: str,
    base: BaseView,
    base_agrees: bool,
    found: Findings,
    names: Mapping[str, str],
) -> None:
    """Check an adapter that was just read against its receipt.

    base_agrees: the answer of `verify_base`. names: names in the file of layers that have another name here.
    """
    if receipt.get("tensors") != digest:
        found.refuse(
            "the tensors are not those that were written: their checksum differs from the receipt's (a damaged or edited file)",
            "receipt",
        )
        return
    own = receipt.get("own", {})
    if not isinstance(own, dict):
        found.refuse("the receipt holds no usable record of the adapter's overrides", "receipt")
        return
    here = {old: new for new, old in names.items()}
    if {here.get(layer, layer): record for layer, record in own.items()} != _override_record(adapter):
        found.refuse(
            "the adapter's overrides are not those that the receipt recorded: adapter_config.json was altered after training "
            "(modules_to_save, trainable_token_indices or bias)",
            "receipt",
        )
        return
    if adapter.meta.get("unsplit"):
        return  # its probes are of parts that only the base can tell apart
    records = receipt.get("base")
    known = records if isinstance(records, dict) else {}
    bare = [name for name in adapter.tensors if not _is_record(known.get(recorded_name(known, name, names)))]
    if bare and base.sites and isinstance(records, dict):
        found.refuse(f"the receipt holds no usable record of the base's weight at {listed(bare)}", "receipt")
        base_agrees = False
    probes = receipt.get("probes")
    if (
        adapter.method.no_delta
        or not isinstance(probes, dict)
        or (adapter.method.needs_base_weights and not base_agrees)
    ):
        return
    recorded = {name: recorded_name(probes, name, names) for name in adapter.tensors}
    if set(probes) != set(recorded.values()):
        found.refuse("the receipt's probes are of other sites than the tensors", "receipt")
        return
    wrong = [
        name
        for name, old in recorded.items()
        if not probe_agrees(probes[old], adapter, name, known.get(old), _weight(base, name), old)
    ]
    if wrong:
        found.refuse(
            f"the change at {listed(wrong)} is not what the receipt's probe recorded: adapter_config.json was altered after training "
            "(r, lora_alpha, use_rslora, use_dora or a pattern)",
            "receipt",
        )


def recorded_name(table: Mapping[str, Any], site: str, names: Mapping[str, str]) -> str:
    """The name under which a receipt's table has a site: today's, or that of the file."""
    return site if site in table else names.get(site, site)


def _override_record(adapter: Adapter) -> dict[str, list[Any]]:
    """{layer: [names, tokens]} of the overrides; their values are in the checksum."""
    return {
        layer: [sorted(tensors), list(adapter.tokens.get(layer, ()))] for layer, tensors in adapter.overrides.items()
    }


def weight_records(base: BaseView, names: Iterable[str]) -> dict[str, Record]:
    """{site: {"sha256", "dtype", "sketch"}} of base weights, computed once for a weight as it stands.

    The fingerprint is that of the file which the model names as its source, where there is one; the sketch is always of what is in
    memory, so that weights which were changed after loading are seen.
    """
    sites = {name: base.sites[name] for name in names}
    fresh = {name: site for name, site in sites.items() if _WEIGHTS.get(site.module, (None,))[0] != _identity(site)}
    hashes = _fingerprints(base.model, fresh)
    for name, site in fresh.items():
        record = weight_record(site.weight_2d, name, hashes[name], site.format)
        _WEIGHTS[site.module] = (_identity(site), record)
    return {name: _WEIGHTS[site.module][1] for name, site in sites.items()}


def weight_record(weight_OK: Tensor, name: str, sha256: str, format: str | None = None) -> Record:
    """The record of one base weight, whose fingerprint is given. format: nf4 and so on, where it is quantized."""
    return {"sha256": sha256, "dtype": format or dtype_name(weight_OK.dtype), "sketch": sketch_of(weight_OK, name)}


def receipt_of(adapter: Adapter) -> Mapping[str, Any]:
    """The receipt of the folder that an adapter was read from; empty without one."""
    receipt = adapter.meta.get("receipt")
    return receipt if isinstance(receipt, Mapping) else {}


def recorded_base(adapter: Adapter) -> str | None:
    """The base that an adapter's folder names: the receipt's name of an embedded base, else PEFT's ``base_model_name_or_path``."""
    found = receipt_of(adapter).get("base_name") or (adapter.meta.get("settings") or {}).get("base_model_name_or_path")
    return str(found) if found else None


def trained_tokens(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Number of tokens that each expert of a stack was trained on, by the stack's name: the adapter's own count, or its receipt's."""
    counted = {stack: tuple(counts.tolist()) for stack, counts in adapter.expert_tokens.items()}
    if any(map(any, counted.values())):
        return counted
    recorded = receipt_of(adapter).get("expert_tokens")
    found: dict[str, tuple[int, ...]] = {}
    for stack, counts in recorded.items() if isinstance(recorded, Mapping) else ():
        if isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts):
            found[str(stack)] = tuple(counts)
    return found


def base_records(adapter: Adapter) -> dict[str, Record]:
    """The usable records of base weights in the receipt of an adapter, by site."""
    records = receipt_of(adapter).get("base")
    known = records if isinstance(records, Mapping) else {}
    names = {site: recorded_name(known, site, adapter.meta.get("names", {})) for site in adapter.tensors}
    return {site: known[name] for site, name in names.items() if _is_record(known.get(name))}


def labels_of(adapter: Adapter) -> tuple[str, ...]:
    """The names of the classes that an adapter's head predicts, in the order of its outputs; empty if the receipt does not record them."""
    recorded = receipt_of(adapter).get("labels")
    return tuple(str(label) for label in recorded) if isinstance(recorded, list) else ()


def stop_tokens(adapter: Adapter) -> dict[str, int]:
    """The tokens with which the adapter learnt to end its answers, {text: id}; empty if the receipt does not record them."""
    recorded = receipt_of(adapter).get("stop_tokens")
    known = recorded if isinstance(recorded, Mapping) else {}
    return {str(text): token for text, token in known.items() if type(token) is int}


def _identity(site: Site) -> object:
    if site.lender is not None:
        return (site.name,)
    weight: Any = site.module.weight
    return (site.name, mark_of(weight), tuple(weight.shape))


def _fingerprints(model: nn.Module | None, sites: Mapping[str, Site]) -> dict[str, str]:
    names = {name: f"{name}.weight" if name else "weight" for name in sites}
    source = named(model)
    folder = Path(source) if source and Path(source).is_dir() else None
    experts = {
        name: tensor_fingerprint(names.pop(name), s.weight_2d) for name, s in sites.items() if s.stack is not None
    }
    found: dict[str, str] = {}
    if model is None:
        return experts
    whole = next((site.lender for site in sites.values() if site.lender is not None), None)
    if names and folder is not None:
        with contextlib.suppress(BaseModelError):  # files that have changed or gone since: what is in memory counts
            found = weight_fingerprints(Base(model, None, str(source), folder, torch.float32), names.values(), whole)
    if names and not found:
        found = weight_fingerprints(model, names.values(), whole)
    return experts | {name: found[path] for name, path in names.items()}


def probe(adapter: Adapter, name: str, weight_OK: Tensor | None = None, signed: str | None = None) -> list[float]:
    """Eight numbers of the change at a site. Methods whose change depends on the base need its weight there.

    signed: the name that the signs are drawn from, if the site had another one in its file.
    """
    signed = signed or name
    method, scale = adapter.method, adapter.scale(name)
    tensors = {key: value.detach().float().cpu() for key, value in adapter.tensors[name].items()}
    if not method.needs_base_weights:
        a_RK, b_OR = factors_2d(tensors, torch.float32)
        return eight(scale * (b_OR @ (a_RK @ signs(a_RK.shape[1], signed))), signed)
    assert weight_OK is not None
    v_K = signs(weight_OK.shape[1], signed)
    changes = []
    for start in range(0, weight_OK.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        delta = method.delta(method.output_rows(tensors, rows), scale, weight_OK[rows].float().cpu())
        changes.append(delta @ v_K)
    return eight(torch.cat(changes), signed)


def _weight(base: BaseView, name: str) -> Tensor | None:
    return base.sites[name].weight_2d if name in base.sites else None


def signs(count: int, name: str, purpose: str = "in") -> Tensor:
    """A fixed vector of +1 and -1 in fp32, [count], a function of its arguments alone."""
    stream = bytearray(hashlib.shake_256(f"veneer\x1f{purpose}\x1f{name}".encode()).digest(-(-count // 8)))
    packed = torch.frombuffer(stream, dtype=torch.uint8)
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:count].float() * 2 - 1


def eight(y_O: Tensor, name: str) -> list[float]:
    """Eight numbers from a vector over outputs: sums with fixed signs, scaled so that they are of the size of its entries."""
    signed = y_O * signs(y_O.numel(), name, "out")
    signed = torch.nn.functional.pad(signed, (0, -signed.numel() % NUMBERS))
    sums = signed.double().reshape(-1, NUMBERS).sum(0) / math.sqrt(max(1, signed.numel() // NUMBERS))
    return [float(f"{value:.7g}") for value in sums.tolist()]


def _times(weight_OK: Tensor, v_K: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W v in fp32, [O], on the CPU; rows are upcast (and before that rounded to ``dtype``) a block at a time."""
    v_K = v_K.to(weight_OK.device)
    blocks = weight_OK.split(_ROWS)
    return torch.cat([(rows if dtype is None else rows.to(dtype)).float() @ v_K for rows in blocks]).cpu()


def _options_beyond_peft(adapter: Adapter) -> dict[str, Any]:
    """Options that adapter_config.json has no name for, where they are not the default."""
    options = adapter.method.model_dump(include=set(adapter.method.beyond_peft))
    default = type(adapter.method)().model_dump()
    return {key: value for key, value in options.items() if value != default[key]}


def probe_agrees(
    recorded: object,
    adapter: Adapter,
    name: str,
    record: object,
    weight_OK: Tensor | None = None,
    signed: str | None = None,
) -> bool:
    """The change at a site is the one of its recorded probe.

    record: the receipt's record of the base weight there. signed: as for `probe`.
    """
    if not _is_eight(recorded):
        return False
    floor = 0.0
    if weight_OK is not None and adapter.method.needs_base_weights:
        # The change is a small difference of large numbers; its rounding is that of the base's own product.
        known: Record = record if _is_record(record) else {"sketch": sketch_of(weight_OK, signed or name)}
        floor = rounding_between(known.get("dtype"), dtype_name(weight_OK.dtype)) * math.hypot(*known["sketch"])
    one = torch.tensor(recorded, dtype=torch.float64)
    other = torch.tensor(probe(adapter, name, weight_OK, signed), dtype=torch.float64)
    return bool((other - one).norm() <= _TOLERANCE * one.norm() + floor + 1e-12)


def _is_eight(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == NUMBERS and all(type(x) in (int, float) for x in value)


def verify_base(
    receipt: Receipt, sites: Iterable[str], base: BaseView, found: Findings, renamed: Mapping[str, str]
) -> bool:
    """The base is known, and its weights at ``sites`` are those of the receipt in any precision. Needs no tensor of the adapter.

    renamed: names in the file of layers that have another name here.
    """
    recorded = receipt.get("base")
    if not base.sites:
        return False
    if not isinstance(recorded, dict):
        found.note("the receipt has no record of the base's weights, so the base was not verified")
        return True
    olds = {name: recorded_name(recorded, name, renamed) for name in sites}
    names = [name for name, old in olds.items() if _is_record(recorded.get(old))]
    differs: dict[str, float] = {}
    rounded: dict[tuple[str, str], list[float]] = {}
    for name, now in weight_records(base, names).items():
        old, weight_OK = olds[name], base.sites[name].weight_2d
        known, sketch = recorded[old], now["sketch"] if old == name else sketch_of(weight_OK, old)
        distance = base_distance(known, sketch, weight_OK, old, now["dtype"])
        same = known.get("sha256") == now["sha256"] or old != name  # a fingerprint depends on the name
        if distance is not None:
            differs[name] = distance
        elif not same or known.get("dtype") != now["dtype"]:
            apart = sketch_distance(known["sketch"], sketch)
            rounded.setdefault((str(known.get("dtype")), now["dtype"]), []).append(apart)
    for (there, here), distances in rounded.items():
        result = ROUNDED
        if _QUANTIZED.keys() & {there, here}:
            mean = math.sqrt(sum(apart * apart for apart in distances) / len(distances))
            result = f"its weights differ by {mean:.1%} on average"
        found.note(f"the base is in {here} here and was in {shown(there, 20)} where the adapter was made; {result}")
    if differs:
        _refuse_other_base(differs, len(names), base, found)
    return not differs


def _is_record(value: object) -> TypeGuard[Record]:
    """A receipt's record of a base weight can be compared with one."""
    return isinstance(value, dict) and _is_eight(value.get("sketch"))


def _refuse_other_base(differs: dict[str, float], sites: int, base: BaseView, found: Findings) -> None:
    mean = math.sqrt(sum(min(distance, 10.0) ** 2 for distance in differs.values()) / len(differs))
    count = f"{len(differs)} of {sites} adapted weights differ, by {mean:.1%} on average"
    quantised = getattr(getattr(base.model, "config", None), "quantization_config", None) is not None
    if mean < 0.25 and quantised:
        found.note(f"the base is quantised and is not what the adapter was made on: {count}")
    elif mean < 0.25:
        found.refuse(
            f"this is a relative of the base that the adapter was made on, not that base: {count} (a quantised copy, another "
            "revision, or the instruct model in place of the base model)",
            "base",
        )
    else:
        found.refuse(f"this is not the base that the adapter was made on: {count}", "base")


def base_distance(
    known: Record,
    sketch: list[float],
    weight_OK: Tensor,
    name: str,
    format: str | None = None,
    *,
    sketches: Sketches | None = None,
) -> float | None:
    """Distance of a base weight from the recorded one, as a share of it; None if only the rounding of its dtype or format differs.

    known: the receipt's record of the weight. sketch: that of ``weight_OK`` as it is held here. format: the one in which it is held.
    sketches: computes another one, as `sketch_of` does.
    """
    there, here = known.get("dtype"), format or dtype_name(weight_OK.dtype)
    apart, most = sketch_distance(known["sketch"], sketch), rounding_between(there, here)
    if there == here:  # the blocks of one format may differ
        most = max(most, _QUANTIZED.get(here, 0.0))
    if apart > _SUMS and there in _NARROW and here in ("float32", "float64"):
        apart, most = sketch_distance(known["sketch"], (sketches or sketch_of)(weight_OK, name, _NARROW[there])), _SUMS
    return apart if apart > most else None


def sketch_of(weight_OK: Tensor, name: str, dtype: torch.dtype | None = None) -> list[float]:
    """Eight numbers of a base weight, [out, in]: P (W v). dtype: as it would be in this dtype."""
    return eight(_times(weight_OK, signs(weight_OK.shape[1], name), dtype), name)


def kept_sketches() -> Sketches:
    """`sketch_of` for weights of one base, each computed once: several adapters are compared with them."""
    kept: dict[tuple[str, torch.dtype | None], list[float]] = {}

    def sketch(weight_OK: Tensor, name: str, dtype: torch.dtype | None = None) -> list[float]:
        if (name, dtype) not in kept:
            kept[name, dtype] = sketch_of(weight_OK, name, dtype)
        return kept[name, dtype]

    return sketch


def sketch_distance(known: list[float], now: list[float]) -> float:
    """Distance of two sketches, as a share of the first."""
    one, other = torch.tensor(known, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    distance = float((one - other).norm() / one.norm().clamp_min(1e-30))
    return distance if math.isfinite(distance) else math.inf


def rounding_between(one: object, other: object) -> float:
    """Largest distance of sketches of the same weights in two dtypes; for one dtype, the rounding of the sums."""
    steps = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, **_QUANTIZED}
    known = [steps[dtype] for dtype in (one, other) if isinstance(dtype, str) and dtype in steps]
    return max(_SUMS, *known) if one != other and len(known) == 2 else _SUMS
