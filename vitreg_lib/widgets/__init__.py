"""Interactive parts of notebooks; in papermill or batch runs, each shows a picture of its default state."""

from .controls import attention_rows, explore, interact, token_kinds
from .live import watch

__all__ = ["attention_rows", "explore", "interact", "token_kinds", "watch"]
