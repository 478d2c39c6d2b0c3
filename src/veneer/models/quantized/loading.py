"""Reading quantized bases through transformers' loader: layers become `QuantizedLinear`, filled or quantized tensor by tensor.

The loader builds the model on the meta device and hands over each weight when it has been read, so neither the dense model nor a second
copy of the files is ever in memory. bitsandbytes is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer._imports import light_imports
from veneer.errors import BaseModelError
from veneer.kernels.experts import quantized_experts
from veneer.kernels.quantized.four_bit import FourBit
from veneer.kernels.quantized.fp8 import SCALE, dequantize_fp8
from veneer.kernels.quantized.int8 import Int8
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.stack import QuantizedStack
from veneer.kernels.quantized.state import COMPANIONS, FORMATS, quantize, weight_of
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.models.quantized.scheme import METHOD, Scheme
from veneer.models.quantized.size import stack_names

with light_imports():
    from transformers.core_model_loading import ConversionOps
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["Reading", "empty_layer", "quantized_names"]

_EXPERTS = "veneer_quantized"
"""Name of the forward of quantized experts, by transformers' ``ExpertsInterface``."""


class Reading:
    """One load of a quantized base. Use: ``from_pretrained(folder, **reading.arguments(config))``, then look at ``problems``.

    Attributes:
        problems: layers whose tensors cannot be used, with the reasons.
        layers: the number of layers that were quantized.
    """

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        """``device``: where weights go that are quantized here. They are quantized on the CPU, which gives the same bits everywhere."""
        self.scheme = scheme
        self.device = device
        self.problems: list[str] = []
        self.layers = 0

    def __deepcopy__(self, memo: Any) -> Reading:
        return self  # the loader copies its converters for each tensor, with all that they refer to

    def fits(self, name: str, weight: Tensor, shape: tuple[int, ...]) -> bool:
        """True for a weight of this shape; any other is a problem."""
        if tuple(weight.shape) == shape:
            return True
        self.problems.append(f"{name} has shape {list(weight.shape)} in the files and {list(shape)} by config.json")
        return False

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """A weight in the format of this load, on its device."""
        made = quantize(weight, self.scheme.format, double=self.scheme.double)
        scales = {name: scale.to(self.device) for name, scale in made.scales.items()}
        return made.with_tensors(made.stored.to(self.device), scales)

    def check_stacks(self, names: Iterable[str]) -> None:
        """Note quantized stacks of the files that the model does not have."""
        for name in sorted(set(self.scheme.stacks) - set(names)):
            self.problems.append(f"{name}: the files hold it as quantized experts, and the model has no such stack")

    def arguments(self, config: Any) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` beside the usual ones."""
        if not self.scheme.stored and self.scheme.fp8 is None:
            return {"quantization_config": _Config(self)}
        config.quantization_config = {"quant_method": METHOD, "reading": self}
        return {"config": config}

    def finish(self, model: Any) -> tuple[str, ...]:
        """Make the model one like others, whose config says how bitsandbytes would read it. Returns what a user should know."""
        if any(isinstance(module, QuantizedStack) for module in model.modules()):
            model.config.get_text_config()._experts_implementation = _EXPERTS
        del model.hf_quantizer
        model.config.quantization_config = self.scheme.as_config(model.dtype)
        plain = [name for name, value in model.named_parameters() if value.dim() == 3 and "experts" in name]
        if not plain:
            return ()
        size = sum(value.numel() * value.element_size() for name, value in model.named_parameters() if name in plain)
        dtype = str(model.dtype).removeprefix("torch.")
        return (
            f"the experts of {type(model).__name__} stay in {dtype} ({size / 1e9:.2f} GB); its linear layers are quantized",
        )


class _Config(QuantizationConfigMixin):
    def __init__(self, reading: Reading | None = None, **unused: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.reading = reading

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class _Quantizer(HfQuantizer):
    """transformers' hooks: which modules are replaced, and what becomes of a tensor that was read."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if quantization_config.reading is None:
            raise BaseModelError(
                f"config.json names the format {METHOD}, which veneer.load_base reads; load the folder with it"
            )
        self.reading: Reading = quantization_config.reading
        companions = COMPANIONS if self.reading.scheme.fp8 is None else (SCALE, "activation_scale")
        self.serialized_names = {"weight": ["weight", *companions]}

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        scheme = self.reading.scheme
        names = quantized_names(model, scheme.skip)
        self.dtype = dtype = options.get("dtype") or torch.get_default_dtype()
        self.transposed = {f"{name}.weight" for name in names if isinstance(model.get_submodule(name), Conv1D)}
        for name in names:
            model.set_submodule(name, empty_layer(model.get_submodule(name), scheme, dtype))
        self.reading.layers = len(names)
        self.stacks = set() if scheme.stored else set(stack_names(model))
        self.reading.check_stacks(stack_names(model))
        for name in scheme.stacks if not self.reading.problems else ():
            path, _, parameter = name.rpartition(".")
            module = model.get_submodule(path)
            shape = getattr(module, parameter).shape
            with torch.device("meta"):
                weight = _empty(scheme, torch.Size((shape[0] * shape[1], shape[2])), dtype)
                stack = QuantizedStack(weight, shape[0], dtype)
            delattr(module, parameter)
            setattr(module, parameter, stack)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return param_name in self.stacks or (
            name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)
        )

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        if self.reading.scheme.fp8 is None:
            return {"deserialize": _Read}
        return {"deserialize": _ReadFP8, "dequantize": _DequantizeFP8}

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Stacks of experts that the loader has put together are quantized last."""
        found = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        for each in found:
            operations: list[Any] = getattr(each, "operations", [])
            if len(operations) > 1 and isinstance(operations[0], _DequantizeFP8):
                operations.append(_QuantizeStack(self))
        return found

    def hold(self, module: QuantizedLinear, name: str, weight: Tensor) -> None:
        """Quantize the weight of a layer, if it fits."""
        weight = weight.T.contiguous() if name in self.transposed else weight
        if self.reading.fits(name, weight, (module.out_features, module.in_features)):
            module.hold(self.reading.quantized(weight))

    def hold_stack(self, module: Any, parameter: str, name: str, weight: Tensor) -> None:
        """Put the quantized weights of all experts in the place of a parameter, if they fit."""
        if not self.reading.fits(name, weight, tuple(getattr(module, parameter).shape)):
            return
        made = self.reading.quantized(weight.reshape(-1, weight.shape[-1]))
        stack = QuantizedStack(made, len(weight), weight.dtype)
        known: tuple[Any, ...] = (stack, stack.weight)
        for value in known:
            value._is_hf_initialized = True
        delattr(module, parameter)
        setattr(module, parameter, stack)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **options: Any) -> Any:
        """A plain weight becomes a quantized one."""
        model, made = options["model"], {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path, _, parameter = name.rpartition(".")
            module = model.get_submodule(path)
            if name in self.hf_quantizer.stacks:
                self.hf_quantizer.hold_stack(module, parameter, name, weight)
                options["missing_keys"].discard(name)
                continue
            self.hf_quantizer.hold(module, name, weight)
            made[name] = module.weight
        return made


class _FP8(ConversionOps):
    """Operations on weights that the files hold in FP8."""

    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def dense(self, weight: Tensor, scale: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in ``dtype``."""
        scheme = self.hf_quantizer.reading.scheme
        assert scheme.fp8 is not None
        if scale is None and weight.element_size() > 1:
            return weight.to(dtype)
        try:
            if scale is None:
                raise ValueError(f"{SCALE} is missing beside the weight")
            return dequantize_fp8(weight, scale, scheme.fp8.block, dtype)
        except ValueError as error:
            self.hf_quantizer.reading.problems.append(f"{name}: {error}")
            return torch.zeros(weight.shape, dtype=dtype)


class _DequantizeFP8(_FP8):
    def convert(self, input_dict: dict[str, Any], *patterns: Any, **options: Any) -> Any:
        """Weights of experts, before the loader stacks them; their scales go."""
        found = {}
        for name, held in input_dict.items():
            if not name.endswith("weight"):
                continue
            weights, scales = _listed(held), _listed(input_dict.get(f"{name}_scale_inv", []))
            if len(scales) not in (0, len(weights)):
                problem = f"expected {len(weights)} tensors {SCALE}, found {len(scales)}"
                self.hf_quantizer.reading.problems.append(f"{options['full_layer_name']}: {problem}")
            known = scales if len(scales) == len(weights) else [None] * len(weights)
            pairs, dtype = zip(weights, known, strict=True), self.hf_quantizer.dtype
            found[name] = [self.dense(weight, scale, options["full_layer_name"], dtype) for weight, scale in pairs]
        return found


class _ReadFP8(_FP8):
    def convert(self, input_dict: dict[str, Any], *patterns: Any, **options: Any) -> Any:
        """A weight in FP8 becomes a quantized one, where it is that of a layer that is quantized, else a plain one."""
        tensors = {name: _listed(value)[0] for name, value in input_dict.items()}
        full_name = options["full_layer_name"]
        path = full_name.rpartition(".")[0]
        module = options["model"].get_submodule(path)
        quantized = isinstance(module, QuantizedLinear)
        dtype = self.hf_quantizer.dtype if quantized else options["model"].get_parameter_or_buffer(full_name).dtype
        weight = self.dense(tensors["weight"], tensors.get(SCALE), path, dtype)
        if quantized:
            self.hf_quantizer.hold(module, full_name, weight)
            weight = module.weight
        return {"weight": weight}


class _QuantizeStack(ConversionOps):
    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **options: Any) -> Any:
        """The stacked weights of experts become a quantized stack."""
        name, quantizer = options["full_layer_name"], self.hf_quantizer
        if name not in quantizer.stacks or len(input_dict) != 1:
            return input_dict
        path, _, parameter = name.rpartition(".")
        weight = _listed(next(iter(input_dict.values())))[0]
        quantizer.hold_stack(options["model"].get_submodule(path), parameter, name, weight)
        options["missing_keys"].discard(name)
        return {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class _Read(ConversionOps):
    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **options: Any) -> Any:
        """The tensors of a layer of bitsandbytes become its weight; others are cast to the type of their place."""
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        model, full_name = options["model"], options["full_layer_name"]
        path = full_name.rpartition(".")[0]
        module = model.get_submodule(path)
        if not isinstance(module, QuantizedLinear):
            place = model.get_parameter_or_buffer(full_name)
            return {
                name: value.to(place.dtype) if value.is_floating_point() else value for name, value in tensors.items()
            }
        try:
            if set(tensors) == {"weight"}:
                raise ValueError(f"expected a weight in {self.hf_quantizer.reading.scheme.format}, found a plain one")
            module.hold(weight_of(tensors, (module.out_features, module.in_features)))
        except ValueError as error:
            self.hf_quantizer.reading.problems.append(f"{path}: {error}")
        return {"weight": module.weight}


def quantized_names(model: Any, skip: tuple[str, ...] | None, *, transposed: bool = True) -> list[str]:
    """The linear layers of a model that are quantized, as transformers chooses them for bitsandbytes.

    transposed: GPT-2's Conv1D too.
    """
    keep = getattr(model, "_keep_in_fp32_modules", None)
    without = HfQuantizer.get_modules_to_not_convert(model, None if skip is None else list(skip), keep)
    kinds = (nn.Linear, Conv1D) if transposed else (nn.Linear,)
    return [
        name for name, module in model.named_modules() if type(module) in kinds and should_convert_module(name, without)
    ]


def empty_layer(layer: Any, scheme: Scheme, dtype: torch.dtype) -> QuantizedLinear:
    """A layer on the meta device with the shapes of the quantized form of ``layer``."""
    out, in_ = (
        (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (layer.nf, layer.weight.shape[0])
    )
    with torch.device("meta"):
        bias = None if layer.bias is None else torch.empty(out, dtype=layer.bias.dtype)
        return QuantizedLinear(_empty(scheme, torch.Size((out, in_)), dtype), bias, dtype)


def _empty(scheme: Scheme, shape: torch.Size, dtype: torch.dtype) -> QuantizedWeight:
    made = FORMATS[scheme.format]
    if issubclass(made, Int8):
        return made(torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]))
    assert issubclass(made, FourBit)
    blocks = -(-shape.numel() // 64)
    absmax = torch.empty(blocks, dtype=torch.uint8 if scheme.double else torch.float32)
    outer = torch.empty(-(-blocks // 256)) if scheme.double else None
    return made(torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), absmax, shape, dtype, outer=outer)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
auto.AUTO_QUANTIZER_MAPPING[METHOD] = _Quantizer
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, quantized_experts)
