"""Names of models, and facts available before loading: data/models.yaml and folders of weights, without torch."""

import functools
import json
import re
from pathlib import Path

import yaml

from ..base import CHECKPOINTS, DATA, ROOT, UserError, env_folder, unknown

MOST_TOKENS = 64  # that can be added at test time; and directions removed
TWINS = ROOT / "runs" / "twins"  # where workflow/twins.py puts its models
OTHERS = ("timm:", "random:", "file:", "open_clip:", "hf:")


@functools.cache
def entries() -> dict[str, dict]:
    """The entries of data/models.yaml by name."""
    return yaml.safe_load((DATA / "models.yaml").read_text())


def split(name: str) -> tuple[str, str, int]:
    """(name, "", 0); for NAME+ttrN, +emptyN or +minusN (NAME, "ttr" …, N). Raises UserError for an invalid N."""
    # in a path, only an ending counts: what looks like one before is part of the path
    number = r"\d+" if name.startswith(("file:", "hf:")) else ".*"
    pattern = rf"(.*?)(?:\+(ttr|empty|minus)({number}))?"
    base, kind, number = re.fullmatch(pattern, name).groups()
    if kind and (not number.isdecimal() or int(number) > MOST_TOKENS):
        raise UserError(f"{name!r}: write +{kind}N with N from 0 to {MOST_TOKENS}, for instance {base}+{kind}4")
    return base, kind or "", int(number or 0)


def file_parts(name: str) -> tuple[Path, str]:
    """(path, architecture) of file:PATH#ARCH; a path may hold a # of its own."""
    whole = name.removeprefix("file:")
    location, mark, architecture = whole.rpartition("#")
    if not mark or Path(whole).expanduser().exists():
        location, architecture = whole, ""
    return Path(location).expanduser(), architecture


def check(names: str) -> None:
    """Raise UserError if one of `names`, separated by spaces or commas, names no model.

    No weights are read. A name outside data/models.yaml needs timm's list, which takes seconds to import.
    """
    for name in names.replace(",", " ").split():
        base, _, _ = split(name)
        if base in entries() or base.startswith(("open_clip:", "hf:")):
            continue
        if base.startswith("file:"):
            if not file_parts(base)[0].exists():
                raise UserError(f"{name}: no such file or folder")
            continue
        import timm

        plain = base.partition(":")[2] if base.startswith(OTHERS) else base
        if plain not in entries() and not timm.is_model(plain.partition(".")[0]):
            raise unknown("model", plain, [*entries(), *timm.list_models("*vit*")], "See `vitreg models`.")


def available(name: str) -> str:
    """Where an entry's weights are: "shipped", "computed", "VITREG_MODELS", "runs/twins", "hub cache" or "not here"."""
    entry = entries()[name]
    if "file" in entry:
        return "shipped" if (CHECKPOINTS / entry["file"]).exists() else "not here"
    if "random" in entry:
        return "computed"
    if "made_by" in entry:
        path = made(name)
        return "not here" if path is None else "runs/twins" if path.is_relative_to(TWINS) else "VITREG_MODELS"
    if folder(entry["timm"]):
        return "VITREG_MODELS"
    from huggingface_hub import try_to_load_from_cache

    for filename in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(try_to_load_from_cache(f"timm/{entry['timm']}", filename), str):
            return "hub cache"
    return "not here"


def made(name: str) -> Path | None:
    """Path of the weights of an entry that is made here, in VITREG_MODELS or runs/twins; None without any."""
    roots = [root for root in (env_folder("VITREG_MODELS"), TWINS) if root]
    return next((path for root in roots if (path := root / name / "model.safetensors").exists()), None)


def folder(timm_name: str) -> Path | None:
    """The folder of VITREG_MODELS that holds a model of timm in hub layout, recognised by its name or its config.

    An unreadable config.json is skipped.
    """
    root = env_folder("VITREG_MODELS")
    if not root:
        return None
    if not root.is_dir():
        raise UserError(f"VITREG_MODELS={root}: no such folder")
    if (root / timm_name / "config.json").exists():
        return root / timm_name
    for place in _with_config(root):
        content = config(place)
        tag = content.get("pretrained_cfg", {}).get("tag", "")
        if f"{content.get('architecture')}.{tag}".removesuffix(".") == timm_name:
            return place
    return None


def damaged() -> str:
    """A sentence on folders of VITREG_MODELS whose config.json cannot be read; empty where there are none."""
    root = env_folder("VITREG_MODELS")
    bad = [place.name for place in _with_config(root) if not config(place)] if root else []
    return f"config.json in {', '.join(bad)} cannot be read; " if bad else ""


def _with_config(root: Path) -> list[Path]:
    return [path.parent for path in sorted(root.glob("*/config.json"))]


def in_hub_layout(folder: Path, key: str = "architecture") -> bool:
    """Whether a folder's config.json describes a model, by timm's key or transformers' "model_type", or is damaged."""
    return (folder / "config.json").exists() and (key in (content := config(folder)) or not content)


def config(folder: Path) -> dict:
    """The config.json of a folder in hub layout; empty where it cannot be read."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
