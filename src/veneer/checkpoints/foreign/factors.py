"""Import of adapters that other programs wrote: which program a folder comes from, and an adapter from its factors.

    mlx-lm     adapters.safetensors with adapter_config.json                     ``mlx.py``
    LitGPT     lit_model.lora.safetensors with hyperparameters.yaml               ``litgpt.py``

A reader gives factors by site. They are checked against the base's layers, all at once, and become an adapter that is saved as a PEFT
folder. A tensor without a layer is an error that names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.compatibility import tensor_problems
from veneer.adapters.layers.site import Site
from veneer.adapters.methods import method_class_for
from veneer.checkpoints.files import Folder
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.checks import check_values
from veneer.checkpoints.tensors import read_header, read_tensors
from veneer.errors import CheckpointError, Problems

MLX, LITGPT = "adapters.safetensors", "lit_model.lora.safetensors"
CONFIG, HYPERPARAMETERS = "adapter_config.json", "hyperparameters.yaml"
_PEFT, _PICKLED, _OLD_MLX = "adapter_model.safetensors", ".pth.lora", "adapters.npz"
_MAX_ALPHA, _MAX_RANK = 1e6, 4096


@dataclass(frozen=True)
class ForeignFactors:
    """Another program's factors at one site: A [r, in], B [out, r], the scale of B A, and DoRA's magnitude [out]."""

    a_RK: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None


def program_of(path: Path) -> str:
    """The program that wrote a folder: mlx-lm or litgpt.

    Raises CheckpointError for anything else, with what to do about it.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; expected the folder of an adapter by mlx-lm ({MLX}) or LitGPT ({LITGPT})"
        )
    with Folder(path) as folder:
        names = folder.names
    if MLX in names:
        return "mlx-lm"
    if LITGPT in names:
        return "litgpt"
    if _PEFT in names:
        raise CheckpointError(
            f"{path} is a PEFT folder, which every command reads as it is; nothing has to be imported"
        )
    if pickled := next((name for name in names if name.endswith(_PICKLED)), None):
        raise CheckpointError(
            f"{path / pickled} is a pickle, which can run code when it is opened, and is not read; where it is trusted, convert it in "
            f"its folder with LitGPT's own Python: python -c \"import torch; from safetensors.torch import save_file; "
            f"save_file(torch.load('{pickled}', weights_only=True)['model'], '{LITGPT}')\""
        )
    if _OLD_MLX in names:
        raise CheckpointError(
            f"{path / _OLD_MLX} is of an mlx-lm from before 2024-04, whose layers have other names; save the adapter once with a newer one"
        )
    if (path / "adapter" / "adapter_config.json").is_file() or (path / "run.json").is_file():
        raise CheckpointError(
            f"{path} is a run, whose adapters every command reads as they are; nothing has to be imported"
        )
    inside = sorted(file.parent.name for known in (MLX, LITGPT) for file in path.glob(f"*/{known}"))
    hint = f"; it contains {', '.join(map(shown, inside[:8]))}: give one, such as {path / inside[0]}" if inside else ""
    raise CheckpointError(f"{path} holds no adapter that is known: expected {MLX} (mlx-lm) or {LITGPT} (LitGPT){hint}")


def check_rank(declared: object, ranks: Iterable[int], where: str) -> None:
    """Raise CheckpointError where settings declare another rank than the tensors have: the two files do not belong together."""
    found = sorted(set(ranks))
    if declared is not None and (isinstance(declared, bool) or found != [declared]):
        have = ", ".join(map(str, found))
        raise CheckpointError(
            f"{where} declares rank {shown(declared, 20)}, and the tensors have rank {have}; get both files from the same run"
        )


def read_foreign_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file in a folder, in fp32.

    Raises CheckpointError for files that are damaged, empty, or hold numbers that are not finite.
    """
    where = str(path / name)
    with Folder(path) as folder, folder.open(name) as (file, size):
        tensors, _ = read_tensors(file, read_header(file, size, where), where)
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors")
    problems = Problems()
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            problems.add(f"{key} holds values that are not finite")
    problems.raise_if_any(CheckpointError, f"{where} cannot be used", limit=8)
    return {key: tensor.float() for key, tensor in tensors.items()}


def adapter_of(
    found: Mapping[str, ForeignFactors],
    sites: Mapping[str, Site],
    name: str,
    where: str,
    *,
    dropout: object = 0.0,
    last_blocks: int | None = 0,
    force: Iterable[str] = (),
) -> Adapter:
    """The adapter with these factors, checked against the base's layers. Its ``meta`` holds "notes".

    Args:
        found: factors by site.
        sites: the base's layers.
        name: the adapter's name.
        where: the folder, for messages.
        dropout: the value in the settings, ignored if not valid.
        last_blocks: the number of blocks, counted from the last, that the settings say are adapted; 0 for all, None where they do not say.
        force: checks to override, keys of `findings.CHECKS`.

    Raises:
        CheckpointError: it names every site which the base lacks, which has another shape or which is missing from the file, and says
            where nothing is changed.
    """
    use_dora = any(factors.magnitude_O is not None for factors in found.values())
    form = method_class_for({"use_dora": use_dora})
    tensors: dict[str, dict[str, Tensor]] = {}
    problems = Problems()
    for site, factors in found.items():
        if problem := _problem(sites.get(site), factors):
            problems.add(f"{site}: {problem}")
            continue
        values = (factors.a_RK, factors.b_OR, factors.magnitude_O)
        names = form().tensor_names(sites[site].kind)
        tensors[site] = {key: value for key, value in zip(names, values, strict=False) if value is not None}
        for problem in tensor_problems(form(), sites[site], tensors[site]):
            problems.add(problem)
    problems.raise_if_any(CheckpointError, f"{where} does not fit the base", limit=8)
    if not any(bool(factors.b_OR.any()) and bool(factors.a_RK.any()) for factors in found.values()):
        raise CheckpointError(f"{where} changes nothing: its factors are zero at every layer (never trained?)")
    ranks = {site: int(factors.a_RK.shape[0]) for site, factors in found.items()}
    alphas = {site: factors.scale * ranks[site] for site, factors in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    method = form(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0,
        rank_pattern={site: value for site, value in ranks.items() if value != rank},
        alpha_pattern={site: value for site, value in alphas.items() if value != alpha},
        target_modules=tuple(found),
        # mlx-lm lets a change of the embedding act on the head that is tied to it.
        ensure_weight_tying=any(site.tied_to in found for site in sites.values()),
    )
    tensors = {site: {key: value.contiguous() for key, value in held.items()} for site, held in tensors.items()}
    made = Adapter(name, method, tensors, {site: sites[site].kind for site in found}, alphas=alphas)
    findings = Findings(force)
    _check_complete(found, sites, last_blocks, findings)
    check_values(made, findings)
    findings.raise_if_any(f"{where} cannot be used")
    made.meta["notes"] = findings.notes
    return made


def _check_complete(
    found: Iterable[str], sites: Mapping[str, Site], last_blocks: int | None, findings: Findings
) -> None:
    """Refuse a file that lacks layers in some blocks and has their like in others: both programs adapt a name in every block."""
    places: dict[str, tuple[str, str, int]] = {}  # (name of the stack of blocks, name inside a block, block)
    for name, site in sites.items():
        if site.block is not None:
            stack, tail = name.split(f".{site.block}.", 1)
            places[name] = stack, tail, site.block
    held = [name for name in found if name in places]
    adapted = {places[name][:2] for name in held}
    first: dict[str, int] = {}
    for stack, _ in adapted:
        blocks = {block for other, _, block in places.values() if other == stack}
        own = {places[name][2] for name in held if places[name][0] == stack}
        first[stack] = min(own) if last_blocks is None else max(blocks) + 1 - last_blocks if last_blocks else 0
    missing = [
        name
        for name, (stack, tail, block) in places.items()
        if (stack, tail) in adapted and block >= first[stack] and name not in held
    ]
    if missing:
        lacking = ", ".join(str(block) for block in sorted({places[name][2] for name in missing})[:12])
        findings.refuse(
            f"it has no factors of {listed(missing, 2)} (block {lacking}), and has those of their like in other blocks: it is incomplete",
            "config",
        )
    if surplus := [name for name in held if places[name][2] < first[places[name][0]]]:
        findings.refuse(
            f"its settings say that the last {last_blocks} blocks are adapted (num_layers), and it has factors of {listed(surplus, 2)}; "
            "get both files from the same run",
            "config",
        )


def sites_by_block(sites: Mapping[str, Site]) -> dict[int | None, dict[str, str]]:
    """{block: {name inside the block: site}}; block None holds the sites outside of all blocks, by their last name."""
    found: dict[int | None, dict[str, str]] = {}
    for name, site in sites.items():
        tail = name.rpartition(".")[2] if site.block is None else name.split(f".{site.block}.", 1)[-1]
        found.setdefault(site.block, {})[tail] = name
    return found


def _problem(site: Site | None, factors: ForeignFactors) -> str:
    """The reason that no tensors can be made of factors at a site, or ""."""
    rank = len(factors.a_RK)
    if site is None:
        return "the base has no such layer"
    if rank > _MAX_RANK:
        return f"its rank is {rank}; at most {_MAX_RANK} is read"
    if site.kind not in ("linear", "conv1d", "embedding"):
        return f"layers of kind {site.kind} cannot be imported"
    if site.kind == "embedding" and factors.magnitude_O is not None:
        return (
            "DoRA of an embedding has one magnitude per token there and one per feature here, so it cannot be imported"
        )
    if not 0 < factors.scale * rank <= _MAX_ALPHA:
        return f"the scale is {factors.scale:g}; expected a number above 0 with rank x scale up to {_MAX_ALPHA:g}"
    return ""
