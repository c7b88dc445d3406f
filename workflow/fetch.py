"""`vitreg fetch`: download the weights and data sets that items of a profile need, to run them later without a network.

An interrupted download is continued. When everything is downloaded, HF_HUB_OFFLINE=1 keeps the hub's client from using
the network.
"""

from __future__ import annotations

import sys

import cells
import depends

from vitreg_lib.base import NOTEBOOKS, UserError, hub
from vitreg_lib.model import names
from vitreg_lib.record import run as record

FILES = ("config.json", "model.safetensors")  # of timm's repositories on the hub


def main(profile: str, item: str = "") -> int:
    """Show what is available, and download the rest; the exit code is 1 if a download fails."""
    try:
        models, sets = wanted(profile, [record.normal_name(item)] if item else cells.paper_items())
    except UserError as error:
        print(f"vitreg: {error}", file=sys.stderr)
        return 1
    failed = 0
    for name in models + sets:
        try:
            print(f"{name:20} {_model(name) if name in models else _data_set(name)}", flush=True)
        except UserError as error:
            print(f"vitreg: {error}", file=sys.stderr)
            failed += 1
    total = len(models + sets)
    if failed:
        print(f"vitreg: {failed} of {total} models and data sets cannot be had; the others are here", file=sys.stderr)
    else:
        print(f"all {total} models and data sets are here: HF_HUB_OFFLINE=1 vitreg run ITEM --profile {profile}")
    return int(failed > 0)


def wanted(profile: str, items: list[str]) -> tuple[list[str], list[str]]:
    """(names of the models, names of the data sets) that these items load with a profile. Raises UserError for an
    unknown item."""
    models, sets = set(), set()
    for item in items:
        parameters = record.check_parameters(item, {"profile": profile})
        models |= depends.models(item, parameters) & names.entries().keys()
        sets |= depends.data_sets(item, parameters).keys()
    return sorted(models), sorted(sets)


def _data_set(name: str) -> str:
    sys.path.append(str(NOTEBOOKS / "paper"))
    import tables_sets

    from vitreg_lib.data import sets

    if sets.state(name) == "not here":
        for split in ("train", "test"):
            tables_sets.load(name, split)
    return sets.state(name)


def _model(name: str) -> str:
    entry = names.entries()[name]
    if names.available(name) == "not here":
        if "made_by" in entry:
            raise UserError(f"{name} is made here: {entry['made_by']} --only {name}")
        _download(name, entry["timm"])
    return names.available(name)


def _download(name: str, timm_name: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repository = f"timm/{timm_name}"
    instead = (
        f"put {' and '.join(FILES)} of the hub's {repository} into a folder {timm_name} of VITREG_MODELS, "
        "or run fetch where there is a network and copy the hub's cache (HF_HOME)"
    )
    with hub(f"{name}: {FILES[1]}", instead):
        for file in FILES:
            size = get_hf_file_metadata(hf_hub_url(repository, file)).size or 0
            print(f"{name:20} {file} from {repository}, {size / 1e6:.1f} MB", flush=True)
            hf_hub_download(repository, file)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
