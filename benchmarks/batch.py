"""Does a batch lose or repeat anything, does its memory grow, and what does it cost beside its alternatives?

    python benchmarks/batch.py
    python benchmarks/batch.py --only rows --images 100000
    python benchmarks/batch.py --only cluster speed

Images and classifiers are made here: small pictures, a tiny ViT and a small one with random weights, which
change neither what is lost nor what it costs. Parts already in the results file are kept, so that they can
be measured one by one.

rows      IMAGES pictures, one in a hundred damaged; the process is killed (-9) twice and resumed
memory    resident memory of the process while it labels, a tenth of the images against all of them
cluster   the Parquet files of two Ray workers on this machine against those of one process
speed     processor seconds an image, beside the graph alone plus decoding, a loop over `classify`, open_clip
          with a torch DataLoader, and Ray Data's `map_batches` around the same classifier

Speed is in processor seconds because others use this machine, too: they make everybody wait, and hardly
change these.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import two_nodes
from PIL import Image

from cbpt_runtime.bench.results import describe_machine, describe_versions
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.loading import open_classifier
from export import random_bundle

RESULTS = Path(__file__).parent / "results" / "batch.json"
PARTS = ("rows", "memory", "cluster", "speed")
PARTITION = 4096
PICTURES = 500  # different ones; more are copies
BATCH = 64
KILLED_AT = (0.2, 0.6)  # share of the partitions that are finished


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--photos", type=int, default=256, help="of the speed part")
    parser.add_argument("--repeats", type=int, default=3, help="of the speed part")
    parser.add_argument("--tower", default="ViT-B-32", help="of the speed part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="kept, and used again")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    work = {
        "rows": measure_rows,
        "memory": measure_memory,
        "cluster": measure_cluster,
        "speed": measure_speed,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.scratch or Path(scratch)
        folder.mkdir(exist_ok=True)
        for part in options.only:
            result = work[part](folder, options)
            result |= {
                "load_average": round(os.getloadavg()[0], 2),
                "machine": describe_machine(),
                "versions": describe_versions() | extra_versions(),
            }
            found[part] = result
            print(part, json.dumps({key: value for key, value in result.items() if key != "machine"}))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(found, indent=1) + "\n")


def extra_versions() -> dict[str, str]:
    """Return what the batch runs on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("daft", "pyarrow", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def tiny_graph(folder: Path) -> Path:
    """Return a repository with a classifier of a few thousand weights, for what does not depend on it."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}}
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "batch-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "configs")
    return repository(folder, "batch-tiny")


def repository(folder: Path, tower: str) -> Path:
    """Return a repository with random weights, made once."""
    place = folder / tower
    if not place.exists():
        bundle = random_bundle(tower, folder / f"{tower}-bundle")
        export_bundle(bundle, place, name="batch", profile=Profile(max_batch=64, threads=1))
    return place


def make_pictures(folder: Path, count: int, *, side: int) -> Path:
    """Pictures in a thousand to a folder, one in a hundred damaged."""
    place = folder / f"pictures-{side}-{count}"
    if place.exists():
        return place
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(min(PICTURES, count)):
        buffer = io.BytesIO()
        noise = generator.integers(0, 256, (max(side // 8, 4), max(side // 8, 4), 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side)).save(buffer, "JPEG", quality=85)
        contents.append(buffer.getvalue())
    partial = folder / "pictures.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for number in range(count):
        below = partial / f"{number // 1000:04}"
        below.mkdir(parents=True, exist_ok=True)
        content = contents[number % len(contents)]
        if number % 100 == 7:
            content = content[: len(content) // 3] if number % 200 == 7 else b"no image"
        (below / f"{number:07}.jpg").write_bytes(content)
    partial.rename(place)
    return place


def label_command(pictures: Path, classifier: Path, output: Path, *options: str) -> list[str]:
    """Return the command that is measured."""
    words = [str(pictures), "--classifier", str(classifier), "--output", str(output), "--json", *options]
    return [sys.executable, "-m", "cbpt_runtime", "label", *words]


def resident_mib(process: int) -> float:
    """Return what a process has in memory now."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024 if "VmRSS:" in text else 0.0


def watch(command: list[str], stages: Path, *, kill_after: int | None = None) -> dict[str, Any]:
    """Run a command, sample its memory by finished partitions, and kill it when so many are finished."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        samples: dict[int, float] = {}
        while process.poll() is None:
            done = len(list(stages.glob("part-*.parquet")))
            if kill_after is not None and done >= kill_after:
                process.send_signal(signal.SIGKILL)
                break
            try:
                samples[done] = max(samples.get(done, 0.0), resident_mib(process.pid))
            except (OSError, ValueError):
                break
            time.sleep(0.2)
        text = process.communicate()[0].decode()
    return {
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "resident_mib": samples,
        "answer": json.loads(text) if process.returncode == 0 else None,
        "partitions_finished": len(list(stages.glob("part-*.parquet"))),
    }


def measure_rows(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows out, images in, with two kills between."""
    pictures, classifier = make_pictures(folder, options.images, side=16), tiny_graph(folder)
    output = folder / "rows"
    for place in (output, folder / "rows.partial"):
        shutil.rmtree(place, ignore_errors=True)
    stages = folder / "rows.partial" / "stages" / "labels"
    command = label_command(pictures, classifier, output, "--resume")
    partitions = -(-options.images // PARTITION)
    runs, kept = [], {}
    for share in (*KILLED_AT, None):
        run = watch(command, stages, kill_after=None if share is None else int(share * partitions))
        again = {file.name: file.stat().st_mtime_ns for file in stages.glob("part-*.parquet")}
        assert kept.items() <= again.items() or share is None, "a finished partition was written again"
        kept = again or kept
        runs.append({key: value for key, value in run.items() if key not in ("answer", "resident_mib")})
    final = {file.name: file.stat().st_mtime_ns for file in (output / "labels").iterdir()}
    table = pa.concat_tables([pq.read_table(output / "labels" / name) for name in sorted(final)])
    keys = set(table.column("key").to_pylist())
    damaged = sum(number % 100 == 7 for number in range(options.images))
    result = {
        "images_in": options.images,
        "rows_out": len(table),
        "different_keys": len(keys),
        "all_keys_are_images": keys == {str(path) for path in pictures.rglob("*.jpg")},
        "damaged_in": damaged,
        "errors_out": len(table) - table.column("error").null_count,
        "finished_partitions_written_again": sum(final[name] != at for name, at in kept.items()),
        "partitions": len(final),
        "runs": runs,
    }
    assert result["rows_out"] == result["different_keys"] == options.images
    assert result["errors_out"] == damaged
    assert result["all_keys_are_images"]
    return result


def measure_memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory while labelling: of a tenth of the images, and of all."""
    found: dict[str, Any] = {}
    for count in (options.images // 10, options.images):
        output = folder / "memory"
        for place in (output, folder / "memory.partial"):
            shutil.rmtree(place, ignore_errors=True)
        command = label_command(
            make_pictures(folder, count, side=16), tiny_graph(folder), output, "--partition", "1000"
        )
        run = watch(command, folder / "memory.partial" / "stages" / "labels")
        assert run["exit_code"] == 0
        samples = {done: mib for done, mib in run["resident_mib"].items() if done}
        found[str(count)] = {
            "first_partitions_mib": round(max(mib for done, mib in samples.items() if done <= 3)),
            "half_way_mib": round(samples[min(samples, key=lambda done: abs(done - max(samples) / 2))]),
            "peak_mib": round(max(run["resident_mib"].values())),
            "images_per_second": run["answer"]["images_per_second"],
        }
    return found


def measure_cluster(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the files of two Ray workers with those of this process."""
    pictures, classifier = make_pictures(folder, 3000, side=16), tiny_graph(folder)
    outputs = {}
    program = [sys.executable, two_nodes.__file__]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        address = running.stdout.readline().strip()
        for name, more in (("process", {}), ("cluster", {**two_nodes.CLIENT, "RAY_ADDRESS": address})):
            outputs[name] = folder / f"cluster-{name}"
            shutil.rmtree(outputs[name], ignore_errors=True)
            command = label_command(pictures, classifier, outputs[name], "--partition", "256")
            subprocess.run(command, env={**os.environ, **more}, check=True, stdout=subprocess.DEVNULL)
        running.stdin.close()
    files = {name: sorted((output / "labels").iterdir()) for name, output in outputs.items()}
    same = [one.read_bytes() == other.read_bytes() for one, other in zip(*files.values(), strict=True)]
    tables = [pa.concat_tables(map(pq.read_table, own)) for own in files.values()]
    assert tables[0].equals(tables[1])
    return {
        "images": len(tables[0]),
        "nodes": 2,
        "files": len(same),
        "files_with_the_same_bytes": sum(same),
    }


Answers = dict[str, Any]
"""Labels, where a contestant gives them, and processor seconds that it took in other processes."""


def cost(work: Callable[[list[Path]], Answers], paths: list[Path]) -> tuple[float, Answers]:
    """Processor seconds of a contestant, with all its threads, and what it said."""
    begun = time.process_time()
    said = work(paths)
    return time.process_time() - begun + said.get("elsewhere_s", 0.0), said


def measure_speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds an image, of a real tower at its real size, side by side, several times over.

    What a start costs, of an engine or a classifier, is paid once however many images there are: it is
    measured with a few images, and subtracted.
    """
    classifier_path = repository(folder, options.tower)
    pictures = make_pictures(folder, options.photos, side=320)
    paths = [path for path in sorted(pictures.rglob("*.jpg")) if int(path.stem) % 100 != 7]
    few = paths[: len(paths) // 4]
    classifier = open_classifier(classifier_path, threads=1)
    pixels = classifier.read(paths[:BATCH])

    def graph(some: list[Path]) -> Answers:
        for start in range(0, len(some), BATCH):
            classifier.predict(pixels[: len(some) - start])
        return {}

    def decoding(some: list[Path]) -> Answers:
        for path in some:
            classifier.read([path])
        return {}

    def loop(some: list[Path]) -> Answers:
        return {"label": [classifier(path).labels[0].name for path in some]}

    contestants: dict[str, Callable[[list[Path]], Answers]] = {
        "graph alone": graph,
        "decoding alone": decoding,
        "label": lambda some: label(some, classifier_path, folder),
        "classify, image by image": loop,
        "open_clip and a DataLoader": open_clip_loop(options.tower),
        "Ray Data's map_batches": lambda some: ray_data(some, classifier_path),
    }
    rounds: list[dict[str, float]] = []
    with ray_nodes():
        for work in contestants.values():
            work(few)  # so that nobody pays for imports
        for _ in range(options.repeats):
            seconds, said = {}, {}
            for name, work in contestants.items():
                start, _ = cost(work, few)
                whole, said[name] = cost(work, paths)
                seconds[name] = (whole - start) / (len(paths) - len(few))
            own = said["classify, image by image"]["label"]
            assert said["label"]["label"] == own == said["Ray Data's map_batches"]["label"]
            rounds.append(seconds)
            print({name: round(1000 * one, 2) for name, one in seconds.items()}, flush=True)
    floor = [one["graph alone"] + one["decoding alone"] for one in rounds]
    return {
        "images": len(paths),
        "few": len(few),
        "tower": options.tower,
        "threads": 1,
        "repeats": len(rounds),
        "processor_seconds_an_image": {name: median(one[name] for one in rounds) for name in contestants},
        "share_of_graph_plus_decoding": {
            name: {
                "median": median(
                    shares := [least / one[name] for least, one in zip(floor, rounds, strict=True)]
                ),
                "all": shares,
            }
            for name in list(contestants)[2:]
        },
    }


def label(paths: list[Path], classifier: Path, folder: Path) -> Answers:
    """Return what is measured, asked for images by a table of their paths."""
    from cbpt_runtime.batch.labelling import label_images
    from cbpt_runtime.batch.sources import Source
    from cbpt_runtime.batch.workers import Work

    output, table = folder / "speed", folder / "speed.csv"
    shutil.rmtree(output, ignore_errors=True)
    table.write_text("path\n" + "".join(f"{path}\n" for path in paths))
    label_images(Source(name=str(table)), output, Work(classifier=str(classifier)))
    tables = [pq.read_table(file) for file in sorted((output / "labels").iterdir())]
    return {"label": pa.concat_tables(tables).column("label").to_pylist()}


class RayLabeller:
    """The same classifier in an actor of Ray Data."""

    def __init__(self, classifier: str) -> None:
        self.classifier = open_classifier(classifier, threads=1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Labels, and what this process has taken so far."""
        named = [(path, path) for path in batch["path"]]
        labels = [answer.labels[0].name for answer in self.classifier.classify_each(named)]
        return {"label": labels, "seconds": [time.process_time()] * len(labels)}


def ray_data(paths: list[Path], classifier: Path) -> Answers:
    """Run what Ray's guides recommend for batches, in one worker; what Ray's servers take is not counted."""
    import ray

    rows = ray.data.from_items([{"path": str(path)} for path in paths])
    answers = rows.map_batches(
        RayLabeller,
        fn_constructor_args=(str(classifier),),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    found = answers.take_all()
    return {"label": [row["label"] for row in found], "elsewhere_s": max(row["seconds"] for row in found)}


@contextmanager
def ray_nodes() -> Iterator[None]:
    """Ray, on two nodes of this machine."""
    os.environ |= two_nodes.CLIENT
    import ray.data  # it needs the package pandas

    program = [sys.executable, two_nodes.__file__]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        ray.init(address=running.stdout.readline().strip(), logging_level="ERROR", log_to_driver=False)
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:  # first of all: Ray ends a process that has lost its cluster
            ray.shutdown()
            running.stdin.close()


def open_clip_loop(tower: str) -> Callable[[list[Path]], Answers]:
    """Return what people write: open_clip's model and transform, in a torch DataLoader of this process."""
    import open_clip
    import torch

    model, _, transform = open_clip.create_model_and_transforms(tower, pretrained=None)
    head = torch.nn.functional.normalize(torch.randn(100, model.visual.output_dim), dim=1)

    class Photos(torch.utils.data.Dataset):
        def __init__(self, paths: list[Path]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> torch.Tensor:
            return transform(Image.open(self.paths[number]))

    def work(paths: list[Path]) -> Answers:
        torch.set_num_threads(1)
        with torch.inference_mode():
            for batch in torch.utils.data.DataLoader(Photos(paths), batch_size=BATCH):
                (model.eval().encode_image(batch, normalize=True) @ head.T).argmax(dim=1)
        return {}

    return work


if __name__ == "__main__":
    main()
