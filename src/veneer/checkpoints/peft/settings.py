"""``adapter_config.json``: the settings that are read, refused by name, and written.

A key is in one of four groups. Used: it changes the computation, and is honoured. Refused: it changes the computation in a way that
Veneer does not support (a default value is harmless). Ignored: it matters only where the adapter was made. Unknown: harmless if its value
is null, false, 0 or empty, and refused otherwise, because a later format may have given it a meaning.

Patterns are kept as text; see ``patterns.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from veneer.adapters.methods import METHODS, LowRankMethod, Method
from veneer.checkpoints.findings import Findings, shown
from veneer.config import Alpha

MAX_RANK = 4096
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Few = Annotated[list[Name], Field(max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(max_length=1_000_000)]
Names = Annotated[list[Name], Field(max_length=20_000)]

INIT_PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
INIT_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

NO_TARGETS = "dummy-target-modules"
"""PEFT's word for an adapter without factors."""

REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts only behind its invocation tokens",
    "layer_replication": "it builds a model with repeated layers",
    "megatron_config": "its layers are Megatron's parallel ones",
    "use_qalora": "QA-LoRA pools its inputs in groups",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "Arrow routes tokens among several adapters",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA compresses activations in training",
    "monteclora_config": "MonteCLoRA samples its factors",
    "loftq_config": "LoftQ replaces the base's weights",
}
"""Settings that change the computation and that Veneer does not support."""

_ELSEWHERE = (
    "peft_type auto_mapping peft_version inference_mode revision base_model_name_or_path task_type runtime_config megatron_core "
    "qalora_group_size eva_config corda_config lora_ga_config modules_to_tie target_modules_to_tie loraplus_lr_ratio "
    "loraplus_lr_embedding unsloth_fixed"
)
_EMPTY = (
    "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules kasa_config layer_replication "
    "layers_pattern layers_to_transform lora_ga_config megatron_config monteclora_config revision target_parameters "
    "use_bdlora velora_config"
)
IGNORED = frozenset(_ELSEWHERE.split())
"""Settings that matter only where the adapter was made."""


class Settings(BaseModel):
    """The settings that are used."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str = "LORA"
    r: Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)] = 8
    lora_alpha: Annotated[Alpha, Field(strict=True)] = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    use_rslora: Annotated[bool, Field(strict=True)] = False
    use_dora: Annotated[bool, Field(strict=True)] = False
    lora_bias: Annotated[bool, Field(strict=True)] = False
    fan_in_fan_out: bool = False
    bias: Annotated[str, Field(pattern="^(none|all|lora_only)$")] = "none"
    init_lora_weights: bool | str | None = True
    target_modules: Name | Names | None = None
    exclude_modules: Name | Names | None = None
    target_parameters: Names | None = None
    modules_to_save: Few | None = None
    trainable_token_indices: Tokens | Annotated[dict[Name, Tokens], Field(max_length=64)] | None = None
    layers_to_transform: int | Annotated[list[int], Field(max_length=20_000)] | None = None
    layers_pattern: Name | Few | None = None
    rank_pattern: Annotated[
        dict[Name, Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)]], Field(max_length=20_000)
    ] = {}
    alpha_pattern: Annotated[dict[Name, Annotated[Alpha, Field(strict=True)]], Field(max_length=20_000)] = {}
    ensure_weight_tying: Annotated[bool, Field(strict=True)] = False
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    mh_adapter: bool = False
    of_method: dict[str, Any] = {}
    """Values of the keys that the method declares, as they are in the file."""

    def scaling(self, r: int, alpha: float) -> float:
        """s in W + s B A."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def read_settings(raw: Any, found: Findings) -> Settings | None:
    """The settings in a parsed ``adapter_config.json``, or None if they cannot be used; ``found`` collects the reasons."""
    if not isinstance(raw, dict):
        found.refuse(f"adapter_config.json holds {type(raw).__name__}; expected a table of settings")
        return None
    kind = raw.get("peft_type")
    known = {method.peft_type for method in METHODS.values()}
    if not isinstance(kind, str) or kind not in known:
        others = " or ".join(sorted(known - {"LORA"}))
        found.refuse(
            f'peft_type: expected "LORA" (so are LoRA, rsLoRA and DoRA) or {others}, found {shown(kind, 40)}, which Veneer does not '
            "support"
        )
        return None
    own = {key for method in METHODS.values() if method.peft_type == kind for key in method.peft_keys}
    used = Settings.model_fields.keys() - {"of_method"}
    if kind != "LORA":
        used -= {name for name in used if name in LowRankMethod.model_fields and name not in Method.model_fields}
    try:
        settings = Settings.model_validate(
            {
                **{key: value for key, value in raw.items() if key in used},
                "of_method": {key: raw[key] for key in own if key in raw},
            }
        )
    except ValidationError as error:
        for detail in error.errors():
            place = ".".join(shown(part, 60) for part in detail["loc"])
            found.refuse(f"adapter_config.json, {place}: {detail['msg']}; found {shown(detail['input'], 60)}")
        return None
    for key in ("r", "lora_alpha") if kind == "LORA" else ():
        if key not in raw:
            found.note(f"adapter_config.json has no {key}; PEFT's default is taken, {getattr(settings, key)}")
    _refuse_unsupported(raw, used | own, found)
    return settings


def _refuse_unsupported(raw: dict[str, Any], used: Collection[str], found: Findings) -> None:
    for key, value in raw.items():
        if key in used or key in IGNORED or not value:
            continue
        if key in REFUSED:
            found.refuse(f"adapter_config.json, {key}: not supported, {REFUSED[key]}")
        else:
            found.refuse(
                f"adapter_config.json, {shown(key, 60)}: not known, and its value {shown(value, 60)} may change the computation",
                "config",
            )
    mapping = raw.get("auto_mapping")
    if mapping:
        found.note("auto_mapping in adapter_config.json is ignored: no class or library named in a file is imported")


def written_settings(**values: Any) -> dict[str, Any]:
    """Everything that PEFT 0.21 writes: these values, and for all other keys those that change nothing."""
    return {
        **dict.fromkeys(_EMPTY.split()),
        "inference_mode": True,
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "use_qalora": False,
        **values,
        "alpha_pattern": {key: _number(value) for key, value in values["alpha_pattern"].items()},
        "lora_alpha": _number(values["lora_alpha"]),
    }


def other_settings(**values: Any) -> dict[str, Any]:
    """The settings that all adapters of PEFT have, of other types than LoRA."""
    common = dict.fromkeys(("auto_mapping", "revision", "exclude_modules", "modules_to_save", "task_type"))
    return {**common, "inference_mode": True, "peft_version": "0.21.2", **values}


def _number(value: float) -> int | float:
    """Whole numbers as integers, as other programs expect of lora_alpha."""
    return int(value) if float(value).is_integer() else float(value)
