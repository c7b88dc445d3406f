"""Probes: what frozen tokens tell about class, place, pixels, segments and depth (Fig. 5, Tables 1, 2, 4 to 6)."""
