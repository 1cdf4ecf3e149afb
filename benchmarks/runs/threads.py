"""Updates per second by --threads and by the number of busy processes beside, for every script.

  python benchmarks/runs/threads.py                      # all, twenty minutes on a quiet machine
  python benchmarks/runs/threads.py sac --busy 0 1 4 --threads 1 2 4

`serious` are the sizes of profile_scripts.py (HalfCheetah; CQL 3 x 256, N = 10), `bare` those
of the bare command. The steady loop alone is timed, each time in a process of its own, since OpenMP
keeps its threads. In benchmarks/raw/threads.csv what is measured again is replaced.
"""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from profile_scripts import RUNS, between  # noqa: E402

BUSY = [sys.executable, "-c", "while True: pass"]
KEY = ("script", "size", "cores", "busy", "threads")
SHORT = {"collect_steps": 1_100, "learning_starts": 300, "bc_steps": 0, "behaviour_steps": 1}
BARE = {  # script: the first and the last call of Learner.update
    "cql_continuous": (20, 220), "policy_constraints": (50, 450), "cql_atari": (20, 120),
    "dr3_analysis": (50, 150), "sac": (100, 500), "td3": (100, 500), "ppo": (3, 23),
    "kfac_npg": (2, 5), "qt_opt": (50, 450), "safety_critics": (2, 5),
}  # fmt: skip


def updates_per_second(script: str, size: str, threads: int) -> float:
    settings, first, last = RUNS[script] if size == "serious" else (SHORT, *BARE[script])
    return (last - first) / between(script, run=(settings | {"threads": threads}, first, last))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("scripts", nargs="*", default=list(RUNS))
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--here", nargs=2, metavar=("SIZE", "THREADS"), help="in this process")
    options = parser.parse_args()
    if options.here:
        print(updates_per_second(options.scripts[0], options.here[0], int(options.here[1])))
        return
    path, rows = HERE / "raw" / "threads.csv", {}
    if path.exists():
        with open(path) as f:
            rows = {tuple(row[name] for name in KEY): row for row in csv.DictReader(f)}
    for busy in options.busy:
        others = [subprocess.Popen(BUSY) for _ in range(busy)]
        for script in options.scripts:
            for size in ("bare", "serious"):
                for threads in options.threads:
                    words = [script, "--here", size, str(threads)]
                    line = [sys.executable, __file__, *words]
                    with TemporaryDirectory() as folder:
                        done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True)
                    rate = round(float(done.stdout.split()[-1]), 2)
                    row = {"script": script, "size": size, "cores": os.cpu_count(), "busy": busy}
                    row |= {"threads": threads, "updates_per_second": rate}
                    rows[tuple(str(row[name]) for name in KEY)] = row
                    print(row, flush=True)
        for other in others:
            other.kill()
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, row)
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
