"""The docs say what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from photogram.cli.flags import flags

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_flag_has_a_row_in_the_configuration_page() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    missing = [flag.name for flag in flags() if not re.search(rf"^\| `{re.escape(flag.name)}[ `]", page, re.MULTILINE)]
    assert not missing


def test_the_generated_tables_are_up_to_date() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "tools/docs_tables.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert checked.returncode == 0, checked.stderr


def test_every_link_between_the_pages_leads_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert not broken


def test_every_make_target_that_the_docs_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    known = {"--version", "--help"}
    for command in ("serve", "generate", "doctor"):
        helped = subprocess.run(
            [sys.executable, "-m", "photogram", command, "--help"], capture_output=True, text=True, check=True
        )
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", helped.stdout))
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path, known_flags: set[str]) -> None:
    named = set()
    for line in page.read_text().splitlines():
        if re.search(r"^\s*(photogram|make serve)|`--|photogram (serve|generate|doctor)", line):
            named |= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]\b(?!-`)", line.replace("_", "-")))
    assert named <= known_flags
