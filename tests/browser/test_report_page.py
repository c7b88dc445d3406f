"""The page of all results in a browser: on a phone and on a desk, in light and dark, without a dead link."""

from __future__ import annotations

import shutil

import pytest
import report

from vitreg_lib.base import ROOT


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_fits_its_window_and_shows_all_figures(browser, results, width, scheme):
    for item in ("fig03", "tab03"):
        shutil.copytree(ROOT / "docs" / "results" / "small" / item, results / "small" / item)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(report.write("small").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator("img").count() >= 2
    for link in page.locator("nav a").all():
        assert page.locator(f'[id="{link.get_attribute("href")[1:]}"]').count() == 1
    background, text = (
        page.evaluate(f"getComputedStyle(document.documentElement).{name}") for name in ("colorScheme", "color")
    )
    assert background == "light dark"
    assert text == ("rgb(0, 0, 0)" if scheme == "light" else "rgb(255, 255, 255)")
    assert not problems
    page.close()
