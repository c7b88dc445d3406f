"""One page of all results of a profile: a table of verdicts, then each item's figures."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from ..base import UserError, results, write_atomically
from .run import VERDICTS, tally

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color-scheme:light dark}
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #8884;padding:.3rem .5rem;text-align:left;
vertical-align:top}img{max-width:100%;background:#fff}"""


def write(profile: str) -> Path:
    """Write results/<profile>/report.html, self-contained; its path. Raises UserError where nothing was made yet."""
    records = [(p.parent, json.loads(p.read_text())) for p in sorted((results() / profile).glob("*/record.json"))]
    if not records:
        raise UserError(f"nothing made yet in profile {profile}: run `make reproduce-all PROFILE={profile}` first")
    parts = [f"<title>vitreg, profile {profile}</title><style>{_STYLE}</style><h1>Profile {profile}</h1>"]
    parts.append("<p>Numbers of this page come from the models named below each item; the paper's are beside them.</p>")
    counts = tally([claim for _, record in records for claim in record["claims"]])
    for title, side in (("Claims of the paper", "paper"), ("Claims of this collection's own", "ours")):
        told = ", ".join(f"{number} {verdict}" for verdict, number in counts[side].items())
        parts.append(f"<p>{title}: {sum(counts[side].values())} ({told}).</p>")
    for folder, record in records:
        parts.append(_section(folder, record))
    path = results() / profile / "report.html"
    write_atomically(path, ("<!doctype html><meta charset=utf-8>" + "\n".join(parts)).encode())
    return path


def _section(folder: Path, record: dict) -> str:
    models = ", ".join(f"{m['name']}" + ("" if m["role"] == "trained" else f" ({m['role']})") for m in record["models"])
    rows = "".join(_row(claim) for claim in record["claims"])
    figures = "".join(
        f'<p><img alt="{html.escape(record["title"])}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / f"{name}.png").read_bytes()).decode()}">'
        for name in record["figures"]
    )
    return (
        f"<h2 id={folder.name}>{folder.name}: {html.escape(record['title'])}</h2><p>Models: {html.escape(models)}</p>"
        f"<table><tr><th>claim<th>verdict<th>measured<th>paper</tr>{rows}</table>{figures}"
    )


def _row(claim: dict) -> str:
    colour, mark = VERDICTS[claim["verdict"]]
    texts = [f"{claim['id']} {claim['text']}", f"{mark} {claim['verdict']}", claim["measured"], claim["paper"]]
    styles = ["", f' style="border-left:6px solid {colour};white-space:nowrap"', "", ""]
    cells = zip(styles, map(html.escape, texts), strict=True)
    return "<tr>" + "".join(f"<td{style}>{text}</td>" for style, text in cells) + "</tr>"
