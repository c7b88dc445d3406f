"""The workshop as a student meets it: nothing filled in, solutions, usual wrong answers; and its two commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile

import checks
import nbformat
import pytest
import torch

import vitreg_lib as vr
from vitreg_lib.base import ROOT, UserError

sys.path.insert(0, str(ROOT / "workflow"))
import wheelhouse  # noqa: E402
import workshop as notebooks  # noqa: E402

PATHS = notebooks.exercises()


@pytest.fixture(scope="module")
def data():
    """What the notebooks have computed where an answer is asked for, by the names that they use."""
    model, fresh = vr.load("planted"), vr.load("mini-random")
    images = vr.images.load("scenes", model, 24)
    seen = model.capture(images, ("norms", "tokens", "q", "k", "attention"))
    last = seen.layers[-1]
    truth = model.truth(images)
    rows = seen.attention[last][:, :, 0]
    mended = seen.patch_norms[:, -1].where(~truth | (torch.arange(len(truth)) % 3 == 0)[:, None], torch.tensor(1.0))
    hits = {"without": torch.arange(200) % 10 < 3, "with": torch.arange(200) % 20 < 9}
    return {
        "vr": vr,
        "model": model,
        "norms": seen.patch_norms,
        "tokens": seen.tokens[last],
        "truth": truth,
        "clean": fresh.capture(images, "norms").patch_norms[:, -1],
        "q": seen.q[last][0, :, 0],
        "k": seen.k[last][0],
        "rows": rows,
        "is_outlier": truth,
        "before": seen.patch_norms[:, -1],
        "after": mended,
        "limit": vr.outliers.cutoff(seen.patch_norms[:, -1]),
        "hits": hits,
        "without": "without",
        "with_registers": "with",
        "features": torch.nn.functional.normalize(vr.objects.features(seen, "k"), dim=-1),
    }


@pytest.fixture(scope="module")
def right(data):
    """The answers of the solutions, computed: {name: function or value}."""
    values = {}
    for name, code in notebooks.answers().items():
        space = data | {"torch": torch} | values  # one answer may use what an earlier one of its notebook has made
        before = set(space)
        exec(code, space)
        values |= {key: value for key, value in space.items() if key not in before and key != "__builtins__"}
        assert name in values
    return values


CHECKS = {  # answer: (check, names of its data)
    "patch_norms": (checks.check_patch_norms, lambda d: (d["tokens"], 1)),
    "onset": (checks.check_onset, lambda d: (d["norms"],)),
    "cutoff": (checks.check_cutoff, lambda d: (d["norms"][:, -1], d["truth"], d["clean"])),
    "attention_row": (checks.check_attention_row, lambda d: (d["q"], d["k"])),
    "share": (checks.check_share, lambda d: (d["rows"], d["is_outlier"])),
    "head": (checks.check_head, lambda d: (d["rows"], d["is_outlier"])),
    "split": (checks.check_split, lambda d: ()),
    "partner": (checks.check_partner, lambda d: ()),
    "fit": (checks.check_fit, lambda d: ()),
    "add_registers": (checks.check_add_registers, lambda d: ()),
    "patch_mean": (checks.check_patch_mean, lambda d: ()),
    "left": (checks.check_left, lambda d: (d["before"], d["after"], d["limit"])),
    "iou": (checks.check_iou, lambda d: ()),
    "seed": (checks.check_seed, lambda d: (d["features"],)),
    "gain": (checks.check_gain, lambda d: (d["hits"]["without"], d["hits"]["with"])),
}


def overlap(a, b, clamp=0.0):
    width, height = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(clamp)
    return width * height


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def always(number):
    """A function that returns this number whatever it is given."""
    return lambda *arguments: number


WRONG = {  # answer: [(a usual wrong one, from the right one r and the data d; what the line must speak of)]
    "patch_norms": [
        (lambda r, d: lambda t, p: t.norm(dim=-1), "which tokens are too many"),
        (lambda r, d: lambda t, p: t[:, p:].norm(dim=1), "one value for each dimension"),
        (lambda r, d: lambda t, p: t[:, p:].square().sum(-1), "one step is missing"),
        (lambda r, d: lambda t, p: t[:, p:].abs().sum(-1), "L1"),
        (lambda r, d: lambda t, p: t[:, :-p].norm(dim=-1), "where in the sequence"),
        (lambda r, d: lambda t, p: t.norms(p), "AttributeError"),
    ],
    "onset": [
        (lambda r, d: r + 1, "Is your first block 0 or 1"),
        (lambda r, d: d["norms"].shape[1] - 1, "not for the first time"),
        (lambda r, d: r - 1, "two groups that stay"),
        (lambda r, d: d["norms"].shape[1], "there is no block"),
        (lambda r, d: "middle", "must be one number"),
        (lambda r, d: r + 0.5, "a whole number"),
    ],
    "cutoff": [
        (lambda r, d: lambda n: n.quantile(1 - d["truth"].float().mean().item()), "find outliers in every model"),
        (lambda r, d: always(4 * d["norms"][:, -1].median()), "does your rule contain a fixed number"),
        (lambda r, d: lambda n: 2 * n.max(), "too high"),
        (lambda r, d: lambda n: n.mean(), "too low"),
        (lambda r, d: lambda n: n > 3 * n.median(), "must be one number"),
    ],
    "attention_row": [
        (lambda r, d: lambda q, k: (k @ q[:, :, None])[..., 0].softmax(-1), "a factor is missing"),
        (lambda r, d: lambda q, k: (k @ q[:, :, None])[..., 0] / q.shape[-1] ** 0.5, "a row of attention sums to 1"),
        (lambda r, d: lambda q, k: ((k @ q[:, :, None])[..., 0] / q.shape[-1]).softmax(-1), "too flat"),
        (lambda r, d: lambda q, k: ((k @ q[:, :, None])[..., 0] / q.shape[-1] ** 0.5).softmax(0), "along which axis"),
        (lambda r, d: lambda q, k: (k @ q[:, :, None]).softmax(1), "the shape is"),
        (lambda r, d: lambda q, k: (q @ k).softmax(-1), "your function raised RuntimeError"),
    ],
    "share": [
        (lambda r, d: 100 * r, "percentage"),
        (lambda r, d: d["is_outlier"].float().mean(), "not how much attention they get"),
        (lambda r, d: r * d["rows"].shape[1], "the heads are added up"),
        (lambda r, d: r / 2, "too low"),
    ],
    "head": [
        (lambda r, d: -1, "mean of all heads"),
        (lambda r, d: d["rows"].shape[1], "counted from 0"),
        (lambda r, d: r - 1, "another head gives them more"),
        (lambda r, d: "the last", "must be one number"),
    ],
    "split": [
        (lambda r, d: lambda ids: torch.rand(len(ids)) < 0.2, "tokens on both sides"),
        (lambda r, d: lambda ids: torch.arange(len(ids)) < len(ids) // 5, "tokens on both sides"),
        (lambda r, d: lambda ids: ids < 8, "no token is left for test"),
        (lambda r, d: lambda ids: ids.unique()[:8], "a bool for each token"),
        (lambda r, d: lambda ids: ids == ids.max(), "a tenth to a half"),
    ],
    "partner": [
        (lambda r, d: lambda m, row, col: (row, col), "the outlier itself"),
        (lambda r, d: lambda m, row, col: (row - 1, col), "outside the grid"),
        (lambda r, d: lambda m, row, col: (row, (col + 1) % m.shape[1]), "an outlier, too"),
        (lambda r, d: lambda m, row, col: (3, 0), "there is a nearer one"),
        (lambda r, d: lambda m, row, col: row * 6 + col + 1, "a pair"),
    ],
    "fit": [
        (lambda r, d: "normal", "never saw such a norm"),
        (lambda r, d: "all", "so it fits those"),
        (lambda r, d: "outlier", "a group of tokens"),
        (lambda r, d: 3, "is no fit"),
    ],
    "add_registers": [
        (lambda r, d: lambda x, g: torch.cat([g.expand(len(x), -1, -1), x], 1), "before cls"),
        (lambda r, d: lambda x, g: torch.cat([x, g.expand(len(x), -1, -1)], 1), "at the end"),
        (lambda r, d: lambda x, g: torch.cat([x[:, :1], g, x[:, 1:]], 1), "your function raised RuntimeError"),
        (lambda r, d: lambda x, g: x, "as long as before"),
    ],
    "patch_mean": [
        (lambda r, d: lambda x, n: x.mean(1), "all tokens are in this mean"),
        (lambda r, d: lambda x, n: x[:, 1:].mean(1), "registers are still in this mean"),
        (lambda r, d: lambda x, n: x[:, n:].mean(1), "cls is still in this mean"),
        (lambda r, d: lambda x, n: x[:, 1 : x.shape[1] - n].mean(1), "at the end of the sequence"),
        (lambda r, d: lambda x, n: x[:, 1 + n :], "the shape is"),
        (lambda r, d: lambda x, n: x[:, 1:-n].mean(1), "at the end of the sequence"),
    ],
    "left": [
        (lambda r, d: 100 * r, "per cent"),
        (lambda r, d: 1 / r, "the ratio is inverted"),
        (lambda r, d: 1 - r, "what is gone"),
        (lambda r, d: (d["after"] > d["limit"]).double().mean(), "divide it by the share before"),
        (lambda r, d: (d["before"] > d["limit"]).double().mean() * (1 - r), "a difference"),
        (lambda r, d: 0, "the cutoff is too high"),
        (lambda r, d: float("nan"), "NaN"),
    ],
    "iou": [
        (lambda r, d: lambda a, b: overlap(a, b, -99) / (area(a) + area(b) - overlap(a, b, -99)), "be negative"),
        (lambda r, d: lambda a, b: overlap(a, b) / (area(a) + area(b)), "counts the overlap twice"),
        (lambda r, d: lambda a, b: overlap(a, b) / min(area(a), area(b)), "divides by the smaller box"),
        (lambda r, d: lambda a, b: overlap(a, b), "the area of the overlap"),
    ],
    "seed": [
        (lambda r, d: lambda f: (f @ f.T >= 0).sum(1).argmax(), "the most links"),
        (lambda r, d: lambda f: (f @ f.T).sum(1).argmin(), "lowest summed similarity"),
        (lambda r, d: lambda f: f.norm(dim=1).argmin(), "shortest feature"),
        (lambda r, d: lambda f: (f @ f.T >= 0).sum(1), "must be one number"),
        (lambda r, d: lambda f: len(f), "is no patch"),
    ],
    "gain": [
        (lambda r, d: -r, "the sign is wrong"),
        (lambda r, d: r / 100, "give it in points"),
        (lambda r, d: 50.0, "relative to the value without"),
        (lambda r, d: 45.0, "not yet a difference"),
    ],
}


def function_of_nothing(*arguments):
    """A function whose body is still `...`."""
    ...


@pytest.mark.parametrize("name", CHECKS)
def test_nothing_filled_in_is_told_politely(name, data):
    check, choose = CHECKS[name]
    for nothing in (..., function_of_nothing) if callable(WRONG[name][0][0](1.0, data)) else (...,):
        found = check(nothing, *choose(data))
        assert found.state == "empty"
        assert "yet" in found.line


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name, data, right):
    check, choose = CHECKS[name]
    found = check(right[name], *choose(data))
    assert found.state == "right", found
    assert repr(found).startswith(f"✓ {check.exercise}: right")


@pytest.mark.parametrize("name, number", [(name, i) for name, wrong in WRONG.items() for i in range(len(wrong))])
def test_a_usual_wrong_answer_is_caught_with_a_helpful_line(name, number, data, right):
    check, choose = CHECKS[name]
    make, told = WRONG[name][number]
    found = check(make(right[name], data), *choose(data))
    assert found.state == "not yet", found
    assert told in found.line


def test_every_exercise_has_three_usual_wrong_answers_at_least():
    assert WRONG.keys() == CHECKS.keys() == notebooks.answers().keys()
    assert min(map(len, WRONG.values())) >= 3


def test_a_verdict_is_safe_as_a_page():
    assert "&lt;b&gt;" in checks.check_fit("<b>")._repr_html_()


def test_another_right_rule_is_right_too(data):
    """The check wants a rule that works, not the words of the solution."""
    check, choose = CHECKS["cutoff"]
    for rule in (
        vr.outliers.cutoff,
        lambda norms: 4 * norms.median(),
        lambda norms: norms.median().item() * 5,
    ):
        assert check(rule, *choose(data)).state == "right"


def test_what_is_read_off_one_token_is_what_is_there():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    tokens = torch.randn(240, 6, 8, generator=generator)
    tokens[:, :3, :4] += 9 * torch.nn.functional.one_hot(labels, 4)[:, None]
    knows = torch.arange(6).expand(240, -1) < 3
    found = checks.read_off_one_token(tokens, labels, {"knows": knows, "does not": ~knows, "nobody": knows & ~knows})
    assert found["knows"] == 1.0
    assert abs(found["does not"] - 1 / 4) < 0.12
    assert found["nobody"] != found["nobody"]


def test_the_class_is_read_off_the_tokens_that_hold_it():
    generator, kept = torch.Generator().manual_seed(0), {}
    for part in ("train", "test"):
        labels = torch.arange(160) % 4
        kept |= {f"set.caltech101-small.{part}.labels": labels, f"set.caltech101-small.{part}.has_outlier": labels < 9}
        for token in ("cls", "outlier", "matched", "normal"):
            values = torch.randn(160, 2, 8, generator=generator)
            if token in ("cls", "outlier"):
                values[..., :4] += 9 * torch.nn.functional.one_hot(labels, 4)[:, None]
            kept[f"set.caltech101-small.{part}.{token}"] = values[:, 0] if token == "cls" else values
        kept[f"set.caltech101-small.{part}.has_outlier"][7] = False  # without one, a photo is left out
        kept[f"set.caltech101-small.{part}.outlier"][7] = torch.nan
    found = checks.class_from_one_token(kept.__getitem__)
    assert found["cls"] == found["outlier"] == 1.0
    assert max(found["matched"], found["normal"]) < 0.4


def test_a_rule_is_compared_with_the_detector_on_real_models(right):
    norms = torch.ones(2, 3, 3)
    norms[:, 0, 0] = 50.0
    found = {
        "one": vr.outliers.Outliers(norms > 5, norms, 5.0, 0),
        "none": vr.outliers.Outliers(norms > 99, norms, 99.0, 0),
    }
    assert checks.compare_with_detector(right["cutoff"], found).splitlines() == [
        "one: your rule 11.1% of the tokens, the detector 11.1%; 2 tokens of 2 in both",
        "none: your rule 11.1% of the tokens, the detector 0.0%; 0 tokens of 2 in both",
    ]
    assert checks.compare_with_detector(function_of_nothing, found).startswith("fill in exercise 1.3 first")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_solutions_are_the_exercises_with_the_answers_filled_in(path):
    exercise = nbformat.read(path, as_version=4)
    made = notebooks.solved(exercise, notebooks.answers())
    shipped = nbformat.read(notebooks.SOLUTIONS / path.name, as_version=4)
    assert notebooks.sources(shipped) == notebooks.sources(made), "run python workflow/workshop.py"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_exercise_says_what_it_costs_has_hints_and_is_checked(path):
    cells = nbformat.read(path, as_version=4).cells
    asked = [i for i, cell in enumerate(cells) if notebooks.answer_of(cell)]
    assert len(asked) == 3
    for i in asked:
        name = notebooks.answer_of(cells[i])
        assert "..." in cells[i].source
        assert re.search(r"### Exercise \d\.\d · (easy|medium)\S* .*\d+ minutes\n", cells[i - 1].source)
        assert cells[i - 1].source.count("<details>") == cells[i - 1].source.count("</details>") == 2
        later = "\n".join(cell.source for cell in cells[i + 1 : i + 2])
        assert f"checks.check_{name}({name}" in later
    used = [notebooks.answer_of(cells[i]) for i in asked]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("folder, mark", [(notebooks.EXERCISES, "…"), (notebooks.SOLUTIONS, "✓")])
def test_committed_outputs_are_of_a_whole_run(folder, mark):
    for path in PATHS:
        cells = json.loads((folder / path.name).read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        told = [
            "".join(o["data"]["text/plain"]) for c in code for o in c["outputs"] if "text/plain" in o.get("data", {})
        ]
        assert sum(text.startswith(mark) for text in told) == 3, path.name


def test_the_workshop_is_ready_offline(no_models):
    told = notebooks.ready()
    assert told.startswith("workshop: ready, offline. 5 notebooks")
    assert told.endswith("deit-ti (replayed), vit-ti (replayed), deit-ti-trained-reg4 (replayed)")


def test_jupyterlab_opens_at_the_first_notebook():
    command = notebooks.lab()
    assert command[1:3] == ["-m", "jupyterlab"]
    assert command[-1].endswith("/lab/tree/notebooks/workshop/1_tokens_and_norms.ipynb")


def test_what_the_workshop_lacks_is_named(monkeypatch):
    monkeypatch.setattr(notebooks, "NEEDS", ("torch", "jupyterlabz"))
    with pytest.raises(UserError, match="needs jupyterlabz: run `make setup`"):
        notebooks.ready()


@pytest.fixture
def store(tmp_path):
    """A folder with the wheel of a package of one line, made by hand."""
    name = "vitreg_toy-1.0"
    files = {
        "vitreg_toy.py": "answer = 42\n",
        f"{name}.dist-info/METADATA": "Metadata-Version: 2.1\nName: vitreg-toy\nVersion: 1.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files)
    (tmp_path / "store").mkdir()
    with zipfile.ZipFile(tmp_path / "store" / f"{name}-py3-none-any.whl", "w") as archive:
        for path, text in (files | {f"{name}.dist-info/RECORD": record}).items():
            archive.writestr(path, text)
    return tmp_path / "store"


@pytest.mark.slow
def test_a_wheelhouse_is_filled_and_installs_without_a_network(store, tmp_path):
    house = tmp_path / "wheelhouse"
    wheels = wheelhouse.fill(house, ("vitreg-toy",), ("--no-index", "--find-links", str(store)))
    assert [path.name for path in wheels] == ["vitreg_toy-1.0-py3-none-any.whl"]
    told = (house / "README.txt").read_text()
    assert '--no-index --find-links wheelhouse --constraint constraints.txt -e ".[all]"' in told
    with wheelhouse._pip() as pip:
        install = [
            *pip,
            "install",
            "-q",
            "--no-index",
            "--find-links",
            str(house),
            "--target",
            str(tmp_path / "laptop"),
        ]
        subprocess.run([*install, "vitreg-toy"], check=True, cwd=tmp_path)
    assert (tmp_path / "laptop" / "vitreg_toy.py").read_text() == "answer = 42\n"
    with pytest.raises(UserError, match="pip could not get all packages"):
        wheelhouse.fill(house, ("vitreg-toy==9",), ("--no-index", "--find-links", str(store)))
