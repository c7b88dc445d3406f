"""Figures in one visual style, from tensors or data frames to an unsaved matplotlib Figure."""

from .maps import COMPONENT, bars, grids, sheet
from .norms import histograms, norms_by_layer, token_kinds, training
from .scores import dots, scores
from .style import ATTENTION, NORMS, PALETTE, PAPER, caption, picture, plt, styled

__all__ = [
    "ATTENTION",
    "COMPONENT",
    "NORMS",
    "PALETTE",
    "PAPER",
    "bars",
    "caption",
    "dots",
    "grids",
    "histograms",
    "norms_by_layer",
    "picture",
    "plt",
    "scores",
    "sheet",
    "styled",
    "token_kinds",
    "training",
]
