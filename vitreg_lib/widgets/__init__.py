"""Interactive parts of notebooks; in papermill or batch runs, each shows a picture of its default state."""

from .controls import explore, interact, token_kinds
from .live import watch
