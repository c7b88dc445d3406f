"""Probes: what frozen tokens tell about class, place, pixels, and words (Fig. 5, Tables 1, 2, 4 to 6)."""
