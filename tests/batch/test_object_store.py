"""Sources in an object store, read by the engine from an S3 server on the loopback."""

from __future__ import annotations

import io
import socket
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import boto3
    import daft  # noqa: F401
    import pyarrow as pa
    import pyarrow.parquet as pq
    from moto.server import ThreadedMotoServer
except ImportError as error:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn(f"OBJECT STORES NOT TESTED: {error}", stacklevel=1)
    pytest.skip("no daft or moto", allow_module_level=True)

from cbpt_runtime.batch.engine import io_config
from cbpt_runtime.batch.labelling import label_images
from cbpt_runtime.batch.references import reason
from cbpt_runtime.batch.sources import Source
from cbpt_runtime.batch.workers import Work
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.loading import open_classifier

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def bucket(flat: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 client and a bucket ``bucket`` with 36 images at ``photos/``, one of them damaged."""
    server = ThreadedMotoServer(port=0)
    server.start()
    for _ in range(200):
        if server._server is not None:
            break
        time.sleep(0.05)
    _host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket="bucket")
    for path in sorted(flat.glob("*.png")):
        content = b"junk" if path.name == "07.png" else path.read_bytes()
        client.put_object(Bucket="bucket", Key=f"photos/{path.name}", Body=content)
    client.put_object(Bucket="bucket", Key="photos/readme.txt", Body=b"hello")
    yield client
    server.stop()


def test_a_prefix_a_pattern_tables_and_shards_of_a_bucket(
    bucket: Any, flat: Path, tiny_graph: Path, tmp_path: Path
) -> None:
    paths = sorted(flat.glob("*.png"))
    table = pa.table({"path": [f"photos/{path.name}" for path in paths]})
    with pa.BufferOutputStream() as stream:
        pq.write_table(table, stream)
        bucket.put_object(Bucket="bucket", Key="paths.parquet", Body=stream.getvalue().to_pybytes())
    images = pa.table({"bytes": [b"junk" if p.name == "07.png" else p.read_bytes() for p in paths]})
    with pa.BufferOutputStream() as stream:
        pq.write_table(images, stream, row_group_size=5)
        bucket.put_object(Bucket="bucket", Key="images.parquet", Body=stream.getvalue().to_pybytes())
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, content in zip(paths, images.column("bytes").to_pylist(), strict=True):
                entry = tarfile.TarInfo(path.name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        bucket.put_object(Bucket="bucket", Key="shards/0.tar", Body=buffer.getvalue())
    said = {
        answer.image: answer
        for answer in open_classifier(tiny_graph).classify([(p.name, p) for p in paths], top=3)
    }
    work = Work(classifier=str(tiny_graph), top=3)
    for number, name in enumerate(
        (
            "s3://bucket/photos",
            "s3://bucket/photos/*.png",
            "s3://bucket/paths.parquet",
            "s3://bucket/images.parquet",
            "s3://bucket/shards/*.tar",
        )
    ):
        done = label_images(Source(name=name), tmp_path / str(number), work, partition=16)
        rows = [
            row
            for file in sorted((done.path / "labels").iterdir())
            for row in pq.read_table(file).to_pylist()
        ]
        assert len(rows) == 36, name
        for row, path in zip(rows, paths, strict=True):
            if path.name == "07.png":
                assert row["error"], name
            else:
                answer = said[path.name]
                found = [(one["label"], one["probability"]) for one in row["top"]]
                assert found == [(one.name, one.probability) for one in answer.labels], name
                assert row["alarm"] == answer.alarm
        if name == "s3://bucket/photos":
            assert done.notes[0] == "left out 1 files that are not called like images"
            assert rows[0]["key"] == "s3://bucket/photos/00.png"


def test_what_is_not_in_the_bucket_is_said(bucket: Any, tiny_graph: Path, tmp_path: Path) -> None:
    for name, said in {
        "s3://bucket/nothing/*.png": "got none",
        "s3://nowhere/photos": "got none",
        "s3://nowhere/x.parquet": r"x\.parquet does not exist.*AWS_ENDPOINT_URL",
    }.items():
        with pytest.raises(ImageDataError, match=said):
            label_images(Source(name=name), tmp_path / "out", Work(classifier=str(tiny_graph)))
    bucket.put_object(Bucket="bucket", Key="t.csv", Body=b"path\nphotos/00.png\nphotos/gone.png\n")
    done = label_images(Source(name="s3://bucket/t.csv"), tmp_path / "out", Work(classifier=str(tiny_graph)))
    rows = pq.read_table(done.path / "labels" / "part-00000.parquet").to_pylist()
    assert [row["error"] is None for row in rows] == [True, False]


def test_a_store_that_does_not_answer_is_given_up_soon(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "http://127.0.0.1:{1}".format(*server.getsockname())
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    begun = time.monotonic()
    with pytest.raises(ImageDataError, match=r"refused.*Check the name, the network.*AWS_ENDPOINT_URL"):
        list(Source(name="s3://bucket/t.parquet").references())
    assert time.monotonic() - begun < 60  # as Daft would have it, it takes minutes


def test_the_token_of_hugging_face_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert io_config().hf.token == "hf_test"
    monkeypatch.delenv("HF_TOKEN")
    assert io_config().hf.token is None


def test_of_a_long_error_the_cause_at_its_end_is_kept() -> None:
    said = reason(ValueError(f"cannot\nread {'very ' * 100}far: connection refused"))
    assert len(said) < 300
    assert said.startswith("cannot read very")
    assert said.endswith("far: connection refused")
