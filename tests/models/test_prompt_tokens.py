from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.errors import ClassListError
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.prompt_tokens import prompt_notes
from cbpt_runtime.models.tokenizer import Tokenizer
from cbpt_runtime.purification.vocabulary import build_vocabulary

LONG = "word " * 140


def listed(*names: str, template: str, folders: tuple[str, ...] = ()) -> ClassList:
    return ClassList(names=names, templates=((template,),) * len(names), folders=folders)


def test_prompts_that_fit_are_not_remarked_upon() -> None:
    tokenizer = Tokenizer({"context_length": 8})
    assert tokenizer.is_cut(["a b c d e f", "a b c d e f g", ""]) == [False, True, False]
    assert prompt_notes(listed("cat", "dog", template="a b c d e {}"), tokenizer) == ()


def test_cut_prompts_are_counted() -> None:
    notes = prompt_notes(listed("cat", "dog", template="{} " + LONG), Tokenizer({}))
    assert notes == (
        "2 of 2 prompts are longer than the 77 tokens of the text tower and were cut, first: "
        + ("cat " + LONG)[:80],
    )


def test_classes_that_are_equal_once_cut_are_refused() -> None:
    with pytest.raises(
        ClassListError, match=r"within 77 tokens; got the same for cat = dog \(2 of 2 prompts are longer"
    ):
        prompt_notes(listed("cat", "dog", template=LONG + "{}"), Tokenizer({}))


def test_classes_with_the_same_sentence_are_refused() -> None:
    with pytest.raises(ClassListError, match=r"the same for cat = dog \(equal prompts\)"):
        prompt_notes(listed("cat", "dog", template="a photo of an animal"), Tokenizer({}))


def test_two_classes_of_one_name_are_remarked_upon() -> None:
    classes = ClassList(
        names=("crane (a)", "crane (b)", "dog"),
        templates=(("a crane",), ("a crane",), ("a {}",)),
        folders=("a", "b", "c"),
    )
    assert prompt_notes(classes, Tokenizer({})) == (
        "classes of the same name have the same prompts, chance tells them apart: crane (a), crane (b)",
    )


def test_every_verb_refuses_prompts_that_are_equal(
    run: Callable,
    tiny_checkpoint_folder: Path,
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tmp_path: Path,
) -> None:
    words = ("--classes", tiny_class_file, "--images", tiny_image_folder)
    output = tmp_path / "bundle"
    for verb in (
        ("purify", "--checkpoint", tiny_checkpoint_folder, "--template", LONG + "{}", "--output", output),
        ("evaluate", tiny_checkpoint_folder, "--template", LONG + "{}"),
    ):
        done = run(*verb, *words)
        assert done.code == 2
        assert "prompts that tell the classes apart within 16 tokens" in done.err
    sentences = tmp_path / "classes.json"
    sentences.write_text(json.dumps({name: [LONG + name] for name in ("cat", "dog")}))
    done = run("scan", tiny_checkpoint_folder, "--classes", sentences, "--images", tiny_image_folder)
    assert done.code == 2
    assert "the same for cat = dog" in done.err
    assert not output.exists()


def test_the_words_of_the_search_are_not_put_into_sentences_about_a_class(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(
        names=("cat", "dog"), templates=(("A small animal that purrs.",), ("An animal that barks.",))
    )
    vocabulary = build_vocabulary(tiny_encoder, classes, tiny_encoder.class_embeddings(classes), 8)
    assert not (vocabulary.texts[2:] == vocabulary.texts[2]).all()
