"""Interactive parts of notebooks; executed by papermill or in batch, each shows its default state as a picture."""

from .interact import attention_rows, cutoff_slider, explore, interact, layer_histogram, token_kinds
from .live import train, watch

__all__ = ["attention_rows", "cutoff_slider", "explore", "interact", "layer_histogram", "token_kinds", "train", "watch"]
