"""Writes the present number of lines of each file into the tree of README.md: python docs/tree.py

A line of the tree is: name, number of lines, comment; two spaces before a file inside a folder.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- tree -->\n```\n"
PAGE = ROOT / "README.md"
WIDTH = 24  # of indent, name and number


def update(text: str, root: Path = ROOT) -> tuple[str, set[str]]:
    """The page with true numbers in its tree, and the files that the tree lists."""
    start = text.index(MARK) + len(MARK)
    end = text.index("```", start)
    lines, folder, listed = [], "", set()
    for line in text[start:end].splitlines():
        found = re.fullmatch(r"( *)(\S+) +(?:\d+ +)?(\S.*)", line)
        if found is None:  # the first line: the name of the package
            lines.append(line)
            continue
        indent, name, comment = found.groups()
        number = ""
        if name.endswith("/"):
            folder = name
        else:
            path = folder + name if indent else name
            number = str(len((root / path).read_text().splitlines()))
            listed.add(path)
        lines.append(f"{indent}{name}{number:>{WIDTH - len(indent) - len(name)}}  {comment}")
    return text[:start] + "\n".join(lines) + "\n" + text[end:], listed


def main() -> None:
    text, listed = update(PAGE.read_text())
    PAGE.write_text(text)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        outside = name == "__init__.py" or name.startswith(("docs/", "tests/"))
        if name not in listed and not outside and len(path.read_text().splitlines()) >= 20:
            print(f"not in the tree: {name}")


if __name__ == "__main__":
    main()
