"""The kernel that decodes gives what the model gives, for every row alone and beside others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.serve.engine.traces import answer, engine, folders, request, tokens
from tests.tiny import tiny

from veneer.kernels import cpp_library
from veneer.serve.engine.decoding import DecodingRunner, decoder_weights
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import Finished, GenerationRequest
from veneer.serve.engine.runner import PagedRunner
from veneer.training.cpp_kernels import use_cpp_kernels

SHAPE = {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    before = cpp_library.folder()
    use_cpp_kernels()
    if cpp_library.library() is None:
        pytest.skip(f"no C++ kernels: {cpp_library.reason()}")
    yield
    cpp_library.use(before)


def logits(made: Engine, requests: list[GenerationRequest], steps: int) -> list[torch.Tensor]:
    """The logits of each request's decoding steps, [steps, V] each, all requests in one batch."""
    found: dict[str, list[torch.Tensor]] = {one.id: [] for one in requests}
    run = made.runner.run

    def noted(chunks):  # type: ignore[no-untyped-def]
        out, counts = run(chunks)
        for chunk, row in zip(chunks, out.split(counts), strict=True):
            if chunk.count == 1:
                found[chunk.sequence.id].append(row[-1].float().clone())
        return out, counts

    made.runner.run = noted  # type: ignore[method-assign]
    streams = [made.submit(one) for one in requests]
    while made.step():
        pass
    made.runner.run = run  # type: ignore[method-assign]
    assert all(isinstance(list(stream)[-1], Finished) for stream in streams)
    return [torch.stack(found[one.id][:steps]) for one in requests]


@pytest.mark.parametrize(
    ("arch", "dtype", "bound", "format"),
    [
        *((arch, torch.float32, 1e-5, None) for arch in ("llama", "qwen3", "mistral")),
        *((arch, torch.bfloat16, 4e-2, None) for arch in ("llama", "qwen3")),
        *(("llama", torch.float32, 1e-5, format) for format in ("nf4", "fp4", "int8")),
        *(("qwen3", torch.bfloat16, 4e-2, format) for format in ("nf4", "int8")),
    ],
)
def test_logits_are_the_models(arch: str, dtype: torch.dtype, bound: float, format: str | None, tmp_path: Path) -> None:
    """Under LoRA, DoRA, mixes and the base, dense or quantized, the logits are the flat runner's; so are those of windows in some or all
    layers."""
    over = {**SHAPE, "dtype": dtype, "format": format}
    made, plain = engine(arch, **over), engine(arch, **over)
    assert isinstance(made.runner, DecodingRunner)
    plain.runner = made.runner._paged.__class__(_flat(plain), plain.bank, plain._cache)
    assert isinstance(plain.runner, PagedRunner)
    for path in folders(tmp_path, 4, arch, **over):
        for one in (made, plain):
            one.load_adapter(path.name, path)
    mixes = [
        (),
        (("a0", 1.0),),
        (("a1", 1.0),),
        (("a2", 0.5), ("a3", 0.7)),
        (("a1", -0.4), ("a3", 1.5)),
        (("a2", 1.0),),
    ]
    draw = random.Random(0)
    asked = [
        request(n, mix, draw, max_tokens=6, temperature=0.0, logit_bias={7: 100}) for n, mix in enumerate(mixes * 3)
    ]
    pairs = zip(logits(made, asked, 5), logits(plain, asked, 5), strict=True)
    errors = [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
    # In bf16 both round in every layer, and a text on which rounding matters differs more than others.
    assert sum(errors) / len(errors) <= bound and max(errors) <= 4 * bound


def _flat(made: Engine):  # type: ignore[no-untyped-def]
    from veneer.models.flat import FlatRunner

    return FlatRunner(made.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, tmp_path: Path) -> None:
    """The logits of a text that the kernel computes from its first token are the same bits alone and among twenty on three threads."""
    made = engine(**SHAPE, dtype=dtype)
    for path in folders(tmp_path, 2, **SHAPE, dtype=dtype):
        made.load_adapter(path.name, path)
    draw = random.Random(1)
    mixes = [(), (("a0", 1.0),), (("a1", 1.0),)]
    asked = [
        GenerationRequest(
            f"r{n}", (5 + n,), mixes[n % 3], request(n, (), draw, max_tokens=5, logit_bias={7: 100}).sampling
        )
        for n in range(20)
    ]
    torch.set_num_threads(3)
    try:
        together = logits(made, asked, 3)
    finally:
        torch.set_num_threads(1)
    for n in (0, 1, 2, 17):
        alone = replace(asked[n], salt="alone")  # no block of the others
        assert torch.equal(logits(made, [alone], 3)[0], together[n]), n


def test_mixed_equals_solo_through_the_kernel(tmp_path: Path) -> None:
    """Eighteen requests over four adapters, mixes and the base give the tokens that each gives alone on the flat runner."""
    mixed, solo = engine(**SHAPE), engine(**SHAPE)
    solo.runner = PagedRunner(_flat(solo), solo.bank, solo._cache)
    for path in folders(tmp_path, 4, **SHAPE):
        mixed.load_adapter(path.name, path)
        solo.load_adapter(path.name, path)
    draw = random.Random(5)
    names = ["a0", "a1", "a2", "a3"]
    asked = []
    for number in range(18):
        chosen = draw.sample(names, draw.choice([0, 1, 1, 2]))
        asked.append(request(number, tuple((name, draw.choice([0.5, 1.0])) for name in chosen), draw))
    streams = [mixed.submit(one) for one in asked]
    while mixed.step():
        pass
    for one, stream in zip(asked, streams, strict=True):
        assert tokens(list(stream)) == answer(solo, one), one.id


def test_decoders_of_another_form_are_left_to_the_model() -> None:
    """Other norms, biased heads and multipliers: no kernel, or one that is found to differ."""
    for arch in ("gemma2", "granite", "gpt2", "olmo2", "mixtral"):
        small = {} if arch == "gpt2" else {name: size for name, size in SHAPE.items() if name != "num_hidden_layers"}
        assert not isinstance(engine(arch, EngineLimits(context=64), **small).runner, DecodingRunner), arch
    assert decoder_weights(tiny("llama"), 1.0) is None  # heads of eight numbers do not fill a register
