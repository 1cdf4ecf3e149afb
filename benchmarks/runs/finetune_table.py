"""Return by online step of the runs of finetune_pendulum.sh, as a CSV of all seeds and a figure.

  python benchmarks/runs/finetune_table.py runs/* --csv benchmarks/raw/finetune_pendulum.csv \\
      --figure benchmarks/figures/finetune.png
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--figure", required=True)
    options = parser.parse_args()
    rows = []
    for folder in options.runs:
        args = json.loads((folder / "args.json").read_text())["args"]
        with open(folder / "metrics.csv") as f:
            points = {
                int(r["step"]): float(r["value"])
                for r in csv.DictReader(f)
                if r["tag"] == "eval/episodic_return"
            }
        for step, value in sorted(points.items()):
            rows.append([args["exp_name"], args["seed"], step - args["num_updates"], value])
    with open(options.csv, "w", newline="") as f:
        csv.writer(f).writerows(
            [["exp_name", "seed", "online_steps", "return_mean"], *sorted(rows)]
        )

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5))
    styles = {"offline_then_online": ("#0072B2", "-"), "online_only": ("#D55E00", "--")}
    for name, (colour, line) in styles.items():
        curve = defaultdict(list)
        for exp, _, step, value in rows:
            if exp == name:
                curve[round(step, -2)].append(
                    value
                )  # online_only has one update before its first step
        steps = sorted(curve)
        axis.plot(steps, [statistics.mean(curve[s]) for s in steps], line, color=colour, label=name)
        axis.fill_between(
            steps, *([f(curve[s]) for s in steps] for f in (min, max)), color=colour, alpha=0.15
        )
        print(name, {s: round(statistics.mean(curve[s]), 1) for s in steps})
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="online steps (left of 0: offline updates)", ylabel="return")
    axis.legend()
    figure.tight_layout()
    figure.savefig(options.figure, dpi=110)


if __name__ == "__main__":
    main()
