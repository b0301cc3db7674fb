"""The house: a file imports only from those before it; the README's tree is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    *("files", "processes", "readers", "world", "data", "index", "kernels", "models"),
    *("pretrained", "losses", "recipe", "systems", "checkpoint", "released", "pseudo_labels"),
    *("evaluate", "inference", "machine", "parallel", "train", "rehearsal", "runs", "results"),
    *("pictures", "report", "recording", "screen", "compare", "commands", "ftd"),
)
OUTSIDE = ("bench", "docs", "tests")  # not installed; they may import everything


def is_package(room: str) -> bool:
    """Not by the folder alone: `runs/` holds what was trained here, beside `runs.py`."""
    return (ROOT / room / "__init__.py").exists()


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py")) if is_package(room) else [ROOT / f"{room}.py"]


def imported(source: str) -> Iterator[str]:
    """The rooms that a file imports from, in any form of the statement."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["ftdpp.?"]  # relative: not used here
        elif isinstance(node, ast.ImportFrom) and node.module == "ftdpp":
            names = [f"ftdpp.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "ftdpp":
                yield rest.split(".")[0]


def test_every_form_of_import_is_seen() -> None:
    source = (
        "import ftdpp.train\nimport ftdpp.world.cast as c\nfrom ftdpp import data, losses\n"
        "from ftdpp.kernels.maps import Pyramid\nfrom . import ftd\nimport os.path\n"
    )
    found = ["train", "world", "data", "losses", "kernels", "?"]
    assert list(imported(source)) == found


@pytest.mark.parametrize("room", ORDER)
def test_a_file_imports_only_from_those_before_it(room: str) -> None:
    allowed = set(ORDER[: ORDER.index(room)]) | ({room} if is_package(room) else set())
    if room == "commands":
        allowed.add("bench")  # asked for, and missed politely, where the repository is there
    for file in files_of(room):
        for other in imported(file.read_text()):
            assert other in allowed, f"{file.relative_to(ROOT)} imports {other}"


def test_every_module_is_in_the_order() -> None:
    modules = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__"}
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - set(OUTSIDE)
    assert modules | packages == set(ORDER)


def test_installed_packages_are_the_rooms() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    [listed] = re.findall(r"^packages = \[(.*)\]$", text, flags=re.M)
    packages = {f"ftdpp.{room}" for room in ORDER if is_package(room)} | {"ftdpp"}
    assert set(re.findall(r'"([^"]+)"', listed)) == packages


def tree_rows() -> dict[str, int]:
    """File or folder -> lines, from the README's tree."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- tree -->")[1].split("```")[1]
    rows, folder = {}, ""
    for line in block.strip().splitlines()[1:]:
        found = re.fullmatch(r"( *)(\S+) +(\d[\d,]*)?  ?.*", line)
        assert found, f"a line of the tree: {line!r}"
        indent, name, lines = found[1], found[2], found[3]
        if name.endswith("/"):
            folder = name
        path = name if not indent or name.endswith("/") else folder + name
        if lines:
            rows[path] = int(lines.replace(",", ""))
    return rows


def test_the_tree_is_true() -> None:
    """Every Python file with its length, within a tenth; no file that is not there."""
    rows = tree_rows()
    code = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for room in (*ORDER, "bench")
        for p in files_of(room)
    }
    short = {name for name, lines in code.items() if lines < 20}
    assert set(code) - short <= set(rows)
    for name, lines in rows.items():
        assert name in code, f"{name} is in the README's tree, not in the repository"
        assert abs(lines - code[name]) <= 0.1 * code[name] + 2, (
            f"{name} has {code[name]} lines, the README says {lines}: run docs/tree.py"
        )


def test_the_reading_path_is_short() -> None:
    """What a person reads in an afternoon to know FtD++; at 100 columns."""
    path = (
        *("kernels/naive.py", "kernels/maps.py", "kernels/reference.py", "data.py", "models.py"),
        *("losses.py", "recipe.py", "systems/__init__.py", "systems/ftdpp.py", "evaluate.py"),
        "train.py",
    )
    lines = [line for name in path for line in (ROOT / name).read_text().splitlines()]
    assert len(lines) < 3600
    assert max(map(len, lines)) <= 100
