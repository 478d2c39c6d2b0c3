"""``veneer push ADAPTER REPO``: upload an adapter to the Hugging Face Hub, with its model card.

The adapter is read first, as if to load it. Its configuration, weights, chat template and model card go up in one commit, and the
hub's copies are compared with them. Log in with ``hf auth login``, or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from veneer._terminal import note, status
from veneer.cli._output import as_json, print_lines
from veneer.cli._parser import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a run or an adapter folder")
    parser.add_argument("repo", metavar="REPO", help="repository on the hub: OWNER/NAME, or NAME for your own account")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="visibility of a new repository (default: that of your account); an existing one keeps its own",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="list the files without uploading them")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Upload the adapter and print its address."""
    from veneer.checkpoints.locate import choice_note, find_adapter
    from veneer.checkpoints.peft.card import FOLDER, model_card
    from veneer.checkpoints.receipt import receipt_of
    from veneer.cli._hub import CARD, check_repo, files_of, push_adapter
    from veneer.deltas.parents import base_name, read_parents

    check_repo(args.repo)
    name, folder = find_adapter(args.adapter)
    if remark := choice_note(args.adapter, folder):
        note(remark)
    adapter = read_parents([(folder, name, 1.0)])[0].adapter
    if (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8").replace(FOLDER, args.repo)
    else:
        card = model_card(adapter, base=base_name([adapter]), receipt=receipt_of(adapter), folder=args.repo)
    if args.dry_run:
        files = {file: len(content) for file, content in files_of(folder, card).items()}
        if args.json:
            print(as_json({"repo": args.repo, "files": files}))
        else:
            print_lines([f"{args.repo} would hold:", *_listed(files)])
        return 0
    with status(f"uploading {folder}"):
        pushed = push_adapter(
            folder,
            args.repo,
            card=card,
            private=args.private,
            revision=args.revision,
            message=args.message,
            create_pr=args.create_pr,
        )
    if args.json:
        print(as_json(asdict(pushed)))
    else:
        print_lines([pushed.pull_request or pushed.url, *_listed(pushed.files), f"commit {pushed.commit}"])
    return 0


def _listed(files: dict[str, int]) -> list[str]:
    return [f"  {file}  {size:,} bytes" for file, size in files.items()]
