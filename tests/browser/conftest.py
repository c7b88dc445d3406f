"""JupyterLab on a free port with a token, and Chromium that opens a notebook in a workspace of its own and runs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from vitreg_lib.base import NOTEBOOKS, ROOT

TOKEN = "of-the-browser-test"
ANSWERED = """async () => {
  const { kernel } = jupyterapp.shell.currentWidget.sessionContext.session;
  await kernel.requestExecute({ code: '', silent: true, store_history: false }).done;
  return [...document.querySelectorAll('.vr-card')].map((card) => card.dataset.serial ?? ''); }"""
PATIENCE = 300  # seconds, after which a state that has not come counts as an error, also on a busy machine


def chromium() -> str:
    """The browser's path; a test errors with one line where there is none (`make test-browser` installs it)."""
    named = os.environ.get("VITREG_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.fail(
            "Chromium is not here: `make test-browser` installs it, or VITREG_CHROMIUM names one", pytrace=False
        )
    return found


def a_free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Lab:
    """A running JupyterLab. root: of its address; log: what it prints."""

    process: subprocess.Popen
    root: str
    log: Path

    def address(self, notebook: str) -> str:
        """Of a notebook below notebooks/, in an empty workspace: else the tabs of the last one open again."""
        workspace = "".join(c if c.isalnum() else "-" for c in notebook)
        return f"{self.root}/lab/workspaces/{workspace}/tree/notebooks/{notebook}?reset&token={TOKEN}"

    def kernel_bytes(self) -> int:
        """Resident memory of the notebook's kernel."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(c.memory_info().rss for c in children if "ipykernel_launcher" in " ".join(c.cmdline()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a folder that holds copies of the notebooks, with settings of its own."""
    place = tmp_path_factory.mktemp("lab")
    for name in ("explore", "paper"):
        shutil.copytree(NOTEBOOKS / name, place / "work" / "notebooks" / name)
    environment = {k: v for k, v in os.environ.items() if k not in ("VITREG_BATCH", "VITREG_DATA", "VITREG_MODELS")}
    environment |= {
        "JUPYTER_CONFIG_DIR": str(place / "config"),
        "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(place / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(place / "workspaces"),
        "VITREG_RESULTS": str(place / "results"),
        "HF_HUB_CACHE": str(place / "hub"),  # empty: real models are replayed on every machine
    }
    (place / "runtime").mkdir()
    quiet = place / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    port, log = a_free_port(), place / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={place / 'work'}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stream, stderr=stream)
    try:
        yield Lab(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass
class Desk:
    """A notebook in the browser. errors: of the console and the page, none of which a test may leave."""

    page: object
    lab: Lab
    errors: list[str] = field(default_factory=list)

    def run_all(self) -> None:
        """Ask for all cells; their end is not waited for."""
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def settle(self) -> None:
        """Wait until the kernel has answered all that the page has sent, and the page has drawn it.

        The kernel answers in order, so an empty request is answered last. What the page holds back until an earlier
        change is answered is sent then, and the next request waits for that.
        """
        drawn = None
        while drawn != (drawn := self.page.evaluate(ANSWERED)):
            pass

    def until(self, holds, otherwise: str) -> None:
        """Wait until `holds()`; the test fails with `otherwise` and what the page shows if it never does."""
        last = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > last:
                pytest.fail(f"{otherwise}: {self.page.inner_text('body')[-600:]}", pytrace=False)
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_notebook(lab, browser):
    """A function that opens a notebook at 1280 x 1000, with a kernel that is ready and without outputs: a `Desk`."""

    def opened(notebook: str) -> Desk:
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        desk = Desk(page, lab)
        page.on("console", lambda message: desk.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: desk.errors.append(str(error)))
        _go(page, lab, lab.address(notebook))
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function("window.jupyterapp")
        choice = page.get_by_role("button", name="Select", exact=True)  # asked for a kernel where none was started
        kernel = "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        desk.until(lambda: page.evaluate(kernel) or (choice.count() and choice.click()), "the kernel did not start")
        page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        return desk

    return opened


@pytest.fixture(scope="module")
def desk(open_notebook):
    """The explorer notebook, run as far as the explorer's first view."""
    desk = open_notebook("explore/explorer.ipynb")
    desk.run_all()
    desk.until(desk.page.locator(".vr-card[data-serial]").count, "the explorer did not come")
    desk.page.locator(".vr-explorer").scroll_into_view_if_needed()
    return desk


def _go(page, lab: Lab, address: str) -> None:
    """Go to the address as soon as the server answers."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            page.goto(address)
            return
        except Exception:
            if lab.process.poll() is not None or time.monotonic() > last:
                pytest.fail(f"JupyterLab did not start: {lab.log.read_text()[-500:]}", pytrace=False)
            time.sleep(0.3)


@pytest.fixture(autouse=True)
def no_console_errors(request):
    """Fail a test that left an error in the browser's console."""
    yield
    if "desk" in request.fixturenames:
        desk = request.getfixturevalue("desk")
        errors, desk.errors[:] = list(desk.errors), []
        assert not errors, errors
