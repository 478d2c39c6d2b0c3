"""Limits of a server on what a client can ask of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeLimits:
    """Limits on requests.

    Attributes:
        max_body_bytes: maximum size of a request other than an upload.
        max_file_bytes: maximum size of an uploaded file.
        max_files_bytes: maximum size of all files together.
        max_choices: maximum choices of one prompt.
        max_prompts: maximum prompts of one request, a prompt counted once for each of its choices.
        max_stops: maximum stop strings.
        max_stop_characters: maximum characters of a stop string.
        max_top_logprobs: maximum likely tokens that are reported for each token.
        max_biases: maximum tokens with a bias.
        max_adapters: maximum adapters of a mix.
        max_tools: maximum tools.
        max_messages: maximum messages.
        max_prompt_characters: maximum characters of all messages or prompts.
        max_jobs: maximum jobs that are not over.
        request_seconds: maximum time for an answer, which is cut with an error then.
        header_seconds: maximum time for the headers of a request.
        body_seconds: maximum pause within the body of a request.
        write_seconds: maximum time for a client to read what fills its buffer.
        max_rendered_characters: maximum characters of the text that a chat template makes.
        render_seconds: maximum time that a chat template takes.
    """

    max_body_bytes: int = 4 << 20
    max_file_bytes: int = 512 << 20
    max_files_bytes: int = 10 << 30
    max_choices: int = 64
    max_prompts: int = 256
    max_stops: int = 16
    max_stop_characters: int = 256
    max_top_logprobs: int = 20
    max_biases: int = 1024
    max_adapters: int = 16
    max_tools: int = 128
    max_messages: int = 4096
    max_prompt_characters: int = 2_000_000
    max_jobs: int = 1000
    request_seconds: float = 3600.0
    header_seconds: float = 10.0
    body_seconds: float = 10.0
    write_seconds: float = 60.0
    max_rendered_characters: int = 4_000_000
    render_seconds: float = 5.0
