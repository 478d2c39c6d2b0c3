"""``veneer config schema``: print the JSON Schema of the training options.

Save the schema beside a configuration and name it in the first line, ``# yaml-language-server: $schema=run.schema.json``;
editors then complete and check the options.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    from veneer.config import TrainOptions, json_schema

    print(json.dumps(json_schema(TrainOptions), indent=2, ensure_ascii=False))
    return 0
