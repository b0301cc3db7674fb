"""`ftd report` and `ftd show`: what they count, what they draw, and that the page stands alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ftdpp import checkpoint, evaluate, inference, pictures, readers, report, runs, systems
from ftdpp.checkpoint import RunError
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED
from ftdpp.index import Index, prepare
from ftdpp.report import charts, survey
from ftdpp.tests import dense_layouts
from ftdpp.tests.commands import TINY, ftd, train_args, words
from ftdpp.tests.random_clip import write_clip

pytestmark = pytest.mark.usefixtures("on_a_cpu")

NAMES = CLASS_SETS["street6"]


@pytest.fixture(scope="module")
def other(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run, of the image alone in all but name: without a teacher."""
    out = tmp_path_factory.mktemp("other") / "run"
    more = ("--set", "val_every=2", "--set", "milestones=2", "--device", "cpu")
    made = ftd(*train_args(out, world, cache, *more, method="source-only", steps=4))
    assert made.exit_code == 0, made.output
    return out


@pytest.fixture(scope="module")
def written(
    other: Path, finished: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The report of both runs."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    made = ftd("report", other, finished, "--out", out, "--cache", cache, "--count", 1)
    assert made.exit_code == 0, made.output
    return out


def opened(run: Path, cache: Path) -> tuple[Any, Index]:
    system, _ = checkpoint.load(run / "best.safetensors", teachers=True)
    record = runs.read_record(run)
    assert record is not None
    origin = runs.recorded_places(record).origins["tgt"]
    return system, origin.index("val", system.recipe, cache)


# ---- what is counted -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(finished: Path, cache: Path) -> tuple[Any, Index, survey.Survey]:
    system, index = opened(finished, cache)
    return system, index, survey.look(system, index)


def said_of(system: Any, index: Index, heads: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """Row by row: label, {head: (class, confidence)}."""
    for _, batch in evaluate.batches_of(index, system.recipe, system.recipe.eval_batch):
        with torch.no_grad():
            prob = system.predict(batch)
        for row, label in enumerate(batch.label.tolist()):
            most = {head: prob[head][row].max(0) for head in heads}
            yield label, {h: (int(m.indices), float(m.values)) for h, m in most.items()}


def test_a_survey_counts_what_a_slow_loop_counts(seen: tuple[Any, Index, survey.Survey]) -> None:
    system, index, found = seen
    score = evaluate.evaluate(system, index, "")
    assert {head: found.miou(head) for head in found.heads} == score.miou
    rows = list(said_of(system, index, found.heads))
    for (a, b), share in found.agreement.items():
        assert share == pytest.approx(np.mean([s[a][0] == s[b][0] for _, s in rows]))
    assert set(found.agreement) == {("2d", "3d"), ("2d", "2d+3d"), ("3d", "2d+3d")}
    for head in ("2d", "3d"):
        for c, kept in enumerate(found.pseudo[head]):
            sure = sorted(s[head][1] for _, s in rows if s[head][0] == c)
            level = min(0.9, sure[(len(sure) - 1) // 2]) if sure else 0.0
            assert kept.threshold == pytest.approx(level)
            alive = [
                (label, s[head][0])
                for label, s in rows
                if s[head][1] >= found.pseudo[head][s[head][0]].threshold
            ]
            of_c = [label for label, _ in rows if label == c]
            assert kept.coverage == pytest.approx(
                sum(label == c for label, _ in alive) / max(len(of_c), 1)
            )
            as_c = [label for label, s in rows if s[head][0] == c and label != IGNORE]
            kept_c = [label for label, p in alive if p == c and label != IGNORE]
            assert kept.before == pytest.approx(as_c.count(c) / max(len(as_c), 1))
            assert kept.after == pytest.approx(kept_c.count(c) / max(len(kept_c), 1))


def test_wrong_rows_of_a_frame(seen: tuple[Any, Index, survey.Survey]) -> None:
    system, index, found = seen
    assert len(found.wrong) == len(index)
    for i, share in enumerate(found.wrong):
        label = survey.labels_of(system, index, i)["2d+3d"]
        truth = index.frame(i).label
        known = (truth != UNLABELLED) & (label != UNLABELLED)
        assert share == pytest.approx((label != truth)[known].mean())


def test_teacher_and_student_are_compared(seen: tuple[Any, Index, survey.Survey]) -> None:
    """With the student's own weights a teacher agrees on every row; a survey changes neither."""
    system, index, found = seen
    assert set(found.teacher) == {"2d", "3d", "2d+3d"}
    assert 0 < found.teacher["3d"] < 1
    before = {k: v.clone() for k, v in system.state_dict().items()}
    system.teacher.load_state_dict(system.student.state_dict())
    same = survey.look(system, index)
    assert set(same.teacher.values()) == {1.0}
    assert same.confusion["2d"].equal(found.confusion["2d"])
    system.load_state_dict(before)
    assert survey.look(system, index).teacher == found.teacher


def test_without_a_teacher_there_is_nothing_to_compare(other: Path, cache: Path) -> None:
    system, index = opened(other, cache)
    assert survey.look(system, index).teacher == {}


@pytest.mark.parametrize("method", ["ftdpp", "bftd", "crossmatch"])
def test_a_network_and_its_teacher_can_change_places(method: str) -> None:
    chosen = ["width_2d=16", "width_3d=4"] if method != "crossmatch" else []
    system = systems.build(systems.recipe("usa-singapore", method, "small", overrides=chosen))
    assert system.teachers
    for student, teacher in system.teachers.items():
        assert teacher in system.training_only
        mine, theirs = (getattr(system, name).state_dict() for name in (student, teacher))
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


def test_pixels_are_counted_at_the_size_of_the_labels(tmp_path: Path) -> None:
    root = dense_layouts.cityscapes(tmp_path / "cityscapes")
    r = systems.recipe(
        "gta5-cityscapes", "source-only", "small", overrides=["image=24,48", "width_2d=16"]
    )
    system = systems.build(r).eval()
    index = prepare(
        root, readers.domains()["cityscapes"], "val", r.classes, r.image, tmp_path / "cache"
    )
    found = survey.look(system, index)
    score = evaluate.evaluate(system, index, "")
    assert found.miou("2d") == score.miou["2d"]
    assert int(found.confusion["2d"].sum()) == score.points
    assert found.agreement == {} and len(found.wrong) == len(index)


# ---- which frames --------------------------------------------------------------------------------


def run_with(name: str, *wrong: float) -> Any:
    return SimpleNamespace(name=name, survey=SimpleNamespace(wrong=list(wrong)))


def test_worst_best_and_where_it_gains_and_loses() -> None:
    nan = float("nan")
    one = run_with("one", 0.1, 0.5, nan, 0.3, 0.2)
    two = run_with("two", 0.4, 0.1, 0.0, 0.3, nan)
    found = report.chosen_frames([one, two], 1)
    assert found == [
        ("Worst frames of two", [0]),
        ("Best frames of two", [2]),
        ("Where it gains most on one", [1]),
    ], "frame 0 is where it loses most, and is shown already"
    assert report.chosen_frames([one], 2) == [
        ("Worst frames of one", [1, 3]),
        ("Best frames of one", [0, 4]),
    ]
    assert report.chosen_frames([one, two], 0) == []


# ---- the page ------------------------------------------------------------------------------------


class Nested(HTMLParser):
    """Raises where tags do not close in the order in which they opened."""

    VOID = ("meta", "img", "br", "path", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [str(found[name]) for name in ("href", "src") if name in found]
        if tag == "img":
            self.images.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone(written: Path) -> None:
    text = written.read_text()
    found = Nested(text)
    assert "<script" not in text and "default-src 'none'" in text
    assert all(link.startswith(("#", "data:image/webp;base64,")) for link in found.links)
    assert {link[1:] for link in found.links if link[0] == "#"} == set(found.ids)
    sections = ["runs", "miou", "classes", "confusion", "curves", "agreement", "pseudo", "frames"]
    assert found.ids == sections
    assert all(image["alt"] for image in found.images)
    assert "url(" not in text and "@import" not in text
    assert text.count("<polyline") > 10 and len(text) < 3_000_000


def test_the_page_says_what_was_measured(
    written: Path, other: Path, finished: Path, cache: Path
) -> None:
    text = written.read_text()
    for run in (other, finished):
        system, index = opened(run, cache)
        for value in evaluate.evaluate(system, index, "").miou.values():
            assert f"{100 * value:.1f}" in text
        record = runs.read_record(run)
        assert record is not None
        assert record["data"]["labelled"]["content"][:12] in text
    for term in ("seg_2d", "mimic_3d_tgt", "distill_fused"):
        assert f"loss term {term}, weighted" in text
    for name in NAMES:
        assert name in text
    assert "2D = its teacher&#x27;s" in text or "2D = its teacher's" in text


def test_settings_of_all_runs_are_said_once(written: Path) -> None:
    """A run is named by what tells it apart."""
    text = written.read_text()
    shared = text.split("All runs: ")[1].split(".</p>")[0].split(", ")
    title = text.split("<h1>")[1].split("</h1>")[0]
    assert "width_3d=4" in shared and "width_3d" not in title
    assert "steps=6" in title and "steps=4" in title


def test_two_reports_are_equal(
    written: Path, other: Path, finished: Path, cache: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.html"
    made = ftd("report", other, finished, "--out", again, "--cache", cache, "--count", 1)
    assert made.exit_code == 0, made.output
    assert again.read_bytes() == written.read_bytes()


def test_figures_that_were_evaluated_are_shown(finished: Path, cache: Path, tmp_path: Path) -> None:
    """Those of test, which the report itself does not open."""
    run, out = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(finished, run)
    (run / "scores.json").unlink(missing_ok=True)
    assert ftd("report", run, "--out", out, "--cache", cache, "--count", 0).exit_code == 0
    assert "on test" not in out.read_text()
    assert ftd("eval", run, "--cache", cache, "--threads", 1).exit_code == 0
    assert ftd("report", run, "--out", out, "--cache", cache, "--count", 0).exit_code == 0
    text = out.read_text()
    assert "mIoU in percent on test (figures of ftd eval)" in text
    assert 'id="frames"' not in text, "none was asked for"


def test_text_is_never_markup(finished: Path, cache: Path) -> None:
    places = runs.recorded_places(runs.read_record(finished) or {})
    origin = places.origins["tgt"]
    [one] = report.gather([finished], [origin], "val", cache)
    one.title = one.name = '<b onclick="x">&'
    text = report.page([one], 0)
    assert "<b onclick" not in text and "&lt;b onclick=&quot;x&quot;&gt;&amp;" in text
    Nested(text)


def test_runs_that_do_not_belong_on_one_page(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tiny = [*TINY, "--set", "classes=nuscenes16"]
    args = train_args(run, world, cache, method="source-only", steps=1)
    made = ftd(*args[: -len(TINY)], *tiny)
    assert made.exit_code == 0, made.output
    found = ftd("report", finished, run, "--out", tmp_path / "r.html", "--cache", cache)
    assert found.exit_code == 1 and "make a report of each" in words(found)
    assert not (tmp_path / "r.html").exists()


def test_four_systems_on_one_page(finished: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    """What each has is shown: one head or three, audits, teachers; the reconstructions say so."""
    clip = write_clip(tmp_path / "clip")
    where = ["--data", world, "--cache", cache, "--threads", 1, "--preset", "small", "--steps", 2]
    tiny = ["--set", "image=48,88", "--set", "batch=2", "--set", "val_every=2"]
    narrow = [*tiny, "--set", "width_3d=4", "--clip", clip]
    pair = ["--src", "usa", "--tgt", "singapore"]
    weak = ["--src", "singapore", "--tgt", "singapore", "--method", "weak"]
    commands = {
        "crossmatch": ["--from", finished, "--tgt", "singapore", *tiny[2:]],
        "clip2uda": [*pair, "--method", "clip2uda", *narrow],
        "weak": [*weak, *narrow, "--set", "labelled=0.02", "--set", "width_2d=16"],
    }
    for name, words_ in commands.items():
        made = ftd("train", *words_, *where, "--out", tmp_path / name)
        assert made.exit_code == 0, made.output
    out = tmp_path / "report.html"
    folders = [finished, *(tmp_path / name for name in commands)]
    made = ftd("report", *folders, "--out", out, "--cache", cache, "--count", 1)
    assert made.exit_code == 0, made.output
    text = out.read_text()
    Nested(text)
    assert text.count("a reconstruction") == 3
    assert "pseudo-labels on val: precision after, percent" in text
    assert "singapore -&gt; singapore" in text and "weak[" in text
    assert "<h1>singapore: ftdpp[" in text, "of two scenarios, their target"
    assert "loss term contrast" in text and "loss term distill_fused" in text


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--split", "tset"], 2, "--split tset: singapore has"),
        (["--out", "notes.txt"], 2, "ftd did not write it"),
        (["--out", "RUN/log.csv"], 2, "is a run's own file"),
        (["nowhere"], 2, "nowhere: no such run folder"),
    ],
)
def test_refusals(
    more: list[str],
    code: int,
    expected: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    found = ftd("report", finished, *(word.replace("RUN", str(finished)) for word in more))
    assert found.exit_code == code and expected in words(found), found.output
    assert Path("notes.txt").read_text() == "mine"


# ---- curves --------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == pytest.approx([0, 0.5, 1])
    assert charts.ticks(0, 60_000) == [0, 20_000, 40_000, 60_000]
    for low, high in ((0, 97.3), (-0.013, 0.002), (1e-7, 3e-7), (0, 60_000), (5, 5)):
        found = charts.ticks(low, high)
        assert 1 <= len(found) <= 9
        assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert charts.short(20_000) == "20k" and charts.short(0.25) == "0.25"


def test_a_curve_goes_where_its_values_are() -> None:
    text = charts.lines("t", {"a": [(0, 0.0), (10, 1.0)], "b": [(5, 0.5)]}, ["b", "a"])
    [points] = re.findall(r'class="line c1" points="([^"]+)"', text)
    (x0, y0), (x1, y1) = ([float(v) for v in p.split(",")] for p in points.split())
    assert (x0, x1) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert y0 == charts.HEIGHT - charts.FOOT and charts.TOP < y1 < charts.TOP + 10
    [(cx, cy)] = re.findall(r'class="line c0" cx="([\d.]+)" cy="([\d.]+)"', text)
    assert float(cx) == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert float(cy) == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert charts.lines("t", {"a": []}, ["a"]) == ""


def test_logs_are_read_thinned_and_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    assert survey.curves(log) == {}
    log.write_text("iteration,a,b\n" + "".join(f"{i},{i * 2},\n" for i in range(1, 101)))
    assert survey.curves(log) == {"a": [(float(i), 2.0 * i) for i in range(1, 101)]}
    thin = survey.curves(log, points=10)["a"]
    assert thin[0] == (10.0, 11.0) and thin[-1][0] == 100 and len(thin) == 10
    log.write_text("iteration,class,p\n1,car,5\n1,all,7\n")
    assert survey.curves(log, "all") == {"p": [(1.0, 7.0)]}
    for broken in ("iteration,a\n1,x\n", "a\n1\n", "iteration,a\n1,2,3\n"):
        log.write_text(broken)
        with pytest.raises(RunError, match=r"log\.csv: not a log"):
            survey.curves(log)


# ---- one frame -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_show(suffix: str, finished: Path, tmp_path: Path) -> None:
    """Truth, three heads and the errors, each photo at its own size."""
    out = tmp_path / f"frame.{suffix}"
    made = ftd("show", finished, 1, "--out", out, "--threads", 1)
    assert made.exit_code == 0, made.output
    with Image.open(a_photo(finished)) as photo:
        width, height = photo.size
    if suffix == "pdf":
        assert out.read_bytes().startswith(b"%PDF")
        return
    with Image.open(out) as picture:
        assert picture.width == 5 * (width + pictures.GAP) + pictures.GAP
        assert picture.height > height


def a_photo(run: Path) -> Path:
    record = runs.read_record(run)
    assert record is not None
    origin = runs.recorded_places(record).origins["tgt"]
    row = readers.domains()[origin.domain]
    return readers.list_frames(origin.root, row, "test")[0].image_path


def test_show_finds_a_frame_by_token_or_number(finished: Path, tmp_path: Path) -> None:
    record = runs.read_record(finished)
    assert record is not None
    root = runs.recorded_places(record).origins["tgt"].root
    row = readers.domains()["singapore"]
    ref = readers.list_frames(root, row, "test")[1]
    for name in (1, ref.token):
        assert ftd("show", finished, name, "--out", tmp_path / f"{name}.png").exit_code == 0
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / f"{ref.token}.png").read_bytes()
    for name, expected in (("nope", "no frame 'nope'"), (99, "has 2 frames, from 0")):
        found = ftd("show", finished, name, "--out", tmp_path / "x.png")
        assert found.exit_code == 2 and expected in words(found)
    found = ftd("show", finished, 1, "--out", tmp_path / "x.gif")
    assert found.exit_code == 2 and ".png or .pdf" in words(found)
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "x.gif").exists()


def test_show_draws_what_predict_writes(finished: Path, tmp_path: Path) -> None:
    system, _ = checkpoint.load(finished / "best.safetensors")
    record = runs.read_record(finished)
    assert record is not None
    root = runs.recorded_places(record).origins["tgt"].root
    ref = readers.list_frames(root, readers.domains()["singapore"], "test")[0]
    frame, said = inference.seen_frame(system, ref)
    whole = inference.label_heads(system, ref)
    assert frame.has_label and list(said) == ["2d", "3d", "2d+3d"]
    for head, label in said.items():
        assert len(label) == len(frame.label)
        assert np.array_equal(np.sort(whole[head][whole[head] != UNLABELLED]), np.sort(label))


def test_a_recording(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk, an extra, is not installed")
    out = tmp_path / "frame.rrd"
    made = ftd("show", finished, 0, "--out", tmp_path / "f.png", "--rrd", out)
    assert made.exit_code == 0, made.output
    assert out.read_bytes().startswith(b"RRF") and out.stat().st_size > 10_000


def test_without_rerun_it_says_what_to_type(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rerun", None)
    made = ftd("show", finished, 0, "--out", tmp_path / "f.png", "--rrd", tmp_path / "f.rrd")
    assert made.exit_code == 1 and "pip install '.[rerun]'" in words(made)
    assert not (tmp_path / "f.png").exists()


# ---- in a browser --------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<!doctype html><iframe id="f" src="report.html" style="width:{width}px;height:900px">
</iframe><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument;
  const found = [...page.querySelectorAll("a[href], summary, [tabindex]")]
    .filter(e => e.checkVisibility());
  const focused = found.filter(e => { e.focus(); return page.activeElement === e; });
  const broken = [...page.images].filter(i => { i.loading = "eager"; return !i.src; });
  document.body.setAttribute("data-found", [
    page.documentElement.scrollWidth, found.length, focused.length, broken.length,
    getComputedStyle(page.body).backgroundColor].join(";"));
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(width: int, written: Path, tmp_path: Path) -> None:
    """No message on the console, nothing wider than the screen, every control takes the focus."""
    shutil.copy(written, tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(PROBE.replace("{width}", str(width)))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr "
        "--allow-file-access-from-files --virtual-time-budget=5000 --dump-dom"
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *flags.split(), profile, f"file://{tmp_path}/probe.html"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in found.stderr, found.stderr
    [values] = re.findall(r'data-found="([^"]+)"', found.stdout)
    scroll, controls, focused, broken, _ = values.split(";")
    assert int(scroll) <= width, f"{scroll} pixels, and one has to push the page sideways"
    assert int(controls) == int(focused) > 10 and broken == "0"
