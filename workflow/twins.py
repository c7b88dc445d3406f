"""Train registers into DeiT-Ti and ViT-Ti: the ten models of the figures ("twins"), and the whole experiment.

A twin is one of the two models with trained registers. The experiment is that of `registers_after_training`; its
configurations are called cells.

python workflow/twins.py weights                      # train the ten twins of data/models.yaml into runs/twins
python workflow/twins.py weights --only deit-ti-trained-reg4 --out DIR         # then VITREG_MODELS=DIR finds it
python workflow/twins.py run                          # run all cells into runs/twins; can be resumed
python workflow/twins.py run --arms doses --jobs 2
python workflow/twins.py run --models DIR --out DIR --jobs 12 --minutes 6      # several cells at once on one GPU
python workflow/twins.py pack DIR                     # copy models and photos, smaller, for another machine
python workflow/twins.py keep [runs/twins]            # write the table into data/sweeps/
python workflow/twins.py picture                      # draw docs/registers.png, from data/measured/

VITREG_MODELS or --models must name a folder with both models, data/unlabelled and data/imagenet.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vitreg_lib.base import NOTEBOOKS, ROOT, UserError, env_folder, unknown, written  # noqa: E402
from vitreg_lib.model import names  # noqa: E402
from vitreg_lib.model.names import TWINS  # noqa: E402

sys.path.insert(0, str(NOTEBOOKS / "beyond"))
# Learning rates with which 100 steps meet the criteria of the experiment for 4 registers: at most a tenth of the
# outliers and a fifth of their attention is left, and 2 (ViT-Ti: 4) of 100 right answers are lost. For DeiT-Ti it is
# the recipe's default, with which ViT-Ti keeps 11 % of its outliers.
RATES = {"deit-ti": 3e-5, "vit-ti": 1e-4}
SIZES = {"imagenet": (384, 88), "unlabelled": (224, 50)}  # short side in pixels and quality of packed photos


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen command; the exit code is 1, with one line on stderr, if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="train and measure the cells that are not finished")
    run_.add_argument("--models", help="a folder like VITREG_MODELS")
    run_.add_argument("--out", default=str(TWINS), help="folder for rows and weights")
    run_.add_argument("--arms", default="", help="of doses, empty, ttr, grid, photos, steps, answers; by commas")
    run_.add_argument("--only", default="", help="only cells with these values: model=deit-ti,registers=4")
    run_.add_argument("--jobs", type=int, default=1, help="number of cells at once (default 1)")
    run_.add_argument("--minutes", type=float, default=1e9, help="start no cell after this many minutes")
    run_.add_argument("--steps", type=int, default=0, help="training steps instead of the cell's, for a trial")
    weights_ = commands.add_parser("weights", help="train the twins of data/models.yaml (made_by) that are missing")
    weights_.add_argument("--only", default="", help="names of twins, separated by commas")
    weights_.add_argument("--out", default=str(TWINS), help="folder in which each twin gets a folder of its name")
    weights_.add_argument("--data", default="", help="training photos (default: unlabelled, else sample photos)")
    weights_.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    pack_ = commands.add_parser("pack", help="copy models and photos, smaller, into a folder")
    pack_.add_argument("folder")
    pack_.add_argument("--photos", type=int, default=600, help="largest number of training photos (default 600)")
    keep_ = commands.add_parser("keep", help="put the table of a run into data/sweeps/")
    keep_.add_argument("folder", nargs="?", default=str(TWINS))
    commands.add_parser("picture", help="draw docs/registers.png from data/measured/")
    keep_.add_argument("--device", default="", help="name of the device that was used, for the record")
    keep_.add_argument("--photos", default="", help="description of the photos that were used, for the record")
    chosen = parser.parse_args(arguments)
    try:
        {"run": run, "weights": weights, "pack": pack, "keep": keep, "picture": picture}[chosen.command](chosen)
    except UserError as error:
        print(f"twins: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("twins: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def weights(chosen) -> None:
    """Train the missing twins one after another, like `vitreg train registers`; a stopped run is continued."""
    import json

    import torch
    from registers_after_training import CUTOFFS

    from vitreg_lib.data import images
    from vitreg_lib.train import loop

    twins = {name: entry for name, entry in names.entries().items() if "made_by" in entry}
    asked = chosen.only.split(",") if chosen.only else list(twins)
    for name in asked:
        if name not in twins:
            raise unknown("twin", name, twins)
    data = chosen.data or ("unlabelled" if images.named_folder("unlabelled") else "")
    print(f"{len(asked)} twins, trained on {data or 'the photos that ship with other packages'}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in asked:
        folder, entry = Path(chosen.out) / name, twins[name]
        if (folder / "result.json").exists():
            print(f"{name} is there", flush=True)
            continue
        options = dict(registers=entry["registers"], learning_rate=RATES[entry["base"]], steps=chosen.steps)
        options |= dict(cutoff=CUTOFFS[entry["base"]], data=data, eval_images=32, workers=0, save_every=25)
        config, recipe = loop.configure("registers", model=entry["base"], **options)
        print(name, flush=True)
        print(json.dumps(loop.train(config, recipe, folder, device)), flush=True)
        for state in ("state.safetensors", "previous.safetensors"):  # only needed to resume the training
            (folder / state).unlink(missing_ok=True)


def run(chosen) -> None:
    """Run the missing cells in parallel processes."""
    import registers_after_training as experiment

    if chosen.models:
        os.environ["VITREG_MODELS"] = str(Path(chosen.models).resolve())
    root = env_folder("VITREG_MODELS")
    if root is None or not (root / "data" / "unlabelled").is_dir():
        raise UserError("--models or VITREG_MODELS must name a folder with the two models and data/unlabelled")
    out = Path(chosen.out).resolve()
    (out / "cells").mkdir(parents=True, exist_ok=True)
    wanted = select(experiment.cells(), chosen.arms, chosen.only)
    missing = [cell for cell in wanted if not (out / "cells" / f"{experiment.key(cell)}.parquet").exists()]
    print(f"{len(wanted)} cells, {len(wanted) - len(missing)} are there", flush=True)
    options = {"steps": chosen.steps} if chosen.steps else {}
    began, jobs = time.monotonic(), max(1, min(chosen.jobs, len(missing)))
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        deadline = time.time() + 60 * chosen.minutes
        tasks = {
            pool.submit(_cell, cell, str(root / "data" / "unlabelled"), out, deadline, options): cell
            for cell in missing
        }
        for task in as_completed(tasks):
            report = task.exception() or task.result()
            print(f"{time.monotonic() - began:6.0f} s  {tasks[task]}  {report}", flush=True)


def select(cells: list[dict], arms: str = "", only: str = "") -> list[dict]:
    """The cells of `arms` ("": all arms) with the values of `only`, such as "model=deit-ti,registers=4"."""
    pairs = [text.partition("=")[::2] for text in only.split(",") if text]
    chosen = [cell for cell in cells if not arms or cell["arm"] in arms.split(",")]
    return [cell for cell in chosen if all(str(cell.get(name)) == value for name, value in pairs)]


def _cell(cell: dict, data: str, out: Path, deadline: float, options: dict) -> str:
    """A line with the results of a cell, after running it in this process and writing its rows."""
    if time.time() > deadline:
        return "not started: no time left"
    import registers_after_training as experiment
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = experiment.run(cell, data, "imagenet", device, **options)
    with written(out / "cells" / f"{experiment.key(cell)}.parquet") as temporary:
        rows.to_parquet(temporary, index=False)
    seen = rows[rows.control == ""].mean(numeric_only=True)
    return " ".join(f"{name} {seen[name]:.4f}" for name in experiment.MEASURES if name in seen)


def keep(chosen) -> None:
    """Write the rows of all finished cells into data/sweeps/, with their provenance; unused columns are left out."""
    import pandas as pd
    import registers_after_training as experiment

    parts = sorted((Path(chosen.folder) / "cells").glob("*.parquet"))
    if not parts:
        raise UserError(f"no cell has been finished in {chosen.folder}")
    rows = pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
    models = rows.groupby("model")
    about = {"command": "python workflow/twins.py run", "device": chosen.device, "photos": chosen.photos}
    about["photos_sha256"] = rows.photos_sha256.dropna().unique().tolist()
    about["models"] = {name: part.model_sha256.iloc[0] for name, part in models}
    about["cutoffs"] = {name: float(part.cutoff.iloc[0]) for name, part in models}
    about["neurons"] = {name: part.neurons.dropna().iloc[0] for name, part in models if part.neurons.notna().any()}
    rows = rows[list(experiment.COLUMNS)].sort_values([*experiment.ID, "photo"], ignore_index=True)
    texts = rows.select_dtypes(include=["object", "string"]).columns
    rows = rows.astype({name: "category" for name in texts})
    rows.attrs = about
    with written(experiment.TABLE) as temporary:
        rows.to_parquet(temporary, index=False, compression="zstd")
    print(f"{len(rows)} rows of {len(parts)} cells, {experiment.TABLE.stat().st_size / 2**10:.0f} kB")


def picture(chosen) -> None:
    """Draw the README's picture from data/measured/, which workflow/measured.py writes."""
    import registers_drawn

    registers_drawn.pictures().savefig(ROOT / "docs" / "registers.png", dpi=100, bbox_inches="tight")


def pack(chosen) -> None:
    """Copy models in half precision and photos as small WebP files, in the layout of VITREG_MODELS."""
    import registers_after_training as experiment
    from PIL import Image
    from safetensors.torch import load_file, save_file

    from vitreg_lib.data import images
    from vitreg_lib.model import zoo

    target = Path(chosen.folder)
    for name in experiment.MODELS:
        folder = zoo.folder(zoo.entries()[name]["timm"])
        if folder is None:
            raise UserError(f"{name}: VITREG_MODELS must name a folder that holds it")
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "config.json", target / folder.name / "config.json")
        half = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
        save_file(half, target / folder.name / "model.safetensors", {"format": "pt"})
    for name, (side, quality) in SIZES.items():
        folder = target / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        source = images.named_folder(name)
        if (source / "labels.csv").exists():
            shutil.copyfile(source / "labels.csv", folder / "labels.csv")
        paths = images.find(name)[0]
        step = max(1, len(paths) // chosen.photos) if name == "unlabelled" else 1
        for path in paths[::step][: chosen.photos]:
            with Image.open(path) as image:
                image = image.convert("RGB")
                scale = min(1.0, side / min(image.size))
                image.resize([round(scale * length) for length in image.size], Image.BICUBIC).save(
                    folder / f"{path.stem}.webp", quality=quality
                )
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{size / 2**20:.1f} MiB in {target.name}")


if __name__ == "__main__":
    sys.exit(main())
