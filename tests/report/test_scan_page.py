from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cbpt_runtime.bundle import Concept, Evidence
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.scan import Scan, ScanSuspect
from cbpt_runtime.report import render_scan, write_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

CONCEPTS = [
    Concept(word=f"word {index}", score=9.0 - index, p_value=index / 20, family="sine", success=0.5)
    for index in range(20)
]


def made(**changes: Any) -> Scan:
    suspect = ScanSuspect(
        name="<b>banana</b>",
        on_list=False,
        p_value=0.0,
        score=9.0,
        family="sine",
        success=0.953,
        reference_success=0.0712,
    )
    parts: dict[str, Any] = {
        "checkpoint": "suspect & co",
        "sha256": "0123456789abcdef" * 4,
        "verdict": "backdoored",
        "p_value": 0.0,
        "suspects": (suspect,),
        "images": 512,
        "evidence": Evidence(p_value=0.0, concepts=tuple(CONCEPTS), words=1044),
        "notes": ("512 of 5000 images were drawn",),
        "config": PurifyConfig(seed=11, search_steps=29),
        "stage_seconds": {"load": 1.0, "search": 99.5},
    }
    return Scan(**(parts | changes))


def text_of(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).replace("\xa0", " ").split())


def test_a_backdoor_is_named_with_its_numbers() -> None:
    page = render_scan(made())
    text = text_of(page)
    assert "Backdoor found in the checkpoint" in text
    assert "<b>banana</b> no 0 9 sine 95.3 % 7.1 %" in text
    assert "<b>" not in page
    assert "Marked: <b>banana</b>." in text


def test_clean_is_evidence_and_not_proof() -> None:
    text = text_of(render_scan(made(verdict="clean", suspects=(), p_value=0.3)))
    assert "No backdoor found" in text
    assert "A verdict of clean is evidence, not proof" in text
    assert "banana" not in text
    assert "None stands out from the rest." in text


def test_everything_the_verdict_rests_on_is_there() -> None:
    found = made()
    text = text_of(render_scan(found))
    for value in (found.sha256, "suspect & co", "512 of 5000 images were drawn", "load 1.0, search 99.5"):
        assert value in text
    for name, value in found.config.to_dict().items():
        assert f'"{name}": {json.dumps(value)}' in text
    for concept in CONCEPTS:
        assert f"{concept.word} {concept.score:.4g} {concept.p_value:.4g}" in text


def test_the_page_loads_nothing() -> None:
    page = render_scan(made())
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|<script|<link", page)


@pytest.mark.parametrize("suspected", [True, False])
def test_a_browser_shows_it(
    suspected: bool, tmp_path: Path, browser_page: Page, faint_texts: Callable[[Page], list[str]]
) -> None:
    path = tmp_path / "scan.html"
    write_page(path, render_scan(made() if suspected else made(verdict="clean", suspects=())))
    browser_page.set_viewport_size({"width": 360, "height": 740})
    browser_page.goto(path.as_uri())
    browser_page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert browser_page.evaluate("document.documentElement.scrollWidth") == 360
    assert browser_page.eval_on_selector_all("img", "all => all.every(i => i.naturalWidth > 0)")
    assert faint_texts(browser_page) == []
