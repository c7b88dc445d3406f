"""How nbval runs and compares the notebooks: text and numbers, neither HTML (tables are compared as text) nor stderr.

Their kernels fork from one process that has imported the libraries (`workflow/forked.py`), for all workers of pytest.
A notebook's record is compared with the committed one after its last cell.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from ipykernel import kernelspec

sys.path.append(str(Path(__file__).resolve().parents[1] / "workflow"))
import compare  # noqa: E402
import forked  # noqa: E402

from vitreg_lib.record import run as record  # noqa: E402

BEGAN = time.time()
FORKING, PLACE = pytest.StashKey(), pytest.StashKey()


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        place = config.workerinput[forked.VARIABLE]
    else:
        config.stash[FORKING] = forked.serving(dict(os.environ))
        place = config.stash[FORKING].__enter__().get(forked.VARIABLE)
    if place:
        start = [sys.executable, "-ES", forked.__file__, forked.KERNEL, "-f", "{connection_file}"]
        kernelspec.get_kernel_dict = lambda: {"argv": start, "env": {forked.VARIABLE: place}}  # nbval asks for it
    config.stash[PLACE] = place


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput[forked.VARIABLE] = node.config.stash[PLACE]


def pytest_unconfigure(config):
    if FORKING in config.stash:
        config.stash[FORKING].__exit__(None, None, None)


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html", "stderr")


@pytest.hookimpl(trylast=True)  # after pytest's own, which a failure here would keep from tidying up
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path == item.path:
        return
    started = re.search(r'vr\.start\(\\"(\w+)\\"', item.path.read_text())  # the quotes are JSON's
    path = started and record.folder(started[1], record.declared_parameters(started[1])) / "record.json"
    if path and path.exists() and path.stat().st_mtime >= BEGAN:  # else a cell failed, which is an error by itself
        made = json.loads(path.read_text())
        if compare.differences(made):
            pytest.fail(compare.verdict(made), pytrace=False)
