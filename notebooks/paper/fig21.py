"""Figure 21: its verdicts."""

from __future__ import annotations

import pandas as pd
from verdicts import every, over_images

from vitreg_lib.measure import outliers


def summary(found: dict, overlap: dict) -> pd.DataFrame:
    """Cutoff, outlier share, overlap of attention and norm, and overlap by chance: a DataFrame, one row a model."""
    rows = {
        name: {
            "cutoff": each.cutoff,
            "outlier_share": each.share,
            "overlap_with_attention": overlap[name].overlap.nanmean().item(),
            "overlap_by_chance": overlap[name].chance.nanmean().item(),
        }
        for name, each in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def claims(models, found: dict, overlap: dict, pairs: dict[str, str], truths: dict, having):
    """Yields the arguments of `Run.claim`: C064 and C065, ours on registers added at test time, then the controls.

    Dictionaries by model label: found, `Outliers`; overlap, `top_overlap` of attention and norms; truths, masks or
    None. having: labels of the models with artifacts.
    """
    table = summary(found, overlap)
    specimens = [m.label for m in models if m.role == "trained" and m.label in having]
    text = "; ".join(
        f"{n}: {table.overlap_with_attention[n]:.0%} in common, by chance {table.overlap_by_chance[n]:.1%} "
        f"(p {overlap[n].pooled_p.item():.1g})"
        for n in specimens
    )
    beyond_chance = all(overlap[n].pooled_p.item() < 0.01 for n in specimens)
    yield "C064", beyond_chance if specimens else None, text or "no trained model here has artifacts"
    shares = {name: over_images(found[name].mask) for name in pairs}
    change = {name: f"{base}: {found[base].share:.2%} to {name}: {shares[name]}" for name, base in pairs.items()}
    added = "norm outliers vanish with registers added at test time"
    for claim, role, more in (("C065", "trained", ()), ("ours-added", "mended", (added, "none"))):
        members = [m.label for m in models if m.role == role and m.label in pairs]
        judged = [name for name in members if pairs[name] in having]
        text = "; ".join(change[name] for name in judged or members) or "none"
        vanished = every(shares[name].below() for name in judged)
        yield claim, vanished, text if judged else f"no pair whose model without has artifacts: {text}", *more
    for name, truth in truths.items():
        if truth is not None:
            score = outliers.score(found[name].mask.flatten(1), truth)
            text = f"the outliers of {name} are the artifacts that were put there"
            yield f"control-{name}", score["f1"] >= 0.95, f"F1 {score['f1']:.3f}", text, "none"
