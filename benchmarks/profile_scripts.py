"""Where each script's time goes: a short training under torch's profiler, its largest costs.

  python benchmarks/profile_scripts.py                 # all; writes benchmarks/raw/profile.csv
  python benchmarks/profile_scripts.py sac td3 --top 5

Shares are of the processor time of operators, on one thread; `outside` is the share of the wall time that no
operator accounts for: Python, the environments, files. The profiler itself slows Python by a third or so.
"""

import argparse
import csv
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
QUIET = dict(eval_episodes=0, checkpoint_frequency=0, cuda=False)
ONLINE = QUIET | dict(env_id="HalfCheetah-v5", diagnostics_frequency=0)
RUNS = {  # the settings of speed.py, and kfac_npg.py's and dr3_analysis.py's own
    "cql_continuous": QUIET
    | dict(critic_depth=3, policy_depth=3, cql_samples=10, num_updates=60, bc_steps=0, collect_steps=1_100),
    "cql_atari": QUIET | dict(num_updates=60, collect_steps=2_000, diagnostics_frequency=0),
    "dr3_analysis": dict(cuda=False, num_updates=60, checkpoint_frequency=0, diagnostics_frequency=0),
    "sac": ONLINE | dict(total_timesteps=800, learning_starts=300),
    "td3": ONLINE | dict(total_timesteps=800, learning_starts=300),
    "ppo": ONLINE
    | dict(total_timesteps=6_144, num_envs=1, num_steps=2_048, num_minibatches=32, update_epochs=10),
    "kfac_npg": ONLINE | dict(total_timesteps=6_144, num_envs=1, num_steps=2_048),
}


def operators(script: str) -> list[tuple[str, float]]:
    """(operator, seconds of its own), the largest first, and what of the wall time is none of theirs."""
    module = importlib.import_module(script)
    args = module.Args(**RUNS[script] | {"diagnostics_frequency": 0})
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        module.train(args)
    wall = time.perf_counter() - begin
    found = [(e.key, e.self_cpu_time_total / 1e6) for e in seen.key_averages()]
    found = sorted((x for x in found if not x[0].startswith("Optimizer.")), key=lambda x: -x[1])
    return [*found, ("outside", max(0.0, wall - sum(t for _, t in found)))]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", default=list(RUNS))
    parser.add_argument("--top", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, home, folder = [], os.getcwd(), tempfile.mkdtemp()
    os.chdir(folder)  # datasets and runs are made there
    for script in options.scripts:
        *found, outside = operators(script)
        total = sum(t for _, t in found)
        costs = [(name, t / total) for name, t in found[: options.top]]
        share = outside[1] / (outside[1] + total)
        words = ", ".join(f"{name} {x:.0%}" for name, x in costs)
        print(f"\n{script}: {words} of the operators' time; outside of them {share:.0%} of the wall time")
        rows += [[script, name, f"{x:.4f}"] for name, x in [*costs, ("outside", share)]]
    os.chdir(home)
    shutil.rmtree(folder)
    with open(HERE / "raw" / "profile.csv", "w", newline="") as f:
        csv.writer(f).writerows([["script", "cost", "share"], *rows])


if __name__ == "__main__":
    main()
