"""Interactive parts of notebooks; executed by papermill or in batch, each shows its default state as a picture."""

from .controls import attention_rows, explore, interact, token_kinds
from .live import watch

__all__ = ["attention_rows", "explore", "interact", "token_kinds", "watch"]
