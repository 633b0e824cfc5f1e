"""Both reports in a real browser: figures visible, phone width, print, accessible names and contrast."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.evaluation import evaluate_all
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.report import bundle_report, render_evaluation, write_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

PAGES = ("bundle", "evaluation")


@pytest.fixture(scope="module")
def pages(
    tiny_bundle: Bundle, tiny_image_folder: Path, tiny_checkpoint_folder: Path, tmp_path_factory
) -> dict[str, Path]:
    """A report of a bundle and one of an evaluation of a bundle and a checkpoint."""
    root = tmp_path_factory.mktemp("pages")
    evaluations = evaluate_all(
        [tiny_bundle, tiny_checkpoint_folder],
        tiny_image_folder,
        target="blue stripes",
        attack=BadNet(size=8),
        device="cpu",
    )
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    paths = {name: root / f"{name}.html" for name in PAGES}
    write_page(paths["bundle"], bundle_report(tiny_bundle, images, np.arange(12) % 3))
    write_page(paths["evaluation"], render_evaluation(evaluations))
    return paths


@pytest.fixture(params=PAGES)
def shown(request: pytest.FixtureRequest, pages: dict[str, Path], browser_page: Page) -> Page:
    messages: list[str] = []
    browser_page.on("console", lambda message: messages.append(message.text))
    browser_page.goto(pages[request.param].as_uri())
    browser_page.wait_for_load_state("networkidle")
    assert messages == []
    return browser_page


def test_every_figure_is_drawn(shown: Page) -> None:
    sizes = shown.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.clientWidth])")
    assert len(sizes) >= 2
    assert all(natural > 0 and visible > 30 for natural, visible in sizes)


def test_a_phone_scrolls_down_only(shown: Page) -> None:
    shown.set_viewport_size({"width": 360, "height": 740})
    shown.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == 360


def test_the_verdict_is_on_the_first_screen(shown: Page) -> None:
    shown.set_viewport_size({"width": 1280, "height": 800})
    box = shown.locator("header .cards").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 800
    assert shown.locator("h1").count() == 1


def test_it_prints_to_pdf(shown: Page) -> None:
    assert shown.pdf(format="A4").startswith(b"%PDF")


def test_it_can_be_read_without_seeing_it(shown: Page) -> None:
    assert shown.eval_on_selector_all("img", "all => all.every(i => i.alt.trim().length > 8)")
    assert shown.evaluate("document.documentElement.lang") == "en"
    levels = shown.eval_on_selector_all("h1, h2, h3", "all => all.map(h => Number(h.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    scrolling = "all => all.every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))"
    assert shown.eval_on_selector_all(".wide, .plot", scrolling)


def test_every_text_stands_out_from_its_background(
    shown: Page, faint_texts: Callable[[Page], list[str]]
) -> None:
    shown.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert faint_texts(shown) == []


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, make_content: Callable) -> None:
    from cbpt_runtime.errors import OutputError

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to be able to write"):
        write_page(tmp_path / "file" / "report.html", "page")
    write_page(tmp_path / "new" / "report.html", "page")
    assert [item.name for item in (tmp_path / "new").iterdir()] == ["report.html"]
