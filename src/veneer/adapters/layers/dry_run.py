"""The dry run: one tiny forward at attach that shows which layers are called and how the rows of a batch lie in their inputs.

Some models read a layer's weight without calling the layer (Mamba's ``dt_proj``); an adapter there would silently do nothing. Some
reshape on the way, or feed a layer a constant; a route row by row must not be shifted by that. So the dry run uses rows that are all
equal: where rows lie one after the other, the tokens of a layer's input repeat from row to row; where they are interleaved, or where the
input does not depend on rows, they do not.

A model whose inputs cannot be guessed is run with ``example``, or else with the first batch that is routed row by row. The dry run is in
eval mode without gradients; afterwards buffers, modes and the random state are as before.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers.routers import NO_PRODUCT, ScoreProducts
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.runtime.forward_pass import tensors_in

ROWS, TOKENS = 3, 5
NEVER_CALLED = (
    "the layer was not called in the dry run, so an adapter there would do nothing (the model may read its weight "
    "without calling it; if it is called for other inputs, attach with example=)"
)


def dry_run(model: nn.Module, survey: Survey, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> None:
    """Run the model once on ``rows`` equal rows and write the findings into the sites.

    Exceptions of the model pass through.
    """
    layouts: dict[str, set[str]] = {}
    order: list[tuple[Site, bool]] = []
    outputs: list[tuple[Site, Tensor, int]] = []
    routers = [site for site in survey.sites.values() if not site.layer_kind.is_layer]
    scores: set[str] = set()

    def scored(site: Site, x: Tensor, y: Tensor) -> Tensor:
        scores.add(site.name)
        return y

    note = partial(_note, layouts, order, [], rows)
    handles = [
        site.module.register_forward_pre_hook(partial(note, site), with_kwargs=True) for site in survey.modules()
    ]
    handles += [
        site.module.register_forward_hook(partial(_note_output, outputs, site))
        for site in survey.sites.values()
        if site.stack is None
    ]
    try:
        with undisturbed(model), warnings.catch_warnings(), ScoreProducts(routers, scored):
            # The model repeats its warnings in a real call.
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    changed = {site.name for site, y, version in outputs if y._version > version}
    for site in survey.modules():
        found = layouts.get(site.name, set())
        if found:
            # A layer may be called with different layouts in one forward; the least useful one counts.
            site.layout = next(kind for kind in ("constant", "blocks", "tokens", "rows") if kind in found)
        site.overwritten = not found or site.name in changed
    for site in survey.every():
        if site.stack is not None:
            site.layout = site.stack.layout
        elif site.mixture is not None:
            site.layout = "constant" if site.mixture.layout else ""
    for site in routers:
        if site.layout and site.name not in scores:
            site.reason = NO_PRODUCT
    _group(order)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards modes, buffers and the random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, saved in buffers:
            if any(module._buffers.get(name) is not buffer for name, buffer in saved.items()) or len(saved) != len(
                module._buffers
            ):
                module._buffers.clear()
                module._buffers.update(saved)
        with torch.no_grad():
            for buffer, before in values:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _note(
    layouts: dict[str, set[str]],
    order: list[tuple[Site, bool]],
    last: list[Tensor],
    rows: int,
    site: Site,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Record a call: the layout of the layer's input, and whether it is the same tensor as in the call before."""
    x: Any = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor):
        layouts.setdefault(site.name, set()).add("constant")
        return
    if site.kind != "vector_layer":
        order.append((site, bool(last) and last[0] is x))
        last[:] = [x]
    kind = site.layer_kind
    layouts.setdefault(site.name, set()).add(layout_of(kind.by_token(module, x), kind.batch_shape(module, x), rows))


def _note_output(
    outputs: list[tuple[Site, Tensor, int]], site: Site, module: nn.Module, args: tuple[Any, ...], y: Any
) -> None:
    if isinstance(y, Tensor):
        outputs.append((site, y, y._version))


def _group(order: list[tuple[Site, bool]]) -> None:
    """Group linear layers that were called one after the other with the same tensor."""
    times = Counter(site.name for site, _ in order)
    runs: list[list[Site]] = []
    for site, same in order:
        if site.kind != "linear" or times[site.name] > 1 or site.is_head or site.is_router:
            runs.append([])
        elif same and runs and runs[-1] and runs[-1][-1].layout == site.layout:
            runs[-1].append(site)
        else:
            runs.append([site])
    for run in runs:
        for site in run if len(run) > 1 else ():
            site.group = tuple(member.name for member in run)


def layout_of(x: Tensor, shape: tuple[int, ...], rows: int) -> str:
    """Layout of ``rows`` equal rows in an input with these leading sizes: rows, tokens, blocks, or constant if it is none of them."""
    count = math.prod(shape)
    if not rows or not shape or count == 0 or shape[0] % rows:
        return "constant"
    tokens = x.detach().reshape(count, -1).float()
    # A fixed vector of signs and sizes: equal tokens give equal marks, and different ones practically never do.
    weights = torch.cos(torch.arange(tokens.shape[1], device=x.device, dtype=torch.float32) * 2.399963 + 1.0)
    mark = (tokens @ weights).view(rows, -1)
    # Equal rows may differ by rounding where the model groups tokens; different content differs by about its size. Token ids are exact.
    norm = tokens.norm(dim=1).view(rows, -1) if x.is_floating_point() else torch.zeros_like(mark)
    if bool(((mark - mark[:1]).abs() > 0.02 * norm.max(0).values.clamp_min(1e-12)).any()):
        return "constant"
    if shape[0] == rows:
        return "rows"
    return "tokens" if len(shape) == 1 else "blocks"


def equal_rows(values: Any, rows: int) -> Any:
    """The same arguments with every row of a tensor of ``rows`` rows replaced by its first, inside lists and mappings too.

    Raises TypeError for an object that a second call might change.
    """
    if isinstance(values, Tensor):
        return values[:1].expand_as(values).clone() if values.dim() and values.shape[0] == rows else values
    if isinstance(values, Mapping):
        return {key: equal_rows(value, rows) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        changed = [equal_rows(value, rows) for value in values]
        return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)
    if values is None or isinstance(values, (bool, int, float, str, torch.dtype, torch.device)):
        return values
    raise TypeError(type(values).__name__)


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Number of rows of a call's first tensor, or 0."""
    first = next(tensors_in((*args, *kwargs.values())), None)
    return 0 if first is None or not first.dim() else int(first.shape[0])


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """A batch of ROWS equal rows for a transformers model, or None where none can be guessed (any other model)."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    parameter = next(model.parameters(), None)
    if config is None or parameter is None or parameter.device.type == "meta":
        return None
    device = parameter.device
    if main == "input_ids":
        vocab = getattr(config.get_text_config(), "vocab_size", None)
        if not isinstance(vocab, int):
            return None
        ids = (torch.arange(TOKENS, device=device) % max(1, vocab - 1) + (1 if vocab > 1 else 0)).repeat(ROWS, 1)
        inputs: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
        return inputs
    if main == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.linspace(-1, 1, channels * height * width, device=device).view(1, channels, height, width)
        return {"pixel_values": torch.sin(37 * pixels).to(parameter.dtype).expand(ROWS, -1, -1, -1)}
    return None
