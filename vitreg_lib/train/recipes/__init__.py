"""One module a recipe; what a recipe consists of stands at the top of `train.loop`."""

from ...model import mini


def new_vit(config, outputs: int = 0, **options):
    """A fresh ViT of the configuration's size; `outputs` of its head, 0 for none; `options` go to timm's class."""
    return mini.build(config.size, config.registers, outputs, config.image_size, config.register_start, **options)
