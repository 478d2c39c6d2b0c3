"""Options, declared once as fields of frozen pydantic models. Flags, YAML, JSON Schema and help texts derive from them.

    declare     class MyOptions(Options): a field with a type, a default and a docstring
    resolve     options, provenance = resolve(MyOptions, "run.yaml", ["r=8"], {"learning_rate": "1e-4"})
    flags       add_flags(parser, MyOptions), then resolve(..., given_sets(args), given_flags(args))
    print       for difference in differences(options, provenance): print(difference)
    save        to_yaml(options), json_schema(MyOptions)

Precedence: flag > ``--set a.b=c`` > YAML > default. Unknown keys are errors that suggest the nearest known key. All problems of all
sources are reported at once, each with file, line and key. YAML is read as YAML 1.2: ``1e-4`` is a number; ``no``, ``on`` and ``12:30``
are text.
"""

from __future__ import annotations

from veneer._options.base import (
    Count,
    Flag,
    Fraction,
    NotNegative,
    Options,
    Paths,
    Positive,
    Real,
    Texts,
    Whole,
    current_names,
    flag_name,
)
from veneer._options.flags import add_flags, given_flags, given_sets
from veneer._options.low_rank import Alpha, LowRankOptions, Rank
from veneer._options.method import MethodOptions
from veneer._options.output import given, json_schema, plain, to_yaml
from veneer._options.resolve import Difference, Provenance, differences, resolve
from veneer._options.synonyms import command_hint, near_miss, similar
from veneer._options.train import PER_RUN_OPTIONS, DataOptions, TrainOptions, default_learning_rate
from veneer._options.virtual_tokens import VirtualTokenOptions
from veneer._options.yaml_file import Document, load_yaml

__all__ = [
    "PER_RUN_OPTIONS",
    "Alpha",
    "Count",
    "DataOptions",
    "Difference",
    "Document",
    "Flag",
    "Fraction",
    "LowRankOptions",
    "MethodOptions",
    "NotNegative",
    "Options",
    "Paths",
    "Positive",
    "Provenance",
    "Rank",
    "Real",
    "Texts",
    "TrainOptions",
    "VirtualTokenOptions",
    "Whole",
    "add_flags",
    "command_hint",
    "current_names",
    "default_learning_rate",
    "differences",
    "flag_name",
    "given",
    "given_flags",
    "given_sets",
    "json_schema",
    "load_yaml",
    "near_miss",
    "plain",
    "resolve",
    "similar",
    "to_yaml",
]
