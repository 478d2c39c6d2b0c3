"""Requests name the parameters that cannot be honoured, and streams end once."""

from __future__ import annotations

import queue

import pytest

from veneer.serve.engine.request import (
    Finished,
    GenerationRequest,
    RequestStream,
    SamplingParams,
    TextDelta,
    Timing,
    Usage,
)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(temperature=-1), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(top_p=0), "top_p"),
        (SamplingParams(max_tokens=-1), "max_tokens"),
        (SamplingParams(logit_bias={320: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={3: float("inf")}), "logit_bias"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(stop_token_ids=(-1,)), "stop_token_ids"),
        (SamplingParams(logprobs=321), "logprobs"),
        (SamplingParams(seed=2**64), "seed"),
    ],
)
def test_a_parameter_out_of_range_is_named(params: SamplingParams, name: str) -> None:
    """Each wrong value gives one problem under its parameter's name."""
    assert list(params.problems(320)) == [name]


def test_sensible_parameters_have_no_problems() -> None:
    """Defaults and values at the limits are honoured."""
    assert SamplingParams().problems(320) == {}
    assert (
        SamplingParams(max_tokens=None, temperature=100, top_p=1, logit_bias={319: -100}, seed=-1).problems(320) == {}
    )


def test_a_stream_ends_with_finished() -> None:
    """Iteration gives the events in order and stops after `Finished`."""
    cancelled: list[str] = []
    stream = RequestStream(GenerationRequest("r", (1,)), lambda name: not cancelled.append(name))
    events = [TextDelta((5,), "a"), Finished("stop", Usage(1, 1), Timing(0, 0, 0, 0))]
    for event in events:
        stream.put(event)
    assert list(stream) == events and list(stream) == []
    assert stream.cancel() and cancelled == ["r"]
    with pytest.raises(queue.Empty):
        stream.get(timeout=0)
