"""One function opens whatever classifies, and what it opens says the same of the same images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.bundle import ENCODER, Bundle, BundleContent, write_bundle
from cbpt_runtime.classification import Classifier
from cbpt_runtime.errors import BundleError, ClassListError, ConfigError, ServingError, TrustError
from cbpt_runtime.loading import inspect_path, kind_of, open_classifier, open_classifiers
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.trust import make_trust


@pytest.fixture(scope="module")
def opened(
    tiny_bundle: Bundle,
    tiny_served: Path,
    tiny_graph: Path,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
) -> dict[str, Classifier]:
    """One of each kind that needs no server."""
    classes = read_class_list(tiny_class_file, templates=["a photo of a {}."])
    sources = {
        "bundle": tiny_bundle.path,
        "repository": tiny_served,
        "onnx": str(tiny_graph),
        "checkpoint": tiny_checkpoint_folder,
    }
    return {
        kind: open_classifier(source, classes=classes, device="cpu", threads=1)
        for kind, source in sources.items()
    }


def test_every_kind_is_known_by_its_looks(opened: dict[str, Classifier], tiny_bundle: Bundle) -> None:
    for kind, classifier in opened.items():
        assert classifier.kind == kind == kind_of(classifier) == kind_of(classifier.source)
    assert kind_of(tiny_bundle) == "bundle"
    assert {kind_of(f"{scheme}://localhost:1") for scheme in ("grpc", "grpcs", "http", "https")} == {"url"}
    assert kind_of("hf-hub:someone/model") == kind_of("missing.onnx") == "checkpoint"


def test_a_classifier_is_given_back_as_it_is(opened: dict[str, Classifier]) -> None:
    assert open_classifier(opened["onnx"], trust=make_trust(digests=["0" * 64])) is opened["onnx"]


def test_what_is_exported_says_what_the_bundle_says(
    opened: dict[str, Classifier], tiny_image_folder: Path
) -> None:
    files = sorted(tiny_image_folder.rglob("*.png"))
    bundle = opened["bundle"]
    expected = bundle.predict(bundle.read(files))
    for kind in ("onnx", "repository"):
        found = opened[kind].predict(opened[kind].read(files))
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
        np.testing.assert_allclose(found.alarm, expected.alarm, atol=1e-4)
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert found.reference_labels is None
        same = ("class_names", "preprocess", "verdict", "suspects", "detector")
        assert [getattr(opened[kind], name) for name in same] == [getattr(bundle, name) for name in same]
    assert expected.reference_labels is not None


def test_each_is_called_with_a_file_and_shown_on_one_line(
    opened: dict[str, Classifier], tiny_image_folder: Path
) -> None:
    photo = min(tiny_image_folder.rglob("*.png"))
    for kind, classifier in opened.items():
        answer = classifier(photo, top=2)
        assert [len(answer.labels), answer.image] == [2, str(photo)]
        assert (answer.alarm is None) == (kind == "checkpoint")
        assert ("alarm" in str(answer)) == (kind != "checkpoint")
        assert repr(classifier).startswith(f"<{type(classifier).__name__} {classifier.source}: 3 classes")
        assert "\n" not in repr(classifier) + str(answer)


def test_pixels_of_another_size_are_refused_by_all(opened: dict[str, Classifier]) -> None:
    from cbpt_runtime.errors import ImageDataError

    for classifier in opened.values():
        with pytest.raises(ImageDataError, match=r"uint8 images \[batch, 32, 32, 3\]"):
            classifier.predict(np.zeros((1, 31, 32, 3), np.uint8))


def test_a_checkpoint_needs_a_class_list(tiny_checkpoint_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no class list"):
        open_classifier(tiny_checkpoint_folder)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ServingError, match=r"127\.0\.0\.1:1"):
        open_classifier("grpc://127.0.0.1:1", timeout_s=0.5)


def test_only_the_trusted_is_opened_and_what_shows_nothing_never_is(
    opened: dict[str, Classifier], tiny_class_file: Path
) -> None:
    classes = read_class_list(tiny_class_file)
    other = make_trust(digests=["0" * 64])
    for classifier in opened.values():
        with pytest.raises(TrustError):
            open_classifier(classifier.source, classes=classes, trust=other)
    with pytest.raises(TrustError, match="which is neither"):
        open_classifier("grpc://127.0.0.1:1", trust=other)
    for kind in ("bundle", "repository"):
        own = make_trust(digests=[str(opened[kind].digest)])
        assert open_classifier(opened[kind].source, trust=own).digest == opened[kind].digest


def test_a_bundle_is_described_and_its_hashes_verified(tiny_bundle: Bundle) -> None:
    found = inspect_path(tiny_bundle.path)
    assert (found["kind"], found["verdict"], found["suspects"]) == ("bundle", "backdoored", ["Blue Stripes"])
    assert found["digest"] == tiny_bundle.digest
    assert ENCODER in found["verified"]
    assert found["anomalies"] == []
    json.dumps(found)


def test_a_damaged_bundle_is_an_error_that_names_the_file(tmp_path: Path, make_content) -> None:
    write_bundle(tmp_path / "bundle", content=make_content())
    with (tmp_path / "bundle" / ENCODER).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=ENCODER):
        inspect_path(tmp_path / "bundle")


def test_a_file_the_manifest_does_not_know_is_odd(tmp_path: Path, make_content) -> None:
    content: BundleContent = make_content()
    write_bundle(tmp_path / "bundle", content=content)
    (tmp_path / "bundle" / "payload.py").write_text("")
    assert inspect_path(tmp_path / "bundle")["anomalies"] == ["a file the manifest does not know: payload.py"]


def test_anything_else_is_inspected_as_a_checkpoint(tiny_checkpoint_folder: Path) -> None:
    assert inspect_path(tiny_checkpoint_folder)["format"] == "open_clip-folder"


def test_the_prompts_of_a_class_list_are_looked_at_through_the_text_tower(
    tiny_checkpoint_folder: Path, tiny_class_file: Path
) -> None:
    found = inspect_path(tiny_checkpoint_folder, classes=tiny_class_file, templates=["the {}", "my {}"])
    assert found["format"] == "open_clip-folder"
    assert [word["word"] for word in found["prompts"]["words"]] == ["my", "the"]
    json.dumps(found)


def test_classes_are_for_checkpoints_and_templates_for_classes(
    tiny_bundle: Bundle, tiny_class_file: Path
) -> None:
    with pytest.raises(ConfigError, match="one for the bundle"):
        inspect_path(tiny_bundle.path, classes=tiny_class_file)
    with pytest.raises(ConfigError, match="templates alone"):
        inspect_path(tiny_bundle.path, templates=["a {}"])


def test_a_checkpoint_beside_a_graph_takes_the_classes_and_prompts_of_the_bundle(
    tiny_bundle: Bundle, tiny_graph: Path, tiny_checkpoint_folder: Path
) -> None:
    sources = [tiny_graph, tiny_checkpoint_folder, tiny_bundle.path]
    with open_classifiers(sources, device="cpu") as opened:
        assert [classifier.kind for classifier in opened] == ["onnx", "checkpoint", "bundle"]
        assert {classifier.class_names for classifier in opened} == {tiny_bundle.class_names}


def test_a_graph_has_no_prompts_for_a_checkpoint(tiny_graph: Path, tiny_checkpoint_folder: Path) -> None:
    with (
        pytest.raises(ConfigError, match="--classes"),
        open_classifiers([tiny_graph, tiny_checkpoint_folder]),
    ):
        pass


def test_a_graph_of_other_classes_does_not_share_a_table(tiny_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    classes = read_class_list(tmp_path / "classes.txt")
    with (
        pytest.raises(ClassListError, match="one class list"),
        open_classifiers([tiny_graph], classes=classes),
    ):
        pass


def test_only_what_was_opened_here_is_closed_again(
    tiny_bundle: Bundle, tiny_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbpt_runtime.classification import Classifier

    closed: list[str] = []
    monkeypatch.setattr(Classifier, "close", lambda self: closed.append(self.kind))
    with open_classifiers([open_classifier(tiny_graph), tiny_bundle], device="cpu"):
        assert closed == []
    assert closed == ["bundle"]
