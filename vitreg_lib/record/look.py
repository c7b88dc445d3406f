"""One pass over any number of images, which keeps what the questions about a model's artifacts need.

Memory does not grow with the number of images beyond `JUDGED`: norms and attention are kept for these, tokens and
pixels for fewer, and only the share of outliers for other images.
"""

from dataclasses import dataclass

import torch

from ..data import images as image_sets
from ..measure import detection

JUDGED = 500  # images for the verdict; outliers are counted in all images
VALUES = 2**25  # kept of tokens, and of pixels: 221 images for a ViT-B/16
WORK = 3e11  # weights x tokens x images that one pass of an intervention may take: 16 images for a ViT-B/16
BATCH = 16
SHOWN = 4  # images in a picture


@dataclass
class Look:
    """The results of one pass over the images.

    observed, detection: of the judged images. shares: (n,) share of outliers in every image. kept: `Images`, spread
    evenly over the judged ones, with their tokens after the final LayerNorm (images, tokens, dim) and their `rows`
    among the judged images. labels: (images,) their classes, or None. costly: number of them for interventions.
    source: as given, "" for an `Images` set.
    """

    model: object
    observed: detection.Observed
    detection: detection.Detection
    shares: torch.Tensor
    kept: image_sets.Images
    rows: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor | None
    costly: int
    source: str

    @property
    def sample(self) -> torch.Tensor:
        """Rows of `kept`, evenly spread, for work that takes several forward passes."""
        return spread(len(self.kept), self.costly)

    @property
    def shown(self) -> torch.Tensor:
        """Rows of `kept` for pictures; the search for neurons does not use these images."""
        return self.sample[len(self.sample) // 2 :][:SHOWN]

    @property
    def mask(self) -> torch.Tensor:
        """(kept images, rows, cols) which of their patch tokens are outliers."""
        return self.detection.outliers.mask[self.rows]


def observe(model, source, n: int, labelled: bool = False, progress=None) -> Look:
    """The `Look` of a `Model` at an `Images` set, or at up to `n` images of a source that `images.stream` knows.

    labelled: sub-folders are classes, unless labels.csv names them. progress: called with the number of images done.
    """
    n = image_sets.number(source, n) if isinstance(source, str) else len(source)
    judged, progress = min(n, JUDGED), progress or (lambda done: None)
    parts, chosen, tokens, rows, done = [], [], [], [], 0
    for batch in _batches(source, model, judged):
        part, captured = detection.observe_batch(model, batch.x, ("final",))
        fits = VALUES // max(captured.final[0].numel(), batch.x[0].numel())
        wanted = set(spread(judged, max(fits, detection.FEWEST)).tolist())
        here = [i for i in range(len(batch)) if done + i in wanted]
        parts.append(part)
        chosen.append(batch.at(here))
        tokens.append(captured.final[here].clone())
        rows += [done + i for i in here]
        done += len(batch)
        progress(len(batch))
    observed = detection.join(parts)
    detected = detection.judge(observed, model.label)
    shares = [detected.outliers.mask.flatten(1).float().mean(1)]
    for more in _batches(source, model, n, judged) if n > judged else ():
        norms = model.capture(more.x, "norms", layers=detected.outliers.layer).patch_norms[:, 0]
        shares.append((norms > detected.outliers.cutoff).float().mean(1))
        batch.left_out.update(more.left_out)
        progress(len(more))
    shares = torch.cat(shares)
    x, pixels = torch.cat([each.x for each in chosen]), torch.cat([each.pixels for each in chosen])
    names, paths = ([each for part in chosen for each in getattr(part, name)] for name in ("names", "paths"))
    about = f"{batch.source.split(',')[0]}, {len(shares)} image{'s' * (len(shares) > 1)}"
    kept = image_sets.Images(x, pixels, names, about, None, batch.left_out, paths)
    if not isinstance(source, str):
        classes = image_sets.labels(source, labelled)
        classes = None if classes is None else classes[rows]
    elif batch.scenes is not None:
        classes = torch.cat([each.scenes.label for each in chosen])
    else:
        classes = image_sets.labels(kept, True) if labelled else None
    work = sum(p.numel() for p in model.module.parameters()) * captured.final.shape[1]
    costly = min(32, max(8, int(WORK / work)))
    source = source if isinstance(source, str) else ""
    return Look(model, observed, detected, shares, kept, torch.tensor(rows), torch.cat(tokens), classes, costly, source)


def _batches(source, model, n: int, first: int = 0):
    if isinstance(source, str):
        yield from image_sets.stream(source, model, n, batch_size=BATCH, first=first)
        return
    for start in range(first, n, BATCH):
        yield source.at(range(start, min(start + BATCH, n)))


def spread(n: int, most: int) -> torch.Tensor:
    """(at most `most`,) numbers from 0 to n - 1, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long() if n else torch.zeros(0, dtype=torch.long)
