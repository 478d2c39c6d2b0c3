"""docs/errors.md shows the messages that Veneer prints."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_errors_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the twenty mistakes is refused with the message in docs/errors.md."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "scripts" / "errors.py"))
    answers = script["answer_all"]()
    page = script["PAGE"].read_text(encoding="utf-8")
    sections = {title: text for title, _, text in (part.partition("\n") for part in page.split("\n## "))}
    outdated = [title for title, answer in answers.items() if not answer or answer not in sections.get(title, "")]
    assert len(answers) == 20 and not outdated, (
        f"docs/errors.md is out of date for {outdated}; run python -m docs.scripts.errors"
    )
