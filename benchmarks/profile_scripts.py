"""Where each script's time goes in its steady loop: rate, share of matrix products, other costs.

  python benchmarks/profile_scripts.py    # all; their rows of benchmarks/raw/profile.csv
  python benchmarks/profile_scripts.py sac td3 --top 5

Each script trains three times for a short while, in a process of its own, on one thread: plainly,
for the rate and the peak memory (resident, PyTorch's own 300 MiB or so included); with its
floating-point operations counted; and under torch's profiler. All three look only at what lies
between two calls of Learner.update, so that set-up and files are out, environments and sampling
in. An update of ppo.py and kfac_npg.py is a rollout of 2,048 steps and what is learned from it.

`limit_share` is the operations a second over those of a product of 2,048 x 2,048 matrices just
before. `products` is the share of the plain run's time that its own matrix products and
convolutions take at their real sizes: better code can win the rest at most. `costs` are the largest
operators. `outside` is the share of the profiled time that no operator accounts for: Python and
the environments. The profiler itself slows Python by a third or so.
"""

import argparse
import csv
import importlib
import json
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
QUIET = {"checkpoint_frequency": 0, "cuda": False, "threads": 1, "eval_episodes": 0}
QUIET |= {"eval_frequency": 0, "diagnostics_frequency": 0, "log_frequency": 1_000}
CHEETAH = {"env_id": "HalfCheetah-v5"}
OFFLINE = {"collect_steps": 1_100, "num_updates": 400}
CQL = OFFLINE | CHEETAH | {"width": 256, "depth": 3, "cql_samples": 10, "bc_steps": 0}
STEPS = CHEETAH | {"total_timesteps": 1_000, "learning_starts": 300}
ROLLOUT = CHEETAH | {"num_envs": 1, "num_steps": 2_048, "total_timesteps": 12 * 2_048}
# script: settings (those of speed.py), the first and the last call of Learner.update
RUNS = {
    "cql_continuous": (CQL, 20, 60),
    "policy_constraints": (OFFLINE | CHEETAH | {"behaviour_steps": 1}, 50, 250),
    "qt_opt": (OFFLINE | CHEETAH | {"cem_iterations": 5, "width": 256}, 50, 150),
    "cql_atari": (OFFLINE | {"collect_steps": 5_000, "width": 32, "n_step": 1}, 20, 120),
    "dr3_analysis": ({"num_updates": 400}, 50, 250),
    "sac": (STEPS, 100, 500),
    "td3": (STEPS, 100, 500),
    "ppo": (ROLLOUT | {"num_minibatches": 32, "update_epochs": 10}, 2, 6),
    "kfac_npg": (ROLLOUT, 3, 10),
    "safety_critics": (ROLLOUT, 3, 10),
}
PRODUCTS = """mm addmm bmm baddbmm mkldnn_convolution convolution_backward thnn_conv2d
_slow_conv2d_forward""".split()


def product_limit(n: int = 2048, repeats: int = 10) -> float:
    """Floating-point operations per second of a product of two n x n matrices in fp32."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    a @ b
    begin = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return 2 * n**3 * repeats / (time.perf_counter() - begin)


def between(script: str, watch=None, stop=None, run: tuple = ()) -> float:
    """Trains; watch() at the first call of Learner.update, stop() at the last; seconds of both."""
    module, (settings, first, last) = importlib.import_module(script), run or RUNS[script]
    known = {k: v for k, v in (QUIET | settings).items() if hasattr(module.Args, k)}
    if "collect_steps" in known:  # the collector's updates are not of interest
        module.train(module.Args(**known | {"num_updates": 1}))
    method, calls, clock = module.Learner.update, [0], []

    def counted(*words, **named):
        calls[0] += 1
        if calls[0] == first:
            if watch:
                watch()
            clock.append(time.perf_counter())
        if calls[0] == last:
            clock.append(time.perf_counter())
            if stop:
                stop()
            raise KeyboardInterrupt  # what follows is not of interest
        return method(*words, **named)

    module.Learner.update = counted
    try:
        module.train(module.Args(**known))
    except KeyboardInterrupt:
        pass
    finally:
        module.Learner.update = method
    return clock[1] - clock[0]


def measure(script: str, top: int) -> dict:
    """One row of the table; called in a process of its own."""
    torch.set_num_threads(1)
    n = RUNS[script][2] - RUNS[script][1]
    limit = product_limit()
    plain = between(script)
    row = {"script": script, "updates_per_second": n / plain, "ms": 1e3 * plain / n}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    flops = FlopCounterMode(display=False)
    between(script, flops.__enter__, lambda: flops.__exit__(None, None, None))
    row["mflop"] = flops.get_total_flops() / n / 1e6
    row["limit_gflops"] = limit / 1e9
    row["limit_share"] = flops.get_total_flops() / plain / limit
    seen = profile(activities=[ProfilerActivity.CPU])
    profiled = between(script, seen.start, seen.stop)
    found = {e.key.removeprefix("aten::"): e.self_cpu_time_total / 1e6 for e in seen.key_averages()}
    found = {k: t for k, t in found.items() if not k.startswith(("Optimizer.", "autograd::"))}
    row["products"] = sum(found.get(key, 0) for key in PRODUCTS) / plain
    total, largest = sum(found.values()), sorted(found, key=found.get, reverse=True)[:top]
    row["costs"] = ", ".join(f"{key} {found[key] / total:.0%}" for key in largest)
    return row | {"outside": max(0.0, 1 - total / profiled)}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("scripts", nargs="*", default=list(RUNS))
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="the one script, in this process")
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
            done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows[script] = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print(rows[script], flush=True)
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[script])
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
