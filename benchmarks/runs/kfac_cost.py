"""Seconds of one policy step of kfac_npg.py by each solver, as its two hidden layers grow from 32
to 1,024.

  python benchmarks/runs/kfac_cost.py && python benchmarks/figures.py kfac_cost

HalfCheetah's shapes (17 observations, 6 actions), 2,048 rows of made-up data, factors new at
every step. `exact` needs a matrix of all parameters squared and stops where that leaves the
memory (--most-exact).
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent))
import kfac_npg as k  # noqa: E402

OBS, ACT = gym.spaces.Box(-np.inf, np.inf, (17,)), gym.spaces.Box(-1, 1, (6,))
SOLVERS = {"none": {}, "kfac": {}, "cg": {"damping": 0.1}, "exact": {}}


def seconds(solver: str, width: int, repeats: int, device) -> list[float]:
    args = k.Args(solver=solver, width=width, **SOLVERS[solver])
    k.check(args)
    k.set_up(args)
    learner, obs = k.Learner(OBS, ACT, args, device), torch.randn(2048, 17, device=device)
    with torch.no_grad():
        head, value = learner.agent(obs)
        act = learner.agent.sample(head)
        logp = learner.agent.log_prob(head, act)
    batch = k.Batch(obs, act, logp, torch.randn_like(value), value)
    out = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        learner.policy_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        out.append(time.perf_counter() - begin)
    return out[1:]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--most-exact", type=int, default=64, help="largest width for the exact solver"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open(HERE / "raw" / "kfac_cost.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["solver", "width", "repeat", "seconds"])
        for solver in SOLVERS:
            for width in options.widths:
                if solver == "exact" and width > options.most_exact:
                    continue
                times = seconds(solver, width, options.repeats, device)
                writer.writerows([solver, width, i, f"{t:.6g}"] for i, t in enumerate(times))
                print(solver, width, f"{1000 * min(times):.2f} ms", flush=True)


if __name__ == "__main__":
    main()
