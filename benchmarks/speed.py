"""Rates of the scripts, their peers and the matmul limit, alternating in one run.

  python benchmarks/speed.py cql --peer-python peer/bin/python     # that environment: see peer_d3rlpy.py
  python benchmarks/speed.py online --peer-python sb3/bin/python   # see peer_sb3.py
  python benchmarks/speed.py ppo --peer-python sb3/bin/python \\
      --cleanrl cleanrl/bin/python cleanrl/repo/cleanrl/ppo_continuous_action.py  # see
      peer_cleanrl.py
  python benchmarks/speed.py atari --peer-python peer/bin/python

cql: updates per second at HalfCheetah's shapes (17 observations, 6 actions), batch 256, three
hidden layers of 256, three sets of 10 sampled actions, random data. The limit: the time of the
matrix products that an update cannot do without, at its shapes: forward, weight gradient, input
gradient. online: steps per second of the whole loop of sac.py and td3.py on HalfCheetah-v5,
environment included, one environment, one update a step, two hidden layers of 256, batch 256; the
peer is Stable-Baselines3. ppo: the same of ppo.py, 2,048 steps a rollout, 32 minibatches, 10
epochs, two hidden layers of 64; beside CleanRL's also with observations and rewards normalised,
as there. atari: updates per second of cql_atari.py and of d3rlpy's DiscreteCQL, the Nature
network without padding, 200 quantiles, batch 32, double Q, 1 step, random frames of 6 actions.
One row a round is added to benchmarks/raw/speed_{cql,online,ppo,atari}.csv; `device` tells
machines apart.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cql_atari as atari  # noqa: E402
import cql_continuous as cql  # noqa: E402
import ppo  # noqa: E402
import sac  # noqa: E402
import td3  # noqa: E402

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


def pixels(updates: int, device) -> float:
    """Updates of cql_atari.py on random frames, sampling and stacking included."""
    args = atari.Args(width=32, n_step=1, head="qr", batch_size=32)
    atari.check(args)
    atari.set_up(args)
    n, draw = 5_000, np.random.default_rng(0)
    columns = dict(act=draw.integers(6, size=n), rew=draw.normal(size=n).astype(np.float32))
    columns |= dict(terminal=np.zeros(n, bool), real=np.ones(n, bool), age=np.full(n, 3, np.uint8))
    columns["train"] = np.arange(3, n - 1)
    frames = draw.integers(256, size=(n, 84, 84), dtype=np.uint8)
    data = atari.Data(frames, columns, args, device)
    learner = atari.Learner((4, 84, 84), [6], args, device)
    update = atari.GraphedUpdate(lambda: learner.update([data.sample(32)]), device.type == "cuda")

    def run(count):
        begin = time.perf_counter()
        for _ in range(count):
            update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count / (time.perf_counter() - begin)

    run(6)
    return run(updates)


def whole_loop(script, start: int, steps: int, **settings) -> float:
    """Steps per second of train() itself, the first `start` steps left out."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict(eval_episodes=0, diagnostics_frequency=0, checkpoint_frequency=0, log_frequency=1000)
        common = dict(env_id="HalfCheetah-v5", run_dir=folder) | quiet | settings
        script.train(script.Args(total_timesteps=start, **common))
        (run,) = Path(folder).iterdir()
        args = script.Args(total_timesteps=start + steps, resume=str(run), **common)
        return script.train(args)["steps_per_second"]


def peer(python: str, *words) -> float:
    """The last word that a peer's script prints."""
    line = [python, str(HERE / words[0]), *map(str, words[1:])]
    return float(subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cql", "online", "ppo", "atari"])
    parser.add_argument("--peer-python", help="python of the peer's environment")
    names = ("PYTHON", "FILE")
    parser.add_argument("--cleanrl", nargs=2, metavar=names, help="ppo: as peer_cleanrl.py says")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--updates", type=int, help="updates or steps a round (default 40, online 2,000, ppo 20,480)"
    )
    parser.add_argument("--bf16", action="store_true", help="cql: bf16 too (slow without AMX, AVX512-BF16)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else name
    n, rows = args.updates or {"online": 2_000, "ppo": 20_480}.get(args.what, 40), []
    for _ in range(args.rounds):
        row = {"device": name}
        if args.what == "cql":
            row["ours_fp32"] = ours("fp32", n, device)
            if args.bf16:
                row["ours_bf16"] = ours("bf16", n, device)
            if device.type == "cpu":
                row["limit_fp32"] = matmul_limit(torch.float32)
            if args.peer_python:
                row["d3rlpy"] = peer(args.peer_python, "peer_d3rlpy.py", "speed", "--updates", n)
        elif args.what == "atari":
            row["ours"] = pixels(n, device)
            if args.peer_python:
                row["d3rlpy"] = peer(args.peer_python, "peer_d3rlpy.py", "speed-atari", "--updates", n)
        elif args.what == "ppo":
            sizes = dict(num_envs=1, num_steps=2048, num_minibatches=32, update_epochs=10)
            row["ppo"] = whole_loop(ppo, 2048, n, **sizes)
            if args.peer_python:
                row["sb3_ppo"] = peer(args.peer_python, "peer_sb3.py", "ppo", "speed", "--steps", n)
            if args.cleanrl:
                python, file = args.cleanrl
                both = dict(normalize_obs=True, normalize_reward=True)
                row["ppo_normalized"] = whole_loop(ppo, 2048, n, **sizes, **both)
                row["cleanrl_ppo"] = peer(python, "peer_cleanrl.py", file, "--steps", n)
        else:
            for script in (sac, td3):
                algo = script.__name__
                row[algo] = whole_loop(script, 500, n, learning_starts=300)
                if args.peer_python:
                    row[f"sb3_{algo}"] = peer(args.peer_python, "peer_sb3.py", algo, "speed", "--steps", n)
        rows.append(row)
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    path = HERE / "raw" / f"speed_{args.what}.csv"
    path.parent.mkdir(exist_ok=True)
    before = list(csv.DictReader(open(path))) if path.exists() else []
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, dict.fromkeys(k for r in before + rows for k in r))
        writer.writeheader()
        writer.writerows(before + rows)
    median = {k: statistics.median(r[k] for r in rows) for k in rows[0] if k != "device"}
    print("medians, per second: " + ", ".join(f"{k} {v:.2f}" for k, v in median.items()))


if __name__ == "__main__":
    main()
