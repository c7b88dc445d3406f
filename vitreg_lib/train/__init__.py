"""One training loop and its recipes."""
