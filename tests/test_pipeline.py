from __future__ import annotations

import errno
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cbpt_runtime.bundle import HEAD, REPORT, read_bundle
from cbpt_runtime.defenses.finetuning import Finetune
from cbpt_runtime.errors import (
    CheckpointError,
    ClassListError,
    ConfigError,
    ImageDataError,
    OutputError,
    PurificationError,
)
from cbpt_runtime.models import labelling
from cbpt_runtime.models.data import ClassList, CleanSplit
from cbpt_runtime.models.labelling import UnlabelledImages
from cbpt_runtime.pipeline import purify_checkpoint, read_method
from cbpt_runtime.purification import cbpt
from cbpt_runtime.purification.cbpt import Cbpt
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.method import Purified
from cbpt_runtime.purification.stages import StageStore


class FakePurify:
    """Stands in for minutes of purification; saves a stage, as the real one does."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def __call__(
        self,
        encoder: Any,
        classes: ClassList,
        split: CleanSplit,
        config: PurifyConfig,
        *,
        reference: Any = None,
        cluster: str | None = None,
        progress: Any = None,
        stages: StageStore | None = None,
    ) -> Purified:
        assert stages is not None
        found = stages.load("inversion")
        self.calls.append(
            {
                "config": config,
                "split": split,
                "classes": classes,
                "reference": reference,
                "resumed": found is not None,
            }
        )
        stages.save("inversion", {"x": torch.ones(2)}, {})
        if self.error is not None:
            raise self.error
        head = torch.nn.functional.normalize(
            torch.randn(
                len(classes.names), encoder.embed_dim, generator=torch.Generator().manual_seed(config.seed)
            ),
            dim=1,
        )
        return Purified(
            encoder=encoder,
            verdict="clean",
            class_embeddings=head,
            reference_embeddings=encoder.class_embeddings(classes),
            metrics={"heldout_ca_before": 0.5, "heldout_ca_after": 0.5},
            stage_seconds={"inversion": 0.1},
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePurify:
    purify = FakePurify()
    monkeypatch.setattr(cbpt, "purify", purify)
    return purify


@pytest.fixture
def purify_tiny(
    tiny_checkpoint_folder: Path, tiny_class_file: Path, tiny_image_folder: Path, tmp_path: Path
) -> Callable[..., Any]:
    def call(**changes: Any) -> Any:
        inputs = {
            "checkpoint": tiny_checkpoint_folder,
            "classes": tiny_class_file,
            "images": tiny_image_folder,
            "output": tmp_path / "out" / "bundle",
            "templates": ["a photo of a {}."],
            "shots": 4,
            "device": "cpu",
        }
        return purify_checkpoint(**(inputs | changes))

    return call


@pytest.fixture
def flat(flat: Path) -> Path:
    """The images without a suffix, and a file that is none."""
    for path in list(flat.iterdir()):
        path.rename(path.with_suffix(""))
    (flat / "list.csv").write_text("x")
    return flat


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is sure of what it sees, which that of a random model is not."""

    def seen(drawn: UnlabelledImages, *_: object) -> np.ndarray:
        brightness = drawn.images.mean(axis=(1, 2)).astype(np.float32)
        return brightness**4 / (brightness**4).sum(axis=1, keepdims=True)

    monkeypatch.setattr(labelling, "reference_probabilities", seen)


def names_beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_the_bundle_tells_where_it_comes_from(fake: FakePurify, purify_tiny: Callable) -> None:
    bundle = purify_tiny()
    manifest = read_bundle(bundle.path).manifest
    assert len(manifest["model"]["sha256"]) == 64
    assert manifest["model"]["format"] == "open_clip-folder"
    assert manifest["model"]["dtype"] == "float32"
    assert manifest["classes"]["names"] == ["red_square", "green disc", "Blue Stripes"]
    assert manifest["method"]["config"] == json.loads(json.dumps(PurifyConfig().to_dict()))
    assert (manifest["method"]["shots"], manifest["method"]["tune_images"]) == (4, 12)
    assert "torch" in manifest["versions"]
    assert REPORT in manifest["files"]
    assert names_beside(bundle.path) == ["bundle"]


def test_the_bundle_comes_with_papers_for_auditors(
    fake: FakePurify, purify_tiny: Callable, check_statement: Callable, check_bom: Callable
) -> None:
    bundle = purify_tiny()
    predicate = check_statement(bundle.read_file("verdict.intoto.json"))
    assert predicate["verdict"] == bundle.verdict
    assert predicate["method"]["config"] == bundle.manifest["method"]["config"]
    checkpoint = check_bom(bundle.read_file("mlbom.cdx.json"))["metadata"]["component"]["pedigree"]
    assert checkpoint["ancestors"][0]["hashes"][0]["content"] == bundle.manifest["model"]["sha256"]


def test_the_bundle_carries_clean_images_unless_told_not_to(fake: FakePurify, purify_tiny: Callable) -> None:
    images = purify_tiny().images()
    assert (len(images.calibration), len(images.heldout)) == (12, 24)
    split = fake.calls[0]["split"]
    assert (images.heldout[0] == split.heldout_images[0]).all()
    assert purify_tiny(keep_images=False, force=True).images() is None


def test_seed_zero_and_seed_one_draw_different_images(
    fake: FakePurify, purify_tiny: Callable, tmp_path: Path
) -> None:
    for seed in (0, 1, 0):
        purify_tiny(output=tmp_path / "again" / "bundle", method=Cbpt(seed=seed), force=True)
    zero, one, again = (call["split"].digest for call in fake.calls)
    assert zero == again != one
    assert [call["config"].seed for call in fake.calls] == [0, 1, 0]


def test_the_same_seed_gives_the_same_head_byte_for_byte(
    fake: FakePurify, purify_tiny: Callable, tmp_path: Path
) -> None:
    heads = [(purify_tiny(output=tmp_path / name).path / HEAD).read_bytes() for name in ("one", "two")]
    assert heads[0] == heads[1]


def test_an_existing_output_is_refused_before_anything_is_read(
    fake: FakePurify, purify_tiny: Callable, tmp_path: Path
) -> None:
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    with pytest.raises(OutputError, match="--force"):
        purify_tiny(checkpoint=tmp_path / "missing", classes=tmp_path / "missing")
    assert fake.calls == []


def test_force_replaces_a_bundle(fake: FakePurify, purify_tiny: Callable) -> None:
    first = purify_tiny()
    second = purify_tiny(force=True, method=Cbpt(seed=1))
    assert first.digest != second.digest
    assert read_bundle(first.path).digest == second.digest


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PurificationError(expected="a", got="b", fix="c")])
def test_an_interrupted_run_keeps_its_stages_and_no_bundle(
    fake: FakePurify, purify_tiny: Callable, tmp_path: Path, error: BaseException
) -> None:
    fake.error = error
    with pytest.raises(type(error)):
        purify_tiny()
    assert names_beside(tmp_path / "out" / "bundle") == ["bundle.partial"]
    fake.error = None
    purify_tiny(resume=True)
    assert [call["resumed"] for call in fake.calls] == [False, True]
    assert names_beside(tmp_path / "out" / "bundle") == ["bundle"]


def test_without_resume_old_stages_are_discarded(fake: FakePurify, purify_tiny: Callable) -> None:
    fake.error = KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            purify_tiny()
    assert [call["resumed"] for call in fake.calls] == [False, False]


def test_resume_without_an_earlier_run_starts_one(fake: FakePurify, purify_tiny: Callable) -> None:
    purify_tiny(resume=True)
    assert [call["resumed"] for call in fake.calls] == [False]


def test_stages_of_another_configuration_are_never_used(fake: FakePurify, purify_tiny: Callable) -> None:
    fake.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        purify_tiny()
    fake.error = None
    try:
        purify_tiny(resume=True, method=Cbpt(seed=1))
    except ConfigError:
        return
    assert not fake.calls[-1]["resumed"]


def test_a_full_disk_says_so(fake: FakePurify, purify_tiny: Callable, tmp_path: Path) -> None:
    fake.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match=r"No space left on device.*Free some space"):
        purify_tiny()
    assert not (tmp_path / "out" / "bundle").exists()


def test_a_full_disk_while_writing_the_bundle_keeps_the_stages(
    fake: FakePurify, purify_tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        if path.name == HEAD:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match="Free some space"):
        purify_tiny()
    assert names_beside(tmp_path / "out" / "bundle") == ["bundle.partial"]


def test_bad_classes_stop_the_run_before_the_checkpoint_is_read(
    fake: FakePurify, purify_tiny: Callable, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ClassListError, match="two or more"):
        purify_tiny(classes=tmp_path / "classes.txt", checkpoint=tmp_path / "missing")


def test_the_purified_classifier_is_the_one_that_was_tuned(fake: FakePurify, purify_tiny: Callable) -> None:
    bundle = purify_tiny()
    expected = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    np.testing.assert_array_equal(read_bundle(bundle.path).class_embeddings, expected)


def test_flags_win_over_the_configuration_file_even_when_zero(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7, "parameterization": "prompt"}')
    config = read_method("cbpt", tmp_path / "config.json", seed=0, parameterization=None)
    assert (config.seed, config.parameterization) == (0, "prompt")
    assert read_method("cbpt", tmp_path / "config.json").seed == 7
    assert read_method("cbpt") == Cbpt()


@pytest.mark.parametrize(
    ("text", "message"), [('{"sede": 1}', "sede"), ("[1]", "one JSON object"), ("{", "JSON file")]
)
def test_a_bad_configuration_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_method("cbpt", tmp_path / "config.json")


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_method("cbpt", tmp_path / "none.json")


def test_images_without_folders_get_the_classes_the_suspect_is_sure_of(
    fake: FakePurify, purify_tiny: Callable, flat: Path, colours: None
) -> None:
    method = purify_tiny(images=flat).manifest["method"]
    split = fake.calls[0]["split"]
    assert split.tune_images.mean(axis=(1, 2)).argmax(axis=1).tolist() == split.tune_labels.tolist()
    assert (method["labelled_by"], method["tune_images"], method["heldout_images"]) == ("suspect", 12, 24)
    assert method["split_digest"] == split.digest
    assert "left out 1 files that are no images: list.csv" in method["notes"]
    assert any(note.startswith("of 36 images 36 were looked at, 36 are used, 0") for note in method["notes"])
    assert (
        "images used per class, fewest first: red_square 12, green disc 12, Blue Stripes 12"
        in method["notes"]
    )


def test_the_report_says_that_nobody_labelled_the_images(
    fake: FakePurify, purify_tiny: Callable, flat: Path, tiny_image_folder: Path, colours: None
) -> None:
    page = (purify_tiny(images=flat).path / REPORT).read_text()
    assert "labelled by the checkpoint's own zero-shot head" in html.unescape(page)
    assert "36 were looked at" in page
    assert "clean accuracy, held out" not in page
    labelled = purify_tiny(force=True)
    assert labelled.manifest["method"]["labelled_by"] == "folders"
    assert "clean accuracy, held out" in (labelled.path / REPORT).read_text()


def test_a_run_on_unlabelled_images_resumes_and_notices_another_image(
    fake: FakePurify, purify_tiny: Callable, flat: Path, colours: None
) -> None:
    fake.error = KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            purify_tiny(images=flat, resume=True)
    (flat / "00").unlink()
    with pytest.raises(KeyboardInterrupt):
        purify_tiny(images=flat, resume=True)
    assert [call["resumed"] for call in fake.calls] == [False, True, False]


def test_a_folder_of_both_images_and_folders_is_refused(
    fake: FakePurify, purify_tiny: Callable, flat: Path
) -> None:
    (flat / "red_square").mkdir()
    with pytest.raises(ImageDataError, match="both: red_square beside the image 00"):
        purify_tiny(images=flat)


def test_a_reference_reaches_the_search_and_the_manifest(
    fake: FakePurify, purify_tiny: Callable, tiny_resnet_folder: Path
) -> None:
    notes = purify_tiny(reference=tiny_resnet_folder).manifest["method"]["notes"]
    assert fake.calls[-1]["reference"].model_config["vision_cfg"]["layers"] == [1, 1, 1, 1]
    assert notes[-1].startswith(f"compared with the reference {tiny_resnet_folder}, SHA-256 ")
    assert not any("reference" in note for note in purify_tiny(force=True).manifest["method"]["notes"])
    assert fake.calls[-1]["reference"] is None


def test_stages_found_with_another_reference_are_never_used(
    fake: FakePurify, purify_tiny: Callable, tiny_resnet_folder: Path
) -> None:
    fake.error = KeyboardInterrupt()
    for reference in (None, tiny_resnet_folder, tiny_resnet_folder, None):
        with pytest.raises(KeyboardInterrupt):
            purify_tiny(reference=reference, resume=True)
    assert [call["resumed"] for call in fake.calls] == [False, False, True, False]


def test_a_reference_is_refused_where_nothing_is_searched(
    purify_tiny: Callable, tiny_resnet_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--reference with --method cbpt; got .* ft, which searches"):
        purify_tiny(reference=tiny_resnet_folder, method=Finetune())
    assert not (tmp_path / "out").exists()


def test_the_suspect_is_no_reference_for_itself(
    fake: FakePurify, purify_tiny: Callable, tiny_checkpoint_folder: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"a reference other than the suspect.*the same weights"):
        purify_tiny(reference=tiny_checkpoint_folder)
    assert fake.calls == []
