"""JupyterLab on a free port with a token, and Chromium that opens the explorer notebook and runs it."""

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
REAL = ROOT.parent / "shared" / "real"  # real small models, where a developer has them
START = 300  # seconds that a kernel may take to load torch and the models on a busy machine


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
    """A running JupyterLab. address: of the explorer notebook, token included."""

    process: subprocess.Popen
    address: str
    log: Path

    def kernel_bytes(self) -> int:
        """Resident memory of the notebook's kernel."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(c.memory_info().rss for c in children if "ipykernel_launcher" in " ".join(c.cmdline()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a folder that holds a copy of the explorer notebook, with settings of its own."""
    place = tmp_path_factory.mktemp("lab")
    folder = place / "work" / "notebooks" / "explore"
    folder.mkdir(parents=True)
    shutil.copy(NOTEBOOKS / "explore" / "explorer.ipynb", folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("VITREG_BATCH", "VITREG_DATA", "VITREG_MODELS")}
    environment |= {
        "JUPYTER_CONFIG_DIR": str(place / "config"),
        "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(place / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(place / "workspaces"),
        "VITREG_RESULTS": str(place / "results"),
    }
    if REAL.is_dir():
        environment["VITREG_MODELS"] = str(REAL)
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
        yield Lab(process, f"http://127.0.0.1:{port}/lab/tree/notebooks/explore/explorer.ipynb?token={TOKEN}", log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass
class Desk:
    """The explorer in the browser. errors: of the console and the page, none of which a test may leave."""

    page: object
    lab: Lab
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def desk(lab):
    """The explorer notebook, opened at 1280 x 1000 and run."""
    from playwright.sync_api import sync_playwright

    executable = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(120_000)
        made = Desk(page, lab)
        page.on("console", lambda message: made.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: made.errors.append(str(error)))
        _open(page, lab)
        _run_all(page)
        yield made
        browser.close()


def _open(page, lab: Lab) -> None:
    """Go to the notebook as soon as the server answers."""
    until = time.monotonic() + START
    while True:
        try:
            page.goto(lab.address)
            return
        except Exception:
            if lab.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"JupyterLab did not start: {lab.log.read_text()[-500:]}", pytrace=False)
            time.sleep(0.3)


def _run_all(page) -> None:
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("window.jupyterapp")
    choice = page.get_by_role("button", name="Select", exact=True)  # asked for a kernel where none was ever started
    kernel = "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    _until(lambda: page.evaluate(kernel) or (choice.count() and choice.click()), "the kernel did not start", page)
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")  # its end is not waited for
    card = page.locator(".vr-card[data-serial]")
    _until(card.count, "the explorer did not come", page)
    page.locator(".vr-explorer").scroll_into_view_if_needed()


def _until(holds, otherwise: str, page) -> None:
    until = time.monotonic() + START
    while not holds():
        if time.monotonic() > until:
            pytest.fail(f"{otherwise}: {page.inner_text('body')[-600:]}", pytrace=False)
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def no_console_errors(request):
    """Fail a test that left an error in the browser's console."""
    yield
    if "desk" in request.fixturenames:
        desk = request.getfixturevalue("desk")
        found, desk.errors[:] = list(desk.errors), []
        assert not found, found
