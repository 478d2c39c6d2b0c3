"""Load a base model and its tokenizer: frozen, in eval mode, with every tensor accounted for.

    base = load_base("smollm2-135m")      # base.model, base.tokenizer, base.path, base.dtype

A missing weight, a weight of another shape and an unknown weight inside a layer are errors. Only a head that the model class does not
build is ignored, with a line in ``Base.notes``. GGUF files are dequantized once into the cache, as fp32 safetensors, which is exact.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from veneer._imports import light_imports
from veneer.errors import BaseModelError, Problems, listed
from veneer.models.cache import build_once
from veneer.models.classifiers.heads import HEADS, belongs_to_head, class_with_head, draw_head, name_padding
from veneer.models.devices import resolve_device
from veneer.models.embedded import EMBEDDED
from veneer.models.precision import fast_dtype, slow_dtype_notes
from veneer.models.quantized.scheme import FP8, read_scheme, scheme_for
from veneer.models.sources import Source, fetch_config, looks_like_path, read_config, read_generation_config, resolve

if TYPE_CHECKING:
    from veneer.models.quantized.loading import Reading

Divide = Callable[[torch.nn.Module], None]
"""Leaves this process its part of a model's weights (``divided/sharding.py``)."""
_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SILENT = 50  # above every level that transformers logs at
_CACHE_FORMAT = 1  # part of a cache folder's name: raise it when what is written there changes


@dataclass
class Base:
    """A frozen model, ready to be adapted.

    Attributes:
        model: in eval mode, ``requires_grad`` False everywhere.
        tokenizer: None where the folder has none.
        name: what the user typed.
        path: the folder that the weights came from (for a GGUF file, its dequantised copy in the cache).
        dtype: of the weights in memory.
        notes: what a user should know of the load, such as parts of the files that this model does not use.
    """

    model: torch.nn.Module
    tokenizer: Any | None
    name: str
    path: Path | None
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Base({self.name!r}, {type(self.model).__name__}, {count:,} parameters in {dtype})"


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    task: str | None = None,
    divide: Divide | None = None,
) -> Base:
    """Load a base by alias, folder, GGUF file or hub id (see ``sources.py``).

    Args:
        name: for example ``"smollm2-135m"``, ``"./my-model"``, ``"model.gguf"`` or ``"organisation/model"``.
        dtype: "float32", "bfloat16", or "auto": what this device is fast at.
        revision: a hub model's branch, tag or commit.
        device: where the weights go: "cpu", "cuda", "cuda:N", "mps", or "auto": a GPU where there is one.
        quantize: format in which linear layers are held, quantized while they are read: "nf4", "fp4" or "int8". Files that bitsandbytes
            quantized need no format.
        task: "classification", "regression" or "token-classification" for a model with a head for it, in place of a language model.
        divide: leaves each process its part of a model's weights; those that are read without changes are read in parts.

    Raises:
        BaseModelError: not found, refused, or files and model do not fit; with the remedy.
        ConfigError: this machine does not have the device.
    """
    if not isinstance(name, str | Path):
        raise BaseModelError(f"load_base takes the name or the path of a base model; found {type(name).__name__}")
    device = resolve_device(device)
    torch_dtype = dtype_for(dtype, device)
    folder = folder_of(name, revision)
    with light_imports(), _quiet():
        tokenizer = _load_tokenizer(folder)
        model, notes = _load_model(folder, torch_dtype, device, quantize, task if task in HEADS else None, divide)
    model.requires_grad_(False)
    model.eval()
    if device.type != "cpu" and divide is None:
        model.to(device)  # buffers that no file holds
    notes += slow_dtype_notes(torch_dtype, device)
    return Base(model, tokenizer, str(name), folder, torch_dtype, notes)


def dtype_for(dtype: str, device: torch.device) -> torch.dtype:
    """The data type that a name means on a device. Raises BaseModelError for another name."""
    found = fast_dtype(device) if dtype == "auto" else _DTYPES.get(dtype)
    if found is None:
        raise BaseModelError(f"the dtype {dtype!r} is not one of 'auto', 'float32' and 'bfloat16'")
    return found


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> Any:
    """Load a base's tokenizer alone, without its weights; names as for ``load_base``.

    Raises:
        BaseModelError: not found, refused, or the base has no tokenizer.
    """
    folder = folder_of(name, revision)
    with light_imports(), _quiet():
        tokenizer = _load_tokenizer(folder)
    if tokenizer is None:
        raise BaseModelError(f"the base {str(name)!r} has no tokenizer in {folder}; add its tokenizer.json there")
    return tokenizer


def config_folder(name: str, revision: str | None = None) -> Path:
    """A folder with the base's config.json; its weights need not be there, and those of a hub model are not fetched.

    Raises BaseModelError where there is none.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if name.lower() in EMBEDDED or path.exists() or looks_like_path(name):
        return folder_of(name, revision)
    return fetch_config(name, revision)


def context_length(name: str | Path, *, revision: str | None = None) -> int | None:
    """The context length of a base in tokens; None if its config does not have it."""
    return _number(read_config(folder_of(name, revision)), "max_position_embeddings", "n_positions")


def vocab_size(name: str | Path, *, revision: str | None = None) -> int | None:
    """The number of rows of a base's embedding according to its config; None if the config does not say."""
    return _number(read_config(folder_of(name, revision)), "vocab_size")


def end_ids(name: str | Path, *, revision: str | None = None) -> list[int]:
    """The ids of a base's end tokens according to its generation_config.json, or else its config.json; names as for ``load_base``."""
    folder = folder_of(name, revision)
    config = read_config(folder)
    parts = [read_generation_config(folder), config, *(config[key] for key in ("text_config",) if key in config)]
    return next((found for part in parts if isinstance(part, dict) and (found := _flat(part.get("eos_token_id")))), [])


def own_ends(model: Any) -> list[int]:
    """The ids of the end tokens in a model's generation config; empty if it has none."""
    return _flat(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def _flat(found: Any) -> list[int]:
    return [token for token in (found if isinstance(found, list) else [found]) if type(token) is int]


def _number(config: dict[str, Any], *keys: str) -> int | None:
    inner = config.get("text_config")
    for part in (inner if isinstance(inner, dict) else {}, config):
        for key in keys:
            if type(part.get(key)) is int and part[key] > 1:
                return int(part[key])
    return None


def _load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    task: str | None = None,
    divide: Divide | None = None,
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    reading, more, remarks = _quantization(folder, quantize, device)
    # Tensor by tensor to a GPU: the machine's memory holds no second copy of the weights.
    there = {} if device.type == "cpu" or more else {"device_map": {"": device}}
    divided = False
    try:
        chosen = model_class(folder) if task is None else class_with_head(folder, task)
        load = partial(_from_pretrained, chosen, folder, dtype)
        if divide is None or more:
            model, info = load(**more, **there)
        else:
            from veneer.models.divided.reading import read_in_parts

            model, info, divided = read_in_parts(load, divide, there)
    except BaseModelError:
        raise
    except Exception as error:  # a model library raises anything on a damaged folder
        raise BaseModelError(
            f"the model in {folder} cannot be loaded: {_first_line(error)}; check that the files are complete"
        ) from error
    if reading is not None:
        problems = Problems()
        for problem in reading.problems:
            problems.add(problem)
        problems.raise_if_any(BaseModelError, f"the quantized weights in {folder} cannot be used")
        remarks += reading.finish(model)
    if task is not None:
        absent = {key for key in info.get("missing_keys", ()) if belongs_to_head(model, key)}
        draw_head(model, absent)
        name_padding(model)
        info = {**info, "missing_keys": set(info.get("missing_keys", ())) - absent}
        return model, (*_account(model, info, folder)[1:], *remarks)  # a head of the files that it replaces is expected
    remarks = (*_account(model, info, folder), *remarks)
    if divide is not None and not divided:
        divide(model)
    return model, remarks


def _from_pretrained(chosen: Any, folder: Path, dtype: torch.dtype, **more: Any) -> Any:
    return chosen.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # so that they are listed with all the rest
        output_loading_info=True,
        **more,
    )


def _quantization(
    folder: Path, quantize: str | None, device: torch.device
) -> tuple[Reading | None, dict[str, Any], tuple[str, ...]]:
    """(the quantized load, arguments of ``from_pretrained``, notes) by the folder's config and what was asked for."""
    stored = read_scheme(read_config(folder), folder)
    if stored is None and quantize is None:
        return None, {}, ()
    import transformers

    if isinstance(stored, FP8) and quantize is None:
        note = f"the weights of {folder} are fp8; they were dequantized, and take the memory of plain ones"
        return None, {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}, (note,)
    if isinstance(stored, FP8):
        scheme = replace(scheme_for(quantize or ""), fp8=stored)
    else:
        scheme = stored or scheme_for(quantize or "")
    if quantize not in (None, scheme.format):
        raise BaseModelError(
            f"the weights in {folder} are quantized to {scheme.format}, and cannot be quantized to {quantize}; leave --quantize out, "
            "or use the model that they were made from"
        )
    from veneer.models.quantized.loading import Reading

    reading = Reading(scheme, device)
    config = None if stored is None else transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return reading, reading.arguments(config), ()


def model_class(folder: Path) -> Any:
    """The class that config.json names, if it is transformers' own; else a causal language model, else a plain one."""
    with light_imports():
        import transformers

        for name in read_config(folder).get("architectures") or ():
            named = getattr(transformers, str(name), None)
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return transformers.AutoModelForCausalLM if causal and not masked else transformers.AutoModel


def _account(model: torch.nn.Module, info: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Raise BaseModelError with all tensors that are missing, misshapen or unknown inside a layer; note heads that are not used."""
    problems = Problems()
    for key in sorted(info.get("missing_keys", ())):
        problems.add(f"{key} is in the model and not in the files")
    for entry in sorted(info.get("mismatched_keys", ())):
        key, stored, built = entry
        problems.add(f"{key} has shape {list(stored)} in the files and {list(built)} by config.json")
    for message in info.get("error_msgs", ()):
        problems.add(str(message))
    passed_over = []
    for key in sorted(info.get("unexpected_keys", ())):
        if _is_foreign_head(model, key):
            passed_over.append(key)
        else:
            problems.add(f"{key} is in the files and has no place in the model")
    problems.raise_if_any(
        BaseModelError, f"the weights in {folder} do not fit {type(model).__name__} as its config.json describes it"
    )
    if not passed_over:
        return ()
    return (f"{type(model).__name__} does not use these tensors of {folder}: {listed(passed_over)}",)


def _is_foreign_head(model: torch.nn.Module, key: str) -> bool:
    """True if a tensor belongs to a part that this model class does not build, such as a pooler or a second head. A tensor of an
    existing module or inside a list of layers does not: without it the model would compute something else."""
    at: Any = model
    for part in key.split(".")[:-1]:
        if isinstance(at, torch.nn.ModuleList):
            return False
        following = getattr(at, part, None)
        if not isinstance(following, torch.nn.Module):
            return True
        at = following
    return False


def _load_tokenizer(folder: Path) -> Any | None:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above: anything can come
        raise BaseModelError(
            f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}; get its files again, or remove them "
            f"all to load the model without one"
        ) from error


def folder_of(name: str | Path, revision: str | None) -> Path:
    """The folder of a base with config, safetensors and tokenizer; that of a GGUF file is built in the cache."""
    source = resolve(str(name), revision)
    if not source.gguf:
        return source.path
    key = f"{source.alias or source.path.stem}-{_identity(source)}"
    return build_once(f"bases/{key}", lambda folder: _convert(source.path, folder))


def _identity(source: Source) -> str:
    """Twelve hex digits from a file's size, first and last bytes, and for a file that is not embedded its time and path."""
    stat = source.path.stat()
    digest = hashlib.sha256(f"{_CACHE_FORMAT}:{stat.st_size}".encode())
    if source.alias is None:
        digest.update(f":{stat.st_mtime_ns}:{source.path.resolve()}".encode())
    end = 1 << 20
    with source.path.open("rb") as file:
        digest.update(file.read(end))
        file.seek(max(0, stat.st_size - end))
        digest.update(file.read(end))
    return digest.hexdigest()[:12]


def _convert(file: Path, folder: Path) -> None:
    import importlib.util

    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BaseModelError(f"reading {file.name} needs the package {package}; run `pip install {package}`")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _refuse_adapter(file)
    _log.info("dequantising %s once; later loads read %s", file.name, folder.parent)
    if sys.stderr.isatty():
        print(f"unpacking {file.name} into {folder.parent}, once; later starts are quick", file=sys.stderr, flush=True)
    # the reader draws its own bar, which no setting turns off
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                # without this the model counts as quantized although its weights are floats, and refuses to be saved
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:
            raise BaseModelError(
                f"the GGUF file {file} cannot be read: {_first_line(error)}; check that it is complete, and that "
                f"transformers knows its architecture"
            ) from error
        model, info = loaded
        _account(model, info, file)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _refuse_adapter(file: Path) -> None:
    from gguf import GGUFReader

    try:
        kind = GGUFReader(file).fields["general.type"].contents()
    except Exception:  # the loader reports a file that cannot be read
        return
    if kind == "adapter":
        raise BaseModelError(
            f"{file} is an adapter in llama.cpp's format and no base; give its base, and as the adapter the folder it was exported from"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and warning of what is checked here anyway; its settings come back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(_SILENT)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}" if text else type(error).__name__
