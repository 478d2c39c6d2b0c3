"""Writes an adapter as a PEFT folder: settings, tensors with a receipt, and a model card, read back before it counts as written.

    adapter_config.json          what PEFT, vLLM and others build the layers from
    adapter_model.safetensors    the tensors in fp32, the receipt in its metadata
    README.md                    a model card
    chat_template.jinja          the chat template, if it is not the base's

Tensors under PEFT's names, and the settings that declare overrides:

    weight, bias      <layer>.weight, <layer>.bias                           modules_to_save
    bias              <site>.base_layer.bias, or <layer>.bias                bias
    lora_bias         <site>.lora_B.bias                                     lora_bias
    rows              <layer>.token_adapter.trainable_tokens_delta           trainable_token_indices
    weight beside     <site>.base_layer.weight                               (PEFT declares none of these)
    factors

``target_modules``, ``target_parameters``, ``rank_pattern`` and ``alpha_pattern`` are chosen so that PEFT gives exactly these layers these
ranks and scales, and names are those that PEFT looks for (``portable.py``).
The same adapter gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.methods import LoRA, low_rank
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.adapters.targets import as_list
from veneer.checkpoints import receipt as receipts
from veneer.checkpoints.base_view import BaseView, inside, named
from veneer.checkpoints.files import Folder, write_folder
from veneer.checkpoints.locate import CONFIG, WEIGHTS
from veneer.checkpoints.peft.card import model_card
from veneer.checkpoints.peft.fused_experts import FusedExperts, fuse_experts
from veneer.checkpoints.peft.patterns import ends_with, names_for, table_for
from veneer.checkpoints.peft.placement import stored_shape
from veneer.checkpoints.peft.portable import as_parameters, converts_experts, stored_sites
from veneer.checkpoints.peft.read import MAX_CONFIG, TEMPLATE
from veneer.checkpoints.peft.settings import NO_TARGETS, other_settings, written_settings
from veneer.checkpoints.peft.tensor_names import PREFIX, TOKEN_ROWS, key_of
from veneer.checkpoints.peft.virtual_tokens import stored_virtual_tokens, virtual_token_settings
from veneer.checkpoints.tensors import digest, read_header, read_tensors, to_buffers
from veneer.errors import CheckpointError
from veneer.models.embedded import alias_of, public_name
from veneer.models.names import plain_shapes

CARD = "README.md"
_NO_FACTORS = LoRA(r=8, lora_alpha=8)
"""What PEFT's settings say of factors where an adapter has none: the defaults."""
T = TypeVar("T", int, float)
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_HEADS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def write_adapter_folder(
    adapter: Adapter,
    path: Path,
    base: BaseView,
    *,
    base_name: str | None = None,
    task_type: str | None = None,
    receipt: Mapping[str, Any] | None = None,
    template: str | None = None,
    experts: Literal["auto", "separate", "fused"] = "auto",
) -> None:
    """Write ``adapter`` as the folder ``path``, or over the adapter that is there.

    Args:
        adapter: the adapter.
        path: the folder.
        base: the base that it acts on; a plain `BaseView` if it is not loaded.
        base_name: name of the base, by default the model's own name, or that of the folder which the adapter came from.
        task_type: PEFT's task_type, with the same defaults.
        receipt: more entries for the receipt, such as the hashes of template, tokenizer and data.
        template: a chat template that is not the base's own, stored beside the tensors.
        experts: "separate" tensors of each expert, "fused" for PEFT's target_parameters, or "auto": separate where PEFT reads them so.

    Raises:
        CheckpointError: the folder cannot be written, or does not read back equal.
    """
    if adapter.method.virtual_tokens:
        _write_virtual_tokens(adapter, path, base, base_name, task_type, receipt, template)
        return
    as_one = experts == "fused" or (experts == "auto" and _only_fused(adapter, base))
    fused = fuse_experts(adapter, base) if as_one else FusedExperts()
    tensors = stored_tensors(adapter, base, fused)
    checksum = digest(tensors)
    settings = _settings(adapter, base, base_name, task_type, fused)
    note = _receipt_for(adapter, base, base_name, checksum, receipt)
    if settings.get("lora_dropout", 0.0) != adapter.method.dropout:
        note["options"]["lora_dropout"] = adapter.method.dropout
    _write(adapter, path, settings, tensors, note, template, checksum)


def _write_virtual_tokens(
    adapter: Adapter,
    path: Path,
    base: BaseView,
    base_name: str | None,
    task_type: str | None,
    receipt: Mapping[str, Any] | None,
    template: str | None,
) -> None:
    """`write_adapter_folder` for an adapter whose tensor stands before the sequence."""
    tensors = stored_virtual_tokens(adapter)
    checksum, name = digest(tensors), _base_name(adapter, base, base_name)
    task = task_type or _task(adapter, base) or _task_before(adapter, adapter.meta.get("settings") or {})
    settings = virtual_token_settings(adapter, base, None if name is None else public_name(name), task)
    note = _receipt_for(adapter, base, base_name, checksum, receipt)
    _write(adapter, path, settings, tensors, note, template, checksum)


def _receipt_for(
    adapter: Adapter, base: BaseView, base_name: str | None, checksum: str, receipt: Mapping[str, Any] | None
) -> dict[str, Any]:
    note = receipts.make_receipt(adapter, base, checksum, receipt)
    alias = alias_of(_base_name(adapter, base, base_name) or "")
    return note if alias is None else {**note, "base_name": alias}


def _write(
    adapter: Adapter,
    path: Path,
    settings: Mapping[str, Any],
    tensors: dict[str, Tensor],
    note: Mapping[str, Any],
    template: str | None,
    checksum: str,
) -> None:
    """Write the files of a folder and read them back."""
    metadata = {"format": "pt", receipts.KEY: json.dumps(note, sort_keys=True, separators=(",", ":"))}
    config = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    files: dict[str, Sequence[bytes | memoryview]] = {
        CARD: [model_card(adapter, base=settings["base_model_name_or_path"], receipt=note).encode()],
        WEIGHTS: to_buffers(tensors, metadata),
        CONFIG: [config],
    }
    if template is not None:
        files[TEMPLATE] = [template.encode()]
    write_folder(path, files)
    _read_back(path, config, checksum)


def stored_tensors(adapter: Adapter, base: BaseView, fused: FusedExperts | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names and in PEFT's shapes, fp32 (an fp64 master is rounded)."""
    fused = fused or FusedExperts()
    stored = {key_of(name, key): _fp32(value) for name, held in fused.tensors.items() for key, value in held.items()}
    for site, tensors in adapter.tensors.items():
        if site in fused.sites:
            continue
        for name, value in tensors.items():
            stored[key_of(base.written_name(site), name)] = _fp32(value).reshape(
                stored_shape(tuple(value.shape), adapter.kinds[site])
            )
        for head in _tied_heads(adapter, site, base):
            # PEFT keeps the head's factors beside the embedding's, transposed.
            stored[key_of(head, "lora_A")] = _fp32(tensors["lora_embedding_B"].T)
            stored[key_of(head, "lora_B")] = _fp32(tensors["lora_embedding_A"].T)
    stored |= _stored_overrides(adapter, base) | adapter.method.shared()
    earlier = stored_sites(base.model, adapter.tensors)
    return {_respelt(name, earlier): value for name, value in stored.items()} if earlier else stored


def _respelt(name: str, earlier: Mapping[str, str]) -> str:
    """A tensor's name with the earlier name of its site, if it has one."""
    site, _, tensor = name.removeprefix(PREFIX).rpartition(".lora_")
    return f"{PREFIX}{earlier[site]}.lora_{tensor}" if site in earlier else name


def _fp32(value: Tensor) -> Tensor:
    return value.detach().float().contiguous()


def _tied_heads(adapter: Adapter, site: str, base: BaseView) -> list[str]:
    if not adapter.method.ensure_weight_tying:
        return []
    return [name for name in base.tied.get(site, ()) if base.tied_to(name) == site]


def _stored_overrides(adapter: Adapter, base: BaseView) -> dict[str, Tensor]:
    """{PEFT's name: tensor in fp32} of the overrides. Rows that two layers share are stored once."""
    stored: dict[str, Tensor] = {}
    rows: set[int] = set()
    for layer, overrides in adapter.overrides.items():
        beside = ".base_layer" if layer in adapter.tensors else ""
        for key, value in overrides.items():
            if key == LORA_BIAS:
                stored[f"{PREFIX}{layer}.lora_B.bias"] = _fp32(value)
            elif key != ROWS:
                stored[f"{PREFIX}{layer}{beside}.{key}"] = _fp32(value)
            elif id(value) not in rows:
                stored[f"{PREFIX}{layer}.token_adapter.{TOKEN_ROWS}"] = _fp32(value)
                rows.add(id(value))
        if WEIGHT in overrides and not beside:
            # PEFT needs every parameter of a saved layer: those that are not overridden are the base's.
            for key, parameter in base.parameters_of(layer).items():
                stored.setdefault(f"{PREFIX}{layer}.{key}", _fp32(parameter))
    return stored


def _settings(
    adapter: Adapter, base: BaseView, base_name: str | None, task_type: str | None, fused: FusedExperts
) -> dict[str, Any]:
    if adapter.method.peft_type != _NO_FACTORS.peft_type:
        return _other_settings(adapter, base, base_name, task_type)
    method = low_rank(adapter.method, adapter.name) if adapter.method.low_rank else _NO_FACTORS
    names = {site: base.written_name(site) for site in adapter.tensors if site not in fused.sites}
    ranks = {name: adapter.rank(site) for site, name in names.items()} | fused.ranks
    alphas = {name: adapter.alpha(site) for site, name in names.items()} | fused.alphas
    # PEFT takes the rank of separately stored experts from r alone.
    experts = [adapter.rank(site) for site in names if base.is_expert(site)]
    r = _usual(0, experts) if experts else _usual(method.r, ranks.values())
    alpha = _usual(method.lora_alpha, alphas.values())
    before = adapter.meta.get("settings") or {}
    name = _base_name(adapter, base, base_name)
    parameters = _as_parameters(adapter, base, before)
    return written_settings(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0 if fused.sites or parameters or experts else method.lora_dropout,
        use_rslora=method.use_rslora,
        **method.flags,
        init_lora_weights="gaussian" if method.init_lora_weights == "gaussian" else True,
        target_modules=names_for([name for site, name in names.items() if site not in parameters], base.paths)
        if adapter.tensors
        else NO_TARGETS,
        target_parameters=[*_parameters(fused, base), *_parameter_names(parameters, base)] or None,
        rank_pattern=_table(ranks, r, parameters),
        alpha_pattern=_table(alphas, alpha, parameters),
        fan_in_fan_out="conv1d" in adapter.kinds.values() and "linear" not in adapter.kinds.values(),
        ensure_weight_tying=method.ensure_weight_tying,
        **_override_settings(adapter, base),
        base_model_name_or_path=None if name is None else public_name(name),
        task_type=task_type or _task(adapter, base) or _task_before(adapter, before),
    )


def _other_settings(adapter: Adapter, base: BaseView, base_name: str | None, task_type: str | None) -> dict[str, Any]:
    """The settings of an adapter that is not of PEFT's type LORA."""
    written = [base.written_name(site) for site in adapter.tensors]
    before, name = adapter.meta.get("settings") or {}, _base_name(adapter, base, base_name)
    targets = names_for(written, base.paths)
    own = adapter.method.peft_settings(adapter.tensors, written)
    if "feedforward_modules" in own:  # PEFT wants a subset of the targets
        targets = written
    return other_settings(
        peft_type=adapter.method.peft_type,
        target_modules=targets,
        fan_in_fan_out="conv1d" in adapter.kinds.values() and "linear" not in adapter.kinds.values(),
        modules_to_save=_saved(adapter, base) or None,
        trainable_token_indices=_tokens(adapter, base),
        base_model_name_or_path=None if name is None else public_name(name),
        task_type=task_type or _task(adapter, base) or _task_before(adapter, before),
        **own,
    )


def _base_name(adapter: Adapter, base: BaseView, given: str | None) -> str | None:
    """The name under which the base is loaded: given, the model's own, or that of the folder which the adapter came from."""
    return given or named(base.model) or receipts.recorded_base(adapter)


def _only_fused(adapter: Adapter, base: BaseView) -> bool:
    """PEFT reads the experts of this adapter from fused factors alone.

    It stacks separate factors of some models, if all experts have all their projections at one rank and scale.
    """
    held = [site for site in adapter.tensors if base.is_expert(site)]
    if not held or not adapter.method.as_parameter or adapter.method.adds_bias:
        return False
    every = sum(base.is_expert(site) for site in base.sites)
    alike = {(adapter.rank(site), adapter.alpha(site)) for site in held}
    return not (converts_experts(base.model) and len(held) == every and len(alike) == 1)


def _parameters(fused: FusedExperts, base: BaseView) -> list[str]:
    """``target_parameters`` that mean exactly the fused parameters."""
    model = base.model
    every = [] if model is None else list(plain_shapes(model))
    names = names_for(fused.ranks, every)
    if isinstance(names, str):
        return sorted(fused.ranks)
    # With the stack's own name, by which readers without the base tell stacks from layers.
    stacks = {name.rsplit(".", 2)[-2] for name in fused.ranks}
    return [f"{stack}.{name}" if "." not in name else name for name in names for stack in sorted(stacks)]


def _as_parameters(adapter: Adapter, base: BaseView, before: Mapping[str, Any]) -> frozenset[str]:
    """The sites whose weights PEFT takes by ``target_parameters``; without a base those of the folder that the adapter was read from."""
    if base.model is not None or not adapter.method.as_parameter:
        sites = {site: base.sites[site] for site in adapter.tensors if adapter.method.as_parameter}
        return as_parameters(base.model, sites)
    names = before.get("target_parameters") or ()
    return frozenset(site for site in adapter.tensors if any(ends_with(f"{site}.weight", name) for name in names))


def _parameter_names(sites: Collection[str], base: BaseView) -> list[str]:
    """``target_parameters`` for the weights of these sites."""
    every = [] if base.model is None else list(plain_shapes(base.model))
    weights = sorted(f"{site}.weight" for site in sites)
    names = names_for(weights, every)
    return weights if isinstance(names, str) else names


def _table(values: Mapping[str, T], default: T, parameters: Collection[str]) -> dict[str, T]:
    """A rank or alpha table for layers, and for weights that PEFT takes as parameters: it looks those up by the parameter's name."""
    weights = {f"{site}.weight": value for site, value in values.items() if site in parameters}
    return table_for(values, default) | (table_for(weights, default) if weights else {})


def _override_settings(adapter: Adapter, base: BaseView) -> dict[str, Any]:
    """The settings that declare the overrides."""
    biased = [layer for layer, overrides in adapter.overrides.items() if BIAS in overrides and WEIGHT not in overrides]
    beside = all(layer in adapter.tensors for layer in biased) and not adapter.method.every_bias
    return {
        "modules_to_save": _saved(adapter, base) or None,
        "bias": "none" if not biased else "lora_only" if beside else "all",
        "lora_bias": any(LORA_BIAS in overrides for overrides in adapter.overrides.values()),
        "trainable_token_indices": _tokens(adapter, base),
    }


def _saved(adapter: Adapter, base: BaseView) -> list[str]:
    """Names for ``modules_to_save``: those of the adapter's options if they mean exactly the overridden layers, else full paths."""
    layers = [
        layer for layer, overrides in adapter.overrides.items() if WEIGHT in overrides and layer not in adapter.tensors
    ]
    names = list(as_list(adapter.method.modules_to_save))
    meant = {layer.name for layer in base.layers() if any(inside(layer.name, name) for name in names)}
    return sorted(names) if names and meant == set(layers) else sorted(layers)


def _tokens(adapter: Adapter, base: BaseView) -> list[int] | dict[str, list[int]] | None:
    """A list for the input embedding (and a head tied to it), which PEFT finds by itself; otherwise a table by name."""
    distinct: dict[int, tuple[str, tuple[int, ...]]] = {}
    for layer, overrides in adapter.overrides.items():
        if ROWS in overrides:
            distinct.setdefault(id(overrides[ROWS]), (layer, adapter.tokens[layer]))
    if not distinct:
        return None
    if len(distinct) == 1:
        layer, ids = next(iter(distinct.values()))
        get = getattr(base.model, "get_input_embeddings", None)
        if base.model is None or (callable(get) and get() is base.sites[layer].module):
            return list(ids)
    return {layer: list(ids) for layer, ids in distinct.values()}


def _usual(declared: T, values: Iterable[T]) -> T:
    """The declared value if any site has it, else the most common one."""
    counts = Counter(values)
    return declared if declared in counts or not counts else counts.most_common(1)[0][0]


def _task(adapter: Adapter, base: BaseView) -> str | None:
    """PEFT's task type of a model. A classifier's adapter without a head gets none: PEFT expects a trained one in the file."""
    name = type(base.model).__name__
    if any(base.is_classifier(layer) for layer in adapter.overrides):
        return next((task for end, task in _HEADS.items() if name.endswith(end)), None)
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _task_before(adapter: Adapter, before: Mapping[str, Any]) -> str | None:
    """The task of the folder that the adapter was read from. A classifier's needs a head in the file."""
    task = before.get("task_type")
    needs_head = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    return task if isinstance(task, str) and (adapter.overrides or not needs_head) else None


def _read_back(path: Path, config: bytes, checksum: str) -> None:
    with Folder(path) as folder:
        same = folder.read(CONFIG, MAX_CONFIG) == config
        with folder.open(WEIGHTS) as (file, size):
            where = str(path / WEIGHTS)
            same = same and read_tensors(file, read_header(file, size, where), where)[1] == checksum
    if not same:
        raise CheckpointError(
            f"{path} does not read back as it was written; the disk may be failing: write to another one"
        )
