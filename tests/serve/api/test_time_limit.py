"""Code that does not end is interrupted, nothing is interrupted later, and a template that takes too long is a clear error."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from tests.tiny import tiny_tokenizer

from veneer.serve.api.errors import ApiError
from veneer.serve.api.parameters import ChatMessage
from veneer.serve.api.prompts import PromptRenderer
from veneer.serve.api.time_limit import within
from veneer.serve.limits import ServeLimits

LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def spin(seconds: float) -> None:
    """Compute, and swallow every exception of the usual kind."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            sum(range(1000))


def test_code_that_does_not_end_is_interrupted() -> None:
    """The body ends soon after its time, with the error, even if it swallows exceptions; one that ends in time is left alone."""
    began = time.monotonic()
    late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        within(0.1, late, lambda: spin(20))
    assert time.monotonic() - began < 10
    assert within(5, late, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, late, lambda: 1 // 0)
    for _ in range(200):  # ends at about its time: the error comes inside the call or not at all
        with contextlib.suppress(ValueError):
            within(0.002, late, lambda: spin(0.002))
        spin(0.0005)


def test_template_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    """A chat template with loops that do not end is refused in time, and the next conversation is rendered."""
    renderer = PromptRenderer(tiny_tokenizer(), ServeLimits(render_seconds=0.3))
    messages = [ChatMessage(role="user", content="Hello")]
    began = time.monotonic()
    with pytest.raises(ApiError, match=r"does not end within 0\.3 seconds") as error:
        renderer.chat(messages, template=f"{LONG}{{{{ messages[0].content }}}}")
    assert error.value.status == 400 and error.value.param == "messages" and time.monotonic() - began < 10
    assert renderer.chat(messages).ids
