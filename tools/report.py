"""Reads finished runs: a table of means over seeds, a CSV with one row a run, a figure of curves.

  python tools/report.py runs/* --csv offline.csv --figure offline.png
  python tools/report.py runs/* --at 10000       # as things stood at that update or step
  python tools/report.py runs/*alpha* --sweep    # of --cql-alpha: which value to take
  python tools/report.py runs/* --html runs.html    # one page: verdicts, table, curves, commands
  python tools/report.py runs/* --curves benchmarks/raw/online.csv   # what figures.py draws from
  python tools/report.py runs/HalfCheetah-v5__dr3_analysis__1__* --figure features.png

Runs of the same environment and experiment name (--exp-name) are one group; a curve is its mean,
the band runs from its lowest to its highest seed. In the table a value is the mean over seeds +-
standard deviation; `learned - achieved`, the mean of Q(s0, pi) less the discounted return that
followed, comes with its 95 % interval (Student's t).

A run of dr3_analysis.py holds many networks and is reported by itself: a table of what was measured
at the end; which of the papers' claims hold, in how many of its seeds and by what numbers.
"""

import argparse
import base64
import csv
import html
import importlib.util
import io
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

COLUMNS = """script env_id exp_name seed num_updates batch_size cql_alpha dataset_return_mean
bc_return_mean final_return_mean final_return_std selected_return_mean selected_step
collector_return_mean normalized_score overestimation q_max q_bound td_error td_error_holdout
cql_gap q_minus_return srank feature_dot verdict updates_per_second global_step updates
steps_per_second v_s0 kl wall_seconds dataset_sha256 device divergence divergence_floor distance
weight argmax_share novelty offline_return_mean verdict_text""".split()
PANELS = {
    "eval/episodic_return": "return",
    "diagnostics/q_data": "Q of the data",
    "diagnostics/overestimation": "predicted - achieved return",
    "diagnostics/td_error": "TD error / variance of target",
    "diagnostics/srank": "srank of the features",
    "diagnostics/feature_dot": "feature dot product",
}
CURVES = [*PANELS, "diagnostics/q_max", "diagnostics/q_bound", "diagnostics/feature_norm"]
CURVES.append("charts/SPS")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00"]
LINES = ["-", "--", "-.", ":"]  # with six colours twelve pairs


def read_run(folder: Path, at: int | None = None) -> tuple[dict, dict]:
    """One run as (row of COLUMNS, tag -> list of (step, value)), up to step `at`."""
    curves = defaultdict(list)
    written = (folder / "metrics.csv").read_text()
    whole_lines = written[: written.rfind("\n") + 1].splitlines()  # the last may be half there
    for r in csv.DictReader(whole_lines):
        if at is None or int(r["step"]) <= at:
            curves[r["tag"]].append((int(r["step"]), float(r["value"])))
    header = json.loads((folder / "args.json").read_text())
    row = header["args"] | {"script": header["script"]}
    if isinstance(row["env_id"], list):  # cql_atari.py's games
        row["env_id"] = " ".join(row["env_id"])
    if (folder / "summary.json").exists():
        row |= json.loads((folder / "summary.json").read_text())
    for tag, points in curves.items():
        if tag.startswith("diagnostics/"):
            row[tag.removeprefix("diagnostics/")] = points[-1][1]
    if at is not None:  # the summary speaks of the end
        of_the_end = ("selected_", "verdict", "normalized", "final_return_std")
        row |= {name: None for name in row if name.startswith(of_the_end)}
        returns = curves["eval/episodic_return"]
        row["final_return_mean"] = returns[-1][1] if returns else None
    return {name: row.get(name) for name in COLUMNS}, curves


def differing(folders: list[Path]) -> str:
    """The flags in which runs of one name differ, apart from their seed, their files and what only
    watches them; "" if in none."""
    runs = [json.loads((x / "args.json").read_text())["args"] for x in folders]
    others = "seed resume run_dir data_dir save_dataset track wandb_project_name wandb_entity"
    names = [k for k in runs[0] if all(k in run for run in runs) and k not in others.split()]
    names = [k for k in names if not k.startswith(("eval_", "log_", "checkpoint_"))]
    several = [k for k in names if any(run[k] != runs[0][k] for run in runs)]
    return ", ".join("--" + key.replace("_", "-") for key in several)


def difference(one: Path, other: Path) -> str:
    """What tells two runs of one name and seed apart."""
    flags = differing([one, other])
    what = f"differ in {flags}" if flags else "were started alike"
    return f"one seed and --exp-name, but they {what}: report one of them, or name them apart"


def half_width(values) -> float:
    """Of the 95 % interval of a mean, by Student's t; 0 for a single value."""
    n, t = len(values), (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    if n < 2:
        return 0.0
    quantile = t[n - 2] if n <= 10 else 1.96 + 2.6 / (n - 1)
    return quantile * statistics.stdev(values) / n**0.5


def interval(values: list[float]) -> str:
    """Mean and its 95 % interval."""
    if len(values) < 2:
        return spread(values)
    mean, half = statistics.mean(values), half_width(values)
    return f"{mean:.4g} [{mean - half:.4g}, {mean + half:.4g}]"


def spread(values: list[float]) -> str:
    """Mean +- standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    return f"{statistics.mean(values):.4g} +- {statistics.stdev(values):.3g}"


def markdown(lines: list[list]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def grouped(rows: list[dict], *keys: str) -> dict:
    groups = defaultdict(list)
    for r in rows:
        groups[tuple(r[k] for k in keys)].append(r)
    return groups


def table(rows: list[dict]) -> str:
    """A line for each environment and experiment name: returns, what Q said of them, verdicts."""
    keys = (
        "final_return_mean selected_return_mean dataset_return_mean overestimation q_max td_error"
    )
    heads = ["final", "selected", "dataset", "learned - achieved", "q_max", "td_error"]
    lines = [["environment", "run", "seeds", *heads, "verdicts"]]
    for (env, name), group in grouped(rows, "env_id", "exp_name").items():
        cells = []
        for key in keys.split():
            values = [r[key] for r in group if r[key] is not None]
            cells.append((interval if key == "overestimation" else spread)(values))
            if 0 < len(values) < len(group):  # some still run, or were broken off
                cells[-1] += f" (of {len(values)})"
        verdicts = ", ".join(sorted({str(r["verdict"]) for r in group if r["verdict"]}))
        lines.append([env, name, len(group), *cells, verdicts])
    return markdown(lines)


def sweep(rows: list[dict]) -> str:
    """Which --cql-alpha to take: the TD error and the conservative term should both be small.

    Of the values whose TD error is small, at most a tenth of the target's variance and twice the
    least of the sweep, the one with the least gap. (Not the best by both ranks: the two move
    against each other, and that names the middle of any grid.)"""
    lines = [["cql_alpha", "seeds", "td_error", "cql_gap", "q - return", "final return"]]
    found = []
    for (alpha,), group in sorted(grouped(rows, "cql_alpha").items()):
        means = [statistics.mean(r[k] for r in group) for k in ("td_error", "cql_gap")]
        found.append((alpha, *means))
        cells = []
        for key in ("td_error", "cql_gap", "q_minus_return", "final_return_mean"):
            cells.append(spread([r[key] for r in group if r[key] is not None]))
        lines.append([f"{alpha:g}", len(group), *cells])
    least = min(td for _, td, _ in found)
    if least > 0.1:
        advice = "no alpha brings the TD error below a tenth of the target's variance"
        short = any(r["verdict"] == "too short to judge" for r in rows)
        mend = "more --num-updates, some are too short to judge" if short else "a larger model"
        return f"{markdown(lines)}\n\n{advice}: try {mend}"
    fitted = [row for row in found if row[1] <= min(0.1, 2 * least)]
    alpha, td, gap = min(fitted, key=lambda row: row[2])
    advice = f"take --cql-alpha {alpha:g}: TD error {td:.3g} of the variance, gap {gap:.3g}"
    if alpha == found[-1][0]:
        advice += "; it is the largest of the sweep, try still larger ones"
    return f"{markdown(lines)}\n\n{advice}"


def draw(runs: list[tuple[dict, dict]]):
    """A panel for each of PANELS, a line for each group: mean and range of its runs as far as all
    of them go, read off between their own steps where those differ; thin, each run to its end."""
    from matplotlib.figure import Figure

    panels = {tag: title for tag, title in PANELS.items() if any(c[tag] for _, c in runs)}
    lines = max(1, math.ceil(len(panels) / 3))  # 1: nothing was measured yet
    figure = Figure(figsize=(12, 3 * lines), layout="tight")
    axes = figure.subplots(lines, 3, sharex=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    groups = list(dict.fromkeys((row["env_id"], row["exp_name"]) for row, _ in runs))
    several = len({env for env, _ in groups}) > 1
    for axis, (tag, title) in zip(axes.flat, panels.items()):
        for (env, name), colour, line in zip(groups, COLOURS * 9, LINES * 9):
            mine = [c[tag] for row, c in runs if (row["env_id"], row["exp_name"]) == (env, name)]
            mine = [np.array(points).T for points in mine if points]
            if not mine:
                continue
            first, last = max(x[0] for x, _ in mine), min(x[-1] for x, _ in mine)
            steps = np.unique(np.concatenate([x for x, _ in mine]))
            steps = steps[(steps >= first) & (steps <= last)]
            values = np.array([np.interp(steps, x, y) for x, y in mine])
            label = f"{env} {name}" if several else name
            axis.plot(steps, values.mean(0), line, color=colour, label=label)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15)
            for x, y in mine:
                axis.plot(x, y, line, color=colour, linewidth=0.5, alpha=0.5)
        axis.set_title(title, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("updates (offline) or environment steps")
    if len(groups) > 1 and panels:
        axes[0, 0].legend(fontsize=8)
    return figure


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ padding: 0.2em 0.8em; border-bottom: 1px solid #ccc; text-align: left }}
img {{ max-width: 100% }} pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 0.5em }}
pre.wide {{ white-space: pre; overflow-x: auto }}
</style></head><body><h1>{title}</h1>
<h2>Verdicts</h2>{verdicts}
<h2>Means over seeds</h2>{table}
<h2>Curves</h2>{curves}
<h2>How to make it again</h2>{commands}
</body></html>
"""


def picture(figure) -> str:
    """A figure as an image that stands in the page itself."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="curves" src="data:image/png;base64,{data}">'


def page(runs: list[tuple[dict, dict]], folders: list[Path]) -> str:
    """One HTML file that needs no other and no network. A run of dr3_analysis.py has the papers'
    claims for a verdict, and a table and a figure of its own."""
    others = [run for run in runs if run[0]["script"] != "dr3_analysis"]
    groups = list(dict.fromkeys(f"{r['env_id']} {r['exp_name']}" for r, _ in runs))
    drawn = importlib.util.find_spec("matplotlib")
    figures = [draw(others)] if drawn and others else []
    verdicts, tables, commands = [], [], []
    for (row, curves), folder in zip(runs, folders):
        name = f"{row['env_id']} {row['exp_name']}, seed {row['seed']}"
        said = f"<b>{row['verdict'] or 'none'}</b> {html.escape(row['verdict_text'] or '')}"
        if row["script"] == "dr3_analysis":
            networks = measured(curves)
            said = "".join(f"<br>{html.escape(line)}" for line in claims(*networks))
            wide = html.escape(table_of_networks(networks[1]))
            tables.append(f'<pre class="wide">{wide}</pre>')
            figures += [draw_networks(*networks)] if drawn else []
        verdicts.append(f"<p>{html.escape(name)}: {said}</p>")
        header = json.loads((folder / "args.json").read_text())
        versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
        called = header["command"]  # one each time that it was resumed; older runs: the last one
        called = [called] if isinstance(called, str) else called
        made = [*(f"python {line}" for line in called), f"{header['device']}, {versions}"]
        commands.append(f"<pre>{html.escape(chr(10).join(made))}</pre>")
    if others:
        lines = table([row for row, _ in others]).splitlines()
        head, _, *lines = (html.escape(x).strip("| ").split(" | ") for x in lines)
        cells = [[f"<th>{x}</th>" for x in head], *([f"<td>{x}</td>" for x in y] for y in lines)]
        as_table = "".join(f"<tr>{''.join(x)}</tr>" for x in cells)
        tables.insert(0, f"<table>{as_table}</table>")
    return PAGE.format(
        title=html.escape(groups[0] if len(groups) == 1 else f"{len(groups)} experiments"),
        verdicts="".join(verdicts),
        table="".join(tables),
        curves="".join(map(picture, figures)) or "<p>no figure: matplotlib is not installed</p>",
        commands="".join(commands),
    )


def write_curves(runs: list[tuple[dict, dict]], path):
    """env_id, exp_name, seed, step, tag, value: a row for each point of CURVES; of dr3_analysis.py
    for each that was measured, where exp_name is `target cure`, seed the network's."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["env_id", "exp_name", "seed", "step", "tag", "value"])
        for row, curves in runs:
            named = {tag: (row["exp_name"], row["seed"], tag) for tag in CURVES}
            if row["script"] == "dr3_analysis":
                named = {}
                for tag, (target, cure, seed, metric) in networks_of(curves).items():
                    named[tag] = (f"{target} {cure}", seed, f"diagnostics/{metric}")
            for tag, (name, seed, short) in named.items():
                for step, value in curves[tag]:
                    writer.writerow([row["env_id"], name, seed, step, short, f"{value:.6g}"])


# ------------------------------------------------------------------------- runs of dr3_analysis.py
def networks_of(curves: dict) -> dict:
    """tag -> (target, cure, seed, metric) of what was measured of each network."""
    return {tag: tag.split("/")[1:] for tag in curves if tag.startswith("diagnostics/")}


def measured(curves: dict) -> tuple[list, dict]:
    """The steps, and results[target][cure][metric], an array (steps, seeds)."""
    results, networks = {}, networks_of(curves)
    whole = min((curves[tag] for tag in networks), key=len, default=[])  # a run may end in between
    steps = [step for step, _ in whole]
    for tag, (target, cure, _, metric) in networks.items():
        metrics = results.setdefault(target, {}).setdefault(cure, defaultdict(list))
        metrics[metric].append([value for _, value in curves[tag][: len(steps)]])
    for cures in results.values():
        for metrics in cures.values():
            metrics.update({name: np.array(columns).T for name, columns in metrics.items()})
    return steps, results


def claims(steps: list, results: dict) -> list[str]:
    """The papers' claims, checked on this run, a line each.

    Each is decided seed by seed, against the network of the same weights and batches: `supported`
    if it holds in all seeds, `not supported` if in none, else `undecided`. A rank falls if it ends
    15 % below that of sarsa (without sarsa: of mc); it does not for mc and oracle if at most 5 % is
    lost after the first quarter, for moving if it ends less than 15 % below sarsa's. A dot product
    rises if it ends above twice sarsa's and gains more than 10 % in the second half; while Q has
    settled, if it gains that where mean Q moves by less than 10 %. DR3 must bring the dot product
    to sarsa's, at least 10 % down, and move mean Q by less than 10 %; a rescue is a rank 5 % above
    that without DR3 and within 15 % of sarsa's; a larger or lower error is one by 10 %, on held-out
    episodes where the truth is unknown."""
    lines, base = [], next((t for t in ("sarsa", "mc") if t in results), None)
    exact = any("q_error" in cures["none"] for cures in results.values())
    error = "q_error" if exact else "return_error_holdout"
    judged = {target for target, cures in results.items() if error in cures["none"]}

    def get(target, metric, when=1.0, cure="none"):
        nearest = np.abs(np.array(steps) - when * steps[-1]).argmin()
        return results[target][cure][metric][nearest]

    def change(now, before):
        return (now - before) / np.abs(before).clip(1e-30)

    def say(name: str, holds, *parts: str):
        word = "supported" if holds.all() else "undecided" if holds.any() else "not supported"
        lines.append(f"- {name}: {word} ({holds.sum()} of {len(holds)} seeds). {', '.join(parts)}")

    if base and "td" in results:
        td, other = get("td", "srank"), get(base, "srank")
        ranks = f"srank ends at {td.mean():.0f} for td and {other.mean():.0f} for {base}"
        say("with bootstrapping on unseen actions the rank falls", td < 0.85 * other, ranks)
        dot, base_dot = get("td", "feature_dot"), get(base, "feature_dot")
        ratio, rise = dot / base_dot.clip(1e-30), change(dot, get("td", "feature_dot", 0.5))
        dots = f"in the second half td's dot product changes by {rise.mean():+.0%} (a rise: +10%)"
        twice = f"it ends at {ratio.mean():.1f} times that of {base} (a rise: 2)"
        steady = change(base_dot, get(base, "feature_dot", 0.5)).mean()
        name = "with bootstrapping on unseen actions the dot products rise"
        say(name, (ratio > 2) & (rise > 0.1), dots, twice, f"which changes by {steady:+.0%}")
        moved = change(get("td", "q_mean"), get("td", "q_mean", 0.5))
        settled = f"its mean Q by {moved.mean():+.0%} (settled: 10%)"
        holds = (np.abs(moved) < 0.1) & (rise > 0.1)
        say("the dot products rise while Q has settled", holds, dots, settled)
        if {"td", base} <= judged:
            worse = get("td", error) / get(base, error).clip(1e-30)
            times = f"td's {error} is {worse.mean():.2f} times that of {base}"
            holds = (worse > 1.1) & (td < 0.85 * other)
            say("the lower rank comes with a larger error", holds, ranks, times)
    for target in ("oracle", "mc"):
        if target in results:
            kept = change(get(target, "srank"), get(target, "srank", 0.25))
            text = f"its srank changes by {kept.mean():+.0%} after the first quarter"
            say(f"with {target} targets the rank does not fall", kept > -0.05, text)
    if "moving" in results and base:
        moving, other = get("moving", "srank"), get(base, "srank")
        text = f"srank ends at {moving.mean():.0f} with td's target, {other.mean():.0f} for {base}"
        say("a moving target alone does not lower the rank", moving > 0.85 * other, text)
    for target, cure in [(t, c) for t in results for c in results[t] if c.startswith("dr3")]:
        name = f"{cure} on {target}"
        was, dot = (get(target, "feature_dot", cure=x) for x in ("none", cure))
        goal = np.minimum(get(base, "feature_dot") if base else was, 0.9 * was)
        q_was, q = (get(target, "q_mean", cure=x) for x in ("none", cure))
        holds = (dot <= goal) & (np.abs(change(q, q_was)) < 0.1)
        dots = f"dot product {was.mean():.3g} -> {dot.mean():.3g}"
        moved = f"mean Q changes by {change(q, q_was).mean():+.0%}"
        say(f"{name} lowers the dot products and leaves Q alone", holds, dots, moved)
        if base:
            was, rank = (get(target, "srank", cure=x) for x in ("none", cure))
            other = get(base, "srank")
            holds = (rank > 1.05 * was) & (rank > 0.85 * other)
            text = f"srank {was.mean():.0f} -> {rank.mean():.0f}, {other.mean():.0f} for {base}"
            say(f"{name} rescues the rank", holds, text)
        if target in judged:
            was, now = (get(target, error, cure=x) for x in ("none", cure))
            text = f"{error} {was.mean():.3g} -> {now.mean():.3g}"
            say(f"{name} lowers the error", now < 0.9 * was, text)
    return lines


def table_of_networks(results: dict) -> str:
    """What was measured at the end: means over seeds +- half of their 95 % interval."""
    names = "feature_dot feature_cos srank dormant reg_td q_mean q_error return_error"
    names = f"{names} return_error_holdout td_error greedy_return".split()
    found = {name for cures in results.values() for metrics in cures.values() for name in metrics}
    names = [name for name in names if name in found]
    lines = ["target cure".ljust(22) + "".join(name.rjust(21) for name in names)]
    for target, cures in results.items():
        for cure, metrics in cures.items():
            line = f"{target} {cure}".ljust(22)
            for values in [metrics[name][-1] if name in metrics else [] for name in names]:
                half = f" +- {half_width(values):.2g}" if len(values) > 1 else ""
                line += (f"{values.mean():.3g}{half}" if len(values) else "").rjust(21)
            lines.append(line)
    return "\n".join(lines)


FEATURE_PANELS = {
    "feature_dot": "dot product of phi and phi'",
    "feature_cos": "cosine of phi and phi'",
    "srank": "srank of phi",
    "reg_td": "regulariser R(phi) with bootstrapping",
    "q_mean": "mean Q (dotted: truth)",
    "q_error": "error to truth / its variance",
    "return_error_holdout": "error to held-out returns / their variance",
    "td_error": "TD error / target's variance",
    "dormant": "share of dormant units",
}
TARGETS = {"mc": "#0072B2", "oracle": "#56B4E9", "sarsa": "#009E73", "td": "#D55E00"}
TARGETS |= {"td10": "#E69F00", "q": "#CC79A7", "moving": "#000000"}
DASHES = ["-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3))]  # by cure


def draw_networks(steps: list, results: dict):
    """A panel for each of FEATURE_PANELS that was measured, a line for each target and cure: mean
    over seeds, band of its 95 % interval."""
    from matplotlib.figure import Figure

    kinds = [(target, cure, m) for target, cures in results.items() for cure, m in cures.items()]
    dashes = dict(zip(dict.fromkeys(cure for _, cure, _ in kinds), DASHES * 99))
    panels = [name for name in FEATURE_PANELS if any(name in m for _, _, m in kinds)]
    lines = max(1, math.ceil(len(panels) / 4))
    figure = Figure(figsize=(16, 3.5 * lines), layout="tight")
    axes = figure.subplots(lines, 4, sharex=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, panels):
        for target, cure, metrics in kinds:
            if metric not in metrics:
                continue
            values, colour = metrics[metric], TARGETS.get(target, "grey")
            mean, half = values.mean(1), np.array([half_width(x) for x in values])
            label = target if cure == "none" else f"{target} {cure}"
            axis.plot(steps, mean, linestyle=dashes[cure], color=colour, label=label)
            axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15)
            if metric == "q_mean" and "truth" in metrics:
                truth = metrics["truth"][-1][0]
                axis.axhline(truth, color="grey", linestyle=":", linewidth=1)
        axis.set_title(FEATURE_PANELS[metric], fontsize=10)
        if metric in ("q_error", "td_error"):
            axis.set_yscale("log")
    figure.supxlabel("updates")
    axes[0, 0].legend(fontsize=8)
    return figure


def fail(message: str):
    """End the program with one line and status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv")
    parser.add_argument("--figure")
    parser.add_argument("--curves", help="a CSV of the curves that figures.py draws")
    parser.add_argument("--at", type=int, help="cut every curve at this update or step")
    parser.add_argument("--sweep", action="store_true", help="compare values of --cql-alpha")
    parser.add_argument("--html", type=Path, help="one page of all, for a browser")
    args = parser.parse_args()
    files = ("metrics.csv", "args.json")
    folders = [x for x in args.runs if all((x / name).exists() for name in files)]
    runs = [read_run(x, args.at) for x in folders]
    if not runs:
        fail("none of these folders holds a metrics.csv and an args.json")
    if skipped := [str(x) for x in args.runs if x not in folders]:
        print(f"left out, for there is no metrics.csv or args.json: {', '.join(skipped)}\n")
    same = ("env_id", "exp_name", "cql_alpha") if args.sweep else ("env_id", "exp_name")
    found = {}
    for folder, (row, _) in zip(folders, runs):
        alike = found.setdefault((row["seed"], *(row[key] for key in same)), folder)
        if alike != folder:
            fail(f"{alike} and {folder}: {difference(alike, folder)}")
    groups = defaultdict(list)
    for folder, (row, _) in zip(folders, runs):
        groups[tuple(row[key] for key in same)].append(folder)
    for (env, name, *_), group in groups.items():
        if flags := differing(group):
            print(f"the runs of {env} {name} differ in {flags}: one mean of different settings\n")
    features = [measured(curves) for row, curves in runs if row["script"] == "dr3_analysis"]
    others = [run for run in runs if run[0]["script"] != "dr3_analysis"]
    if args.sweep and len({row["env_id"] for row, _ in runs}) > 1:
        fail("--sweep: these runs are of several environments, give those of one")
    if args.sweep and any(row["cql_alpha"] is None for row, _ in runs):
        fail("--sweep compares values of --cql-alpha: some of these runs have none")
    blind = [x for x, (row, _) in zip(folders, runs) if None in (row["td_error"], row["cql_gap"])]
    if args.sweep and blind:
        fail(f"--sweep goes by diagnostics: {blind[0]} has none (yet)")
    if args.figure and features and len(runs) > 1:
        fail("--figure: a run of dr3_analysis.py is drawn by itself")
    for steps, results in features:
        print(table_of_networks(results), *claims(steps, results), sep="\n", end="\n\n")
    if others:
        print((sweep if args.sweep else table)([row for row, _ in others]))
    try:
        for target in filter(None, (args.csv, args.curves, args.html, args.figure)):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        if args.csv:
            with open(args.csv, "w", newline="") as f:
                writer = csv.DictWriter(f, COLUMNS)
                writer.writeheader()
                writer.writerows(row for row, _ in runs)
        if args.curves:
            write_curves(runs, args.curves)
        if args.html:
            args.html.write_text(page(runs, folders))
        if args.figure and not importlib.util.find_spec("matplotlib"):
            print("no figure: matplotlib is not installed")
        elif args.figure:
            figure = draw(others) if others else draw_networks(*features[0])
            figure.savefig(args.figure, dpi=110)
    except (OSError, ValueError) as e:
        fail(f"not written: {str(e).splitlines()[0]}")


if __name__ == "__main__":
    main()
