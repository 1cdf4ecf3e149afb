"""What each script costs: rate, share of the matmul limit, peak memory, its largest costs.

  python benchmarks/profile_scripts.py    # all; their rows of benchmarks/raw/profile.csv
  python benchmarks/profile_scripts.py sac td3 --top 5

Each script trains three times for a short while, in a process of its own: plainly, for the rate
and the peak memory (resident, PyTorch's own 300 MiB or so included); with its floating-point
operations counted, those of matrix products and convolutions; and under torch's profiler. The
share of the limit is the plain run's operations a second over those of a product of 2,048 x 2,048
matrices just before it. Shares of costs are of the processor time of operators; `outside` is the
share of the profiled wall time that no operator accounts for: Python, the environments, files.
The profiler itself slows Python by a third or so.
"""

import argparse
import csv
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
QUIET = {"checkpoint_frequency": 0, "cuda": False, "threads": 1}
OFFLINE = QUIET | {"eval_episodes": 0, "diagnostics_frequency": 0}
ONLINE = QUIET | {"eval_episodes": 0, "eval_frequency": 0, "env_id": "HalfCheetah-v5"}
STEPS = ONLINE | {"total_timesteps": 1_000, "learning_starts": 1}
ROLLOUT = ONLINE | {"num_envs": 1, "num_steps": 2_048}
RUNS = {  # the settings of speed.py, and kfac_npg.py's and dr3_analysis.py's own
    "cql_continuous": OFFLINE
    | {"depth": 3, "cql_samples": 10, "num_updates": 60, "bc_steps": 0, "collect_steps": 1_100},
    "cql_atari": OFFLINE | {"num_updates": 60, "collect_steps": 2_000},
    "dr3_analysis": QUIET | {"num_updates": 120, "diagnostics_frequency": 0},
    "sac": STEPS,
    "td3": STEPS,
    "ppo": ROLLOUT | {"total_timesteps": 2_048, "num_minibatches": 32, "update_epochs": 10},
    "kfac_npg": ROLLOUT | {"total_timesteps": 4_096},
}


def product_limit(n: int = 2048, repeats: int = 10) -> float:
    """Floating-point operations per second of a product of two n x n matrices in fp32."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    a @ b
    begin = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return 2 * n**3 * repeats / (time.perf_counter() - begin)


def measure(script: str, top: int) -> dict:
    """One row of the table; called in a process of its own."""
    module, settings = importlib.import_module(script), RUNS[script]
    counted = "num_updates" if "num_updates" in settings else "total_timesteps"

    def train(**changes) -> dict:
        return module.train(module.Args(**settings | changes))

    if "collect_steps" in settings:
        train(num_updates=1)  # makes the data
    limit = product_limit()
    begin = time.perf_counter()
    summary = train(seed=1)
    rate = next(v for k, v in summary.items() if k.endswith("_per_second"))
    row = {
        "script": script,
        "unit": counted,
        "per_second": rate,
        "seconds": time.perf_counter() - begin,
    }
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with FlopCounterMode(display=False) as flops:
        done = train(seed=1, run_dir="counted").get(
            "global_step", settings[counted]
        )  # rollouts end later
    row["mflop_each"] = flops.get_total_flops() / done / 1e6
    row["limit_gflops"] = limit / 1e9
    row["share_of_limit"] = rate * row["mflop_each"] * 1e6 / limit
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        train(seed=1, run_dir="profiled")
    wall = time.perf_counter() - begin
    found = [(e.key, e.self_cpu_time_total / 1e6) for e in seen.key_averages()]
    found = sorted((x for x in found if not x[0].startswith("Optimizer.")), key=lambda x: -x[1])
    total = sum(t for _, t in found)
    row["costs"] = ", ".join(
        f"{name.removeprefix('aten::')} {t / total:.0%}" for name, t in found[:top]
    )
    return row | {"outside": max(0.0, 1 - total / wall)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", default=list(RUNS))
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument(
        "--here", action="store_true", help="measure the one script in this process"
    )
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.scripts[0], options.top)))
        return
    path, rows = HERE / "raw" / "profile.csv", {}
    if path.exists():  # scripts that are not measured anew
        with open(path) as f:
            rows = {r["script"]: r for r in csv.DictReader(f)}
    for script in options.scripts:
        with tempfile.TemporaryDirectory() as folder:  # datasets and runs are made there
            line = [sys.executable, str(HERE / "profile_scripts.py"), script, "--here"]
            line += ["--top", str(options.top)]
            done = subprocess.run(
                line, cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ
            )
        done.check_returncode()
        found = json.loads(done.stdout.splitlines()[-1])
        rows[script] = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print(rows[script], flush=True)
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[script])
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
