"""The command line. One file a command, imported when the command is called: ``data show`` is ``data_show.py``.

A command's file has two functions:

    add_arguments(parser)   must not import torch, so that ``--help`` answers at once
    run(args) -> int        the exit code; errors of the user are raised as ``veneer.errors.VeneerError``

``main.py`` holds the list of commands and turns errors into one line and an exit code. Files that begin with an
underscore are helpers that commands share.
"""
