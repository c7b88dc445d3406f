"""Scenes: a procedural world of images with exact ground truth, rendered by torch on any device.

One to five objects (shape, colour, texture, size, place, rotation) stand before a background that is
plain, a gradient, soft noise (all three of low information, where the paper's artifacts sit) or busy.
The largest object is the nearest and gives the image its class: its shape. Apparent size falls with
distance, so depth can be learnt. Everything follows from (seed, index): the same index gives the same
scene in any batch, at any resolution, on any device.

Coordinates are relative: x to the right, y down, both from 0 to 1. Sizes are radii as a share of the
image's side.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring", "bar", "moon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
TEXTURES = ("plain", "striped", "checked", "dotted")
BACKGROUNDS = ("plain", "gradient", "soft", "busy")
MAX_OBJECTS = 5
_RGB = torch.tensor(
    [
        [0.86, 0.16, 0.18],
        [0.18, 0.66, 0.25],
        [0.16, 0.34, 0.86],
        [0.95, 0.84, 0.16],
        [0.56, 0.22, 0.72],
        [0.20, 0.78, 0.82],
        [0.95, 0.52, 0.12],
        [0.95, 0.95, 0.95],
    ]
)
_ANGLES = 512  # steps of the tables that hold each shape's outline as a function of the angle
_TILT = math.pi / 6  # objects stand upright, give or take thirty degrees
_NEAR, _FAR, _BACKDROP = 1.5, 8.0, 10.0  # depth of the nearest and farthest object and of the background
_DRAWS_PER_OBJECT, _DRAWS_PER_SCENE, _NOISE = 10, 24, 6  # independent uniform numbers; soft noise is 6 x 6
_DRAWS = MAX_OBJECTS * _DRAWS_PER_OBJECT + _DRAWS_PER_SCENE + 3 * _NOISE * _NOISE
HELD_OUT = 1 << 40  # scenes from this index on are never trained on
MEAN = STD = 0.5
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "background": BACKGROUNDS,
}


@dataclass
class Scenes:
    """A batch of rendered scenes; `n` images of `size` pixels a side, up to five objects each.

    pixels: (n, 3, size, size) float32 in [0, 1].
    label: (n,) class of the image, the largest object's shape (index into `SHAPES`).
    instances: (n, size, size) int64, 0 for background, k + 1 for object k.
    semantic: (n, size, size) int64, 0 for background, 1 + shape for objects.
    depth: (n, size, size) float32, in units of the scene (1.5 near to 10 for the background).
    boxes: (n, 5, 4) float32 x0, y0, x1, y1 in pixels of the visible part; zeros where not `visible`.
    visible: (n, 5) bool, whether object k exists and shows at least one pixel. Object 0 is the largest.
    shape, colour, texture: (n, 5) int64. place: (n, 5, 2) centre x, y. radius: (n, 5).
    background: (n,) int64, index into `BACKGROUNDS`. index: (n,) int64.
    """

    pixels: torch.Tensor
    label: torch.Tensor
    instances: torch.Tensor
    semantic: torch.Tensor
    depth: torch.Tensor
    boxes: torch.Tensor
    visible: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    texture: torch.Tensor
    place: torch.Tensor
    radius: torch.Tensor
    background: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def visible_boxes(self) -> list[torch.Tensor]:
        """(objects, 4) boxes of the visible objects, for each image."""
        return [boxes[visible] for boxes, visible in zip(self.boxes, self.visible, strict=True)]


def render(
    index: torch.Tensor | range, size: int = 96, seed: int = 0, device: str = "cpu", compiled: bool = False
) -> Scenes:
    """Scenes `index` of world `seed` as `Scenes`, at `size` pixels a side (64 to 224).

    Rendered in chunks that fit a CPU's cache; `compiled`, for a GPU, in few kernels by torch.compile, equal to 1e-5.
    Raises ValueError for a size outside 64…224.
    """
    if not 64 <= size <= 224:
        raise ValueError(f"size {size} is out of range: scenes are rendered at 64 to 224 pixels a side")
    index = torch.as_tensor(index, dtype=torch.int64, device=device)
    chunk = 32 if index.device.type == "cpu" else 4096
    draw = _compiled() if compiled else _render
    parts = [draw(part, uniform(part, _DRAWS, seed), size, *_tables(index.device)) for part in index.split(chunk)]
    if len(parts) == 1:
        return parts[0]
    return Scenes(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)})


def uniform(index: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """(n, draws) float32 in [0, 1): a counter-based random number for each (seed, index, draw).

    Hashing instead of a generator makes a scene independent of the batch it is drawn in and of the
    device. The mixing is the finaliser of MurmurHash3 on 64 bits, in wrapping integer arithmetic.
    """
    counter = torch.arange(draws, device=index.device)
    world = (seed * 0x5851F42D4C957F2D + (1 << 63)) % (1 << 64) - (1 << 63)  # wrapped as torch's integers are
    h = index[:, None] * 0x9E3779B97F4A7C1 + counter * 0x2545F4914F6CDD1D + world
    for multiplier in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        h = h ^ ((h >> 33) & 0x7FFFFFFF)
        h = h * multiplier
    h = h ^ ((h >> 33) & 0x7FFFFFFF)
    return ((h >> 8) & 0xFFFFFF).float() / 0x1000000


@functools.cache
def _compiled():
    return torch.compile(_render, dynamic=False)


@functools.cache
def _tables(device) -> tuple[torch.Tensor, torch.Tensor]:
    return _RGB.to(device), _outlines().to(device)


def _render(index, u, size: int, colours, outlines) -> Scenes:
    """Scenes `index` from independent numbers u (n, `_DRAWS`), which a compiler's integers are too narrow to draw."""
    n, device = len(index), index.device
    objects = u[:, : MAX_OBJECTS * _DRAWS_PER_OBJECT].view(n, MAX_OBJECTS, _DRAWS_PER_OBJECT)
    scene = u[:, MAX_OBJECTS * _DRAWS_PER_OBJECT :]
    objects, exists, place, radius, z = _layout(objects, scene)
    shape = (objects[..., 4] * len(SHAPES)).long()
    colour = (objects[..., 5] * len(COLOURS)).long()
    texture = (objects[..., 6] * len(TEXTURES)).long()
    background = (scene[:, 1] * len(BACKGROUNDS)).long()

    axis = (torch.arange(size, device=device) + 0.5) / size
    pixels = _background(background, scene, axis)
    instances = torch.zeros(n, size, size, dtype=torch.int64, device=device)
    # the backdrop comes nearer towards the lower edge, as ground does
    depth = (_BACKDROP - 2 * axis)[None, :, None].expand(n, size, size).clone()
    for k in reversed(range(MAX_OBJECTS)):  # far to near
        for i in _rows(exists[:, k]):
            outline = outlines[shape[i, k]]
            inside, shade = _object(objects[i, k], place[i, k], radius[i, k], shape[i, k], texture[i, k], axis, outline)
            inside = inside * exists[i, k, None, None]
            rgb = (colours[colour[i, k]] * (0.85 + 0.15 * objects[i, k, 7, None]))[:, :, None, None]
            pixels[i] = torch.lerp(pixels[i], rgb * shade[:, None], inside[:, None])
            solid = inside >= 0.5
            instances[i] = torch.where(solid, k + 1, instances[i])
            depth[i] = torch.where(solid, z[i, k, None, None], depth[i])
    boxes, visible = _boxes(instances)
    table = torch.cat([torch.zeros(n, 1, dtype=torch.int64, device=device), shape + 1], 1)
    semantic = table.gather(1, instances.flatten(1)).view_as(instances)
    attributes = dict(shape=shape, colour=colour, texture=texture, place=place, radius=radius, background=background)
    return Scenes(
        pixels.clamp_(0, 1), shape[:, 0], instances, semantic, depth, boxes, visible, index=index, **attributes
    )


def _rows(mask: torch.Tensor) -> Iterator:
    """An index of the rows where a mask (n,) holds, if there are any; on a GPU, which would wait for the count, of all.

    Callers therefore apply the mask to what they compute.
    """
    if mask.device.type != "cpu":
        yield slice(None)
    elif len(rows := mask.nonzero()[:, 0]):
        yield rows


def _layout(objects, scene):
    """Objects' draws sorted near to far, which exist, centres (n, 5, 2), radii (n, 5) and depths (n, 5)."""
    is_main = torch.arange(MAX_OBJECTS, device=scene.device) == 0
    radius = torch.where(is_main, 0.20 + 0.12 * objects[..., 0], 0.06 + 0.08 * objects[..., 0])
    # apparent radius = physical radius / depth, so the main object (at most 2.75) is nearer than all others (3.2)
    depth = (0.5 * (0.9 + 0.2 * objects[..., 8]) / radius).clamp(_NEAR, _FAR)
    depth, order = depth.sort(dim=1, stable=True)
    objects = objects.gather(1, order[..., None].expand_as(objects))
    radius = radius.gather(1, order)
    place = radius[..., None] + (1 - 2 * radius[..., None]) * objects[..., 1:3]
    exists = order < 1 + (scene[:, :1] * MAX_OBJECTS).long()
    return objects, exists, place, radius, depth


def _object(draws, place, radius, shape, texture, axis, outline):
    """Coverage in [0, 1] and shade of the surface, both (objects, size, size)."""
    x = (axis - place[:, :1])[:, None, :]
    y = (axis - place[:, 1:])[:, :, None]
    turn = (draws[:, 3, None, None] - 0.5) * (2 * _TILT)
    distance = torch.sqrt(x * x + y * y) / radius[:, None, None]
    step = ((torch.atan2(y, x) + turn) * (_ANGLES / (2 * math.pi))).long() % _ANGLES
    outer = outline.flatten()[step + (torch.arange(len(shape), device=step.device) * _ANGLES)[:, None, None]]
    soft = (radius * len(axis))[:, None, None]  # pixels in a radius: edges are one pixel wide
    inside = ((outer - distance) * soft + 0.5).clamp_(0, 1)
    is_ring = shape == SHAPES.index("ring")
    for i in _rows(is_ring):
        hole = ((distance[i] - 0.55) * soft[i] + 0.5).clamp_(0, 1)
        inside[i] = torch.where(is_ring[i, None, None], torch.minimum(inside[i], hole), inside[i])
    shade = torch.ones_like(inside)
    for kind in range(1, len(TEXTURES)):
        is_kind = texture == kind
        for i in _rows(is_kind):
            surface = _surface(kind, x[i], y[i], turn[i], 16 + 10 * draws[i, 9, None, None])
            shade[i] = torch.where(is_kind[i, None, None], surface, shade[i])
    return inside, shade


def _surface(kind, x, y, turn, frequency):
    """Shade of a texture, 0.5 or 1, in the object's own rotated frame; `frequency` in radians a quarter side."""
    cos, sin = torch.cos(turn), torch.sin(turn)
    a = torch.sin((x * cos - y * sin) * (4 * frequency))
    if TEXTURES[kind] == "striped":
        dark = a > 0
    else:
        b = torch.sin((x * sin + y * cos) * (4 * frequency))
        dark = (a * b > 0) if TEXTURES[kind] == "checked" else (a * b > 0.4)
    return 1 - 0.5 * dark


def _outlines() -> torch.Tensor:
    """(shapes, angles): the outline's distance from the centre, as a share of the radius."""
    angle = torch.arange(_ANGLES) * (2 * math.pi / _ANGLES)
    turn = [2 * math.pi * k / 10 for k in range(10)]
    star = [((1.0 if k % 2 == 0 else 0.45), t) for k, t in enumerate(turn)]
    arm, w = 1.0, 0.3
    corners = [(arm, w), (w, w), (w, arm), (-w, arm), (-w, w), (-arm, w)]
    cross = corners + [(-x, -y) for x, y in corners]
    table = {
        "disc": torch.ones(_ANGLES),
        "square": _polygon([(0.8, 0.8), (-0.8, 0.8), (-0.8, -0.8), (0.8, -0.8)], angle),
        "triangle": _polygon([(math.cos(t), math.sin(t)) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)], angle),
        "star": _polygon([(r * math.cos(t), r * math.sin(t)) for r, t in star], angle),
        "cross": _polygon(cross, angle),
        "ring": torch.ones(_ANGLES),
        "bar": _polygon([(1.0, 0.3), (-1.0, 0.3), (-1.0, -0.3), (1.0, -0.3)], angle),
        "moon": _half_disc(angle),
    }
    return torch.stack([table[name] for name in SHAPES])


def _polygon(corners, angle):
    """Distance of a star-shaped polygon's outline from the origin in each direction."""
    far = torch.full_like(angle, torch.inf)
    ray = torch.stack([angle.cos(), angle.sin()])
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        cross = ray[0] * ey - ray[1] * ex
        t = (x0 * ey - y0 * ex) / cross  # along the ray
        s = (x0 * ray[1] - y0 * ray[0]) / cross  # along the edge
        far = torch.where((t > 0) & (s >= -1e-4) & (s <= 1 + 1e-4), torch.minimum(far, t), far)
    return far


def _half_disc(angle, shift: float = 0.4):
    """A half disc seen from a point inside it, `shift` from its straight side."""
    c, s = angle.cos(), angle.sin()
    arc = -shift * c + torch.sqrt(1 - (shift * s) ** 2)  # circle of radius 1 about (-shift, 0)
    straight = torch.where(c < 0, -shift / c, torch.inf)
    return torch.minimum(arc, straight)


def _background(kind, scene, axis):
    """(n, 3, size, size) backdrop: two muted colours, mixed evenly, along a line, by soft noise, or busily."""
    n, size = len(kind), len(axis)
    first, second = 0.25 + 0.45 * scene[:, 2:5], 0.25 + 0.45 * scene[:, 5:8]
    turn = 2 * math.pi * scene[:, 8, None, None]
    slope = (axis - 0.5)[None, None, :] * torch.cos(turn) + (axis - 0.5)[None, :, None] * torch.sin(turn)
    mix = torch.zeros(n, size, size, device=axis.device)
    mix = torch.where((kind == BACKGROUNDS.index("gradient"))[:, None, None], slope * 0.8 + 0.5, mix)
    pixels = torch.lerp(first[:, :, None, None], second[:, :, None, None], mix[:, None])
    noise = scene[:, _DRAWS_PER_SCENE:].view(n, 3, _NOISE, _NOISE) - 0.5
    is_soft, is_busy = (kind == BACKGROUNDS.index(name) for name in ("soft", "busy"))
    for i in _rows(is_soft):
        soft = 0.35 * F.interpolate(noise[i], size=(size, size), mode="bilinear", align_corners=True)
        pixels[i] += soft * is_soft[i, None, None, None]
    for i in _rows(is_busy):
        pixels[i] += _busy(scene[i], noise[i], axis) * is_busy[i, None, None, None]
    return pixels


def _busy(scene, noise, axis):
    """Three crossing waves warped by noise: no patch of it is uniform."""
    warp = F.interpolate(noise[:, :1], size=(len(axis), len(axis)), mode="bilinear", align_corners=True)[:, 0]
    total = 0
    for k in range(3):
        turn = math.pi * scene[:, 9 + k, None, None]
        frequency = 50 + 60 * scene[:, 12 + k, None, None]
        along = axis[None, None, :] * torch.cos(turn) + axis[None, :, None] * torch.sin(turn)
        total = total + torch.sin(along * frequency + 6 * warp)
    tint = 0.04 + 0.10 * scene[:, 15:18, None, None]
    return total[:, None] * tint


def _boxes(instances):
    """Boxes (n, 5, 4) in pixels around what is visible of each object, and which are visible (n, 5)."""
    size = instances.shape[-1]
    place = torch.arange(size, device=instances.device, dtype=torch.float32)
    mask = torch.stack([instances == k + 1 for k in range(MAX_OBJECTS)], 1)
    columns, rows = mask.any(2), mask.any(3)  # (n, 5, size)
    low = [torch.where(m, place, torch.inf).amin(2) for m in (columns, rows)]
    high = [torch.where(m, place + 1, -torch.inf).amax(2) for m in (columns, rows)]
    visible = columns.any(2)
    boxes = torch.stack([*low, *high], 2)
    return torch.where(visible[..., None], boxes, 0.0), visible


def targets(batch: Scenes) -> dict[str, torch.Tensor]:
    """(n,) index of the main object's shape, colour and texture, and of the background."""
    main = {name: getattr(batch, name)[:, 0] for name in ("shape", "colour", "texture")}
    return main | {"background": batch.background}
