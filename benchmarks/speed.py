"""Updates per second of cql_continuous.py, its peer d3rlpy and the matmul limit, alternating in one run.

  python benchmarks/speed.py --peer-python peer/bin/python    # that environment: see peer_d3rlpy.py

HalfCheetah's shapes (17 observations, 6 actions), batch 256, three hidden layers of 256, three sets of 10
sampled actions, random data. The limit is the time of the matrix products alone that an update cannot do
without, at its shapes: forward, weight gradient, input gradient. Writes one row a round
to benchmarks/raw/speed_cql.csv.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cql_continuous as cql  # noqa: E402

OBS, ACT, B, N, WIDTH, DEPTH = 17, 6, 256, 10, 256, 3


def matmul_limit(dtype, repeats: int = 10) -> float:
    """Updates per second if nothing but the matrix products took time."""
    rows_critic = 2 * (
        B + 3 * N * B
    )  # both critics: data and sampled rows, forward and weight and input gradients
    rows_extra = 2 * B  # the target's forward and the actor's pass through the critics, two products a layer
    sizes = [OBS + ACT] + [WIDTH] * DEPTH
    seconds = 0.0
    for rows, passes in ((rows_critic, 3), (rows_extra, 3)):
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            x, w, g = (torch.randn(s).to(dtype) for s in ((rows, fan_in), (fan_in, fan_out), (rows, fan_out)))
            for _ in range(2):
                begin = time.perf_counter()
                for _ in range(repeats):
                    x @ w
                    x.T @ g
                    if fan_in == WIDTH and passes == 3:  # the first layer's input needs no gradient
                        g @ w.T
                elapsed = time.perf_counter() - begin
            seconds += elapsed / repeats
    return 1 / seconds


def ours(precision: str, updates: int, device) -> float:
    """The script's own update on random data, sampling included."""
    args = cql.Args(critic_depth=DEPTH, policy_depth=DEPTH, cql_samples=N, precision=precision)
    cql.check(args)
    cql.set_up(args)
    data = cql.Data.__new__(cql.Data)
    n = 20_000
    data.obs, data.next_obs = torch.randn(n, OBS, device=device), torch.randn(n, OBS, device=device)
    data.act = torch.rand(n, ACT, device=device) * 1.8 - 0.9
    data.next_act, data.rew = data.act, torch.randn(n, device=device)
    data.done, data.train = torch.zeros(n, device=device), torch.arange(n, device=device)
    learner = cql.Learner(OBS, ACT, args, device)
    update = cql.GraphedUpdate(lambda: learner.update(lambda: data.sample(B), False), device.type == "cuda")

    def run(count):
        begin = time.perf_counter()
        for _ in range(count):
            update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count / (time.perf_counter() - begin)

    run(6)
    return run(updates)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="python of an environment with d3rlpy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument(
        "--bf16", action="store_true", help="time bf16 as well (slow without AMX or AVX512-BF16)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    rows = []
    for _ in range(args.rounds):
        row = {"device": name, "ours_fp32": ours("fp32", args.updates, device)}
        if args.bf16:
            row["ours_bf16"] = ours("bf16", args.updates, device)
        if device.type == "cpu":
            row["limit_fp32"] = matmul_limit(torch.float32)
        if args.peer_python:
            line = [args.peer_python, str(HERE / "peer_d3rlpy.py"), "speed", "--updates", str(args.updates)]
            out = subprocess.run(line, check=True, capture_output=True, text=True, env=os.environ).stdout
            row["d3rlpy"] = float(out.split()[-1])
        rows.append(row)
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    path = HERE / "raw" / "speed_cql.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    median = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k != "device"}
    for k, v in median.items():
        print(
            f"{k}: {v:.2f} updates/s, {median['ours_fp32'] / v:.2f} times slower than ours in fp32 (median)"
        )


if __name__ == "__main__":
    main()
