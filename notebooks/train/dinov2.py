r"""Self-supervised training as in DINOv2 (Oquab et al. 2023): DINO between views, iBOT on masked patches, KoLeo.

A student learns to predict the output of its teacher, the moving average of itself, for another view of a scene: on
the cls token for whole and small crops (DINO), on the masked patch tokens that only the teacher sees (iBOT). The
teacher's outputs are balanced over the prototypes by Sinkhorn-Knopp. Losses, heads, masks and schedules come from
lightly.

    vitreg train dinov2 --size s --registers 4
    torchrun --nproc-per-node 8 -m vitreg_lib.cli train dinov2 --size l/14 --registers 4 --data imagenet \
        --image-size 224 --global-size 224 --local-size 98 --local-crops 8 --prototypes 65536 --batch-size 1024 \
        --optimizer adamw --learning-rate 1e-3 --steps 625000 --warmup 12500 --drop-path 0.3    # not run here

Position embeddings are resized to a crop's grid with or without antialiasing (`antialias`): the paper's Figure 10
compares the two.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from operator import attrgetter

import torch
import torch.nn.functional as F
import training_images
import views
from torch import nn

from vitreg_lib.data.scenes import MEAN, STD
from vitreg_lib.model import mini
from vitreg_lib.train import parallel
from vitreg_lib.train.images import order

LEARNS_FROM = "images alone: views of a scene, masked patches"
OPTIONS = {
    "prototypes": (1024, "number of prototypes, the outputs of the heads"),
    "global_size": (64, "pixels a side of the two whole crops"),
    "local_size": (32, "pixels a side of the small crops"),
    "local_crops": (4, "small crops of each image"),
    "momentum": (0.99, "initial momentum of the teacher; it rises to 1"),
    "antialias": (True, "resize position embeddings with antialiasing (Figure 10)"),
}
DEFAULTS = {"size": "s", "steps": 600, "batch_size": 64, "learning_rate": 5e-3, "weight_decay": 0.04, "clip_grad": 3.0}
SEPARABLE = False  # Sinkhorn-Knopp and KoLeo use the whole batch
GLOBAL, LOCAL = (0.4, 1.0), (0.1, 0.4)  # shares of the scene's area in whole and small crops
HEAD = {"hidden_dim": 192, "bottleneck_dim": 48}  # of mini ViTs
FULL_HEAD = {"hidden_dim": 2048, "bottleneck_dim": 256}  # DINOv2's, for full-size ViTs (ti/16 and larger)
FULL_LAYER_SCALE = 1e-5
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = (0.04, 0.07)  # at the first step, and from three tenths of the training on
KOLEO = 0.1


class DINOv2(nn.Module):
    """Student and teacher: each a mini ViT, a head for the cls token and one for patches; and the mask token."""

    def __init__(self, config):
        super().__init__()
        from lightly.loss import DINOLoss, IBOTPatchLoss
        from lightly.models.modules import DINOv2ProjectionHead

        self.student = backbone_of(config, drop_path_rate=config.drop_path)
        dim = self.student.embed_dim
        head = dict(input_dim=dim, output_dim=config.prototypes, **(HEAD if config.size in mini.SIZES else FULL_HEAD))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's heads use torch's older weight_norm
            self.student_heads = nn.ModuleDict({name: DINOv2ProjectionHead(**head) for name in ("cls", "patch")})
            self.teacher_heads = nn.ModuleDict({name: DINOv2ProjectionHead(**head) for name in ("cls", "patch")})
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.teacher = backbone_of(config)
        for student, teacher in self.pairs():
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        # these losses get outputs that Sinkhorn-Knopp has balanced, so their centres stay at zero
        options = dict(student_temp=STUDENT_TEMPERATURE, center_momentum=1.0)
        self.dino = DINOLoss(config.prototypes, **options)
        self.ibot = IBOTPatchLoss(config.prototypes, **options)

    def pairs(self):
        """((student, teacher), (student's heads, teacher's heads))."""
        return (self.student, self.teacher), (self.student_heads, self.teacher_heads)


def backbone_of(config, **options) -> nn.Module:
    """A ViT with random weights and no head; full-size ViTs (ti/16 and larger) have DINOv2's LayerScale."""
    scale = {} if config.size in mini.SIZES else {"init_values": FULL_LAYER_SCALE}
    return config.vit(**scale, **options)


build = DINOv2
backbone = attrgetter("teacher")  # DINOv2 evaluates and publishes the teacher
telemetry_images = training_images.telemetry_images


def loss(module, config, step, device):
    """DINO + iBOT + 0.1 KoLeo on two whole and `local_crops` small crops of each scene."""
    from lightly.loss import KoLeoLoss

    batch, index = training_images.batch(config, step, device)
    crops = views.crops(batch, index, config, GLOBAL, LOCAL)
    whole, small = torch.cat(crops[:2]), torch.cat(crops[2:])
    first = int(index[0]) - step * config.batch_size
    mask = masks(config, step)[:, first : first + len(index)].flatten(0, 1).to(device)
    temperature = teacher_temperature(config, step)

    with torch.no_grad():
        target = tokens(module.teacher, whole, antialias=config.antialias)
        answers = balance(module.teacher_heads["cls"](target[:, 0]), temperature).chunk(2)
        hidden = balance(module.teacher_heads["patch"](patches(module.teacher, target)[mask.flatten(1)]), temperature)
    output = tokens(module.student, whole, mask, module.mask_token, config.antialias)
    cls = output[:, 0]
    predicted = module.student_heads["patch"](patches(module.student, output)[mask.flatten(1)])
    small_cls = tokens(module.student, small, antialias=config.antialias)[:, 0]
    given = [
        *module.student_heads["cls"](cls).chunk(2),
        *module.student_heads["cls"](small_cls).chunk(config.local_crops),
    ]

    dino = module.dino(list(answers), given, teacher_temp=1.0)
    ibot = module.ibot(hidden, predicted, mask, teacher_temp=1.0)
    koleo = sum(KoLeoLoss()(parallel.gather(part)) for part in cls.chunk(2)) / 2
    numbers = {"dino": dino, "ibot": ibot, "koleo": koleo}
    return dino + ibot + KOLEO * koleo, numbers


def balance(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities (n, prototypes) of the teacher, balanced by three rounds of Sinkhorn-Knopp over all ranks.

    In one process the result is that of lightly's `sinkhorn`. With several processes, lightly's is correct only if all
    have the same number of rows, but ranks differ in their number of masked patches.
    """
    shares = (logits.float() / temperature).exp()
    for _ in range(3):
        shares = shares / parallel.all_reduce_sum(shares.sum(0))  # all prototypes get the same total
        shares = shares / shares.sum(1, keepdim=True)  # every row sums to 1
    return shares.clamp_min(1e-30).log()


def tokens(vit, pixels, mask=None, mask_token=None, antialias: bool = True) -> torch.Tensor:
    """Output tokens (n, prefix + patches, dim) of a mini ViT, after the final norm, on crops of any size.

    mask: (n, rows, cols), True where the patch is replaced by `mask_token`.
    """
    from timm.layers import resample_abs_pos_embed

    x = vit.patch_embed(pixels)  # (n, rows, cols, dim)
    if mask is not None:
        x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
    places = resample_abs_pos_embed(vit.pos_embed, list(x.shape[1:3]), num_prefix_tokens=0, antialias=antialias)
    return vit.norm(vit.blocks(vit.norm_pre(with_prefix(vit, x.flatten(1, 2) + places))))


def with_prefix(vit, patches: torch.Tensor) -> torch.Tensor:
    """(n, prefix + patches, dim): a ViT's cls token and registers, followed by patch tokens (n, patches, dim)."""
    prefix = [vit.cls_token] + ([vit.reg_token] if vit.reg_token is not None else [])
    return torch.cat([*(p.expand(len(patches), -1, -1) for p in prefix), patches], 1)


def patches(vit, tokens: torch.Tensor) -> torch.Tensor:
    """The patch tokens of output tokens (n, prefix + patches, dim)."""
    return tokens[:, vit.num_prefix_tokens :]


def masks(config, step: int) -> torch.Tensor:
    """(2, batch, rows, cols) bool: blocks in half of the whole crops of the global batch, 10 to 50 % of a crop."""
    from lightly.models.utils import random_block_mask

    random.seed(f"{config.seed} {step}")  # lightly uses this generator; the same on every rank and after resuming
    patch = int(config.size.partition("/")[2] or 8)  # pixels a side: 14 of l/14, and 8 of mini sizes
    grid = config.global_size // patch
    return random_block_mask((2 * config.batch_size, grid, grid)).unflatten(0, (2, -1))


def teacher_temperature(config, step: int) -> float:
    """The teacher's temperature; it rises linearly in the first three tenths of the training."""
    low, high = TEACHER_TEMPERATURE
    return low + (high - low) * min(1.0, step / max(1, 0.3 * config.steps))


@torch.no_grad()
def after_step(module, config, step) -> None:
    """Update the teacher towards the student; its momentum rises from `momentum` to 1 on a cosine."""
    from lightly.models.utils import update_momentum
    from lightly.utils.scheduler import cosine_schedule

    momentum = cosine_schedule(min(step, config.steps), config.steps, config.momentum, 1.0)
    for student, teacher in module.pairs():
        update_momentum(student, teacher, momentum)


def evaluate(module, config, device) -> dict[str, float]:
    """`beside_random` of the teacher."""
    return beside_random(module.teacher, config, device)


def beside_random(trained, config, device) -> dict[str, float]:
    """k-NN accuracy (0 to 1) of a ViT's cls token for each attribute, and the same with random weights (random_…)."""
    torch.manual_seed(config.seed)
    fresh = backbone_of(config).to(device)
    accuracy = knn(trained, config, device)
    return accuracy | {f"random_{name}": value for name, value in knn(fresh, config, device).items()}


def query_count(config) -> int:
    """Number of queries among the images of `labelled`."""
    return (
        min(config.eval_images, len(training_images.pictures(config.data, "val")))
        if config.data
        else config.eval_images
    )


def labelled(config) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(pixels, labels) for a nearest-neighbour evaluation: `eval_images` held-out queries, then a bank twice as large.

    labels: by attribute for scenes, `class` for a folder. The bank of a folder has training images.
    """
    count = config.eval_images
    if not config.data:
        yield from training_images.held_out_scenes(config, 3 * count)
        return
    for split, wanted in (("val", count), ("train", 2 * count)):
        source = training_images.pictures(config.data, split)
        for part in order(len(source), config.seed)[:wanted].split(256):
            pixels, labels = training_images.read(config, source, part)
            yield pixels, {"class": torch.tensor(labels)}


@torch.no_grad()
def knn(vit, config, device, neighbours: int = 20) -> dict[str, float]:
    """k-NN accuracy (0 to 1) for each attribute: a weighted vote of the 20 nearest images, by cosine of cls tokens.

    The evaluation is that of DINO (weights exp(cosine / 0.07)). `knn` is the mean over the attributes.
    """
    vit.eval()
    features, truth = [], []
    for pixels, labels in labelled(config):
        features.append(F.normalize(vit.forward_features((pixels.to(device) - MEAN) / STD)[:, 0], dim=1).cpu())
        truth.append(labels)
    features = torch.cat(features)
    queries = query_count(config)
    query, bank = features[:queries], features[queries:]
    cosine, nearest = (query @ bank.T).topk(min(neighbours, len(bank)))
    weight = (cosine / 0.07).exp()
    shares = {}
    for name in truth[0]:
        label = torch.cat([part[name] for part in truth])
        votes = F.one_hot(label[queries:][nearest]) * weight[..., None]
        shares[f"knn_{name}"] = (votes.sum(1).argmax(1) == label[:queries]).float().mean().item()
    return {"knn": sum(shares.values()) / len(shares), **shares}
