"""Train the shipped models with registers again, and the cells of workflow/stamped.py: several at once, resumable.

    python workflow/retrain.py --out OUT --minutes 6            # on a machine with a GPU and 16 cores
    python workflow/retrain.py --out OUT --only mini-deit3-reg4 --device cpu

A job is a process and has a folder under OUT/runs; what is finished is not done again, what was cut short goes on. At
the end OUT/retrained.tar.gz holds all that is to be shipped or looked at, OUT/retrained.json one line a job, and
OUT/many-….pt the weights of workflow/stamped_many.py. GPU jobs run `--gpu-slots` at a time, CPU jobs on a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "notebooks" / "beyond")]
LEJEPA = dict(recipe="lejepa", steps=1500, batch_size=256, warmup=100)
VIEWS = {  # of lejepa, tried with 4 registers; the models with other numbers are trained as the best of them
    "mini-lejepa-reg4-small": dict(),
    "mini-lejepa-reg4-whole": dict(local_crops=0),
    "mini-lejepa-reg4-large": dict(local_crops=0, global_size=96),
    "mini-lejepa-reg4-two": dict(local_crops=2, local_size=48, global_size=96),
}
LONG = dict(recipe="dinov2", steps=1500, batch_size=128)
STAMPED = dict(recipe="stamped")


def jobs() -> dict[str, dict]:
    """Name of the job: its recipe, options of TrainConfig, `device` and what else decides, in the order of need."""
    start = dict(register_start=0.2)
    gpu = {
        "many-reg4": dict(recipe="many", run="reg4"),
        "many-reg0": dict(recipe="many", run="reg0"),
        "mini-deit3-reg4": dict(recipe="deit3", registers=4, steps=2500, **start),
        **{name: dict(**LEJEPA, registers=4, **start, **views) for name, views in VIEWS.items()},
        "mini-clip-reg4": dict(recipe="clip", registers=4, **start),
        "many-reg4-four-blocks": dict(recipe="many", run="reg4-four-blocks"),
        "many-reg0-four-blocks": dict(recipe="many", run="reg0-four-blocks"),
        "long-dinov2-reg4": dict(**LONG, registers=4, **start),
        **{f"mini-lejepa-reg{n}": dict(**LEJEPA, registers=n, **start, views="best") for n in (0, 16, 8, 2, 1)},
        "many-reg16": dict(recipe="many", run="reg16"),
        "mini-clip": dict(recipe="clip"),
        **{f"mini-dinov2-reg{n}": dict(recipe="dinov2", registers=n, **start) for n in (4, 2, 8, 16)},
        "start0.02-deit3-reg4": dict(recipe="deit3", registers=4, steps=2500, register_start=0.02),
        "start0.02-lejepa-reg4": dict(**LEJEPA, registers=4, register_start=0.02, views="best"),
    }
    cpu = {"mini-corners-reg4": dict(recipe="emergence", registers=4, **start)}
    cpu["start0.02-corners-reg4"] = dict(recipe="emergence", registers=4, register_start=0.02)
    for seed in range(3):  # a seed of all cells before the next one
        for cell, options in CELLS.items():
            cpu[f"{cell}-seed{seed}"] = dict(**STAMPED, seed=seed, **options)
    return {n: {"device": "cuda", **j} for n, j in gpu.items()} | {n: {"device": "cpu", **j} for n, j in cpu.items()}


CELLS = {
    "stamped": dict(variant="both"),
    "stamped-reg4": dict(variant="both", registers=4, register_start=0.2),
    "stamped-reg4-start1": dict(variant="both", registers=4, register_start=1.0),
    "strong": dict(variant="strong"),
    "strong-reg4": dict(variant="strong", registers=4, register_start=0.2),
    "stamped-reg4-start1e-6": dict(variant="both", registers=4, register_start=1e-6),
}


def best_views(out: Path) -> dict | None:
    """The views of the best of `VIEWS` by k-NN, of those that are done; None where none is."""
    paths = {name: out / "runs" / name / "done.json" for name in VIEWS}
    done = {name: json.loads(path.read_text())["knn"] for name, path in paths.items() if path.exists()}
    return VIEWS[max(done, key=done.get)] if done else None


def recipe_of(job: dict, **changes):
    """The configuration of a job and its recipe."""
    from vitreg_lib.train import loop
    from vitreg_lib.train.config import TrainConfig

    options = {k: v for k, v in job.items() if k not in ("device", "recipe", "views")} | changes
    if job["recipe"] != "stamped":
        return loop.configure(job["recipe"], **options)
    import stamped

    return TrainConfig(**{**stamped.DEFAULTS, **options}), stamped


def work(name: str, out: Path, device: str, **changes) -> None:
    """Run one job to its end, in this process, and measure its registers and, in an artificial task, its sinks."""
    import torch

    from vitreg_lib.train import loop

    torch.set_num_threads(1)
    job, folder = jobs()[name], out / "runs" / name
    if "views" in job:
        changes = (best_views(out) or {}) | changes
    config, recipe = recipe_of(job, **changes)
    result = loop.train(config, recipe, folder, device or job["device"], progress=False)
    module = recipe.build(config)
    vit = recipe.backbone(module)
    from safetensors.torch import load_file

    vit.load_state_dict(load_file(folder / "model.safetensors"))
    result |= {"registers_cosine": largest_cosine(vit), "register_start": config.register_start}
    if job["recipe"] in ("stamped", "emergence"):
        sinks_of(config, recipe, vit.eval()).to_json(folder / "sinks.json", orient="records", indent=1)
    (folder / "done.json").write_text(json.dumps(result, indent=1))


def largest_cosine(vit) -> float | None:
    """Between any two registers; None where there are fewer than two."""
    import torch

    if vit.reg_token is None or vit.reg_token.shape[1] < 2:
        return None
    unit = torch.nn.functional.normalize(vit.reg_token[0].detach().float(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-1).max().item()


def sinks_of(config, recipe, vit):
    """The rows of notebooks/beyond/sinks.py at the idle places of 128 held-out images."""
    import sinks

    from vitreg_lib.data import textures

    if config.recipe == "emergence":
        batch = textures.held_out(config, 128, part=2)
        places = batch.idle
    else:
        batch = recipe.held_out(config, 128, part=2)
        places = recipe.idle().expand(128, -1)
    return sinks.measure(vit, batch.pixels, places)


class Pool:
    """Processes of jobs, so many at a time a device; a job that fails is tried once more."""

    def __init__(self, out: Path, slots: dict[str, int], device: str, steps: int):
        self.out, self.slots, self.device, self.steps = out, slots, device, steps
        self.running: dict[str, tuple[subprocess.Popen, float]] = {}
        self.tries: dict[str, int] = {}

    def start(self, name: str) -> None:
        """Start a job's process; its output goes into its folder."""
        folder = self.out / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.tries[name] = self.tries.get(name, 0) + 1
        if self.wanted[name]["recipe"] == "many":
            left = (self.until - time.time()) / 60 - 1.0  # its measuring takes a while
            command = [sys.executable, str(HERE / "stamped_many.py"), self.wanted[name]["run"], "--out", str(folder)]
            command += ["--minutes", f"{left:.2f}", "--device", self.device or "cuda", "--steps", str(self.steps)]
        else:
            command = [sys.executable, __file__, "--out", str(self.out), "--job", name, "--device", self.device]
            command += ["--steps", str(self.steps)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with open(folder / "output.txt", "a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        self.running[name] = (process, time.time())

    def run(self, wanted: dict[str, dict], until: float) -> None:
        """Run jobs in their order until all are done or the time is up; then what runs saves its state and ends."""
        self.wanted, self.until = wanted, until
        waiting = [n for n in wanted if not (self.out / "runs" / n / "done.json").exists()]
        while (waiting or self.running) and time.time() < until:
            for name, (process, began) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    print(f"{name}: exit {process.returncode} after {time.time() - began:.0f} s", flush=True)
                    if process.returncode and self.tries[name] < 2:
                        waiting.append(name)
            for device, slots in self.slots.items():
                busy = sum(self._device(wanted[n]) == device for n in self.running)
                for name in [n for n in waiting if self._device(wanted[n]) == device]:
                    if busy < slots and self._ready(wanted[name], waiting):
                        waiting.remove(name)
                        self.start(name)
                        busy += 1
            time.sleep(0.5)
        for process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)  # the loop ends its step and saves
        for process, _ in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def _device(self, job: dict) -> str:
        return self.device or job["device"]

    def _ready(self, job: dict, waiting: list[str]) -> bool:
        """Whether the jobs on whose results this one depends are over."""
        return "views" not in job or not any(name in waiting or name in self.running for name in VIEWS)


def collect(out: Path) -> None:
    """One archive of everything but the bulky states of finished runs, and a table of results."""
    table = {}
    with tarfile.open(out / "retrained.tar.gz", "w:gz") as archive:
        for folder in sorted((out / "runs").iterdir()):
            done = folder / "done.json"
            table[folder.name] = json.loads(done.read_text()) if done.exists() else {"unfinished": True}
            if (weights := folder / "many.pt").exists():
                shutil.copyfile(weights, out / f"{folder.name}.pt")
            for path in sorted(folder.iterdir()):
                bulky = path.name == "previous.safetensors" or path.suffix in (".tmp", ".pt")
                if not bulky and not (done.exists() and path.name == "state.safetensors"):
                    archive.add(path, f"runs/{folder.name}/{path.name}")
    (out / "retrained.json").write_text(json.dumps(table, indent=1))
    for name, result in ((n, r) for n, r in table.items() if isinstance(r, dict)):
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items() if "random" not in k})


def main() -> None:
    """Run one job, or all of them in processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--gpu-slots", type=int, default=12)
    parser.add_argument("--cpu-slots", type=int, default=max(1, (os.cpu_count() or 2) - 12))
    parser.add_argument("--device", default="", help="for all jobs, instead of each one's own")
    parser.add_argument("--only", nargs="*", help="these jobs alone")
    parser.add_argument("--steps", type=int, default=0, help="fewer steps, for a trial")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    changes = {"steps": chosen.steps, "warmup": 2, "eval_images": 64} if chosen.steps else {}
    if chosen.job:
        try:
            return work(chosen.job, chosen.out, chosen.device, **changes)
        except KeyboardInterrupt as stopped:
            sys.exit(str(stopped))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    until = time.time() + 60 * chosen.minutes
    wanted = {n: j for n, j in jobs().items() if not chosen.only or n in chosen.only}
    pool = Pool(chosen.out, {"cuda": chosen.gpu_slots, "cpu": chosen.cpu_slots}, chosen.device, chosen.steps)
    chosen.out.mkdir(parents=True, exist_ok=True)
    pool.run(wanted, until)
    collect(chosen.out)


if __name__ == "__main__":
    main()
