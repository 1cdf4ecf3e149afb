"""Tables of finished runs of safety_critics.py: benchmarks/raw/safety.csv, one row a run, and
safety_curves.csv, at most forty points a curve.

  python benchmarks/runs/safety_table.py runs/*__safety_*

`over_limit` is the share of logged rollouts whose V_C is above --accident-limit, `over_limit_late`
of those in the second half. Prints a markdown table: means over seeds, in brackets each seed.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

RAW = Path(__file__).resolve().parent.parent / "raw"
COLUMNS = """env_id exp_name seed global_step accidents episodes
rate_early rate_late predicted realised refused fallbacks v_c over_limit over_limit_late multiplier
risk_above_95 final_return_mean final_return_std verdict wall_seconds device""".split()
TAGS = "charts/accidents eval/episodic_return diagnostics/predicted diagnostics/realised".split()
TAGS += "diagnostics/refused diagnostics/fallbacks diagnostics/v_c".split()


def main():
    rows, points = [], []
    for folder in map(Path, sys.argv[1:]):
        if not (folder / "summary.json").exists():
            continue
        args = json.loads((folder / "args.json").read_text())["args"]
        row = args | json.loads((folder / "summary.json").read_text())
        curves = defaultdict(list)
        with open(folder / "metrics.csv") as f:
            for r in csv.DictReader(f):
                curves[r["tag"]].append((r["step"], r["value"]))
        v_c = [float(value) for _, value in curves["diagnostics/v_c"]]
        for key, some in (("over_limit", v_c), ("over_limit_late", v_c[len(v_c) // 2 :])):
            row[key] = round(statistics.mean(x > args["accident_limit"] for x in some), 3)
        rows.append({key: row.get(key) for key in COLUMNS})
        for tag in TAGS:
            kept = curves[tag][-1 :: -max(1, len(curves[tag]) // 40)][::-1]
            points += [[args["env_id"], args["exp_name"], args["seed"], tag, *x] for x in kept]
    rows.sort(key=lambda r: [r[key] for key in COLUMNS[:3]])
    with open(RAW / "safety.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with open(RAW / "safety_curves.csv", "w", newline="") as f:
        names = ["env_id", "exp_name", "seed", "tag", "step", "value"]
        csv.writer(f, lineterminator="\n").writerows([names, *sorted(points, key=lambda x: x[:4])])
    groups = defaultdict(list)
    for r in rows:
        groups[r["env_id"], r["exp_name"]].append(r)
    columns = (
        "accidents over_limit over_limit_late rate_early rate_late final_return_mean predicted "
        "realised refused fallbacks"
    )
    print("| environment | run | " + " | ".join(columns.split()) + " |")
    for (env, name), found in groups.items():
        cells = []
        for key in columns.split():
            values = [float(r[key]) for r in found if r[key] is not None]
            seeds = ", ".join(f"{v:.3g}" for v in values)
            cells.append(f"{statistics.mean(values):.3g} ({seeds})" if values else "")
        print(f"| {env} | {name.removeprefix('safety_')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
