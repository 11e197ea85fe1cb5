"""A real browser for the tests of the page: Chromium as the system has it, driven by Playwright; without either the tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed (pip install playwright; no browser of its own is needed)"
    )
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium is installed: none of {', '.join(NAMES)} is there")
    sandbox = [] if getattr(os, "geteuid", lambda: 1)() else ["--no-sandbox"]  # root may not use it
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


class OpenPage:
    """A page that was opened from disk. Scripts that fail, and anything that is asked of a network, fail the test.

    Args:
        browser: The browser.
        path: The file.
        **options: Of the browser's context, such as ``color_scheme``.
    """

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1300, "height": 900}, **options)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else self.wrong.append(request.url)
        )
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def click_node(self, node: str) -> None:
        """Click a node of the graph, where it is drawn."""
        at = self.page.evaluate(
            """(id) => { const node = cco.graph.cy.getElementById(id); cco.graph.cy.center(node);
                         const box = document.getElementById("canvas").getBoundingClientRect(), place = node.renderedPosition();
                         return [box.left + place.x, box.top + place.y + scrollY]; }""",
            node,
        )
        self.page.evaluate("scrollTo(0, 0)")
        self.page.wait_for_timeout(60)
        self.page.mouse.click(*at)

    def until(self, holds: str) -> None:
        """Wait for a condition; Playwright's own way would evaluate a text, which the page's policy forbids."""
        for _ in range(200):
            if self.page.evaluate(holds):
                return
            self.page.wait_for_timeout(25)
        raise AssertionError(f"never: {holds}")

    def seen(self) -> set[str]:
        """The nodes of the graph that are seen."""
        return set(self.page.evaluate("cco.graph.cy.nodes().map((node) => node.id())"))

    def detail(self) -> str:
        """The text beside the graph."""
        self.page.wait_for_timeout(30)
        return str(self.page.inner_text("#detail"))

    def yaml(self) -> str:
        """What *Copy YAML* copies."""
        self.page.evaluate("document.getElementById('yaml-details').open = true")
        self.page.click("#copy-yaml")
        self.until("cco.copied !== undefined")
        return str(self.page.evaluate("cco.copied"))
