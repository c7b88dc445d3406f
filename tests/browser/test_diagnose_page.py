"""The page of a diagnosis in a browser: on a phone and on a desk, in light and dark, by keyboard."""

from __future__ import annotations

import pytest

from vitreg_lib.record import diagnose


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    models = [diagnose.controls()[0], diagnose.diagnose("mini-random", "scenes", 24)]
    return diagnose.write(models, tmp_path_factory.mktemp("diagnose"))[0]


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_fits_its_window_and_shows_all_figures(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    assert page.locator("img").count() >= 8
    assert page.evaluate("document.documentElement.lang") == "en"
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    text = page.evaluate("getComputedStyle(document.documentElement).color")
    assert text == ("rgb(0, 0, 0)" if scheme == "light" else "rgb(255, 255, 255)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#model-1"
    page.keyboard.press("Enter")
    assert page.url.endswith("#model-1")
    wide = page.locator(".scroll").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0)"
    )
    assert wide == [], "what scrolls can be scrolled by keyboard"
    assert not problems
    page.close()
