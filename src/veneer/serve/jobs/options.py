"""The training options of a job from the request that created it.

    hyperparameters   batch_size, n_epochs, learning_rate_multiplier (of the usual learning rate); "auto" is the default
    adapter           options of the adapter: method, r, lora_alpha, target_modules, ...
    training          other options of `TrainOptions` that name no file and belong to the job

A request never names a path: its files are the server's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer._options.train import AdapterOptions
from veneer.config import PER_RUN_OPTIONS, TrainOptions, near_miss
from veneer.errors import ConfigError, VeneerError
from veneer.models.load import Base
from veneer.training.run.setup import default_rate

_NOT_HERE = (
    "samples",
    "sample_prompts",
    "sample_tokens",
    "data",
    "valid",
    "chat_template",
    "init_from",
    "on_top_of",
    "orthogonal_to",
    "orthogonal",
    "orthogonal_weight",
)
_ELSEWHERE = ("name", "seed", "batch_size", "epochs")
ADAPTER = tuple(AdapterOptions.model_fields)
TRAINING = (
    *(name for name in TrainOptions.model_fields if name not in (*ADAPTER, *PER_RUN_OPTIONS, *_NOT_HERE, *_ELSEWHERE)),
    "save_every",
)
"""Options that a request may give under ``training``."""


class RequestError(VeneerError, ValueError):
    """A request that cannot be honoured. ``param`` is the name of the parameter at fault, ``code`` one word for programs."""

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def job_options(
    request: Mapping[str, Any],
    *,
    name: str,
    base: Base,
    data: Path,
    valid: Path | None,
    start: Path | None,
    out: Path,
    seed: int,
) -> TrainOptions:
    """The options of a job.

    Args:
        request: the request, whose types are checked already.
        name: name of the adapter.
        base: the base of the server.
        data, valid: the files of examples.
        start: the folder of the adapter that training starts from; None starts a new one.
        out: the folder of the run.
        seed: the job's seed.

    Raises:
        RequestError: an option is unknown or invalid; names the parameter.
    """
    adapter, training = dict(request.get("adapter") or {}), dict(request.get("training") or {})
    _check_names(adapter, ADAPTER, "adapter")
    _check_names(training, TRAINING, "training")
    _check_patterns(adapter, "adapter")
    _check_patterns(training, "training")
    if start is not None and adapter:
        raise RequestError(
            "adapter: the job starts from an adapter, whose options it keeps; leave them out, or give the base as the model",
            "adapter",
        )
    _checked(lambda: AdapterOptions(**adapter), "adapter")
    common: dict[str, Any] = {"base": base.name, "data": (data,), "out": out, "name": name, "seed": seed}
    common["activation_checkpointing"] = False  # the plan of one job changes nothing at the base that others use
    if valid is not None:
        common["valid"] = (valid,)
    if start is not None:
        common["init_from"] = start
    found = _checked(lambda: TrainOptions(**{**common, **adapter, **training}), "training")
    done: TrainOptions = _checked(lambda: _with_hyperparameters(found, request, base, training), "hyperparameters")
    return done


def _with_hyperparameters(
    options: TrainOptions, request: Mapping[str, Any], base: Base, training: Mapping[str, Any]
) -> TrainOptions:
    given = {key: value for key, value in hyperparameters_of(request).items() if value not in (None, "auto")}
    changes: dict[str, Any] = {}
    if "batch_size" in given:
        changes["batch_size"] = int(given["batch_size"])
    if "n_epochs" in given:
        if "steps" in training:
            raise RequestError(
                "n_epochs and training.steps are both given; give only one of them", "hyperparameters.n_epochs"
            )
        changes["epochs"] = float(given["n_epochs"])
    if "learning_rate_multiplier" in given:
        if "learning_rate" in training:
            raise RequestError(
                "learning_rate_multiplier and training.learning_rate are both given; give only one of them",
                "hyperparameters.learning_rate_multiplier",
            )
        changes["learning_rate"] = default_rate(base, options.method, options.task) * float(
            given["learning_rate_multiplier"]
        )
    return TrainOptions(**{**{key: getattr(options, key) for key in options.model_fields_set}, **changes})


def hyperparameters_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a request: those of its method, else the deprecated ones at the top."""
    method = request.get("method") or {}
    inner = (method.get(method.get("type", "supervised")) or {}).get("hyperparameters")
    return dict(inner or request.get("hyperparameters") or {})


def _check_names(given: Mapping[str, Any], known: tuple[str, ...], param: str) -> None:
    for key in given:
        if key not in known:
            raise RequestError(
                f"{param} has no option {key!r}{near_miss(str(key), known)}", f"{param}.{key}", "unknown_parameter"
            )


def _check_patterns(given: Mapping[str, Any], param: str) -> None:
    """Refuse regular expressions: one that backtracks without end would stop the whole server."""
    for key, value in given.items():
        for text in [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else ():
            if isinstance(text, str) and text.startswith("re:"):
                raise RequestError(
                    f"{param}.{key}: requests cannot give regular expressions; give names of layers, with * for any part",
                    f"{param}.{key}",
                )


def as_option_names(text: str) -> str:
    """A message for the command line with its flags as options of a request, without advice that a request cannot follow."""
    text = re.sub(r"; --no-plan starts it anyway|, or --(quantize|dtype) \w+", "", text)
    return re.sub(r"--([a-z-]+)", lambda flag: flag.group(1).replace("-", "_"), text)


def _checked(make: Any, param: str) -> Any:
    """Return the result of ``make``; its ConfigError becomes a RequestError that names the option."""
    try:
        return make()
    except ConfigError as error:
        text = re.sub(r"^invalid \w+: ", "", str(error))
        named = re.match(r"(\w+)(\.[\w.]+)?: ", text)
        raise RequestError(text, f"{param}.{named.group(1)}" if named else param) from None
