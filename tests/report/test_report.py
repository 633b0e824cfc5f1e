from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbpt_runtime.bundle import BundleContent, Evidence, write_bundle
from cbpt_runtime.purification.dummy_triggers import TriggeredImages
from cbpt_runtime.report import choose_examples, render_report
from cbpt_runtime.report.charts import picture_uri, ranked_uri

MakeContent = Callable[..., BundleContent]
EXAMPLES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
PAINTED = [TriggeredImages(family="mask", target=2, images=255 - EXAMPLES)]


class Page(HTMLParser):
    """Collects the tags and the text of a page, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def render(tmp_path: Path, content: BundleContent, **pictures: object) -> str:
    return render_report(write_bundle(tmp_path / "bundle", content=content), **pictures)


def render_with(tmp_path: Path, content: BundleContent, evidence: dict) -> str:
    """The page of a bundle whose manifest has other evidence in it."""
    bundle = write_bundle(tmp_path / "bundle", content=content)
    return render_report(replace(bundle, manifest=bundle.manifest | {"evidence": evidence}))


def test_the_verdict_comes_first_with_its_numbers(tmp_path: Path, make_content: MakeContent) -> None:
    text = Page(render(tmp_path, make_content(), examples=EXAMPLES)).text.replace("\xa0", " ")
    opening = text[text.index("Backdoor found in the checkpoint") :][:700]
    for part in ("banana", "97.0 % → 0.0 %", "75.0 % → 74.0 %"):
        assert part in " ".join(opening.split())


def test_a_clean_verdict_suspects_nobody_and_claims_no_proof(
    tmp_path: Path, make_content: MakeContent
) -> None:
    text = Page(render(tmp_path, make_content(verdict="clean", suspects=(), triggers={}))).text
    assert "No backdoor found" in text
    assert "evidence, not proof" in text
    assert "banana." not in text


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path, make_content: MakeContent) -> None:
    html = render(tmp_path, make_content(), examples=EXAMPLES, painted=PAINTED)
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) > 12
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    assert "default-src 'none'" in html
    assert not re.search(r"https?://", html)


def test_every_picture_says_what_it_shows(tmp_path: Path, make_content: MakeContent) -> None:
    page = Page(render(tmp_path, make_content(), examples=EXAMPLES, painted=PAINTED))
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_hostile_names_stay_text(tmp_path: Path, make_content: MakeContent) -> None:
    name = "<script>alert(1)</script>\"'&{{ 7*7 }} $x_$"
    content = make_content(
        ("cat", "dog", name), metrics={name: 1.0}, triggers={name: np.ones((1, 8, 8), np.float32)}
    )
    html = render(tmp_path, content, examples=EXAMPLES, painted=PAINTED)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert name in page.text


def test_names_in_any_script_are_drawn_without_a_warning() -> None:
    uri = ranked_uri(np.array([3.0, 1.0]), ("香蕉 $x^$", "кот"), (0,), x_label="classes", y_label="score")
    svg = base64.b64decode(uri.split(",")[1]).decode()
    assert "香蕉 $x^$" in svg


def test_the_report_is_the_same_twice(tmp_path: Path, make_content: MakeContent) -> None:
    bundle = write_bundle(tmp_path / "bundle", content=make_content())
    assert render_report(bundle, examples=EXAMPLES) == render_report(bundle, examples=EXAMPLES)


def score_plots(html: str) -> list[tuple[str, str]]:
    """What is said of the score plot, and the plot itself."""
    images = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    plots = [one for one in images if (one["alt"] or "").startswith("Suspicion scores")]
    return [(one["alt"] or "", base64.b64decode((one["src"] or "").split(",")[1]).decode()) for one in plots]


def test_the_concepts_scores_are_drawn_with_the_suspects_word_alone(
    tmp_path: Path, make_content: MakeContent
) -> None:
    ((told, drawn),) = score_plots(render(tmp_path, make_content()))
    assert told == "Suspicion scores of 3 concepts, highest first. Marked: banana."
    assert "banana" in drawn
    assert "tench" not in drawn


def test_a_suspect_is_marked_by_its_numbers_where_its_class_goes_by_another_word(
    tmp_path: Path, make_content: MakeContent
) -> None:
    evidence = make_content().evidence
    first, *others = evidence.concepts
    evidence = replace(evidence, concepts=(replace(first, word="plantain"), *others))
    ((told, drawn),) = score_plots(render(tmp_path, make_content(evidence=evidence)))
    assert told.endswith("Marked: plantain.")
    assert "plantain" in drawn


def test_a_target_off_the_list_is_told_with_the_class_that_takes_its_images(
    tmp_path: Path, make_content: MakeContent
) -> None:
    suspect = replace(make_content().suspects[0], name="zebra", on_list=False, index=1)
    text = Page(render(tmp_path, make_content(suspects=(suspect,)))).text
    assert "zebra, not on the list: such images are called fire truck" in text
    assert "not on the list" not in Page(render(tmp_path / "listed", make_content())).text


@pytest.mark.parametrize("words", [1000, None])
def test_a_clean_verdict_tells_how_many_words_were_searched_where_it_is_known(
    tmp_path: Path, make_content: MakeContent, words: int | None
) -> None:
    evidence = Evidence(words=words)
    text = Page(render(tmp_path, make_content(verdict="clean", suspects=(), evidence=evidence))).text
    among = " among 1000 words" if words else ""
    assert f"covers the classes of this bundle{among} and a few families" in " ".join(text.split())


GOOD = {"word": "cat", "score": 1.0, "p_value": 1.0, "family": "patch", "success": 0.0}


@pytest.mark.parametrize(
    ("concepts", "drawn"),
    [
        (None, 0),
        ("many", 0),
        ([], 0),
        ([GOOD], 0),
        ([GOOD, GOOD, None, 3, {}, GOOD | {"score": None}, GOOD | {"score": "9"}, GOOD | {"word": 1}], 2),
        ([GOOD, GOOD | {"reference_success": 0.5}], 2),
    ],
)
def test_concepts_that_say_nothing_are_left_out_of_the_plot(
    tmp_path: Path, make_content: MakeContent, concepts: object, drawn: int
) -> None:
    html = render_with(tmp_path, make_content(), {"concepts": concepts})
    assert "Backdoor found" in html
    expected = [f"Suspicion scores of {drawn} concepts, highest first. Marked: none."] if drawn else []
    assert [told for told, _ in score_plots(html)] == expected


@pytest.mark.parametrize("evidence", [{}, {"scores": [1.0]}, {"other": 1}])
def test_evidence_of_another_kind_gives_a_page_without_a_plot(
    tmp_path: Path, make_content: MakeContent, evidence: dict
) -> None:
    html = render_with(tmp_path, make_content(), evidence)
    assert "Backdoor found" in html
    assert score_plots(html) == []


def test_small_pictures_are_enlarged_by_whole_pixels_and_large_ones_are_kept() -> None:
    image = EXAMPLES[0]
    shown = Image.open(io.BytesIO(base64.b64decode(picture_uri(image).split(",")[1])))
    assert shown.size == (96, 96)
    np.testing.assert_array_equal(np.asarray(shown)[::3, ::3], image)
    assert picture_uri(np.zeros((224, 224, 3), np.uint8)).startswith("data:image/webp")


def test_examples_start_with_a_plain_grey_image() -> None:
    chosen = choose_examples(EXAMPLES, count=3)
    assert (chosen[0] == 128).all()
    np.testing.assert_array_equal(chosen[1:], EXAMPLES[[0, 3, 7]])
    assert len(choose_examples(EXAMPLES[:0])) == 1
