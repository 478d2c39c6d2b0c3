"""``veneer config schema``: the options of a training run as JSON Schema.

Save it beside a configuration, name it in the first line (``# yaml-language-server: $schema=run.schema.json``), and an
editor completes and checks the options.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    from veneer.config import TrainOptions, json_schema

    print(json.dumps(json_schema(TrainOptions), indent=2, ensure_ascii=False))
    return 0
