"""Probes: what frozen tokens tell about class, place and pixels (Fig. 5, Tables 1, 2, 4 to 6)."""
