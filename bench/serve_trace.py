"""A random trace for ``veneer serve --replay``: python -m bench.serve_trace DIR --requests 2000 --seed 1 --out trace.jsonl

DIR holds folders of adapters, or is filled with 50 random ones for a base: --make BASE. Names are loaded, unloaded, and given other
folders under running requests; requests name one adapter, a mix of two or three, or the base; some are cut. The spread over adapters is
Zipf's, as with many tenants.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ADAPTERS = 50
_WORDS = [
    "the",
    "rain",
    "an",
    "adapter",
    "counts",
    "every",
    "order",
    "of",
    "May",
    "in",
    "Rome",
    "and",
    "writes",
    "to",
    "all",
    "customers",
]


def random_trace(
    names: list[str], requests: int, *, seed: int, rate: float = 100.0, tokens: int = 24
) -> Iterator[dict[str, Any]]:
    """The lines of a trace.

    Args:
        names: folders of adapters, which are names too.
        requests: number of requests.
        seed: of everything.
        rate: requests per second.
        tokens: most tokens of an answer.
    """
    rng = random.Random(seed)
    loaded = names[: max(1, 3 * len(names) // 4)]
    yield from ({"at": 0.0, "load": name} for name in loaded)
    absent = [name for name in names if name not in loaded]
    heads = [" ".join(rng.choices(_WORDS, k=8)) for _ in range(4)]
    at = 0.0
    for number in range(requests):
        at = round(at + rng.expovariate(rate), 4)
        yield from ({"at": at, **change} for change in _changes(rng, names, loaded, absent))
        prompt = f"{rng.choice(heads)} {' '.join(rng.choices(_WORDS, k=rng.randrange(1, 7)))}"
        line: dict[str, Any] = {"at": at, "request": f"r{number}", "prompt": prompt, "ignore_eos": rng.random() < 0.5}
        line |= _chosen(rng, loaded, absent) | {"max_tokens": rng.randrange(1, tokens + 1)}
        if rng.random() < 0.5:
            line |= {"temperature": rng.choice([0.5, 0.9, 1.3]), "top_p": rng.choice([0.8, 0.95, 1.0]), "seed": number}
        yield line
        if rng.random() < 0.1:
            yield {"at": round(at + rng.random() * 0.2, 4), "cancel": f"r{number}"}


def in_order(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines by their times; those of one time stay as they are."""
    return sorted(lines, key=lambda line: float(line["at"]))


def _changes(rng: random.Random, names: list[str], loaded: list[str], absent: list[str]) -> Iterator[dict[str, Any]]:
    """Now and then a load, an unload or a replacement."""
    draw = rng.random()
    if draw < 0.02 and absent:
        loaded.append(absent.pop(rng.randrange(len(absent))))
        yield {"load": loaded[-1]}
    elif draw < 0.04 and len(loaded) > 2:
        absent.append(loaded.pop(rng.randrange(len(loaded))))
        yield {"unload": absent[-1]}
    elif draw < 0.08:
        yield {"load": rng.choice(loaded), "folder": rng.choice(names)}


def _chosen(rng: random.Random, loaded: list[str], absent: list[str]) -> dict[str, Any]:
    """The model of a request, or its mix."""
    draw = rng.random()
    if draw < 0.1:
        return {"model": "base"}
    if draw < 0.12 and absent:
        return {"model": rng.choice(absent)}
    ranks = [1 / (1 + i) for i in range(len(loaded))]
    first = rng.choices(loaded, ranks)[0]
    if draw < 0.3 and len(loaded) > 3:
        others = rng.sample([name for name in loaded if name != first], rng.choice([1, 2]))
        return {"adapters": {name: rng.choice([-0.3, 0.25, 0.5, 0.8, 1.0]) for name in (first, *others)}}
    return {"model": first}


def make_adapters(base: str, folder: Path) -> None:
    """Folders of random adapters: LoRA and DoRA of different ranks and layers, and every tenth of another method that acts on the base."""
    from tests.serve.api.made import write_adapters
    from torch import nn

    from veneer import DoRA, LoRA
    from veneer.adapters import IA3, Full, Houlsby, Pfeiffer, VeRA
    from veneer.checkpoints import attach
    from veneer.errors import TargetError
    from veneer.models.load import load_base

    model = load_base(base, dtype="float32").model
    body = model.base_model
    found = {name.split(".")[-1]: None for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    linears = [name for name in found if "gate" not in name.split("_")[-1:]]  # without routers of experts
    targets: list[Any] = ["all-linear", linears[:2], linears[-1:], linears[2:4]] if linears else ["all-linear"]
    others: list[Any] = [IA3(), Houlsby(bottleneck_size=4), VeRA(vera_rank=8), Pfeiffer(bottleneck_size=4)]
    others += [Full(target_modules=linears[-1:] or "all-linear")]
    methods = {
        f"adapter{i}": (DoRA if i % 2 else LoRA)(r=(2, 4, 8, 16)[i % 4], target_modules=targets[i % 3 % len(targets)])
        for i in range(ADAPTERS)
    }
    bank = attach(model)
    for i, one in enumerate(others):
        with suppress(TargetError):  # this base has no layer for it
            bank.add("tried", one)
            bank.remove("tried")
            methods[f"adapter{10 * i + 7}"] = one
    write_adapters(Path(base), folder, methods)


def main() -> None:
    """Write a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", metavar="BASE", help="write 50 random adapters of this base into the folder first")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.make:
        make_adapters(args.make, args.folder)
    names = sorted(child.name for child in args.folder.iterdir() if (child / "adapter_config.json").is_file())
    lines = in_order(random_trace(names, args.requests, seed=args.seed, rate=args.rate))
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{args.out}: {len(lines)} lines over {len(names)} adapters, {lines[-1]['at']:.0f} s")


if __name__ == "__main__":
    main()
