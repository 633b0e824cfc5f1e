"""The demo from nothing to a purified bundle, and its last act: exported and served, asked over the wire.

Only the step that measures knows the trigger.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbpt_runtime.artifacts import claimed, writing
from cbpt_runtime.artifacts.names import exists
from cbpt_runtime.demo.pictures import contact_sheet, write_folders
from cbpt_runtime.demo.suspect import TARGET, DemoScale, Pictures, draw_pictures, train_suspect
from cbpt_runtime.errors import ConfigError, OutputError, PurificationError
from cbpt_runtime.redteam.implant import Implant
from cbpt_runtime.runtime.prediction import Answer

if TYPE_CHECKING:
    from cbpt_runtime.bundle import Bundle
    from cbpt_runtime.config import Precision
    from cbpt_runtime.evaluation import Evaluation
    from cbpt_runtime.evaluation.metrics import Rate
    from cbpt_runtime.progress import Progress

MAXIMUM_ASR = 0.10
MAXIMUM_CA_DROP = 0.10
_ENTRIES = (
    "images",
    "triggered",
    "reference-checkpoint",
    "suspect-checkpoint",
    "bundle",
    "model_repository",
    "classes.txt",
    "pictures.png",
)
REPOSITORY = "model_repository"
MAX_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo made and measured.

    Attributes:
        output: The demo's folder.
        bundle: The purified bundle.
        report: Its report, a single HTML file.
        checkpoint: The suspect checkpoint, an open_clip folder.
        classes_file: One class name per line.
        train_images: Clean images, one folder per class; purification draws its few from them.
        test_images: Clean images for measuring.
        triggered_images: The same test images with the trigger; folder = true class.
        pictures: A contact sheet of clean (above) and triggered pictures (below).
        target: The class the attacker chose.
        implanted_clean_accuracy: Clean accuracy of the suspect model when it left training.
        implanted_attack_success_rate: Attack success rate then: the proof that the backdoor is there.
        suspects: Names of the suspected targets purification found.
        evaluation: Rates before and after purification, on the test images.
        stage_seconds: Wall time of the demo's stages.
    """

    output: Path
    bundle: Path
    report: Path
    checkpoint: Path
    classes_file: Path
    train_images: Path
    test_images: Path
    triggered_images: Path
    pictures: Path
    target: str
    implanted_clean_accuracy: float
    implanted_attack_success_rate: float
    suspects: tuple[str, ...]
    evaluation: Evaluation
    stage_seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-able dict."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        return {**plain, "suspects": list(self.suspects), "evaluation": self.evaluation.to_dict()}


def run_demo(
    output: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    scale: DemoScale | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Draw pictures, train a backdoored CLIP on them, prove the backdoor, purify the model and measure again.

    Args:
        output: The folder to make.
        seed: Seed of every random choice.
        device: 'auto', 'cpu' or 'cuda'.
        force: Replace what an earlier demo left in the folder.
        scale: How large the demo is.
        progress: Told how far the work is.

    Raises:
        OutputError: The folder exists, or cannot be written.
        ImplantError: The backdoor did not take, so there would be nothing to show.
        PurificationError: The true target was not found, the attack still succeeds in more than `MAXIMUM_ASR`
            of the triggered pictures, or clean accuracy fell by more than `MAXIMUM_CA_DROP`.
    """
    from cbpt_runtime.evaluation import evaluate
    from cbpt_runtime.models.clip import resolve_device

    output, scale = Path(output), scale or DemoScale()
    place = str(resolve_device(device))
    with _prepared(output, force=force):
        seconds: dict[str, float] = {}
        implanted = make_suspect(output, seconds, scale=scale, seed=seed, device=place, progress=progress)
        with _timed(seconds, "purify"):
            bundle = purify_suspect(output, seed, device, progress)
        with _timed(seconds, "evaluate"):
            clean, triggered = output / "images" / "test", output / "triggered"
            evaluation = evaluate(bundle, clean, triggered, TARGET, device=device, progress=progress)
        check_purification(evaluation)
        return _result(output, bundle, implanted, evaluation, seconds)


def make_suspect(
    output: Path,
    seconds: dict[str, float],
    *,
    scale: DemoScale,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Implant:
    """Draw the pictures, train the model and its backdoor, and write all of it.

    Args:
        output: A folder that is there.
        seconds: Told the wall time of both stages.
        scale: How much of it.
        seed: Seed of every random choice.
        device: Where it is trained.
        progress: Told how far the work is.
    """
    with _timed(seconds, "draw"):
        pictures = draw_pictures(scale, seed, progress)
        _write_pictures(output, pictures, scale.names)
    with _timed(seconds, "train"):
        trusted, implanted = train_suspect(pictures, scale, seed, device=device, progress=progress)
        trusted.save(output / "reference-checkpoint")
        implanted.save(output / "suspect-checkpoint")
    return implanted


def check_purification(evaluation: Evaluation) -> None:
    """Raise PurificationError unless the target was found, the attack is gone and accuracy held."""
    before, *_, after = evaluation.heads["before"], *evaluation.heads.values()
    asr_before, asr_after = _value(before.attack_success_rate), _value(after.attack_success_rate)
    ca_drop = _value(before.clean_accuracy) - _value(after.clean_accuracy)
    problems = []
    if TARGET not in evaluation.suspects:
        problems.append(f"suspects {', '.join(evaluation.suspects) or 'none'} instead of {TARGET}")
    if not asr_after <= MAXIMUM_ASR:
        problems.append(f"attack success {asr_after:.3f}")
    if not ca_drop <= MAXIMUM_CA_DROP:
        problems.append(f"clean accuracy lower by {ca_drop:.3f}")
    if problems:
        raise PurificationError(
            expected=f"the target found, attack success at most {MAXIMUM_ASR:.2f} (before: {asr_before:.3f}) "
            f"and clean accuracy lower by at most {MAXIMUM_CA_DROP:.2f}",
            got="; ".join(problems),
            fix="Try another --seed; the bundle and its report are kept for inspection.",
        )


def _value(rate: Rate | None) -> float:
    """Return the share itself; there are always pictures in the demo."""
    return math.nan if rate is None or rate.rate is None else rate.rate


def purify_suspect(
    output: Path, seed: int, device: str, progress: Progress | None, *, precision: Precision = "auto"
) -> Bundle:
    """Exactly what `cbpt-runtime purify` does: checkpoint, class names, clean images, a trusted relative.

    The model knows the sixteen names and no other words, and is searched for them alone.
    """
    from cbpt_runtime.pipeline import purify_checkpoint
    from cbpt_runtime.purification.cbpt import Cbpt

    return purify_checkpoint(
        output / "suspect-checkpoint",
        output / "classes.txt",
        output / "images" / "train",
        output / "bundle",
        reference=output / "reference-checkpoint",
        method=Cbpt(seed=seed, background_words=False, precision=precision),
        device=device,
        progress=progress,
    )


@contextmanager
def _prepared(output: Path, *, force: bool) -> Iterator[None]:
    """Keep the folder for this demo; with `force` clear what an earlier one left, and nothing else."""
    if not force and exists(output) and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(
            expected="a new folder for the demo",
            got=f"{output} exists",
            fix="Choose another --output, or replace the demo there with --force.",
        )
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with claimed(output, "demo"):
        with writing(output):
            for path in map(output.joinpath, _ENTRIES):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        yield


def _write_pictures(output: Path, pictures: Pictures, names: tuple[str, ...]) -> None:
    with writing(output):
        (output / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        write_folders(output / "images" / "train", names, pictures.train.images, pictures.train.labels)
        write_folders(output / "images" / "test", names, pictures.test.images, pictures.test.labels)
        write_folders(output / "triggered", names, pictures.triggered.images, pictures.triggered.labels)
        first = np.searchsorted(pictures.test.labels, np.arange(len(names)))
        both = np.concatenate([pictures.test.images[first], pictures.triggered.images[first]])
        contact_sheet(both, columns=max(1, (len(names) + 1) // 2)).save(output / "pictures.png")


def _result(
    output: Path, bundle: Bundle, implanted: Implant, evaluation: Evaluation, seconds: dict[str, float]
) -> DemoResult:
    return DemoResult(
        output=output,
        bundle=bundle.path,
        report=bundle.path / "report.html",
        checkpoint=output / "suspect-checkpoint",
        classes_file=output / "classes.txt",
        train_images=output / "images" / "train",
        test_images=output / "images" / "test",
        triggered_images=output / "triggered",
        pictures=output / "pictures.png",
        target=TARGET,
        implanted_clean_accuracy=implanted.clean_accuracy,
        implanted_attack_success_rate=implanted.measures[0].attack_success_rate,
        suspects=evaluation.suspects,
        evaluation=evaluation,
        stage_seconds=seconds,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedDemo:
    """What a real server said about two pictures.

    Attributes:
        repository: The exported model repository.
        server: Which server it was, and how the classifier ran.
        clean: Answer for a clean picture.
        triggered: Answer for the same picture with the trigger.
        seconds: From the start of the export to the end of the server.
    """

    repository: Path
    server: str
    clean: Answer
    triggered: Answer
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {**asdict(self), "repository": str(self.repository)}


def serve_demo(result: DemoResult, *, progress: Progress | None = None) -> ServedDemo | str:
    """Export the demo's bundle, serve it, classify a picture with and without the trigger, stop the server.

    Args:
        result: Of `run_demo`.
        progress: Told how far the work is.

    Returns:
        What the server said; or, where no tritonserver is installed, why nothing was served.

    Raises:
        ExportError: The parity gate failed.
        ServingError: The server did not start or answered wrongly.
    """
    from cbpt_runtime.export.profiles import Profile
    from cbpt_runtime.export.repository import export_bundle
    from cbpt_runtime.serving import Client, ServeConfig, running_server
    from cbpt_runtime.serving.triton.servers import find_server

    try:
        find_server()
    except ConfigError as error:
        return str(error)
    start = time.perf_counter()
    repository = result.output / REPOSITORY
    export_bundle(result.bundle, repository, name="demo", profile=Profile(max_batch=MAX_BATCH),
                  progress=progress)  # fmt: skip
    clean, triggered = _pair(result)
    config = ServeConfig(http_port=0, grpc_port=0, metrics_port=0)
    with running_server(repository, config) as server, Client(server.config.grpc_url) as client:
        answers = client.classify_files([(str(path), path) for path in (clean, triggered)], top=2)
        how = f"tritonserver {server.version}, {server.plan.placement.describe()}"
    return ServedDemo(
        repository=repository,
        server=how,
        clean=answers[0],
        triggered=answers[1],
        seconds=time.perf_counter() - start,
    )


def _pair(result: DemoResult) -> tuple[Path, Path]:
    """One test picture of another class than the target, without and with the trigger."""
    triggered = min(
        path for path in result.triggered_images.rglob("*.png") if path.parent.name != result.target
    )
    return result.test_images / triggered.relative_to(result.triggered_images), triggered
