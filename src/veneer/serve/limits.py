"""Limits of a server on what a client can ask of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeLimits:
    """Limits on requests.

    Attributes:
        body_bytes: most bytes of a request other than an upload.
        file_bytes: most bytes of an uploaded file.
        files_bytes: most bytes of all files.
        choices: most choices of one request, over all of its prompts.
        prompts: most prompts of one request.
        stops: most stop strings.
        stop_characters: most characters of a stop string.
        top_logprobs: most likely tokens that are reported.
        biases: most tokens with a bias.
        adapters: most adapters of a mix.
        tools: most tools.
        messages: most messages.
        prompt_characters: most characters of all messages or prompts.
        jobs: most jobs that are not over.
        request_seconds: longest time for an answer; then it is cut with an error.
        header_seconds: longest time for the headers of a request.
        body_seconds: longest pause within the body of a request.
        write_seconds: longest time for a client to read what fills its buffer.
        rendered_characters: longest text that a chat template may make.
        render_seconds: longest time that a chat template may take.
    """

    body_bytes: int = 4 << 20
    file_bytes: int = 512 << 20
    files_bytes: int = 10 << 30
    choices: int = 64
    prompts: int = 256
    stops: int = 16
    stop_characters: int = 256
    top_logprobs: int = 20
    biases: int = 1024
    adapters: int = 16
    tools: int = 128
    messages: int = 4096
    prompt_characters: int = 2_000_000
    jobs: int = 1000
    request_seconds: float = 3600.0
    header_seconds: float = 10.0
    body_seconds: float = 10.0
    write_seconds: float = 60.0
    rendered_characters: int = 4_000_000
    render_seconds: float = 5.0
