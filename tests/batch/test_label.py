"""`cbpt-runtime label`: a row for every image, the rows of `classify`, and nothing twice after kill -9."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import daft  # noqa: F401
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("BATCHES NOT TESTED: no daft; install cbpt-runtime[batch]", stacklevel=1)
    pytest.skip("no daft", allow_module_level=True)

from cbpt_runtime.artifacts import MARKER
from cbpt_runtime.batch.engine import start_engine
from cbpt_runtime.batch.labelling import Labelled, _Query, label_images
from cbpt_runtime.batch.partitions import COLUMNS, make_plan
from cbpt_runtime.batch.sources import Source
from cbpt_runtime.batch.workers import Work
from cbpt_runtime.classification import Classifier
from cbpt_runtime.errors import ConfigError, ImageDataError, OutputError
from cbpt_runtime.loading import open_classifier

BROKEN = {"07.png": b"no image", "20.png": b""}


@pytest.fixture
def photos(flat: Path) -> Path:
    """36 images in a folder, two of them damaged, and a file that is none."""
    for name, content in BROKEN.items():
        (flat / name).write_bytes(content)
    (flat / "readme.txt").write_text("hello")
    return flat


@pytest.fixture(scope="session")
def classifier(tiny_graph: Path) -> Classifier:
    return open_classifier(tiny_graph)


@pytest.fixture
def label(tiny_graph: Path, tmp_path: Path) -> Callable[..., Labelled]:
    """Labels a source with the tiny graph into ``tmp_path/out``."""

    def labelled(
        name: object, *, column: str | None = None, key: str | None = None, **options: Any
    ) -> Labelled:
        source = Source(name=str(name), column=column, key=key)
        work = Work(classifier=str(tiny_graph), top=2)
        return label_images(source, tmp_path / "out", work, **{"partition": 10, **options})

    return labelled


def rows_of(output: Path) -> list[dict[str, Any]]:
    files = sorted((output / "labels").iterdir())
    tables = [pq.read_table(file) for file in files]
    assert all(table.schema.equals(COLUMNS) for table in tables)
    return pa.concat_tables(tables).to_pylist()


def check(rows: list[dict[str, Any]], paths: list[Path], classifier: Classifier) -> None:
    """The rows are those that `classify` gives, to the bit, in this order; the damaged have their error."""
    good = [path for path in paths if path.name not in BROKEN]
    said = iter(classifier.classify([(str(path), path) for path in good], top=2))
    assert len(rows) == len(paths)
    for row, path in zip(rows, paths, strict=True):
        if path.name in BROKEN:
            assert row["error"]
            assert {row[name] for name in ("label", "probability", "alarm", "suspected_target")} == {None}
            continue
        answer = next(said)
        assert row["error"] is None
        assert row["label"] == answer.labels[0].name
        assert [(one["label"], one["probability"]) for one in row["top"]] == [
            (one.name, one.probability) for one in answer.labels
        ]
        assert (row["probability"], row["alarm"]) == (answer.labels[0].probability, answer.alarm)
        assert row["suspicious"] == answer.suspicious
        assert row["suspected_target"] == answer.alarm_target == "Blue Stripes"


def test_a_folder_gets_the_rows_of_classify_and_an_error_for_what_is_damaged(
    photos: Path, label: Callable[..., Labelled], classifier: Classifier
) -> None:
    done = label(photos)
    rows = rows_of(done.path)
    paths = sorted(photos.glob("*.png"))
    assert [row["key"] for row in rows] == [str(path) for path in paths]
    check(rows, paths, classifier)
    assert any("readme.txt" in note for note in done.notes)
    summary = json.loads((done.path / "summary.json").read_text())
    assert summary["images"] == 36
    assert summary["failures"] == len(BROKEN)
    assert sum(summary["classes"].values()) == 36 - len(BROKEN)
    assert summary["alarms"] == sum(row["alarm"] >= 0.5 for row in rows if row["error"] is None)
    assert len(summary["loudest"]) == summary["alarms"]
    assert {path.name for path in done.path.iterdir()} == {"labels", "summary.json", "report.html", MARKER}
    assert not done.path.with_name("out.partial").exists()


def test_the_loudest_come_first_and_equal_ones_in_order(tmp_path: Path) -> None:
    from cbpt_runtime.batch.summary import count_rows

    rows = [
        {"key": f"{n}.png", "label": "cat", "probability": 0.5, "top": [], "alarm": alarm, "error": None}
        for n, alarm in enumerate([0.4, 0.9, 0.5, 0.95, None])
    ]
    for row in rows:
        row["suspected_target"] = "dog"
        row["suspicious"] = None if row["alarm"] is None else row["alarm"] > 0.45
    files = {}
    for number in range(2):
        files[number] = tmp_path / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, COLUMNS), files[number])
    counts = count_rows(files)
    assert [(loud.key, loud.partition, loud.row) for loud in counts.loudest] == [
        ("3.png", 0, 3), ("3.png", 1, 3), ("1.png", 0, 1), ("1.png", 1, 1), ("2.png", 0, 2), ("2.png", 1, 2),
    ]  # fmt: skip
    assert counts.alarms == counts.suspicious == 6
    assert counts.alarm_targets == {"dog": 6}


def test_the_page_has_the_pictures_of_the_alarms_loudest_first(
    photos: Path, label: Callable[..., Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbpt_runtime.batch.summary.ALARM_THRESHOLD", 0.0)
    done = label(photos)
    page = (done.path / "report.html").read_text()
    shown = re.findall(r'<img src="data:image/[a-z]+;base64,[^"]+" alt="([^"]+)">', page)
    said = sorted(
        (row for row in rows_of(done.path) if row["alarm"] is not None), key=lambda row: -row["alarm"]
    )
    assert len(said) == 34
    assert [caption.partition(":")[0] for caption in shown] == [row["key"] for row in said]
    assert "34 of 36 images raised the alarm" in page


def test_a_pattern_takes_what_matches(
    photos: Path, label: Callable[..., Labelled], classifier: Classifier
) -> None:
    check(rows_of(label(photos / "0*.png").path), sorted(photos.glob("0*.png")), classifier)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_of_paths_keeps_its_order_and_takes_relative_ones(
    suffix: str, photos: Path, label: Callable[..., Labelled], classifier: Classifier
) -> None:
    paths = sorted(photos.glob("*.png"), reverse=True)
    table = pa.table({"id": [f"n{path.stem}" for path in paths], "path": [path.name for path in paths]})
    file = photos / f"table.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    elif suffix == "csv":
        file.write_text("id,path\n" + "".join(f"{one['id']},{one['path']}\n" for one in table.to_pylist()))
    else:
        file.write_text("".join(json.dumps(one) + "\n" for one in table.to_pylist()))
    rows = rows_of(label(file, key="id").path)
    assert [row["key"] for row in rows] == table.column("id").to_pylist()
    check(rows, paths, classifier)


@pytest.mark.parametrize("is_struct", [False, True])
def test_a_table_of_images_is_read_group_by_group(
    is_struct: bool, photos: Path, label: Callable[..., Labelled], classifier: Classifier
) -> None:
    paths = sorted(photos.glob("*.png"))
    values: list[Any] = [path.read_bytes() for path in paths]
    if is_struct:  # as Hugging Face's datasets has images
        values = [{"bytes": value, "path": path.name} for value, path in zip(values, paths, strict=True)]
    pq.write_table(pa.table({"image": values}), photos / "images.parquet", row_group_size=7)
    rows = rows_of(label(photos / "images.parquet").path)
    assert rows[35]["key"] == f"{photos / 'images.parquet'}#35"
    check(rows, paths, classifier)


def make_shard(file: Path, paths: list[Path]) -> None:
    with tarfile.open(file, "w") as archive:
        for path in paths:
            archive.add(path, path.name)
            text = b'{"caption": "x"}'
            entry = tarfile.TarInfo(f"{path.stem}.json")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))


def test_shards_are_read_in_order_and_a_cut_one_says_so(
    photos: Path, label: Callable[..., Labelled], classifier: Classifier
) -> None:
    paths = sorted(photos.glob("*.png"))
    make_shard(photos / "a.tar", paths[:20])
    make_shard(photos / "b.tar", paths[20:])
    done = label(photos / "*.tar")
    rows = rows_of(done.path)
    assert rows[0]["key"] == str(photos / "a.tar" / "00.png")
    check(rows, paths, classifier)
    assert any("20 files" in note for note in done.notes)
    content = (photos / "b.tar").read_bytes()
    (photos / "b.tar").write_bytes(content[: len(content) // 2 + 100])
    rows = rows_of(label(photos / "*.tar", force=True).path)
    check(rows[:20], paths[:20], classifier)
    assert rows[-1]["key"] == str(photos / "b.tar")
    assert rows[-1]["error"]
    assert 0 < len(rows) - 21 < 16


def test_a_name_that_is_no_text_has_its_row(photos: Path, label: Callable[..., Labelled]) -> None:
    folder = photos.parent / "odd"
    folder.mkdir()
    shutil.copy(photos / "00.png", folder / os.fsdecode(b"caf\xe9.png"))
    (row,) = rows_of(label(folder).path)
    assert row["key"].endswith(r"caf\xe9.png")
    assert row["label"]


def test_a_missing_file_of_a_table_is_a_row(photos: Path, label: Callable[..., Labelled]) -> None:
    (photos / "t.csv").write_text("path\n00.png\nnowhere.png\n")
    rows = rows_of(label(photos / "t.csv").path)
    assert [row["error"] is None for row in rows] == [True, False]
    assert "no such file" in rows[1]["error"].lower()


def test_kill_and_resume_repeats_no_finished_partition_and_loses_none(
    photos: Path, label: Callable[..., Labelled], tiny_graph: Path, tmp_path: Path
) -> None:
    whole = rows_of(label(photos).path)
    shutil.rmtree(tmp_path / "out")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from cbpt_runtime.batch import labelling, partitions\n"
        "from cbpt_runtime.batch.sources import Source; from cbpt_runtime.batch.workers import Work\n"
        "write = partitions.write_whole\n"
        "def die_at_the_third(path, table):\n"
        "    if path.name == 'part-00002.parquet':\n"
        "        path.with_suffix('.tmp').write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, table)\n"
        "partitions.write_whole = die_at_the_third\n"
        f"labelling.label_images(Source(name={str(photos)!r}), Path({str(tmp_path / 'out')!r}),\n"
        f"    Work(classifier={str(tiny_graph)!r}, top=2), partition=10)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    stages = tmp_path / "out.partial" / "stages" / "labels"
    finished = {file.name: file.stat().st_mtime_ns for file in stages.glob("part-*.parquet")}
    assert {"part-00000.parquet", "part-00001.parquet"} <= set(finished)
    assert len(finished) < 4
    assert not (tmp_path / "out").exists()
    time.sleep(0.01)
    done = label(photos, resume=True)
    assert rows_of(done.path) == whole
    assert {
        file.name: file.stat().st_mtime_ns
        for file in (done.path / "labels").iterdir()
        if file.name in finished
    } == finished
    assert done.images_now == 36 - 10 * len(finished)


def test_resume_refuses_another_run(
    photos: Path, label: Callable[..., Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError(expected="room", got="none", fix="Wait.")

    with monkeypatch.context() as patch:
        patch.setattr("cbpt_runtime.batch.partitions.Partitions._finish", full)
        with pytest.raises(OutputError):
            label(photos)
    with pytest.raises(ConfigError, match="partition 9, which was 10"):
        label(photos, partition=9, resume=True)
    assert len(rows_of(label(photos, resume=True).path)) == 36


def test_an_engine_that_fails_is_asked_again_and_then_given_up(
    photos: Path, label: Callable[..., Labelled], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cbpt_runtime.batch import labelling
    from cbpt_runtime.errors import LabelError

    whole = labelling._Query.rows
    calls: list[list[int]] = []

    def dies_after_the_first(query: Any, numbers: list[int]) -> Iterator[Any]:
        calls.append(numbers)
        yield from whole(query, numbers[:1] if len(calls) < 3 else numbers)
        if len(calls) < 3:
            raise RuntimeError("a worker died")

    with monkeypatch.context() as patch:
        patch.setattr(labelling._Query, "rows", dies_after_the_first)
        assert len(rows_of(label(photos).path)) == 36
    assert calls == [[0, 1, 2, 3], [1, 2, 3], [2, 3]]
    shutil.rmtree(tmp_path / "out")

    def loses_everything(_query: Any, _numbers: list[int]) -> Iterator[Any]:
        return iter(())

    monkeypatch.setattr(labelling._Query, "rows", loses_everything)
    with pytest.raises(LabelError, match="rows of 4 more partitions"):
        label(photos)
    assert not (tmp_path / "out").exists()


def test_a_bundle_gets_the_same_labels(
    photos: Path, tiny_bundle: Any, tmp_path: Path, classifier: Classifier
) -> None:
    work = Work(classifier=str(tiny_bundle.path), top=2, device="cpu")
    done = label_images(Source(name=str(photos)), tmp_path / "out", work)
    said = [row["label"] for row in rows_of(done.path) if row["error"] is None]
    good = [path for path in sorted(photos.glob("*.png")) if path.name not in BROKEN]
    assert said == [answer.labels[0].name for answer in classifier.classify([(str(p), p) for p in good])]
    assert done.facts["digest"] == tiny_bundle.digest


def test_what_cannot_be_labelled_is_refused(
    photos: Path, label: Callable[..., Labelled], tiny_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(ImageDataError, match="nothing there"):
        label(photos / "nowhere")
    with pytest.raises(ImageDataError, match="got none"):
        label(photos / "*.jpg")
    assert not list(photos.parent.glob("out*"))
    for path in photos.glob("*.png"):
        path.unlink()
    with pytest.raises(ImageDataError, match=r"readme\.txt"):
        label(photos)
    (photos / "t.csv").write_text("name\nx\n")
    with pytest.raises(ImageDataError, match="Name the column"):
        label(photos / "t.csv")
    with pytest.raises(ConfigError, match="mounted"):
        label_images(Source(name=str(photos)), Path("s3://bucket/out"), Work(classifier=str(tiny_graph)))
    assert not (tmp_path / "out").exists()


def test_workers_of_a_cluster_need_no_file_of_the_run(
    photos: Path, tiny_graph: Path, classifier: Classifier, tmp_path: Path
) -> None:
    references = Source(name=str(photos)).references()
    plan = make_plan(tmp_path / "plan", references, {}, size=20, notes=[])
    work = Work(classifier=str(tiny_graph), digest=classifier.digest)
    rows = _Query(start_engine(None), plan, work, "ray://head:10001").rows([0, 1])
    shutil.rmtree(plan.folder)  # as on another machine
    assert sum(map(len, rows)) == 36
