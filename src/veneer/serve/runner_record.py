"""A record of which runner a base passed its checks with, so that the next command on it starts without them.

    record = record_of(base)
    Engine(base.model, base.tokenizer, bank, record=record)

The checks cost about a dozen forwards. Their result is kept in the cache under a key of all that it depends on: the base's files and how
they were loaded, the code of Veneer and its C++ library, the versions of torch and transformers, the processor, the device and the number
of threads. An unusable cache costs only time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from veneer._files import replace_text
from veneer.kernels import cpp_library
from veneer.kernels.quantized.bitsandbytes import quantized_layer, quantized_weight
from veneer.models.cache import cache_root
from veneer.models.devices import device_of
from veneer.models.load import Base


class RunnerRecord:
    """What the checks of one base found, in a file.

    Args:
        file: its path; None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def read(self) -> dict[str, Any]:
        """The stored result; empty if there is none that can be read."""
        if self._file is None:
            return {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, found: dict[str, Any]) -> None:
        """Store a result."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._file, json.dumps(found))


def record_of(base: Base) -> RunnerRecord:
    """The record of a base as it is loaded now; of one without files, a record that keeps nothing."""
    if base.path is None:
        return RunnerRecord(None)
    import transformers

    try:
        files = [
            [file.name, (seen := file.stat()).st_size, seen.st_mtime_ns, seen.st_ino]
            for file in sorted(base.path.resolve().iterdir())
        ]
    except OSError:
        return RunnerRecord(None)
    library = cpp_library.folder()
    parts = [
        *(str(base.path.resolve()), files, type(base.model).__qualname__, str(base.model.config)),
        *sorted({str(parameter.dtype) for parameter in base.model.parameters()}),
        *sorted({type(module).__qualname__ for module in base.model.modules()}),
        *sorted({quantized_weight(module).format for module in base.model.modules() if quantized_layer(module)}),
        *(_code(), str(library), cpp_library.processor(), torch.__version__, transformers.__version__),
        *(str(device_of(base.model)), torch.get_num_threads()),
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return RunnerRecord(cache_root() / "runners" / f"{key}.json")


@lru_cache
def _code() -> str:
    """SHA-256 of all files of the package."""
    total = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for file in sorted(folder.rglob("*.py")):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()
