"""Reads finished runs: a CSV with one row a run, a table of means over seeds, and a figure of their curves.

  python benchmarks/report.py runs/* --csv benchmarks/raw/offline.csv --figure offline.png

Runs with the same environment and experiment name (--exp-name) are one group; a curve is its mean, the band
runs from its lowest to its highest seed.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

COLUMNS = """script env_id exp_name seed num_updates batch_size dataset_return_mean bc_return_mean
final_return_mean final_return_std selected_return_mean selected_step collector_return_mean normalized_score
overestimation q_max q_bound td_error td_error_holdout cql_gap srank feature_dot verdict
updates_per_second global_step updates steps_per_second v_s0 kl wall_seconds dataset_sha256 device""".split()
PANELS = {
    "eval/episodic_return": "return",
    "diagnostics/q_data": "Q of the data",
    "diagnostics/overestimation": "predicted - achieved return",
    "diagnostics/td_error": "TD error / variance of target",
    "diagnostics/srank": "srank of the features",
    "diagnostics/feature_dot": "feature dot product",
}
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#000000", "-"),
    ("#E69F00", "--"),
]


def read_run(folder: Path) -> tuple[dict, dict]:
    """One run as (row of COLUMNS, tag -> list of (step, value))."""
    curves = defaultdict(list)
    with open(folder / "metrics.csv") as f:
        for r in csv.DictReader(f):
            curves[r["tag"]].append((int(r["step"]), float(r["value"])))
    header = json.loads((folder / "args.json").read_text())
    row = header["args"] | {"script": header["script"]}
    summary = folder / "summary.json"
    row |= json.loads(summary.read_text()) if summary.exists() else {}
    row |= {
        k.removeprefix("diagnostics/"): v[-1][1] for k, v in curves.items() if k.startswith("diagnostics/")
    }
    return {k: row.get(k) for k in COLUMNS}, curves


def table(rows: list[dict]) -> str:
    """Mean +- standard deviation over seeds of the final and the selected return, and what Q said of it."""
    groups = defaultdict(list)
    for r in rows:
        groups[r["env_id"], r["exp_name"]].append(r)

    def cell(values) -> str:
        values = [v for v in values if v is not None]
        if not values:
            return ""
        spread = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4g}{spread}"

    keys = ("final_return_mean", "selected_return_mean", "overestimation", "q_max", "td_error")
    lines = [["environment", "run", "seeds", *keys, "verdicts"]]
    for (env, name), group in groups.items():
        verdicts = ", ".join(sorted({str(r["verdict"]) for r in group}))
        lines.append([env, name, len(group), *(cell(r[k] for r in group) for k in keys), verdicts])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def draw(runs: list[tuple[dict, dict]], path: str):
    """A panel for each of PANELS, a line for each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    names = list(dict.fromkeys(row["exp_name"] for row, _ in runs))
    for axis, (tag, title) in zip(axes.flat, PANELS.items()):
        for name, (colour, line) in zip(names, STYLES * 9):
            by_step = defaultdict(list)
            for row, curves in runs:
                if row["exp_name"] == name:
                    for step, value in curves[tag]:
                        by_step[step].append(value)
            steps = sorted(by_step)
            axis.plot(steps, [statistics.mean(by_step[s]) for s in steps], line, color=colour, label=name)
            low, high = ([f(by_step[s]) for s in steps] for f in (min, max))
            axis.fill_between(steps, low, high, color=colour, alpha=0.15)
        axis.set_title(title, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("updates (offline) or environment steps")
    if len(names) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv")
    parser.add_argument("--figure")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs if (folder / "metrics.csv").exists()]
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row, _ in runs)
    if args.figure:
        draw(runs, args.figure)
    print(table([row for row, _ in runs]))


if __name__ == "__main__":
    main()
