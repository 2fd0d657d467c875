"""What the tree promises its readers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import photogram

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MOST_LINES = 450


def test_every_source_file_can_be_read_in_one_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == photogram.__version__


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if "cli" not in path.relative_to(ROOT / "src/photogram").parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


@pytest.mark.parametrize("module", ["cli", "cli.serve", "cli.generate", "cli.doctor", "server.app"])
def test_the_host_leaves_torch_alone(module: str) -> None:
    code = f"import sys, photogram.{module}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "[]"


def test_nothing_imports_the_device_probe() -> None:
    importing = re.compile(r"^\s*(from|import)\b.*device_probe", re.MULTILINE)
    assert [path.name for path in SOURCES if importing.search(path.read_text())] == []


def test_the_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_constraints_pin_every_dependency() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    text = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'^  "([A-Za-z0-9_.-]+)[><=]', text, re.MULTILINE)
    assert {name.lower() for name in required} <= pinned


def test_the_server_answers_before_what_is_slow_to_import_is_imported() -> None:
    slow = "{'sqlalchemy', 'numpy', 'PIL', 'rich', 'httpx', 'openai'}"
    code = f"import sys, photogram.cli.serve; print(sorted({slow} & set(sys.modules)))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "[]"
