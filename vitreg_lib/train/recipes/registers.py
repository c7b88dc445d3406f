r"""Train registers into a model that has none, on unlabelled photos, in one to a few minutes on a CPU.

The student is the same model with N registers; it learns the outputs of a teacher without outliers. The loss is
`patch_weight` times the distance of patch tokens before the final norm, relative to the teacher's mean length, plus
`answer_weight` times the Kullback-Leibler divergence of the logits (for a model without classes: 1 - cosine of the
pooled features). After the final norm outliers hardly differ from other tokens: a loss there removed none of ViT-Ti's.

    --start outliers   registers start at k-means centres of what enters block 0 at patches that become outliers
    --start random     as a fresh ViT's registers do, normal numbers of 0.02
    --teacher ttr      the model with 4 registers at test time (see `vitreg mend`)
    --teacher shift    the model's mean over 10 views, shifted by whole patches and flipped, moved back (PH-Reg, 2025)
    --teacher self     the unchanged model: a control, which shows what registers do without such a teacher
    --free all, first (registers, embeddings and the first half of the blocks) or registers

    vitreg train registers --model deit-ti                                 # on the photos that ship with other packages
    vitreg train registers --model timm:NAME --registers 4 --data my/photos --report imagenet

The report compares the model before and after on photos that were not trained on, with the accuracy where the folder
of --report has a labels.csv (file, class_index). The result, model.safetensors, is an ordinary model of timm:

    timm.create_model(NAME, reg_tokens=4, checkpoint_path="model.safetensors")      # num_reg_tokens for Eva
    vr.load("file:model.safetensors")
"""

import dataclasses
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...base import UserError, unknown
from ...data import images as sources
from ...data import scenes
from ...hooks.capture import evaluating, hooks
from ...model import added, mend, names, remedies, zoo
from ...model.grow import with_registers
from .. import parallel
from ..images import HELD_OUT_EVERY, Augmented, Stream, of_files, order

LEARNS_FROM = "unlabelled photos: registers into a model that came without"
OPTIONS = {
    "model": ("", "the model that gets registers: any name of `vitreg models`"),
    "start": ("outliers", "of the registers: outliers (what enters block 0 there), or random"),
    "teacher": ("ttr", "ttr (the model with test-time registers), shift (mean of views), or self"),
    "free": ("all", "what is trained: all, first (registers and first half of blocks), or registers"),
    "cutoff": (0.0, "norm of an outlier after the last block; 0: by the model's own norms"),
    "patch_weight": (2.0, "weight of the patch tokens in the loss"),
    "answer_weight": (1.0, "weight of the logits (or the pooled features) in the loss"),
    "photos": (0, "train on that many photos of the folder only; 0: on all"),
    "report": ("", "photos for the report: a source or folder; default: those held out"),
}
DEFAULTS = {
    "size": "",
    "registers": 4,
    "image_size": 0,
    "steps": 100,
    "batch_size": 8,
    "learning_rate": 3e-5,
    "weight_decay": 0.0,
    "warmup": 5,
    "optimizer": "adamw",
    "eval_images": 100,
    "telemetry_images": 4,
    "save_every": 50,
    "workers": 2,
}
STARTS, TEACHERS, FREE = ("outliers", "random"), ("ttr", "shift", "self"), ("all", "first", "registers")
TEACHERS_REGISTERS = 4  # of the teacher "ttr", whatever the student gets
SEARCHED = 32  # training photos on which outliers and their neurons are searched
CROP = (0.5, 1.0)  # share of a photo's area that a training crop takes
REPORTED = ("rocket", "coffee", "astronaut", "retina")  # of the shipped photos: kept for the report
FEWEST = 4  # photos in a folder


@dataclasses.dataclass(frozen=True)
class Source:
    """The model before, on the CPU; what `mend.find` gave for it; and what enters block 0 at its outliers, (n, dim)."""

    model: object
    found: mend.Search
    entering: torch.Tensor


class Taught(nn.Module):
    """A student with registers and its frozen teacher."""

    def __init__(self, config):
        super().__init__()
        self.source = source(config)
        self.kind = config.teacher
        self.student = with_registers(self.source.model.module, start(config, self.source))
        _free(self.student, config)
        self.teacher = _teacher(config, self.source).requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def wanted(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(patch tokens before the final norm, logits or pooled features) for images, by the teacher."""
        return (remedies.shift_average if self.kind == "shift" else remedies.patches_and_answers)(self.teacher, x)


def build(config) -> nn.Module:
    """The student, grown from `config.model`, with its teacher.

    Raises mend.NothingToMend for a model without outliers, UserError for unknown options, too few photos, or a model
    that cannot have registers or such a teacher.
    """
    for option, valid in (("start", STARTS), ("teacher", TEACHERS), ("free", FREE)):
        if (chosen := getattr(config, option)) not in valid:
            raise unknown(option, chosen, valid)
    if not config.model:
        raise UserError("--model NAME: which model is to get registers? See `vitreg models`; timm: and file: too")
    return Taught(config)


def backbone(module) -> nn.Module:
    """The student."""
    return module.student


def loss(module, config, step, device):
    """(loss, its two parts as numbers): the student's distance from the teacher, in patch tokens and in answers."""
    x = _training_images(config, module.source.model, step, device)
    with torch.autocast(torch.device(device).type, enabled=False):  # bfloat16 would blur distances of a few per cent
        wanted, wanted_answers = module.wanted(x)
        tokens, answers = remedies.patches_and_answers(module.student, x)
    apart = distance(tokens.float(), wanted.float())
    if getattr(module.student, "num_classes", 0) > 0:
        logs = [a.float().log_softmax(-1) for a in (answers, wanted_answers)]
        other = F.kl_div(*logs, reduction="batchmean", log_target=True)
    else:
        other = 1 - F.cosine_similarity(answers.float(), wanted_answers.float(), dim=-1).mean()
    value = config.patch_weight * apart + config.answer_weight * other
    return value, {"patches": apart, "answers": other}


def distance(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean Euclidean distance of tokens (images, patches, dim), each image's by the root mean square length wanted."""
    length = wanted.square().sum(-1).mean(1, keepdim=True).sqrt()
    return (torch.linalg.vector_norm(tokens - wanted, dim=-1) / length).mean()


def telemetry_images(config) -> torch.Tensor:
    """The first photos of the report, normalised."""
    return _report_images(config, source(config).model, config.telemetry_images)[0]


def evaluate(module, config, device) -> dict[str, float]:
    """Means of `remedies.effect` over the report's photos: before and after, on photos that were not trained on."""
    model, found = module.source.model, module.source.found
    x, labels = _report_images(config, model, config.eval_images)
    after = dataclasses.replace(model, module=module.student.to(device))
    before = dataclasses.replace(model, module=model.module.to(device))
    try:
        effects = remedies.effect(before, after, x, found.cutoff, found.layer, labels)
    finally:
        model.module.to("cpu")
    measured = effects.dropna(axis=1, how="all")
    counts = {"photos_of_report": len(effects), "parameters": sum(p.numel() for p in module.student.parameters())}
    return {name: float(measured[name].mean()) for name in sorted(measured)} | counts  # the teacher does not count


# the student and its teacher


def start(config, source: Source) -> torch.Tensor:
    """(registers, dim) tokens that the registers start from."""
    dim = source.model.anatomy.embed_dim
    generator = torch.Generator().manual_seed(config.seed)
    if config.start == "random" or not config.registers:
        return 0.02 * torch.randn(config.registers, dim, generator=generator)
    from sklearn.cluster import KMeans

    points = source.entering
    if len(points) < config.registers:
        raise UserError(f"{len(points)} outliers in {SEARCHED} photos are too few for {config.registers} registers")
    clusters = KMeans(config.registers, n_init=4, random_state=config.seed).fit(points.double().numpy())
    return torch.from_numpy(clusters.cluster_centers_).float()


def _free(student: nn.Module, config) -> None:
    """Only what is to be trained gets gradients."""
    student.requires_grad_(config.free == "all")
    names = {"all": (), "first": ("patch_embed", "pos_embed", "reg_token"), "registers": ("reg_token",)}[config.free]
    blocks = student.blocks[: len(student.blocks) // 2] if config.free == "first" else ()
    for part in (*(getattr(student, name, None) for name in names), *blocks):
        if part is not None:
            part.requires_grad_(True)
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError(f"--free {config.free} with {config.registers} registers leaves nothing to train")


def _teacher(config, source: Source) -> nn.Module:
    model, found = source.model, source.found
    if config.teacher != "ttr":
        return added.add_registers(model.module, (), 0)
    if not found.mends:
        raise UserError(
            f"--teacher ttr: moving the likeliest neurons of {model.name} leaves {found.share_after:.2%} of the patch "
            f"tokens outliers, of {found.share_before:.2%}; take --teacher shift"
        )
    return added.add_registers(model.module, found.neurons, TEACHERS_REGISTERS)


# the model before, and photos


def source(config) -> Source:
    """The model before and its outliers, found on training photos; runs that differ in other options share it."""
    file = names.file_parts(names.split(config.model)[0])[0]
    file = file / "model.safetensors" if file.is_dir() else file
    written = file.stat().st_mtime_ns if file.is_file() else 0  # a file that was written again holds another model
    facts = (config.model, config.image_size, config.cutoff, config.data, config.photos, config.seed)
    return _source(*facts, written)


@functools.lru_cache(maxsize=1)
def _source(name: str, image_size: int, cutoff: float, data: str, photos: int, seed: int, written: int) -> Source:
    model = zoo.load(name, "cpu", image_size or None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.module.to(device)
    if is_procedural(data, model):
        x = mend.handful(model).x
    else:
        training = _photos(data, photos, seed)[0]
        x = _centred(model, [training[i] for i in order(len(training), seed)[:SEARCHED].tolist()])
    found = mend.find(model, x, cutoff=cutoff or None)
    entering = []
    first = model.module.norm_pre if hasattr(model.module, "norm_pre") else model.module.blocks[0]
    keep = lambda part, inputs: entering.append(inputs[0][:, model.anatomy.num_prefix_tokens :].clone())  # noqa: E731
    with evaluating(model.module), hooks((first.register_forward_pre_hook, keep)):
        for part in x.split(16):
            model.module.forward_features(part.to(device))
    norms = model.capture(x, layers=found.layer).patch_norms[:, 0]
    model.module.to("cpu")
    return Source(model, found, torch.cat(entering).cpu()[norms > found.cutoff])


def is_procedural(data: str, model) -> bool:
    """Whether to train on scenes: of a mini ViT, which was trained on them, where no folder is given."""
    return not data and hasattr(model.module, "vit_arguments")


@functools.lru_cache(maxsize=4)
def _photos(data: str, photos: int, seed: int) -> tuple[list[Path], list[Path]]:
    """(photos to train on, at most `photos` where not 0; photos held out) of a folder or of the shipped ones."""
    paths, _ = sources.find(data or "photos")
    if not data:
        held_out = [p for p in paths if p.stem in REPORTED]
        return [p for p in paths if p not in held_out], held_out
    if len(paths) < FEWEST:
        raise UserError(f"{len(paths)} photos in {data!r} are too few: at least {FEWEST} are needed")
    every = min(HELD_OUT_EVERY, len(paths) // 2)  # of few photos at least two are held out
    held_out = paths[every - 1 :: every]
    training = [p for i, p in enumerate(paths) if i % every != every - 1]
    if photos:
        training = [training[i] for i in sorted(order(len(training), seed)[:photos].tolist())]
    return training, held_out


def _training_images(config, model, step: int, device) -> torch.Tensor:
    """This process's images of a step, normalised: random crops, half of them flipped; for a mini ViT scenes."""
    if is_procedural(config.data, model):
        pixels = scenes.render(parallel.batch_range(config, step), model.input_size, config.seed, device).pixels
        return model.normalise(pixels)
    return _stream(config, str(device), model.sha256).batch(step)[0]


@functools.lru_cache(maxsize=1)
def _stream(config, device: str, sha256: str) -> Stream:
    """The photos of a training, augmented as the model of these weights takes them."""
    from timm.data import create_transform

    model = source(config).model
    transform = create_transform(
        model.input_size,
        is_training=True,
        scale=CROP,
        color_jitter=None,
        interpolation=model.interpolation,
        mean=model.mean,
        std=model.std,
    )
    photos = of_files(_photos(config.data, config.photos, config.seed)[0])
    return Stream(config, device, Augmented(config.seed, photos, transform))


def _centred(model, paths: list[Path]) -> torch.Tensor:
    transform = sources.preprocessing(model, model.input_size)
    return model.normalise(torch.stack([transform(sources.read(path)) for path in paths]))


def _report_images(config, model, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most `count` photos of the report, normalised, and their classes where a labels.csv gives them."""
    if config.report:
        chosen = sources.load(config.report, model, count)
        return chosen.x, sources.labels(chosen)
    if is_procedural(config.data, model):
        return sources.load("scenes", model, count, seed=8).x, None
    return _centred(model, _photos(config.data, config.photos, config.seed)[1][:count]), None
