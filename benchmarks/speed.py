"""Rates of the scripts, their peers and the matmul limit, alternating in one run.

  python benchmarks/speed.py cql --peer-python peer/bin/python     # see peers/d3rlpy.py
  python benchmarks/speed.py constraints --peer-python peer/bin/python
  python benchmarks/speed.py atari --peer-python peer/bin/python
  python benchmarks/speed.py online --peer-python sb3/bin/python   # see peers/sb3.py
  python benchmarks/speed.py ppo --peer-python sb3/bin/python \\
      --cleanrl cleanrl/bin/python cleanrl/repo/cleanrl/ppo_continuous_action.py

Each rate is of the script's own train(), start-up left out: steps of the environment or updates per
second. cql: HalfCheetah's shapes, random data, batch 256, three layers of 256, N = 10; k is
--cql-backward, the limit the time of the matrix products that an update with k = 0 cannot do
without. constraints: AWAC and CRR, two layers. atari: the Nature network, 200 quantiles, batch 32,
double Q, 1 step, frames of random play. online: sac.py and td3.py on HalfCheetah-v5, two layers of
256, batch 256, an update a step. ppo: 2,048 steps a rollout, 32 minibatches, 10 epochs, two layers
of 64; beside CleanRL's also normalised, as there.

A row a round goes to benchmarks/raw/speed_{cql,constraints,atari,online,ppo}.csv; `device` tells
machines and threads apart. Ours and the peers have the same --threads.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cql_atari  # noqa: E402
import cql_continuous  # noqa: E402
import policy_constraints  # noqa: E402
import ppo  # noqa: E402
import sac  # noqa: E402
import td3  # noqa: E402

OBS, ACT, B, N, WIDTH, DEPTH = 17, 6, 256, 10, 256, 3
QUIET = {"eval_episodes": 0, "eval_frequency": 0, "checkpoint_frequency": 0, "log_frequency": 1000}


def matmul_limit(repeats: int = 10) -> float:
    """Updates per second if nothing but the matrix products took time."""
    # rows of both critics, data and sampled actions; the target's, the policy's pass through them
    groups = (2 * (B + 3 * N * B), 2 * B)
    sizes, seconds = [OBS + ACT] + [WIDTH] * DEPTH, 0.0
    for rows in groups:
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            x, w = torch.randn(rows, fan_in), torch.randn(fan_in, fan_out)
            g = torch.randn(rows, fan_out)
            for _ in range(2):  # the first time warms up
                begin = time.perf_counter()
                for _ in range(repeats):
                    x @ w
                    x.T @ g
                    if fan_in == WIDTH:  # the first layer's input needs no gradient
                        g @ w.T
                elapsed = time.perf_counter() - begin
            seconds += elapsed / repeats
    return 1 / seconds


def random_data(path: str, n: int = 20_000):
    """A D4RL-layout file of HalfCheetah's shapes."""
    rng = np.random.default_rng(0)
    end = np.arange(1, n + 1) % 1000 == 0
    columns = {
        "observations": rng.normal(size=(n, OBS)),
        "actions": rng.uniform(-0.9, 0.9, (n, ACT)),
    }
    columns |= {"next_observations": rng.normal(size=(n, OBS)), "rewards": rng.normal(size=n)}
    with h5py.File(path, "w") as f:
        f.update({name: x.astype(np.float32) for name, x in columns.items()})
        f.update({"terminals": end & False, "timeouts": end})


def rate(script, start: int, n: int, **settings) -> float:
    """Per second, of train() from step `start` on."""
    length = "num_updates" if hasattr(script.Args, "num_updates") else "total_timesteps"
    with tempfile.TemporaryDirectory() as folder:
        common = QUIET | {"run_dir": folder} | settings
        before = script.train(script.Args(**common | {length: start}))
        (run,) = Path(folder).iterdir()
        after = script.train(script.Args(**common | {length: start + n, "resume": str(run)}))
    (name,) = (key for key in after if key.endswith("_per_second"))
    return n / ((start + n) / after[name] - start / before[name])


def peer(options, file: str, *words) -> float:
    """The last word that a peer's script prints."""
    python = options.cleanrl[0] if file == "cleanrl.py" else options.peer_python
    line = [python, str(HERE / "peers" / file), *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=env)
    return float(done.stdout.split()[-1])


def one_round(options, folder: str) -> dict:
    n, row, threads = options.updates, {}, {"threads": options.threads}
    with_peer = options.peer_python is not None
    if options.what == "cql":
        settings = threads | {"env_id": "HalfCheetah-v5", "dataset": f"{folder}/random.hdf5"}
        settings |= {"width": WIDTH, "depth": DEPTH, "cql_samples": N, "bc_steps": 0}
        settings |= {"diagnostics_frequency": 0}
        for precision in ("fp32", "bf16") if options.bf16 else ("fp32",):
            for k in (0, 1):
                flags = {"precision": precision, "cql_backward": k}
                row[f"ours_{precision}_k{k}"] = rate(cql_continuous, 6, n, **settings, **flags)
        row["limit_fp32"] = matmul_limit()
        if with_peer:
            row["d3rlpy"] = peer(options, "d3rlpy.py", "speed", "--updates", n)
    elif options.what == "constraints":
        settings = threads | {"env_id": "HalfCheetah-v5", "dataset": f"{folder}/random.hdf5"}
        settings |= {"behaviour_steps": 1, "diagnostics_frequency": 0}
        own = {"awac": {"extract": "exp", "normalise_weights": True, "advantage_samples": 1}}
        own |= {"crr": {"extract": "binary"}}
        for algo, flags in own.items():
            row[algo] = rate(policy_constraints, 6, n, **settings, **flags)
            if with_peer:
                words = "speed --depth 2 --algo".split()
                row[f"d3rlpy_{algo}"] = peer(options, "d3rlpy.py", *words, algo, "--updates", n)
    elif options.what == "atari":
        settings = threads | {"width": 32, "n_step": 1, "collect_steps": 5_000}
        settings |= {"diagnostics_frequency": 0}
        row["ours"] = rate(cql_atari, 6, n, **settings)
        if with_peer:
            row["d3rlpy"] = peer(options, "d3rlpy.py", "speed-atari", "--updates", n)
    elif options.what == "ppo":
        settings = threads | {"env_id": "HalfCheetah-v5", "num_envs": 1, "num_steps": 2048}
        settings |= {"num_minibatches": 32, "update_epochs": 10}
        row["ppo"] = rate(ppo, 2048, n, **settings)
        if with_peer:
            row["sb3_ppo"] = peer(options, "sb3.py", "ppo", "speed", "--steps", n)
        if options.cleanrl:
            both = {"normalize_obs": True, "normalize_reward": True}
            row["ppo_normalized"] = rate(ppo, 2048, n, **settings, **both)
            row["cleanrl_ppo"] = peer(options, "cleanrl.py", options.cleanrl[1], "--steps", n)
    else:
        for script in (sac, td3):
            algo, settings = script.__name__, threads | {"env_id": "HalfCheetah-v5"}
            row[algo] = rate(script, 500, n, learning_starts=300, **settings)
            if with_peer:
                row[f"sb3_{algo}"] = peer(options, "sb3.py", algo, "speed", "--steps", n)
    return row


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["cql", "constraints", "online", "ppo", "atari"])
    parser.add_argument("--peer-python", help="python of the peer's environment")
    parser.add_argument("--cleanrl", nargs=2, metavar=("PYTHON", "FILE"), help="with ppo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--updates", type=int, help="updates or steps a round")
    parser.add_argument("--bf16", action="store_true", help="cql: bf16, too")
    options = parser.parse_args()
    usual = {"cql": 40, "constraints": 400, "atari": 40, "online": 2_000, "ppo": 20_480}
    options.updates = options.updates or usual[options.what]
    torch.set_num_threads(options.threads)
    device = f"cpu, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    path = HERE / "raw" / f"speed_{options.what}.csv"
    before = list(csv.DictReader(open(path))) if path.exists() else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_data(f"{folder}/random.hdf5")
        for _ in range(options.rounds):
            rows.append({"device": device} | one_round(options, folder))
            print(rows[-1], flush=True)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, dict.fromkeys(k for r in before + rows for k in r))
        writer.writeheader()
        writer.writerows(before + rows)
    median = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k != "device"}
    print("medians, per second: " + ", ".join(f"{k} {v:.2f}" for k, v in median.items()))


if __name__ == "__main__":
    main()
