"""The shape of the project: what lies at the top, and which packages are imported."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("search", "evaluators", "spaces")
ALLOWED = {
    *PACKAGES,
    "pyproject.toml",
    "tests",
    "scripts",
    "README.md",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
}


def committed() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return listed.stdout.splitlines()


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_those_of_this_repository(name: str) -> None:
    """Their names are generic: another distribution's `spaces` must not take the place of ours."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_workers_start_without_what_they_rarely_need() -> None:
    """Every worker process imports it before its first job."""
    code = "import sys, evaluators.pipeline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"sklearn", "plotly", "matplotlib", "ray", "nncf"}
    assert set(done.stdout.split()) & heavy == set()


def test_the_top_level_is_the_users() -> None:
    top = {name.split("/")[0] for name in committed()}
    assert {name for name in top if not name.startswith(".")} <= ALLOWED


def test_modules_have_one_idea_each() -> None:
    """About 300 lines are enough for one."""
    long = {
        name: lines
        for name in committed()
        if name.endswith(".py") and name.startswith(PACKAGES) and (ROOT / name).is_file()
        if (lines := len((ROOT / name).read_text().splitlines())) > 350
    }
    assert long == {}


def test_no_machine_is_named() -> None:
    """Paths of a developer's machine work nowhere else."""
    pattern = re.compile(r"(?<![\w.])/(work|home|Users)/\w")
    found = [
        f"{name}:{number}"
        for name in committed()
        if Path(name).suffix in (".py", ".yaml", ".toml", ".md") or name == "Makefile"
        if (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []
