"""Is the verdict right? Short trainings with a known sickness, on a toy: a point on a line.

  python benchmarks/runs/verdicts.py > benchmarks/raw/verdicts.csv    # eight minutes on one thread

Each sickness with four kinds of rewards, with and without terminals. What is expected was written
down before the runs; `right` says whether the verdict was that.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import test_cql_continuous_runs as toy  # noqa: E402

REWARDS = {  # of the next position
    "negative": lambda x: -abs(x),
    "positive": lambda x: 2 - abs(x),
    "both signs": lambda x: 1 - 2 * abs(x),
    "sparse": lambda x: float(abs(x) < 0.1),
}
GOOD, SHORT = "no sign of trouble", "too short to judge"
CASES = {  # what is expected, flags, data
    "healthy": (GOOD, "--num-updates 1500 --width 64", {}),
    "healthy, gamma 0.95": (GOOD, "--num-updates 2500 --width 64 --gamma 0.95", {}),
    "a slow target, gamma 0.99": (SHORT, "--num-updates 600 --gamma 0.99 --tau 0.005", {}),
    "stopped on the way": (SHORT, "--num-updates 300 --gamma 0.95", {}),
    "alpha 100": ("alpha too large", "--num-updates 1500 --cql-alpha 100", {}),
    "two episodes": (
        "overfitting",
        "--num-updates 1500 --width 128 --holdout 0.5",
        {"episodes": 4},
    ),
    "one unit": ("underfitting", "--num-updates 1500 --width 1 --depth 1", {}),
    "sarsa": ("sarsa passes", "--num-updates 1500 --width 64 --backup sarsa --cql-alpha 0", {}),
    "sarsa, one unit": (
        "sarsa fails",
        "--num-updates 1500 --width 1 --depth 1 --backup sarsa --cql-alpha 0",
        {},
    ),
}


def main():
    os.chdir(tempfile.mkdtemp())
    print("case,rewards,terminals,expected,verdict,right,return")
    for case, (expected, words, data) in CASES.items():
        for kind, reward in REWARDS.items():
            for ends in (False, True):
                file = toy.point_data("point.hdf5", reward=reward, ends=ends, **data)
                with contextlib.redirect_stdout(io.StringIO()):
                    out = toy.run(f"{words} --batch-size 64 --eval-episodes 5", file)
                row = [f'"{case}"', kind, int(ends), expected, out["verdict"]]
                row += [int(out["verdict"] == expected), round(out["final_return_mean"], 2)]
                print(*row, sep=",", flush=True)


if __name__ == "__main__":
    main()
