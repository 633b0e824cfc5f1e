"""What is compared shares one class list, whatever it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ClassListError, ConfigError
from cbpt_runtime.evaluation.opening import open_classifiers
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.models.class_lists import read_class_list


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
