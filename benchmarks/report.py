"""Reads finished runs: a CSV with one row a run, a table of means over seeds, and a figure of their curves.

  python benchmarks/report.py runs/* --csv benchmarks/raw/offline.csv --figure offline.png
  python benchmarks/report.py runs/* --at 10000      # as things stood at that update or step
  python benchmarks/report.py runs/*alpha* --sweep   # a sweep of --cql-alpha: which value to take
  python benchmarks/report.py runs/* --curves benchmarks/raw/online.csv   # what figures.py draws from

Runs with the same environment and experiment name (--exp-name) are one group; a curve is its mean, the band
runs from its lowest to its highest seed. In the table a value is the mean over seeds +- standard deviation;
`learned - achieved`, the mean of Q(s0, pi) less the discounted return that followed, comes with its 95 %
interval (Student's t).
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = """script env_id exp_name seed num_updates batch_size cql_alpha dataset_return_mean bc_return_mean
final_return_mean final_return_std selected_return_mean selected_step collector_return_mean normalized_score
overestimation q_max q_bound td_error td_error_holdout cql_gap q_minus_return srank feature_dot verdict
updates_per_second global_step updates steps_per_second v_s0 kl wall_seconds dataset_sha256 device
verdict_text""".split()
PANELS = {
    "eval/episodic_return": "return",
    "diagnostics/q_data": "Q of the data",
    "diagnostics/overestimation": "predicted - achieved return",
    "diagnostics/td_error": "TD error / variance of target",
    "diagnostics/srank": "srank of the features",
    "diagnostics/feature_dot": "feature dot product",
}
CURVES = [*PANELS, "diagnostics/q_max", "diagnostics/q_bound", "diagnostics/feature_norm", "charts/SPS"]
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#000000", "-"),
    ("#E69F00", "--"),
]


def read_run(folder: Path, at: int | None = None) -> tuple[dict, dict]:
    """One run as (row of COLUMNS, tag -> list of (step, value)), up to step `at`."""
    curves = defaultdict(list)
    with open(folder / "metrics.csv") as f:
        for r in csv.DictReader(f):
            if at is None or int(r["step"]) <= at:
                curves[r["tag"]].append((int(r["step"]), float(r["value"])))
    header = json.loads((folder / "args.json").read_text())
    row = header["args"] | {"script": header["script"]}
    if isinstance(row["env_id"], list):  # cql_atari.py's games
        row["env_id"] = " ".join(row["env_id"])
    summary = folder / "summary.json"
    row |= json.loads(summary.read_text()) if summary.exists() else {}
    row |= {
        k.removeprefix("diagnostics/"): v[-1][1] for k, v in curves.items() if k.startswith("diagnostics/")
    }
    if at is not None:  # the summary speaks of the end
        of_the_end = ("selected_", "verdict", "normalized", "final_return_std")
        row |= {k: None for k in row if k.startswith(of_the_end)}
        row["final_return_mean"] = (
            curves["eval/episodic_return"][-1][1] if curves["eval/episodic_return"] else None
        )
    return {k: row.get(k) for k in COLUMNS}, curves


T_QUANTILE = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 0.975, of 1, 2, ... degrees of freedom


def interval(values: list[float]) -> str:
    """Mean and its 95 % interval (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    mean, n = statistics.mean(values), len(values)
    half = (T_QUANTILE[n - 2] if n <= 10 else 1.96 + 2.6 / (n - 1)) * statistics.stdev(values) / n**0.5
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
    heads = {
        "final_return_mean": "final",
        "selected_return_mean": "selected",
        "dataset_return_mean": "dataset",
        "overestimation": "learned - achieved",
        "q_max": "q_max",
        "td_error": "td_error",
    }
    lines = [["environment", "run", "seeds", *heads.values(), "verdicts"]]
    for (env, name), group in grouped(rows, "env_id", "exp_name").items():
        cells = []
        for key in heads:
            values = [r[key] for r in group if r[key] is not None]
            cells.append((interval if key == "overestimation" else spread)(values))
        verdicts = ", ".join(sorted({str(r["verdict"]) for r in group if r["verdict"]}))
        lines.append([env, name, len(group), *cells, verdicts])
    return markdown(lines)


def sweep(rows: list[dict]) -> str:
    """Which --cql-alpha to take: the TD error and the conservative term should both be small.

    Of the values whose TD error is small, at most a tenth of the target's variance and twice the least of
    the sweep, the one with the least gap. (Not the best by both ranks: the two move against each other, and
    that names the middle of any grid.) If no TD error is below a tenth, a larger model is due.
    """
    lines, found = [["cql_alpha", "seeds", "td_error", "cql_gap", "q - return", "final return"]], []
    for (alpha,), group in sorted(grouped(rows, "cql_alpha").items()):
        means = [statistics.mean(r[k] for r in group) for k in ("td_error", "cql_gap")]
        found.append((alpha, *means))
        known = [r["q_minus_return"] for r in group if r["q_minus_return"] is not None]
        returns = [r["final_return_mean"] for r in group if r["final_return_mean"] is not None]
        cells = [spread([r[k] for r in group]) for k in ("td_error", "cql_gap")]
        lines.append([f"{alpha:g}", len(group), *cells, spread(known), spread(returns)])
    least = min(td for _, td, _ in found)
    if least > 0.1:
        advice = "no alpha brings the TD error below a tenth of the target's variance: try a larger model"
    else:
        fitted = [row for row in found if row[1] <= min(0.1, 2 * least)]
        alpha, td, gap = min(fitted, key=lambda row: row[2])
        advice = f"take --cql-alpha {alpha:g}: TD error {td:.3g} of the target's variance, gap {gap:.3g}"
        if alpha == found[-1][0]:
            advice += "; it is the largest of the sweep, try still larger ones"
    return f"{markdown(lines)}\n\n{advice}"


def draw(runs: list[tuple[dict, dict]], path: str):
    """A panel for each of PANELS, a line for each group: mean and range of its runs, read off between their
    own steps where those differ."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    groups = list(dict.fromkeys((row["env_id"], row["exp_name"]) for row, _ in runs))
    several = len({env for env, _ in groups}) > 1
    for axis, (tag, title) in zip(axes.flat, PANELS.items()):
        for (env, name), (colour, line) in zip(groups, STYLES * 9):
            group = [c[tag] for row, c in runs if (row["env_id"], row["exp_name"]) == (env, name)]
            mine = [np.array(points).T for points in group if points]
            if not mine:
                continue
            first, last = max(x[0] for x, _ in mine), min(x[-1] for x, _ in mine)
            steps = mine[0][0][(mine[0][0] >= first) & (mine[0][0] <= last)]
            values = np.array([np.interp(steps, x, y) for x, y in mine])
            label = f"{env} {name}" if several else name
            axis.plot(steps, values.mean(0), line, color=colour, label=label)
            axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15)
        axis.set_title(title, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("updates (offline) or environment steps")
    if len(groups) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write_rows(rows: list[dict], path):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_curves(runs: list[tuple[dict, dict]], path: str):
    """env_id, exp_name, seed, step, tag, value: a row for each point of CURVES. A run of dr3_analysis.py
    holds many networks: all that was measured, exp_name is `target cure`, seed the network's."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["env_id", "exp_name", "seed", "step", "tag", "value"])
        for row, curves in runs:
            one = {tag: (row["exp_name"], row["seed"], tag) for tag in CURVES}
            if row["script"] == "dr3_analysis":  # diagnostics/target/cure/seed/metric
                parts = {tag: tag.split("/") for tag in curves if tag.startswith("diagnostics/")}
                one = {tag: (f"{p[1]} {p[2]}", p[3], f"{p[0]}/{p[4]}") for tag, p in parts.items()}
            for tag, (name, seed, short) in one.items():
                for step, value in curves[tag]:
                    writer.writerow([row["env_id"], name, seed, step, short, f"{value:.6g}"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv")
    parser.add_argument("--figure")
    parser.add_argument("--curves", help="a CSV of the curves that figures.py draws")
    parser.add_argument("--at", type=int, help="cut every curve at this update or step")
    parser.add_argument("--sweep", action="store_true", help="compare values of --cql-alpha")
    args = parser.parse_args()
    runs = [read_run(folder, args.at) for folder in args.runs if (folder / "metrics.csv").exists()]
    same = ("env_id", "exp_name", "cql_alpha") if args.sweep else ("env_id", "exp_name")
    for (env, name, *_), group in grouped([row for row, _ in runs], *same).items():
        seeds = [r["seed"] for r in group]
        if len({*seeds}) < len(seeds):
            parser.error(f"several runs are {env} {name} with one seed ({sorted(seeds)}): choose among them")
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        write_rows([row for row, _ in runs], args.csv)
    if args.curves:
        write_curves(runs, args.curves)
    if args.figure:
        draw(runs, args.figure)
    if not runs:
        parser.error("none of these folders holds a metrics.csv")
    print((sweep if args.sweep else table)([row for row, _ in runs]))


if __name__ == "__main__":
    main()
