"""What a release is made of agrees with itself: workflows, templates, versions, the changelog, the dependencies."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_lifecycle

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # "on" stays a word


def commands(workflow: Any) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_targets_that_exist(path: Path) -> None:
    workflow = read(path)
    assert {"name", "on", "jobs", "permissions"} <= set(workflow)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = {one for command in commands(workflow) for one in re.findall(r"\bmake ([a-z-]+)", command)}
    assert called
    assert called <= targets
    for job in workflow["jobs"].values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])


def test_tests_run_on_every_version_of_python_that_is_promised_newest_and_oldest() -> None:
    jobs = read(ROOT / ".github/workflows/tests.yml")["jobs"]
    promised = [one.split(" :: ")[-1] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == promised
    assert jobs["oldest"]["strategy"]["matrix"]["python"][0] == promised[0]
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_release_is_published_without_a_token() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    job = read(ROOT / ".github/workflows/release.yml")["jobs"]["publish"]
    assert job["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    assert "password" not in text


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_template_asks_what_it_says(path: Path) -> None:
    template = read(path)
    if path.stem != "config":
        assert {"name", "description", "body"} <= set(template)
        assert all({"type", "id", "attributes"} <= set(part) for part in template["body"])


def test_version_is_the_same_everywhere() -> None:
    assert read(ROOT / "CITATION.cff")["version"] == hf_lifecycle.__version__
    releases = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    badge = (ROOT / "docs/pictures/badge-version.svg").read_text(encoding="utf-8")
    assert f">{hf_lifecycle.__version__}<" in badge, "run make pictures"
    assert releases[:1] in ([], [hf_lifecycle.__version__])


def test_entries_of_the_changelog_have_at_most_three_lines() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- .*(?:\n  .*)*", text, re.MULTILINE)
    assert len(entries) > 50
    assert [entry for entry in entries if entry.count("\n") > 2] == []


def test_each_dependency_has_a_reason_and_is_imported() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = block[1].splitlines()
    assert all(re.search(r'^ +"[a-z0-9]+>=[^"]*",  # \w', line) for line in lines), lines
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_lifecycle").rglob("*.py"))
    for name in re.findall(r'^ +"([a-z0-9]+)', block[1], re.MULTILINE):
        assert re.search(rf"^ *(import|from) {name}\b", sources, re.MULTILINE), name
