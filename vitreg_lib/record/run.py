"""Input and output of a notebook: parameters, measurements, claims, figures.

A notebook's parameters are the plain literals of its cell tagged `parameters`; papermill, `vitreg run` and edits by
hand may set no other names or types. `start` refuses them before any computation.

    run = vr.start("fig04", globals())
    run.measure("outlier_share", 0.021, model=model.name, paper=0.0237)
    run.claim("C012", holds=True, measured="block 7 of 12")
    run.save(figure)
    run.claims()                          # shows the verdicts and writes record.json

With default parameters, results go to results/<profile>/<item>/, else to results/<profile>/<item>--<hash>/.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import yaml

from ..base import DATA, NOTEBOOKS, UserError, commit, env_folder, in_batch, results, unknown, write_atomically, written
from ..model import names as model_names
from . import values
from .verdicts import Verdicts, reported_claims

PROFILES = ("mini", "small", "large", "paper")
KEPT = 2**23  # numbers of a set of images up to which a run keeps it, for what asks for it again


def start(item: str, namespace: dict) -> Run:
    """The `Run` of a notebook, from the notebook's own `globals()`.

    Raises UserError for parameters that the notebook does not declare (papermill may inject some), for a value of
    another type than its default, and for an unknown profile; the message gives the nearest valid name.
    """
    declared = declared_parameters(item)
    injected = _injected(namespace.get("In", []))
    given = {name: namespace[name] for name in declared if name in namespace} | injected
    return Run(item, check_parameters(item, given))


def check_parameters(item: str, given: dict) -> dict:
    """All parameters of an item, with defaults, after checking `given` against its notebook's declarations.

    Raises UserError for a name that is not declared, a value that does not fit, an unknown profile or model.
    """
    declared = declared_parameters(item)
    for name in given:
        if name not in declared:
            raise unknown(f"parameter of {item}", name, declared)
    checked = {name: values.taken(name, default, given.get(name, default)) for name, default in declared.items()}
    if checked["profile"] not in PROFILES:
        raise unknown("profile", checked["profile"], PROFILES)
    usual = declared.get("models") or str(items().get(item, {}).get("mini", {}).get("models", ""))
    # Figure 12 takes sizes of architectures, not names
    if not usual or model_names.split(usual.split()[0])[0] in model_names.entries():
        model_names.check(checked.get("models", ""))
    return checked


@functools.cache
def declared_parameters(item: str) -> dict:
    """Names and defaults in the cell tagged `parameters` of an item's notebook."""
    for cell in json.loads(notebook(item).read_text())["cells"]:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            return _assigned("".join(cell["source"]))
    raise UserError(f"{notebook(item).name} has no cell tagged parameters")


def notebook(item: str) -> Path:
    """The notebook of an item such as fig04 (also fig4, figure4, table2)."""
    name = normal_name(item)
    paths = sorted(p for p in NOTEBOOKS.glob("*/*.ipynb") if p.parent.name != "workshop")  # exercises are no items
    short = {p: p.stem.split("_")[0] if p.parent.name == "paper" else p.stem for p in paths}
    matching = [p for p in paths if name in (short[p], p.stem)]
    if not matching:
        names = {p.stem for p in paths} | set(short.values())
        raise unknown("item", item, names, "See the README's table of notebooks.")
    return matching[0]


def normal_name(item: str) -> str:
    """fig4, figure4, Fig04, fig04_norms_by_layer_training_size → fig04; table2 → tab02; other names as they are."""
    if named := re.fullmatch(r"(fig|tab)(?:ure|le)?(\d+)", item.lower()):
        return f"{named[1]}{int(named[2]):02d}"
    stem = item.removesuffix(".ipynb").rpartition("/")[2]
    paper = (NOTEBOOKS / "paper" / f"{stem}.ipynb").exists()
    return stem.split("_")[0] if paper else stem if stem != item else item


def folder(item: str, parameters: dict) -> Path:
    """Where a run with these (checked) parameters keeps its results."""
    declared = declared_parameters(item)
    differing = {k: v for k, v in parameters.items() if v != declared[k] and k != "profile"}
    name = normal_name(item)
    if differing:
        name += "--" + hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
    return results() / parameters["profile"] / name


def _assigned(source: str) -> dict:
    """{name: value} of the plain literals assigned in a cell."""
    assigned = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name):
            try:
                assigned[target.id] = ast.literal_eval(node.value)
            except ValueError as error:
                text = ast.unparse(node.value)
                raise UserError(f"parameter {target.id} = {text}: write a plain number or text") from error
    return assigned


def _injected(cells: list[str]) -> dict:
    """Assignments of the cell that papermill injects; no other cell can hold undeclared names."""
    injected = [_assigned(source) for source in cells if source.startswith("# Parameters")]
    return {name: value for each in injected for name, value in each.items()}


@functools.cache
def items() -> dict[str, dict]:
    """data/items.yaml: title, and models, images and sizes of every profile, by item."""
    return yaml.safe_load((DATA / "items.yaml").read_text())


class Run:
    """One execution of a notebook. `parameters` are checked; `models`, `images` and `n_images` come from the item's
    profile where the parameter is left empty."""

    def __init__(self, item: str, parameters: dict):
        self.item, self.parameters, self.profile = item, parameters, parameters["profile"]
        entry = items().get(item, {})
        self.title = entry.get("title", item)
        self.settings = {**entry.get("mini", {}), **entry.get(self.profile, {})}
        self.settings |= {
            name: value for name, value in parameters.items() if value not in ("", 0) or name not in self.settings
        }
        self.at = SimpleNamespace(**{k: v for k, v in self.settings.items() if k != "profile"})
        self.folder = env_folder("VITREG_MAKING") or folder(item, parameters)
        self.models, self.not_here, self._measured, self._claims = [], [], [], []
        self._features, self._drawn, self._images = {}, {}, {}
        self.progress = not in_batch()  # no bars in committed outputs
        self._began = time.perf_counter()
        print(f"{item}: {self.title}. Profile {self.profile}: {self.settings.get('models', '')}".rstrip(": "))

    def load(self, names: str | None = None) -> list:
        """The loaded models of this run, or of `names`, separated by spaces; one that is not reachable is left out.

        An unreachable model is an error in the profile mini, and where the models were given by hand.
        """
        loaded = []
        for name in (names or self.settings["models"]).replace(",", " ").split():
            try:
                model = self._model(name)
            except UserError as error:
                if self.profile == "mini" or self.parameters.get("models"):
                    raise
                print(f"not reachable here: {name}")
                self.not_here.append({"name": name, "reason": str(error)})
                continue
            loaded.append(model)
            if model.name not in {m.name for m in self.models}:
                self.models.append(model)
        if not loaded:
            reason = self.not_here[0]["reason"]
            raise UserError(f"none of the models of profile {self.profile} is reachable here; {reason}")
        if replayed := ", ".join(model.label for model in loaded if model.replayed):
            print(f"replayed from measurements, without weights: {replayed}")
        return loaded

    def _model(self, name: str):
        """A model by name; in the profile mini, replayed if its weights are missing."""
        from ..model import measured, zoo

        if self.profile != "mini":
            return zoo.load(name)
        made = "made_by" in model_names.entries().get(model_names.split(name)[0], {})
        # weights that are made here differ a little between machines, so this profile replays measurements
        return measured.load(name) if made and name in measured.names() else measured.live_or_replayed(name)

    def source(self, model, to_show: bool = False) -> str:
        """The name of the images for `model`: the run's, but in profile mini scenes only for models trained on them.

        The shipped photos replace a folder `imagenet` that is not here, and, of images `to_show`, any set that may not
        be published (all but procedural ones and a folder named by a path).
        """
        from ..data import images

        own, source = model_names.entries().get(model.entry, {}), self.settings["images"]
        if self.profile == "mini" and source == "scenes":
            source = own.get("looks_at", "photos" if model.replayed or "timm" in own else "scenes")
        published = source in images.PROCEDURAL or Path(source).exists()
        missing = source == "imagenet" and not images.named_folder("imagenet")
        return "photos" if missing or (to_show and not published) else source

    def by_source(self, models: list) -> list[list]:
        """The models in groups of the same images, in order; pictures of one group can share a figure."""
        groups = {}
        for model in models:
            groups.setdefault(self.source(model), []).append(model)
        return list(groups.values())

    def images(self, model, n: int | None = None):
        """The run's images, prepared for `model`: `n_images` of its `source`, drawn by `seed`."""
        return self._loaded(self.source(model), model, n or self.settings["n_images"])

    def examples(self, model, n: int = 4):
        """A few images to show: the first of the run's own, or photos that may be published (`source`)."""
        return self._loaded(self.source(model, to_show=True), model, n)

    def _loaded(self, source: str, model, n: int):
        """`images.load`; the same set again for models that are fed in the same way."""
        from ..data import images

        key = (source, n, model.input_size, model.mean, model.std, model.interpolation, model.crop, model.crop_mode)
        if key in self._images:
            return self._images[key]
        loaded = images.load(source, model, n, self.parameters.get("seed", 0))
        if loaded.x.numel() <= KEPT:
            self._images[key] = loaded
        return loaded

    def measure(self, name: str, value, model: str = "", unit: str = "", paper=None, features: str = "") -> None:
        """Put one number into the record; null if it does not exist, such as the cutoff of one mode.

        `model` is a model's label or name, recorded as its full name; a condition after ", " is kept. `paper`: the
        paper's value for its own model, shown beside it. `features`: fingerprints of the cached features from which it
        was computed, described by `trace`.
        """
        label, comma, condition = model.partition(", ")
        model = {m.label: m.name for m in self.models}.get(label, label) + comma + condition
        value = value.item() if hasattr(value, "item") else value
        if value is None or value != value or value in (float("inf"), float("-inf")):
            value = None
        row = {"name": name, "model": model, "value": value, "unit": unit, "paper": paper}
        self._measured.append(row | ({"features": features} if features else {}))

    def trace(self, about: dict[str, dict]) -> None:
        """Put descriptions of cached features into the record by fingerprint: model's sha256, images, options."""
        for key, entry in about.items():
            infinite = {k: None for k, v in entry.items() if v == float("inf")}  # JSON has no such number
            self._features[key] = {k: v for k, v in entry.items() if k != "code"} | infinite

    def measure_table(self, table, paper: dict | None = None, name: str = "{column}") -> None:
        """`measure` every cell of a DataFrame whose index is models' labels; empty cells are recorded as null.

        With further index levels, `name` builds a number's name from theirs, as "{column}, {feature}, bias {bias:g}";
        paper: {name: the paper's value}.
        """
        import pandas as pd

        for key, row in table.iterrows():
            label, *rest = key if isinstance(key, tuple) else (key,)
            levels = dict(zip(table.index.names[1:], rest, strict=True))
            for column, value in row.items():
                called = name.format(column=column, **levels)
                value = None if pd.isna(value) else value
                self.measure(called, value, label, paper=(paper or {}).get(called))

    def caption(self, shown=None) -> str:
        """A caption for a figure: the labels of its models, the images, and whether a profile chose them.

        shown: the models that are drawn, each on the run's images for it; or an `Images` on which all models are.
        """
        from ..data import images

        by_hand = [name for name in ("models", "images") if self.parameters.get(name)]
        chosen = f"{' and '.join(by_hand)} chosen by hand" if by_hand else f"profile {self.profile}"
        models, source = (shown, "") if isinstance(shown, list) else (self.models, shown.source if shown else "")
        if isinstance(shown, list):
            n = self.settings["n_images"]
            source = ", ".join(images.counted(each, n) for each in dict.fromkeys(map(self.source, shown)))
        names = ", ".join(m.label + (f" ({m.role})" if m.is_control else "") for m in models)
        names = names if len(models) <= 6 else f"{len(models)} models"
        return f"{self.item}, {chosen}: {names}" + (f"; {source}" if source else "")

    def claim(
        self, claim: str, holds: bool | str | None, measured: str, text: str | None = None, paper: str | None = None
    ) -> None:
        """Judge a claim of the paper (an id of data/reported/claims.csv) or one of this collection's own (with `text`).

        holds: True, False, "undecided" where the difference lies inside its interval, or None where the claim cannot be
        tested here: the model without registers has no artifacts, or a model is missing; `measured` then says which.
        """
        reported = reported_claims().get(claim)
        if reported is None and text is None:
            raise unknown("claim", claim, reported_claims())
        words = {True: "holds", False: "fails", None: "not testable here", "undecided": "undecided"}
        if holds not in words:
            raise ValueError(f"verdict {holds!r}: True, False, None or 'undecided'")
        judged = {"id": claim, "text": text or reported["claim"], "verdict": words[holds], "measured": measured}
        value = (reported or {}).get("paper_value", "")
        self._claims.append(judged | {"paper": value if paper is None else paper})

    def save(self, figure, name: str = "figure") -> None:
        """Write a matplotlib figure as SVG and PNG into the run's folder, and a summary of it into the record.

        It stays open for the notebook to show. It is laid out here, once for both files and the notebook.
        """
        from . import drawn

        if layout := figure.get_layout_engine():
            layout.execute(figure)
            figure.set_layout_engine(None)  # under "none" each drawing would be rehearsed
        box = figure.get_tightbbox().padded(0.1)
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            with written(self.folder / f"{name}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, bbox_inches=box, **options)
        figure.stale = False  # else pyplot draws it once more after the cell, for nobody
        self._drawn[name] = drawn.summary(figure)

    def claims(self, judged=()):
        """All verdicts as a table, including those on `judged` (arguments of `claim`); writes record.json."""
        for arguments in judged:
            self.claim(*arguments)
        self.write()
        return Verdicts(self._claims)

    def write(self) -> Path:
        """Write record.json atomically."""
        record = {
            "item": self.item,
            "title": self.title,
            "profile": self.profile,
            "parameters": self.parameters,
            "settings": {k: v for k, v in self.settings.items() if k not in self.parameters or not self.parameters[k]},
            "measured": self._measured,
            "claims": self._claims,
            "models": [{key: getattr(m, key) for key in ("name", "label", "sha256", "role")} for m in self.models],
            **({"features": self._features} if self._features else {}),
            "not_reachable_here": self.not_here,
            "figures": list(self._drawn),
            "drawn": self._drawn,
            "environment": environment(),
            "seconds": round(time.perf_counter() - self._began, 1),
        }
        text = json.dumps(record, indent=1, allow_nan=False, default=float)
        write_atomically(self.folder / "record.json", text.encode())
        return self.folder / "record.json"


def environment() -> dict:
    """Commit of the code, versions and machine, without private data."""
    import torch

    packages = {name: version(name) for name in ("torch", "timm", "numpy", "datasets")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": platform.python_version(), **packages}
    return {"commit": commit(), **versions, "system": sys.platform, "device": device}
