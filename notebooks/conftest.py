"""How nbval compares the notebooks: text and numbers, neither HTML (tables are compared as text) nor stderr."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html", "stderr")
