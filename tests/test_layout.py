"""A file imports only from those left of it in the chain that the README draws."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["synth", "data", "kernels", "models", "losses", "checkpoint", "evaluate", "train", "report", "bench", "screen", "ftd"]


def test_imports_go_left() -> None:
    seen = 0
    for name in ORDER:
        files = sorted((ROOT / name).glob("*.py")) if (ROOT / name).is_dir() and name == "kernels" else [ROOT / f"{name}.py"]
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                found: list[str] = []
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ftdpp":
                    parts = node.module.split(".")
                    found = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
                for other in found:
                    seen += 1
                    assert ORDER.index(other) < ORDER.index(name) or other == name == "kernels", f"{file.name} imports {other}"
    assert seen > 10


def test_every_module_is_in_the_order() -> None:
    modules = {p.stem for p in ROOT.glob("*.py")} - {"__init__"}
    assert modules | {"kernels"} == set(ORDER)
