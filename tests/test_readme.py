"""README and docs/ hold: examples run, commands parse, links lead somewhere, tables are made from
files; and a data set is one file and one row."""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from ftdpp import compare, readers, recipe, systems
from ftdpp.data import CLASS_SETS
from ftdpp.docs import figures, tables, tree
from ftdpp.ftd import app
from ftdpp.readers import Calib
from ftdpp.systems import METHODS, Method
from ftdpp.tests.commands import TINY, ftd, train_args
from ftdpp.tests.toy import Toy, write_toy

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {
    **{"README.md": README, "CONTRIBUTING.md": CONTRIBUTING},
    **{f"docs/{name}.md": text for name, text in PAGES.items()},
}
# What docs/faults.md shows is refused, on purpose.
MEANT = {name: text for name, text in TEXTS.items() if name != "docs/faults.md"}

pytestmark = pytest.mark.usefixtures("on_a_cpu")


def example(name: str) -> str:
    """The Python block behind `<!-- example: NAME -->`, which stands once, on whichever page."""
    pattern = rf"<!-- example: {name} -->\n```python\n(.*?)```"
    [code] = re.findall(pattern, "\n".join(TEXTS.values()), flags=re.S)
    return code


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor a comment nor a docstring of one line."""
    return sum(bool(re.match(r'\s*[^\s#"]', line)) for line in source.splitlines())


def lines_of_commands(text: str) -> list[str]:
    """Every `ftd ...` of the shell blocks, and of the prose where it is complete."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
        found += block.replace("\\\n", " ").splitlines()
    found += [code for code in re.findall(r"`([^`\n]+)`", text) if " --" in code]
    commands = [re.sub(r"^OMP_NUM_THREADS=1 ", "", line.strip()) for line in found]
    partial = re.compile(r"\.\.\.|COMMAND|-h\b|--help|--version")  # nothing to parse, or not whole
    return [c for c in commands if c.startswith("ftd ") and not partial.search(c)]


DENSE = [name for name, row in METHODS.items() if row.dense]
COMMANDS = list(dict.fromkeys(c for text in MEANT.values() for c in lines_of_commands(text)))


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a command line. Raises the parser's error."""
    node, words, names = typer.main.get_command(app), shlex.split(command, comments=True)[1:], []
    while hasattr(node, "get_command"):
        names.append(words.pop(0))
        node = node.get_command(None, names[-1])
        assert node is not None, f"there is no command {' '.join(names)}"
    return " ".join(names), node.make_context(names[-1], words).params


def test_there_are_commands_of_every_kind() -> None:
    names = {name for name, _ in map(parsed, (c for c in COMMANDS if "--scan" not in c))}
    wanted = {"train", "eval", "pseudo", "predict", "compare", "table", "export", "convert"}
    assert {*wanted, "clip", "report", "show", "data check", "data prepare"} <= names
    assert all(lines_of_commands(TEXTS[name]) for name in ("README.md", "docs/using.md"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    """Options exist, values have the right type, and recipes can be made of them."""
    name, options = parsed(command.replace("--scan SCAN", f"--scan {__file__}"))
    if name == "train" and options["from_"] is not None:
        assert options["tgt"] in readers.domains() and options["src"] is None
    elif name == "train" and options["resume"] is None:
        scenario = f"{options['src']}-{options['tgt']}" + ("-ssda" if options["ssda"] else "")
        preset, stage = options["preset"] or "small", options["pseudo"] is not None
        method = options["method"] or "ftdpp"
        r = systems.recipe(scenario, method, preset, stage, options["set_"] or [])
        assert r.method == method
    elif name == "compare":
        rest = options["seeds"], options["preset"] or "small", options["set_"] or [], options["out"]
        for pair in zip(options["src"].split(","), options["tgt"].split(","), strict=True):
            scenario = "-".join(pair) + ("-ssda" if options["ssda"] else "")
            methods = compare.listed(options["methods"], scenario)
            assert compare.plan(scenario, methods, *rest, options["sweep"] or [])


def test_a_command_that_is_wrong_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option: --nope"):
        parsed("ftd train --nope")
    with pytest.raises(AssertionError, match="no command trian"):
        parsed("ftd trian --src usa")


def test_every_setting_that_the_text_names_exists() -> None:
    text = "".join(MEANT.values())
    named = set(re.findall(r"--set ([a-z]\w*)=", text)) - {"entropy"}  # the example's own
    assert len(named) > 8
    made = {systems.system_of(name, "usa-singapore").Recipe for name in METHODS}
    made |= {systems.system_of(name, "gta5-cityscapes").Recipe for name in DENSE}
    assert named <= {name for settings in made for name in recipe.settings(settings)}


@pytest.mark.parametrize("name", ["crossmatch", "clip2uda", "weak"])
def test_a_system_s_page_lists_its_settings(name: str) -> None:
    """Each of its own."""
    table = PAGES[name].split("| setting | default | meaning |")[1].split("\n\n")[0]
    names = [row.split("|")[1] for row in table.strip().splitlines()[1:]]
    listed = set(re.findall(r"`(\w+)`", "".join(names)))
    r = systems.recipe("usa-singapore", name)
    own = recipe.settings(type(r)).keys() - recipe.settings(recipe.Recipe).keys()
    missing = own - listed - {"dropout", "ema"}  # FtD++'s own, described there
    assert not missing, f"docs/{name}.md says nothing of {missing}"
    assert listed <= recipe.settings(type(r)).keys()


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: str, text: str) -> list[str]:
    """Links of a page to files or headings that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            if not file.exists() or (heading and heading not in anchors(file.read_text())):
                broken.append(target)
    return broken


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    """From the folder of the page: files are there, and so are the headings."""
    assert not broken_links(page, TEXTS[page])


def test_a_broken_link_would_be_found() -> None:
    links = "[a](nope.md) [b](#nope) [c](results.md#nope) [d](docs/data.md) [e](data.md) [f](#data)"
    assert broken_links("docs/data.md", links) == [
        *("nope.md", "#nope", "results.md#nope", "docs/data.md")
    ]


def test_the_front_page_is_short() -> None:
    """A picture, two commands, the table of all systems; every page is linked."""
    assert len(README.splitlines()) <= 330
    lead = README.split("\n## ")[0]
    [picture] = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", lead, flags=re.M)
    assert README.count("![") == 2 and (ROOT / picture).exists()
    assert lead.index("![") < 20, "the picture comes first"
    order = ["## Two commands", "make demo", "## Results", "<!-- results: ", "## Use it"]
    assert sorted(order, key=README.index) == order
    for name in PAGES:
        assert f"](docs/{name}.md)" in README, f"the README does not link docs/{name}.md"


def test_prose_is_not_too_wide() -> None:
    for text in TEXTS.values():
        fenced = False
        for line in text.splitlines():
            fenced ^= line.startswith("```")
            if (
                not fenced
                and not line.startswith(("|", "![", "<!--"))
                and " ftd " not in f" {line}".replace("`", " ")
            ):
                assert len(line) <= 130, line


def test_pictures() -> None:
    """Small and readable, with a text instead; each that is there is shown; the figure is what
    docs/figures.py draws."""
    shown = set()
    for page, text in TEXTS.items():
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            path = ((ROOT / page).parent / name).resolve()
            assert path.stat().st_size < 200_000, name
            if path.suffix != ".svg":
                Image.open(path).verify()
            shown.add(path.name)
        assert "![](" not in text, f"{page}: a picture without a text"
    there = {p.name for p in (ROOT / "docs").iterdir() if p.suffix in (".jpg", ".png", ".svg")}
    assert shown == there and {"prediction.jpg", "world.jpg", "ftdpp.svg"} <= shown
    assert (ROOT / "docs/ftdpp.svg").read_text() == figures.figure()


def test_line_counts_are_rewritten_in_the_tree_alone() -> None:
    page = tree.PAGE.read_text()
    text, listed = tree.update(page)
    assert tree.update(text) == (text, listed)
    assert "systems/ftdpp.py" in listed
    inside = page.split("<!-- tree -->")[1].split("```")[1].splitlines()
    for before, after in zip(page.splitlines(), text.splitlines(), strict=True):
        assert before == after or before in inside


def test_tables_are_made_from_the_results() -> None:
    """python docs/tables.py leaves every page as it is; and a figure that is not in the files
    would not survive it."""
    for page in tables.pages():
        text = page.read_text()
        assert tables.update(text) == text, f"{page.name}: run python docs/tables.py"
    least = {"README.md": 1, "docs/results.md": 3, "docs/crossmatch.md": 1, "docs/clip2uda.md": 1}
    for name, number in {**least, "docs/weak.md": 1}.items():
        whole = TEXTS[name]
        blocks = tables.BLOCK.findall(whole)
        assert len(blocks) == whole.count("<!-- results: ") == whole.count("<!-- /results -->")
        assert len(blocks) >= number, name
        for found in tables.BLOCK.finditer(whole):
            cell = re.search(r"\| (\d\d\.\d)", found[0])
            assert cell is not None
            changed = whole.replace(found[0], found[0].replace(cell[0], "| 99.9", 1))
            assert changed != whole and tables.update(changed) == whole


def test_a_method_of_ones_own(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of less than twenty lines and one row: it trains, logs its term, is evaluated."""
    code = example("method")
    assert lines_of_code(code) < 20
    package = tmp_path / "users_own_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "entropy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    name, module = re.findall(r'"([\w-]+)": Method\("(\w+)"\)', README)[0]
    assert (name, module) == ("ftdpp-entropy", "entropy")
    monkeypatch.setitem(METHODS, name, Method(f"users_own_methods.{module}"))

    out = tmp_path / "run"
    trained = ftd(*train_args(out, world, cache, "--set", "entropy=0.5", method=name, steps=2))
    assert trained.exit_code == 0, trained.output
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert len(rows) == 2
    largest = 0.5 * np.log(len(CLASS_SETS["street6"]))
    assert all(0 < float(row["entropy"]) < largest for row in rows)
    evaluated = ftd("eval", out, "--cache", cache, "--threads", 1)
    assert evaluated.exit_code == 0, evaluated.output
    assert f"{name}[" in evaluated.output
    sys.modules.pop("users_own_methods.entropy")


def matrix(calib: Calib) -> np.ndarray:
    """The (3, 4) matrix from homogeneous points to pixels."""
    motion = np.eye(4)
    for quaternion, translation, inverse in calib.steps:
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = readers.rotation(quaternion), translation
        motion = (np.linalg.inv(step) if inverse else step) @ motion
    return np.array(calib.camera) @ motion[:3]


def test_as_a_library(
    finished: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = example("library")
    assert lines_of_code(code) <= 10
    domain = readers.domains()["singapore"]
    reader = readers.reader_of(domain)
    ref = readers.list_frames(world, domain, "test")[0]
    raw = reader.read(ref)
    assert ref.points_path is not None and ref.calib is not None
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/usa-singapore-ftdpp-seed0").symlink_to(finished)
    Path("image.jpg").write_bytes(ref.image_path.read_bytes())
    Path("points.bin").write_bytes(ref.points_path.read_bytes())
    np.savetxt("calibration.txt", matrix(ref.calib))

    left: dict[str, Any] = {}
    exec(code, left)
    wanted, _, _ = reader.project(raw, ref)
    rows = left["rows"]
    assert len(np.setxor1d(rows, wanted)) <= 2, "points on the border may round either way"
    assert len(left["labels"]) == len(rows) > 100
    assert set(left["labels"]) <= set(CLASS_SETS["street6"])
    for p in left["probabilities"].values():
        assert p.shape == (len(rows), 6)
        assert np.allclose(p.sum(1), 1, atol=1e-5)


def test_a_data_set_is_one_file_and_one_row(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy data set trains and is evaluated by the commands, which know nothing of it."""
    monkeypatch.setitem(readers.READERS, "toy", Toy())
    root, out = write_toy(tmp_path / "toy"), tmp_path / "run"
    checked = ftd("data", "check", root, "--domain", "brick")
    assert checked.exit_code == 0, checked.output
    where = ("--data", root, "--cache", cache, "--threads", 1)
    pair = ("--src", "wood", "--tgt", "brick", "--preset", "small", "--steps", 2)
    trained = ftd("train", *pair, "--out", out, *where, *TINY)
    assert trained.exit_code == 0, trained.output
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert {"seg_2d", "distill_fused"} <= rows[0].keys()
    evaluated = ftd("eval", out, *where)
    assert evaluated.exit_code == 0, evaluated.output
    assert "brick" in evaluated.output
