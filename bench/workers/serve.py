"""A contestant's process: python -m bench.workers.serve SPEC.json

The file names the engine, the base, the first adapter, the dtype and the rows; ``turn.py`` defines the protocol.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from bench.workers.turn import Turn


def main() -> None:
    """Run the engine until the pipe is closed."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])
    turn = Turn(spec)
    import torch

    torch.set_num_threads(spec["threads"])
    importlib.import_module(f"bench.workers.{spec['engine']}").run(spec, turn)


if __name__ == "__main__":
    main()
