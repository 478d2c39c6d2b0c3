"""The command line. Each command is one file, imported only when it runs: ``veneer data show`` is ``data_show.py``.

A command's file has two functions:

    add_arguments(parser)   declares the arguments; must not import torch, so that ``--help`` is fast
    run(args) -> int        runs the command and returns the exit code; raises ``VeneerError`` for user errors

``main.py`` lists the commands and turns exceptions into one line and an exit code. Files whose name starts with an
underscore hold code that several commands share.
"""
