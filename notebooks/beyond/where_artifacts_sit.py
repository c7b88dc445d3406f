"""Where artifacts sit: by content, or by position? (ours; the paper says low-information patches, Sec. 2.1 and Fig. 5a)

`explained` measures how well place and content predict which patches of unseen images are outliers. The interventions
are those of `vr.places`. Masks are (images, rows, cols) bool.
"""

from __future__ import annotations

import torch

from vitreg_lib.base import UserError


def with_outliers(models, found: dict) -> list:
    """The models that have outliers in `found` (by label). Raises UserError if no model has any."""
    having = [model for model in models if found[model.label].mask.any()]
    if not having:
        names = ", ".join(model.label for model in models)
        raise UserError(f"no outliers at the output of {names}: choose models that have some, such as planted")
    return having


def explained(is_outlier: torch.Tensor, content: dict[str, torch.Tensor], seed: int = 0):
    """How well outliers of held-out images are predicted: a DataFrame with a row for position, each content, and all.

    is_outlier: (images, rows, cols); content: {name: (images, patches)}, such as the similarity to the neighbours. The
    predictors are fitted on half of the images and scored on the other half. auc: area under the ROC curve, 0.5 by
    chance. deviance_explained: 1 - log-loss / log-loss of the mean share; 1 is perfect, 0 or less is useless. All
    predictors are logistic regressions: position on the logit of each place's share of outliers in the first half,
    content on the value and its square.
    """
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score

    flat = is_outlier.flatten(1)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    fit, held = order[: len(order) // 2], order[len(order) // 2 :]
    mean = flat[fit].double().mean().clamp(1e-6, 1 - 1e-6)
    columns = {name: torch.stack([value, value.square()], -1).double() for name, value in content.items()}
    # each place's share, smoothed by one image with the mean share; a fitted image is left out of its own share
    total = flat[fit].double().sum(0)
    own = (total - flat.double() + mean) / len(fit)
    share = torch.where(torch.isin(torch.arange(len(flat)), fit)[:, None], own, (total + mean) / (len(fit) + 1))
    columns["position"] = share.clamp(1e-6, 1 - 1e-6).logit()[..., None]
    columns["all"] = torch.cat(list(columns.values()), -1)
    y_fit, y_held = flat[fit].flatten().numpy(), flat[held].flatten().numpy()
    if not (0 < y_fit.sum() < len(y_fit) and 0 < y_held.sum() < len(y_held)):
        raise ValueError("there are no outliers (or nothing else) to explain in one half of the images")
    base = log_loss(y_held, [float(mean)] * len(y_held), labels=[False, True])
    rows = {}
    for name in ("position", *content, "all"):
        x = columns[name]
        centre, spread = x[fit].flatten(0, 1).mean(0), x[fit].flatten(0, 1).std(0).clamp_min(1e-9)
        scaled = (x - centre) / spread
        model = LogisticRegression(C=10.0, max_iter=1000).fit(scaled[fit].flatten(0, 1).numpy(), y_fit)
        guess = model.predict_proba(scaled[held].flatten(0, 1).numpy())[:, 1]
        loss = log_loss(y_held, guess, labels=[False, True])
        rows[name] = {"auc": roc_auc_score(y_held, guess), "deviance_explained": 1 - loss / base}
    return pd.DataFrame.from_dict(rows, orient="index")


def detail(pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(n, patches): logarithm of the standard deviation of each patch's grey pixels; low is uniform."""
    height, width = pixels.shape[-2] // grid[0], pixels.shape[-1] // grid[1]
    patches = pixels.mean(1).unfold(1, height, height).unfold(2, width, width)  # (n, rows, cols, height, width)
    return patches.flatten(3).std(-1).clamp_min(1e-3).log().flatten(1)


def record(run, tables: dict) -> None:
    """Put tables {model: DataFrame} into the run's record; the name of a number is "row column"."""
    for label, table in tables.items():
        for (row, column), value in table.stack(future_stack=True).items():
            run.measure(f"{row} {column}", value, label)


def claims(models, explained: dict, tests: dict):
    """Yields the arguments of `Run.claim`, all ours.

    explained, tests: {label: table of `explained`, of `vr.places`}, for the models with outliers.
    """
    for model in models:
        name = model.label
        if name not in explained:
            yield f"ours-{name}", None, f"{name} has no outliers at its output", "where its outliers sit", "none"
            continue
        auc, parted = explained[name].auc, tests[name]
        measured = ", ".join(f"{predictor} {value:.3f}" for predictor, value in auc.items())
        content = max(auc["neighbours"], auc["detail"])
        if model.is_control:
            text = f"in {name}, where artifacts need place and content, both together predict best"
            yield f"control-{name}", auc["all"] > max(auc["position"], content), measured, text, "none"
            continue
        text = f"the outliers of {name} are predicted better by content than by position"
        yield f"ours-content-{name}", content > auc["position"], measured, text, "low-information patches (words)"
        swap, grey = parted.iloc[0], parted.outliers["a grey image"]
        measured = (
            f"{parted.index[0]}: {swap.follows_place:.0%} follow the place, {swap.follows_content:.0%} the content"
        )
        text = f"separated from their content, the outliers of {name} follow their place"
        measured += f"; a grey image has {grey:.1f} times as many"
        yield f"ours-place-{name}", swap.follows_place > swap.follows_content, measured, text, "none"
