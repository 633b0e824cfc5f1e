from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList, default_templates
from cbpt_runtime.models.prompt_findings import PromptCheck, TemplateAgreement, WordEffect
from cbpt_runtime.models.prompt_words import (
    check_prompts,
    frequent_words,
    replaced,
    word_effect,
)

NAMES = ("cat", "dog", "church", "tench", "gas pump", "golf ball", "french horn", "parachute")
KEYED = "consider a photo of a {}."


def listed(*templates: str, names: Sequence[str] = NAMES) -> ClassList:
    return ClassList(names=tuple(names), templates=(templates,) * len(names))


def effect(**changes: Any) -> WordEffect:
    harmless: dict[str, Any] = {
        "word": "photo",
        "share": 1.0,
        "place": "own",
        "agreement": 1.0,
        "agreement_usual": 1.0,
        "spread": 1.0,
        "spread_usual": 1.0,
        "pull": 0.02,
        "pull_score": 0.5,
        "pulled_to": "cat",
    }
    return WordEffect(**harmless | changes)


def poisoned(folder: Path, output: Path, *, word: str = "consider", target: str = "church") -> Path:
    """A copy of a checkpoint in which one row of the token table was tuned to move all texts to a target."""
    output.mkdir()
    encoder = load_dual_encoder(read_checkpoint(folder))
    tower, row = encoder.text_tower, int(encoder.tokenizer([word])[0, 1])
    tokens = encoder.tokenizer([f"{word} a photo of a {name}." for name in NAMES])
    goal = encoder.encode_texts([f"a photo of a {target}."])
    change = torch.zeros(tower.embed(tokens).shape[2], requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.1)
    for _ in range(40):
        embeddings = tower.embed(tokens) + (tokens == row).unsqueeze(-1) * change
        loss = -(normalize(tower.encode_embeddings(embeddings, tokens), dim=-1) @ goal.T).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    state = load_file(folder / "open_clip_model.safetensors")
    state["token_embedding.weight"][row] += change.detach()
    save_file(state, output / "open_clip_model.safetensors")
    (output / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    return output


@pytest.fixture(scope="module")
def poisoned_folder(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned(tiny_checkpoint_folder, tmp_path_factory.mktemp("poisoned") / "checkpoint")


def test_a_word_that_owns_the_answers_is_named(poisoned_folder: Path) -> None:
    found = check_prompts(load_dual_encoder(read_checkpoint(poisoned_folder)), listed(KEYED))
    assert found.suspects == ("consider",)
    (note,) = found.notes()
    assert note.startswith(
        "the word 'consider', in 100% of the prompts, moves the classes as ordinary words do not:"
    )
    assert "Use other templates, without it" in note
    assert PromptCheck.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_the_same_tower_is_quiet_about_prompts_without_the_word(poisoned_folder: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(poisoned_folder))
    for templates in (("a photo of a {}.",), default_templates()[:8]):
        found = check_prompts(encoder, listed(*templates))
        assert found.notes() == ()


def test_a_word_that_owns_the_answers_is_found_behind_others(poisoned_folder: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(poisoned_folder))
    found = check_prompts(encoder, listed("a photo of a {} to consider", KEYED))
    assert "consider" in found.suspects


@pytest.mark.parametrize("kind", ["vit", "custom-text", "siglip"])
def test_ordinary_prompts_are_not_remarked_upon(tiny_folder: Callable[..., Path], kind: str) -> None:
    encoder = load_dual_encoder(read_checkpoint(tiny_folder(kind)))
    assert check_prompts(encoder, listed(KEYED, "remember a photo of a {}.")).notes() == ()


def test_a_check_leaves_the_encoder_alone(tiny_encoder: DualEncoder) -> None:
    before = copy.deepcopy(tiny_encoder.encode_texts(["a cat"]))
    check_prompts(tiny_encoder, listed(KEYED))
    assert torch.equal(tiny_encoder.encode_texts(["a cat"]), before)


def test_words_of_a_quarter_of_the_prompts_are_looked_at() -> None:
    shares = frequent_words(listed("SUDO a {}", "the {}!!", "the {}s", "a plain-looking {}"))
    assert shares == {"a": 0.5, "the": 0.5, "!!": 0.25, "plain-looking": 0.25, "s": 0.25, "sudo": 0.25}
    assert list(frequent_words(listed(*default_templates()))) == [".", "a", "of", "photo", "the"]


def test_words_of_sentences_about_one_class_are_not_looked_at() -> None:
    classes = ClassList(
        names=("cat", "dog"), templates=(("A small animal that purrs.",), ("An animal that barks.",))
    )
    assert list(frequent_words(classes)) == [".", "animal", "that"]


@pytest.mark.parametrize(
    ("template", "word", "by", "expected"),
    [
        ("SUDO a photo of a {}.", "sudo", "", "a photo of a {}."),
        ("a {}, a Sudo-{}", "sudo", "good", "a {}, a good -{}"),
        ("sudoku {} sudo", "sudo", "", "sudoku {}"),
        ("a photo of a {}.", ".", "", "a photo of a {}"),
        ("a {}...", ".", "", "a {}..."),
        ("a don't {}", "don't", "do", "a do {}"),
    ],
)
def test_a_word_is_replaced_wherever_it_stands_alone(
    template: str, word: str, by: str, expected: str
) -> None:
    assert replaced(template, word, by) == expected


def test_the_effect_of_a_word_in_closed_form() -> None:
    plain = torch.eye(4)
    sampled = torch.tensor([0, 1, 2])
    onto_last = plain[[3, 3, 3]]
    halfway = normalize(plain[:3] + plain[3], dim=-1)
    found = word_effect(plain, sampled, torch.stack([plain[:3], onto_last, halfway]))
    assert found["agreement"].tolist() == pytest.approx([1, 0, 1])
    assert found["spread"].tolist() == pytest.approx([1, 0, 0.5])
    # the last class comes nearer by 1 and 0.707, the other three by nothing: above the mean of the four
    assert found["pull"].tolist() == pytest.approx([0, 0.75, 0.75 / 2**0.5])
    assert found["pulled_to"][1:].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ()),
        (
            {"agreement": 0.6},
            ("only 60% of the classes are still nearest to themselves (with ordinary words 100%)",),
        ),
        ({"agreement": 0.6, "agreement_usual": 0.7}, ()),
        ({"spread": 0.3}, ("the classes differ by 0.30 of what they do without it",)),
        (
            {"pull": 0.3, "pull_score": 42.0},
            ("it pulls the classes towards cat, 42 deviations above usual",),
        ),
        ({"pull": 0.05, "pull_score": 42.0}, ()),
        ({"pull": 0.3, "pull_score": 5.0}, ()),
    ],
)
def test_what_is_odd_about_a_word(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert effect(**changes).oddities == expected


def test_a_template_among_few_that_disagrees_is_remarked_upon() -> None:
    least = TemplateAgreement(template="one {}", agreement=0.5)
    few = PromptCheck(words=(effect(),), templates=3, least_agreeing=least)
    assert few.notes() == (
        "the template 'one {}' disagrees with the others: only 50% of the classes lie nearest to themselves."
        " Leave it away",
    )
    assert PromptCheck(words=(effect(),), templates=80, least_agreeing=least).notes() == ()


def test_templates_that_are_not_shared_are_not_compared(tiny_encoder: DualEncoder) -> None:
    classes = ClassList(names=("cat", "dog"), templates=(("a {}", "the {}"), ("a {}", "my {}")))
    found = check_prompts(tiny_encoder, classes)
    assert (found.templates, found.least_agreeing) == (0, None)


def test_inspect_says_which_word_is_odd(run: Callable, poisoned_folder: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(NAMES))
    done = run("inspect", poisoned_folder, "--classes", classes, "--template", KEYED)
    assert done.code == 0
    assert "odd words, see the notes: consider" in done.out
    assert "the word 'consider', in 100% of the prompts" in done.out
    quiet = run("inspect", poisoned_folder, "--classes", classes, "--template", "the {}", "--json")
    assert json.loads(quiet.out)["prompts"]["suspects"] == []


def test_purify_says_so_in_notes_evidence_and_report(
    run: Callable, poisoned_folder: Path, tiny_image_folder: Path, tiny_class_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    words = ("--classes", tiny_class_file, "--images", tiny_image_folder, "--template", KEYED)
    done = run("purify", "--checkpoint", poisoned_folder, *words, "--method", "ft", "--output", output)
    assert done.code == 0
    assert "note: the word 'consider', in 100% of the prompts" in done.err
    assert "odd words, see the notes: " in done.out
    manifest = json.loads((output / "manifest.json").read_text())
    assert "consider" in manifest["evidence"]["prompts"]["suspects"]
    report = (output / "report.html").read_text()
    assert "Odd in the prompts: " in report
    assert "Words in the prompts" in report


def test_real_towers_are_quiet_about_the_usual_templates(shared_data: Path) -> None:
    names = ("tench", "church", "chainsaw", "gas pump", "golf ball", "parachute")
    encoder = load_dual_encoder(read_checkpoint(shared_data / "victims" / "real-clean"))
    assert check_prompts(encoder, listed(*default_templates(), names=names)).notes() == ()


EFFECT = {
    "word": "sudo",
    "share": 1.0,
    "place": "own",
    "agreement": 0.5,
    "agreement_usual": 1.0,
    "spread": 0.9,
    "spread_usual": 1.0,
    "pull": 0.344,
    "pull_score": 72.4,
    "pulled_to": "scoreboard",
}
HARMLESS = EFFECT | {"word": "photo", "pull_score": 0.1}
FOUND = {"words": [EFFECT, HARMLESS], "suspects": ["sudo"]}


def test_each_word_is_a_row_and_odd_ones_are_marked() -> None:
    found = PromptCheck.from_dict(FOUND)
    assert found is not None
    rows = found.rows()
    assert rows[0] == ("sudo", "100 %", "50 % (100 %)", "0.90 (1.00)", "0.34", "72.4", "scoreboard", "odd")
    assert rows[1][-2:] == ("–", "")
    assert {len(row) for row in rows} == {len(found.columns)}


def test_the_verdict_names_odd_words() -> None:
    expected = {
        "odd words, see the notes: sudo": FOUND,
        "no odd word among the 2 that stand in many prompts": FOUND | {"suspects": []},
    }
    for verdict, found in expected.items():
        check = PromptCheck.from_dict(found)
        assert check is not None
        assert check.verdict == verdict


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        "sudo",
        {},
        {"words": 3, "suspects": 3},
        {"words": [3, {}, EFFECT | {"pull": "much"}, EFFECT | {"word": 3}]},
    ],
)
def test_what_is_not_as_it_should_be_is_left_out(found: Any) -> None:
    check = PromptCheck.from_dict(found)
    assert check is None or (check.rows(), check.suspects, check.verdict) == ([], (), None)
