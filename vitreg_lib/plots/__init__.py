"""Figures in one visual style, from tensors or data frames to an unsaved matplotlib Figure."""

from .maps import COMPONENT, bars, grids, sheet
from .norms import histograms, norms_by_layer, token_kinds, training
from .scores import scores
from .style import ATTENTION, NORMS, PALETTE, PAPER, caption, picture, plt, styled
