"""Any JSON, any bytes, any numbers give a result, or an error that names the file.

Documents that are right are changed in one place, which goes deeper than documents made of nothing:
a value becomes another one, of any type, or is left out. `HYPOTHESIS_PROFILE=long` tries 25 times
as many.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ftdpp import checkpoint, recipe, results, runs, systems
from ftdpp.checkpoint import RunError
from ftdpp.data import class_table
from ftdpp.index import Index, read_frame
from ftdpp.readers import DataError, FrameRef, domains, list_frames, reader_of
from ftdpp.recipe import RecipeError
from ftdpp.report.survey import curves
from ftdpp.tests import dense_layouts, layouts

calm = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("default", max_examples=40, **calm)
settings.register_profile("long", max_examples=1000, **{**calm, "derandomize": False})
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, 1e308, -1e308, 1e-310, 0.5]),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["", "..", "/etc/passwd", "\0", "[red]", "a" * 300, "NaN"]),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value of a document."""
    keys: list[Any] = []
    if isinstance(document, dict):
        keys = list(document)
    elif isinstance(document, list):
        keys = list(range(len(document)))[:4]
    return [path, *(p for key in keys for p in places(document[key], (*path, key)))]


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """The document with one of its values replaced or left out."""
    path = draw(st.sampled_from(places(document)))
    value = draw(values)
    if not path:
        return value
    made = copy.deepcopy(document)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    if draw(st.integers(0, 3)):
        holder[path[-1]] = value
    else:
        del holder[path[-1]]
    return made


@contextmanager
def or_refused(kind: type[Exception], words: object) -> Iterator[None]:
    """What happens inside ends well, or in an error of this kind that names these words."""
    try:
        yield
    except kind as error:
        if str(words) not in str(error):
            raise AssertionError(f"{words} is not named") from error


def text_of(document: Any) -> bytes:
    return json.dumps(document).encode(errors="surrogatepass")


# ---- files of a run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meta(finished: Path) -> dict[str, Any]:
    return checkpoint.read_metadata(finished / "last.safetensors")


@given(data=st.data())
def test_metadata(data: Any, meta: dict[str, Any], tmp_path: Path) -> None:
    """And the recipe in it, which is checked as one from the command line."""
    path = tmp_path / "a.safetensors"
    document = data.draw(changed(meta))
    if isinstance(document, dict) and data.draw(st.booleans()):  # what lies behind the digest
        document["digests"] = checkpoint._digests({}, document)
    save_file({"a": np.zeros(1)}, path, {"ftd": json.dumps(document)})
    with or_refused(RunError, path):
        found = checkpoint.read_metadata(path)
        if "recipe" in found:
            r = checkpoint.stored_recipe(found, path)
            r.check()
        checkpoint.read_training(path)


@given(content=st.binary(max_size=64) | values.map(text_of))
def test_any_safetensors(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"a\.safetensors"):
        checkpoint.read_metadata(path)


@given(data=st.data())
def test_run_json(data: Any, finished: Path, tmp_path: Path) -> None:
    document = json.loads((finished / "run.json").read_bytes())
    (tmp_path / "run.json").write_bytes(text_of(data.draw(changed(document))))
    with or_refused(RunError, "run.json"):
        record = runs.read_record(tmp_path)
        assert record is not None
        runs.recorded_places(record)


ROW = {
    **{"scenario": "usa-singapore", "method": "ftdpp", "title": "ftdpp", "domain": "singapore"},
    **{"split": "test", "checkpoint": "best", "seed": 0, "frames": 9},
    **{"miou": {"2d": 0.5, "3d": 0.25}, "iou": {"2d": {"car": 0.5}, "3d": {"car": None}}},
}
FILE = {"format": 1, "command": "c", "machine": "m", "preset": "small", "rows": [ROW]}


@given(document=changed(FILE))
def test_results(document: Any, tmp_path: Path) -> None:
    """What is read can be made a table of."""
    path = tmp_path / "compare.json"
    path.write_bytes(text_of(document))
    with or_refused(RunError, "compare.json"):
        for table in results.tables(results.read(path)["rows"]):
            assert results.markdown(table) and results.latex(table)


@given(
    content=st.binary(max_size=80)
    | st.text(alphabet='iteraon,12.5\n"x', max_size=60).map(str.encode)
)
def test_logs(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with or_refused(RunError, "log.csv"):
        curves(path)


# ---- settings ------------------------------------------------------------------------------------


@given(data=st.data())
def test_settings_on_the_command_line(data: Any) -> None:
    """A recipe, or a refusal that names the setting."""
    base = systems.recipe("usa-singapore", "ftdpp", "small")
    name = data.draw(st.sampled_from(list(recipe.settings(type(base)))))
    text = data.draw(st.text(max_size=12) | scalars.map(str) | st.lists(st.integers()).map(str))
    with or_refused(RecipeError, ""):
        made = systems.recipe("usa-singapore", "ftdpp", "small", overrides=[f"{name}={text}"])
        made.check()


# ---- data sets -----------------------------------------------------------------------------------


def read_all(root: Path, domain: str) -> None:
    """Read every frame as an index does."""
    row = domains()[domain]
    reader = reader_of(row)
    for ref in list_frames(root, row, None):
        table = class_table(reader, next(iter(reader.classes)), reader.categories(ref))
        read_frame(ref, table, None)


@pytest.fixture(scope="module")
def nuscenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.nuscenes(tmp_path_factory.mktemp("nuscenes"), scenes=layouts.SCENES[:2])


TABLES = (
    *("scene", "log", "sample", "sample_data", "calibrated_sensor", "sensor", "ego_pose"),
    *("category", "lidarseg"),
)


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_tables_of_nuscenes(data: Any, table: str, nuscenes: Path) -> None:
    path = nuscenes / "v1.0-mini" / f"{table}.json"
    before = path.read_bytes()
    try:
        path.write_bytes(text_of(data.draw(changed(json.loads(before)))))
        with or_refused(DataError, nuscenes):
            refs: list[FrameRef] = list_frames(nuscenes, domains()["singapore"], None)
            for ref in refs:
                assert all(file.is_relative_to(nuscenes) for file in ref.files)
    finally:
        path.write_bytes(before)


Writer = Callable[[Path], Path]
FILES: dict[str, tuple[Writer, str, str]] = {
    "sweep": (layouts.nuscenes, "singapore", "samples/LIDAR_TOP/frame-0001.pcd.bin"),
    "labels": (layouts.nuscenes, "singapore", "lidarseg/v1.0-mini/frame-0001_lidarseg.bin"),
    "calibration": (layouts.kitti, "skitti", "sequences/00/calib.txt"),
    "scan": (layouts.kitti, "skitti", "sequences/00/velodyne/000000.bin"),
    "label": (layouts.kitti, "skitti", "sequences/00/labels/000000.label"),
    "cloud": (layouts.virtual_kitti, "vkitti", "vkitti_npy/0001/00000.npy"),
    "cameras": (layouts.a2d2, "a2d2", "cams_lidars.json"),
    "colours": (layouts.a2d2, "a2d2", "class_list.json"),
    "palette": (dense_layouts.gta5, "gta5", "labels/00001.png"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Writer, Path]:
    made: dict[Writer, Path] = {}
    for write, _, _ in FILES.values():
        if write not in made:
            made[write] = write(tmp_path_factory.mktemp("set") / "root")
    return made


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_files_of_data_sets(data: Any, name: str, written: dict[Writer, Path]) -> None:
    """Bytes changed, cut or made of nothing; of JSON a value changed, too."""
    write, domain, file = FILES[name]
    root = written[write]
    path = root / file
    before = path.read_bytes()
    kinds = [st.binary(max_size=300), st.integers(0, len(before)).map(lambda n: before[:n])]
    place = st.integers(0, len(before) - 1)
    kinds.append(
        st.tuples(place, st.binary(min_size=1, max_size=8)).map(
            lambda change: before[: change[0]] + change[1] + before[change[0] + len(change[1]) :]
        )
    )
    if file.endswith(".json"):
        kinds.append(changed(json.loads(before)).map(text_of))
    try:
        path.write_bytes(data.draw(st.one_of(kinds)))
        with or_refused(DataError, root):
            read_all(root, domain)
    finally:
        path.write_bytes(before)


@given(data=st.data())
def test_meta_of_an_index(data: Any, world: Path, cache: Path, finished: Path) -> None:
    """What opens can be read, frame by frame, or says which is damaged."""
    r = checkpoint.load(finished / "best.safetensors")[0].recipe
    index = runs.Origin("singapore", world).index("val", r, cache)
    path = index.path / "meta.json"
    before = path.read_bytes()
    try:
        path.write_bytes(text_of(data.draw(changed(json.loads(before)))))
        with or_refused(DataError, index.path):
            again = Index(index.path)
            for i in range(len(again)):
                again.frame(i)
    finally:
        path.write_bytes(before)
