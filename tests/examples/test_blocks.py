"""Python code in the documents runs as it is printed, on a tiny base and in few steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.project.source import ROOT

RUN = ("README.md", "docs/tutorials/first_adapter.md", "docs/tutorials/python.md")
"""Documents whose blocks run here, one after another in one namespace."""
ELSEWHERE = {
    "docs/guides/methods.md": "tests/examples/test_methods_page.py",
    "docs/serving.md": "tests/serve/api/test_openai_jobs.py",
    "docs/guides/classification.md": "tests/training/test_classification.py",  # the same call of PEFT on the test's own run
}
"""Documents whose blocks run in another test."""
SHORTER = {'"smollm2-135m"': "BASE", "max_steps=100": "max_steps=1, report_to=[], use_cpu=True", "steps=20": "steps=2"}


def blocks(page: str) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(
    page: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks run in their order; only the base and the number of steps differ from the page."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dataset = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    names: dict[str, Any] = {"BASE": base, "dataset": dataset}
    code = "\n".join(blocks(page))
    for printed, shorter in SHORTER.items():
        code = code.replace(printed, shorter)
    exec(compile(code, page, "exec"), names)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == {"docs/tutorials/first_adapter.md": ["dates.csv"]}.get(page, ["out", "runs"])
    if page == RUN[2]:
        assert names["loss"].detach() < 0.5
    if page == RUN[1]:
        lines = (tmp_path / "dates.csv").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 201 and re.fullmatch(r"Turn into a date: \d\d \w+ \d{4},\d{4}-\d\d-\d\d", lines[1])


def test_every_block_runs_somewhere() -> None:
    """Each document with Python code is in one of the tables, and the tests of the second one read their documents' blocks."""
    documents = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
    assert {page for page in documents if blocks(page)} == {*RUN, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert page.rpartition("/")[2].removesuffix(".md") in (ROOT / test).read_text(encoding="utf-8"), (page, test)
