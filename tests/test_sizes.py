"""Models at the sizes of the paper are timm's."""

from __future__ import annotations

import pytest
import timm
import torch

from vitreg_lib.base import UserError
from vitreg_lib.model import mini


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ("ti/16", "vit_tiny_patch16_224"),
        ("s/16", "vit_small_patch16_224"),
        ("b/16", "vit_base_patch16_224"),
        ("l/14", "vit_large_patch14_224"),
        ("h/14", "vit_huge_patch14_224"),
        ("g/14", "vit_giant_patch14_224"),
    ],
)
def test_full_sizes_have_the_weights_of_timms_models(size, name):
    with torch.device("meta"):
        ours = mini.build(size, 4, 1000, 224, init_values=None)
        theirs = timm.create_model(name, reg_tokens=4, no_embed_class=True, num_classes=1000)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="unknown mini size 'b/x'; known are xxs, .* ti/16"):
        mini.build("b/x")
    with pytest.raises(UserError, match="100 pixels a side are not a multiple of the patch's 14"):
        mini.build("l/14", image_size=100)
