"""Check one device in ten minutes.

    python -m bench.device [STAGE ...] [--device cuda] [--out out/device]
    python -m bench.device --tiny --device cpu                            the same stages on the smallest sizes, in seconds

    ceilings      the card's own rates: copying, and a product of two matrices
    correctness   gradients against fp64, with the rounding of the plain form beside them; isolation; bits before and after attaching
    qwen          a step on Qwen3-1.7B's shape beside PEFT and TRL, gradients compared first
    llama         a step on Llama-3-8B's shape, in bf16 and in NF4
    together      many small jobs together and in turn
    decoding      64 rows on 16 adapters
    profile       the operations that take most of a step's time
    sweeps        size of the loss's chunks, forms of the low-rank products

Weights are random and made on the device; nothing is fetched. Each stage is a process with its own time limit and writes
``OUT/STAGE.json`` as it goes; ``OUT/table.md`` has all rows. The exit code is 1 if a stage did not end or a check does not hold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.device.supervise import Setting, Stage, chosen, context, sound, supervise, table

STAGES = (
    Stage("ceilings", "bench.device.ceilings", 20),
    Stage("correctness", "bench.device.correctness", 80),
    Stage("qwen", "bench.device.steps", 110),
    Stage("llama", "bench.device.steps_llama", 110),
    Stage("together", "bench.device.together", 60),
    Stage("decoding", "bench.device.decoding", 60),
    Stage("profile", "bench.device.profiling", 60),
    Stage("sweeps", "bench.device.sweeps", 60),
)


def main() -> int:
    """Run the stages one after another and print the table."""
    parser = argparse.ArgumentParser(
        prog="bench.device", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(stage.name for stage in STAGES))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to check the checks")
    parser.add_argument("--out", type=Path, default=Path("out/device"))
    args = parser.parse_args()
    unknown = set(args.stages) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(
            f"no stage {', '.join(sorted(unknown))}; the stages are {', '.join(stage.name for stage in STAGES)}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    results, processes = {}, context()
    for stage in chosen(STAGES, args.stages):
        result = supervise(stage, Setting(args.device, args.tiny, stage.seconds, args.out), processes)
        results[stage.name] = result
        print(f"{stage.name}: {result['state']} in {result['seconds']} s {result['error']}".rstrip(), flush=True)
    (args.out / "table.md").write_text(table(results), encoding="utf-8")
    (args.out / "all.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0 if sound(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
