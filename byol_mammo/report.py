"""summary.json and report.html, made of a run's files alone."""

from __future__ import annotations

import base64
import datetime
import html
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from byol_mammo import files, makers, one_scale, pictures
from byol_mammo.settings import MammoError, command_of


def tile_funnel(
    records: list[dict[str, Any]], kept: pd.Series, images: Sequence[str], columns: list[str]
) -> pd.DataFrame:
    """rejections.csv, one row for each image: positions, kept, rescued, rejected by criterion, capped,
    error. `kept`: tiles chosen by row of `images`; `columns`: the criteria's."""
    rows = []
    for index, record in enumerate(records):
        rejected = record.get("rejected", dict.fromkeys(columns, 0))
        passed = record.get("positions", 0) - sum(rejected.values())
        chosen = int(kept.get(index, 0))
        rows.append(
            {
                "image": images[index],
                "positions": record.get("positions", 0),
                "kept": chosen,
                "rescued": record.get("rescued", 0),
                **rejected,
                "capped": passed - chosen,
                "error": record.get("error", ""),
            }
        )
    return pd.DataFrame(rows)


def read_rejections(cache: Path) -> pd.DataFrame:
    """rejections.csv of a finished cache, see tile_funnel."""
    return pd.read_csv(cache / "rejections.csv", keep_default_na=False)


def describe_funnel(rejections: pd.DataFrame, columns: list[str]) -> str:
    """The funnel in a few lines of text: images, positions, rejections by criterion, skips by name."""
    total = rejections.sum(numeric_only=True)
    skipped = rejections[rejections["error"] != ""]
    lost = ", ".join(f"{name} {total[name]:,.0f}" for name in (*columns, "capped") if total[name])
    lines = [
        f"images    {len(rejections):,}, skipped {len(skipped):,}",
        f"positions {total['positions']:,.0f}, kept {total['kept']:,.0f} "
        f"({total['rescued']:,.0f} for high energy or convergence alone); rejected: {lost or 'none'}",
    ]
    lines += [f"  skipped {row.image}: {row.error}" for row in skipped.head(10).itertuples()]
    if len(skipped) > 10:
        lines.append(f"  ... and {len(skipped) - 10:,} more in rejections.csv")
    return "\n".join(lines)


def describe_extraction(cache: Path, columns: list[str], target_mm: float) -> str:
    """describe_funnel of a finished cache, and a line on the one scale of its images, 0 = their own."""
    funnel = describe_funnel(read_rejections(cache), columns)
    if not target_mm:
        return funnel
    spacing = target_mm / one_scale.source_px(pd.read_csv(cache / "images.csv"))
    return f"{funnel}\n{one_scale.describe(pd.Series(spacing), target_mm)}"


def learning_curves(own: dict[str, str], findings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Columns of metrics.csv by label, by title of their picture; `own`: an objective's titles."""
    return {
        **{title: {"": name} for name, title in own.items()},
        "feature std (1 = isotropic)": {"training tiles": "feature_std", "monitor tiles": "monitor_std"},
        "RankMe (effective rank)": {"monitor tiles": "monitor_rankme"},
        "learning rate": {"": "lr"},
        "speed (tiles per second)": {"": "tiles_per_s"},
        "probe AUROC": {name: f"monitor_auroc_{name}" for name in findings},
    }


REPORT_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: auto;
    padding: 1rem }
h1 { margin: 0 0 .5rem } h2 { margin: 2rem 0 .3rem; border-bottom: 1px solid #ccc }
h1, .state, pre { overflow-wrap: anywhere }
.state { padding: .6rem .8rem; border-left: 6px solid #0072b2; background: #eef5fa }
.bad { border-color: #d55e00; background: #fdf0e7 }
.facts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.facts div { border: 1px solid #ddd; padding: .4rem .6rem } .facts b { display: block }
.pictures { display: grid; gap: 1.5rem; margin: 1rem 0 }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) }
figure { margin: 0 } img { max-width: 100%; height: auto } figcaption { font-size: .95rem; color: #333 }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; border-bottom: 1px solid #eee }
.paths td + td { overflow-wrap: anywhere; min-width: 4.5rem }
pre { white-space: pre-wrap; background: #f4f4f4; padding: .6rem }
.bar { height: 1em; background: #56b4e9 } td:has(.bar) { width: 8rem }
"""


CAPTIONS = {
    "curves.png": "Monitor tiles are seen after each epoch, and not trained on where there are enough.",
    "segmentation.png": "What counts as breast and as muscle. Labels and markers must lie outside.",
    "grid.png": "Each mark is the centre of a tile; tiles overlap.",
    "tiles.png": "Black: outside the breast. Rejected tiles: their value of what was asked for.",
    "views.png": "Each row: a tile and two views of it that the network must recognise as the same.",
    "targets.png": "Each row: a monitor tile; where its gradients converge as around a mass; the "
    "strongest in each cell, which the structure target asks for; what the network tells of it.",
    "embedding.png": "Each point is a monitor tile; near points look alike to the network.",
    "roc.png": "Sensitivity against false alarms.",
    "pr.png": "Share of right alarms against sensitivity.",
    "reliability.png": "How often a finding was there against the probability given.",
    "grades.png": "How many images of each grade were given which.",
    "embeddings.png": "Features of labelled tiles.",
}


CLASSIFIER_PICTURES = ("roc.png", "pr.png", "reliability.png", "grades.png", "embeddings.png")


@dataclass(frozen=True)
class Terms:
    """What the main script calls things, for a report made of a run's files alone."""

    defaults: dict[str, Any]  # settings
    criteria: Sequence[Any]  # Criterion of tiles
    columns: list[str]  # of metrics.csv
    findings: Sequence[str]  # of the online probe
    collapse_std: float
    collapse_advice: str


def write_summary(folder: Path, cache: Path, facts: dict[str, Any]) -> None:
    """summary.json: `facts` about the run, the time, and the funnel of tiles from its cache."""
    rejections = read_rejections(cache)
    errors = rejections["error"][rejections["error"] != ""]
    content = {
        **facts,
        "time": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "images": len(rejections),
        "skipped": errors.value_counts().to_dict(),
        "funnel": {k: int(v) for k, v in rejections.sum(numeric_only=True).items()},
    }
    files.write_atomic(folder / "summary.json", json.dumps(content, indent=2))


def read_run(folder: Path, terms: Terms) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """A run's config.json, summary.json ({} where absent) and metrics.csv. Raises MammoError."""
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record["config"] = terms.defaults | record["config"]
        path = folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path = folder / "metrics.csv"
        metrics = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=terms.columns)
        # Until 2026-11-26 the titles of an objective's curves were not on record.
        curves = record.setdefault("curves", {"loss": "loss", "freq_loss": "frequency loss"})
        columns = list(dict.fromkeys([*terms.columns, *curves]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MammoError(
            f"{folder}: not the folder of a run, or a file of it is damaged ({error!r})"
        ) from error
    return record, summary, metrics.reindex(columns=columns).apply(pd.to_numeric, errors="coerce")


def write_report(folder: Path, terms: Terms) -> Path:
    """report.html of a run, self-contained, from the files in its folder alone; returns its path.

    Raises MammoError where the folder holds no run.
    """
    record, summary, metrics = read_run(folder, terms)
    if len(metrics):
        curves = learning_curves(record["curves"], terms.findings)
        pictures.draw_curves(metrics, curves, terms.collapse_std, folder / "curves.png")
    title = html.escape(f"Run {folder.resolve().name}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{REPORT_STYLE}</style></head><body><h1>{title}</h1>",
        html_headline(summary, metrics, terms.collapse_advice),
        html_learning(folder, metrics, terms.collapse_std, summary.get("told", {})),
        html_funnel(folder, record["config"], summary, terms.criteria),
        html_classifier(folder),
        html_settings(record["config"], terms.defaults),
        "<h2>Environment</h2>" + files.html_table(record.get("environment", {}).items(), kind="paths"),
        "<p>Research use only; not for clinical decisions.</p></body></html>\n",
    ]
    files.write_atomic(folder / "report.html", "\n".join(parts))
    return folder / "report.html"


def html_pictures(folder: Path, *names: str) -> str:
    """Those pictures that are there, inside the page, with their captions."""
    figures = []
    for path in (folder / name for name in names):
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'
            caption = CAPTIONS.get(path.name, "")
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def html_headline(summary: dict[str, Any], metrics: pd.DataFrame, collapse_advice: str) -> str:
    """How the run stands, in a sentence and a few figures."""
    state, healthy = summary.get("state", "unknown"), summary.get("healthy", True)
    words = {"running": "Running when last heard of", "finished": "Finished"}
    text = f"{words.get(state, state.capitalize())}, {summary.get('time', 'time unknown')}. "
    text += summary.get("reason", "")
    if not healthy:
        text += f" Collapsed: {collapse_advice}"
    known = [name for name in metrics if metrics[name].notna().any()]
    last = {name: metrics[name].dropna().iloc[-1] for name in known}
    best = summary.get("best", {})
    facts = {"step": f"{summary.get('step', 0):,} of {summary.get('steps', 0):,}"}
    facts["epoch"] = f"{summary.get('epoch', 0):.2f}"
    if best:
        chosen = f"AUROC {best['auroc']:.3f}" if "auroc" in best else f"RankMe {best['rankme']:.1f}"
        facts["best epoch"] = f"{best['epoch']} ({chosen})"
    figures = {
        "loss": ("loss", ".3f"),
        "feature std": ("feature_std", ".2f"),
        "RankMe": ("monitor_rankme", ".1f"),
        "tiles per second": ("tiles_per_s", ".3g"),
        "GiB of GPU memory": ("gpu_memory_gb", ".1f"),
        "% GPU utilisation": ("gpu_utilisation", ".0f"),
    }
    facts |= {k: f"{last[name]:{style}}" for k, (name, style) in figures.items() if name in last}
    if state == "running" and "seconds_left" in last:
        facts["time left"] = str(datetime.timedelta(seconds=round(last["seconds_left"])))
    facts["device"] = f"{summary.get('processes', 1)} x {summary.get('device', 'unknown')}"
    shown = (f"<div>{html.escape(k)}<b>{html.escape(v)}</b></div>" for k, v in facts.items())
    bad = "" if healthy and state in words else " bad"
    return f'<p class="state{bad}">{html.escape(text)}</p><div class="facts">{"".join(shown)}</div>'


def html_learning(
    folder: Path, metrics: pd.DataFrame, collapse_std: float, told: dict[str, float]
) -> str:
    """Curves, the signs of collapse, what is `told` (R2 by name) of no use, and the map of features."""
    epochs = metrics.dropna(subset=["monitor_rankme"]).dropna(axis=1, how="all")
    columns = [name for name in epochs if name == "epoch" or name.startswith("monitor_")]
    rows = [[f"{value:.4g}" for value in row] for row in epochs[columns].tail(20).to_numpy()]
    table = files.html_table(rows, columns)
    last = f"<details><summary>The last {len(rows)} epochs</summary>{table}</details>"
    return (
        "<h2>Does it learn?</h2><p>The loss alone can't tell: it is lowest when all tiles look alike to "
        "the network (collapse). <b>Feature std</b> is the spread of the tiles' projections: 1 = even "
        f"in all directions, below {collapse_std} collapsed. <b>RankMe</b> is the number of directions "
        "that the features fill; it has no fixed threshold: a fall towards 1 is collapse, and without "
        "labels the best checkpoint is from the healthy epoch where it is highest.</p>"
        + html_nuisances(told)
        + html_pictures(folder, "curves.png", "targets.png", "embedding.png")
        + (last if rows else "")
    )


def html_nuisances(told: dict[str, float]) -> str:
    """A sentence on what features tell of tiles without telling anything of tissue."""
    words = {"r2_air": "the share of air", "r2_brightness": "the brightness"}
    parts = [f"{words[name]} with R&sup2; {value:.2f}" for name, value in told.items() if name in words]
    if not parts:
        return ""
    return (
        f"<p>Of what should not matter, the features tell {' and '.join(parts)} of monitor tiles (1 = "
        "wholly, 0 or less = nothing; ridge regression, studies apart). The lower, the less of them is "
        "spent on shortcuts.</p>"
    )


def html_funnel(
    folder: Path, config: dict[str, Any], summary: dict[str, Any], criteria: Sequence[Any]
) -> str:
    """From images to tiles: how many each criterion took, and what that looks like."""
    funnel, skipped = summary.get("funnel", {}), summary.get("skipped", {})
    total = max(1, funnel.get("positions", 0))
    rows = [("positions in the images", funnel.get("positions", 0))]
    for c in criteria:
        side = "above" if c.passes(0, 1) else "below"  # where the values of rejected tiles lie
        reason = f"{c.title} ({c.column} {side} {config[c.setting]:g})"
        rows.append((reason, -funnel.get(c.column, 0)))
    rows += [("over --max_tiles", -funnel.get("capped", 0)), ("kept", funnel.get("kept", 0))]
    lines = (
        f"<tr><td>{html.escape(text)}</td><td>{count:,}</td>"
        f'<td><div class="bar" style="width: {abs(count) / total:.1%}"></div></td></tr>'
        for text, count in rows
    )
    return (
        f"<h2>From images to tiles</h2><p>{summary.get('images', 0):,} images, of which "
        f"{sum(skipped.values()):,} were skipped; {funnel.get('rescued', 0):,} tiles were kept for high "
        "energy, although dark or nearly empty, or for convergence, although without energy. "
        f"{summary.get('training_tiles', 0):,} tiles train, "
        f"{summary.get('monitor_tiles', 0):,} are monitor tiles.</p>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
        + (files.html_table(skipped.items(), ("why skipped", "images")) if skipped else "")
        + html_pictures(folder, "segmentation.png", "grid.png", "tiles.png", "views.png")
    )


def html_results(path: Path) -> str:
    """A table of train_classifier.py without evaluation.csv's sub-groups of images."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        return f"<p>{path.name} can't be read ({type(error).__name__})</p>"
    if "group" in table:
        table = table[table["group"] == "all"].drop(columns="group")
    counts = [name for name in ("n", "positive", "studies", "positive_studies") if name in table]
    table = table[[*table.columns.drop(counts), *counts]]  # a phone shows the first columns
    cells = table.map(lambda v: f"{v:.3f}" if isinstance(v, float) else v).replace("nan", "")
    return files.html_table(cells.to_numpy(), [name.replace("_", " ") for name in cells])


def html_classifier(folder: Path) -> str:
    """Results of train_classifier.py in the run's sub-folders (--output_dir with the run's folder)."""
    parts = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = []
        for name in ("evaluation.csv", "pooling.csv", "compare.csv", *makers.TABLES):
            if (place / name).is_file():
                found.append(html_results(place / name))
        found += [html.escape(text).join(("<p>Warning: ", "</p>")) for text in makers.warned(place)]
        maps = [path.name for path in sorted(place.glob("map_*.png"))[:4]]
        found.append(html_pictures(place, *CLASSIFIER_PICTURES, *maps))
        if any(found):
            parts += [f"<h2>Classifier: {html.escape(place.name)}</h2>", *found]
    return "".join(parts)


def changed_flags(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, list[str]]:
    """The words of the flag for each setting that is not at its default."""
    flags = {}
    for name, default in defaults.items():
        value = settings[name]
        if value != default:
            on_off = [f"--{name}" if value else f"--no_{name}"]
            flags[name] = on_off if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def html_settings(config: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that repeats the run, and all settings."""
    flags = changed_flags(config, defaults)
    lines = [command_of("train_byol_mammo.py"), *map(shlex.join, flags.values())]
    changed = [(name, config[name], defaults[name]) for name in flags]
    same = [(name, value) for name, value in defaults.items() if name not in flags]
    return (
        "<h2>Settings</h2><pre>"
        + html.escape(" \\\n    ".join(lines))
        + "</pre>"
        + files.html_table(changed, ("changed", "here", "default"), "paths")
        + f"<details><summary>{len(same)} settings at their defaults</summary>"
        + files.html_table(same, kind="paths")
        + "</details>"
    )


def print_end(folder: Path, step: int, healthy: bool, with_report: bool) -> None:
    """Name the files of a finished run."""
    if not healthy:
        print(
            "warning: the run ended collapsed; mammogram_byol_best.pth is from before that "
            "where an epoch was healthy",
            file=sys.stderr,
        )
    print(f"finished at step {step}. Open in {folder}:")
    if with_report:
        print("  report     report.html")
        print(f"  pictures   {' '.join(name for name in CAPTIONS if (Path(folder) / name).is_file())}")
    print("  numbers    metrics.csv summary.json config.json")
    print(
        "  models     mammogram_byol_best.pth mammogram_byol_final.pth backbone.safetensors", flush=True
    )
