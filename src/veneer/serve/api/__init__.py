"""The HTTP API, compatible with OpenAI's."""
