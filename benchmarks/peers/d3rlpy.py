"""d3rlpy's CQL, AWAC and CRR on the same file at the same sizes: the peers of cql_continuous.py
and policy_constraints.py, in an environment of their own.

  python -m venv peer && peer/bin/pip install torch==2.13.0 d3rlpy==2.8.1 "gymnasium[mujoco]" h5py
  peer/bin/python benchmarks/peers/d3rlpy.py train FILE.hdf5 Hopper-v5 --seed 1 --out row.csv
  peer/bin/python benchmarks/peers/d3rlpy.py speed --updates 60
  peer/bin/python benchmarks/peers/d3rlpy.py speed --algo awac --depth 2 --updates 400
  peer/bin/python benchmarks/peers/d3rlpy.py speed-atari --updates 40

`train` appends a line an evaluation to a CSV: peer, env, seed, updates, mean and deviation of 10
returns, seconds of training so far.
"""

import argparse
import csv
import logging
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder, where `import d3rlpy` would find this file
import d3rlpy  # noqa: E402
import gymnasium as gym  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402


def make(algo: str, width: int, depth: int, samples: int, batch_size: int):
    """CQL by its reproduction recipe (no Lagrange, weight 5, actor 1e-4, critic 3e-4); AWAC with
    lambda 1, CRR with binary weights, both with 1e-4 and 3e-4, two critics and soft targets, as
    policy_constraints.py has them; the sizes given."""
    encoder = d3rlpy.models.VectorEncoderFactory([width] * depth)
    common = dict(
        actor_learning_rate=1e-4,
        critic_learning_rate=3e-4,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        batch_size=batch_size,
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
    )
    if algo.startswith("awac"):
        config = d3rlpy.algos.AWACConfig(**common)
    elif algo == "crr":
        both = dict(weight_type="binary", n_critics=2, target_update_type="soft")
        config = d3rlpy.algos.CRRConfig(**common, **both)
    else:
        config = d3rlpy.algos.CQLConfig(
            **common,
            temp_learning_rate=1e-4,
            alpha_learning_rate=0.0,
            initial_alpha=1.0,
            conservative_weight=5.0,
            n_action_samples=samples,
        )
    return config.create(device="cpu")


def fit(algo, dataset, updates: int):
    algo.fit(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=updates,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        show_progress=False,
    )


def train(args):
    with h5py.File(args.file) as f:
        columns = [
            f[k][()] for k in ("observations", "actions", "rewards", "terminals", "timeouts")
        ]
    obs, act, rew, terminal, timeout = columns
    timeout[-1] = not terminal[-1]  # the file's end
    dataset = d3rlpy.dataset.MDPDataset(
        obs, act, rew, terminal.astype(np.float32), timeout.astype(np.float32)
    )
    d3rlpy.seed(args.seed)
    algo = make(args.algo, args.width, args.depth, args.samples, args.batch_size)
    if args.algo == "awac-hard":  # no entropy in the target: findings/d3rlpy_awac_targets_are_soft
        algo.build_with_dataset(dataset)
        next(algo.impl.modules.log_temp.parameters()).data.fill_(-100)
    env, seconds = gym.make(args.env), 0.0
    every = args.eval_frequency or args.updates
    for done in range(every, args.updates + 1, every):
        begin = time.time()
        fit(algo, dataset, every)
        seconds += time.time() - begin
        returns = evaluate(algo, env, args.seed)
        peer = "d3rlpy" if args.algo == "cql" else f"d3rlpy {args.algo}"
        row = [peer, args.env, args.seed, done, np.mean(returns), np.std(returns), seconds]
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", newline="") as f:
            if f.tell() == 0:
                f.write("peer,env,seed,updates,return_mean,return_std,seconds\n")
            csv.writer(f).writerow(row)
        print(row, flush=True)


def evaluate(algo, env, seed: int) -> list[float]:
    """Returns of ten episodes from the seeds that cql_continuous.py evaluates on."""
    returns = []
    for stream in np.random.SeedSequence([seed, 1]).generate_state(10, np.uint64).tolist():
        first = int(np.random.SeedSequence([stream, 0]).generate_state(1)[0])
        (x, _), done, total = env.reset(seed=first), False, 0.0
        while not done:
            x, r, terminated, truncated, _ = env.step(algo.predict(x[None].astype(np.float32))[0])
            total, done = total + float(r), terminated or truncated
        returns.append(total)
    return returns


def speed(args):
    """Updates per second on random data of HalfCheetah's shape, start-up left out."""
    n, rng = 20_000, np.random.default_rng(0)
    end = (np.arange(1, n + 1) % 1000 == 0).astype(np.float32)
    obs, act = (
        rng.normal(size=(n, 17)).astype(np.float32),
        rng.uniform(-0.9, 0.9, (n, 6)).astype(np.float32),
    )
    dataset = d3rlpy.dataset.MDPDataset(
        obs, act, rng.normal(size=n).astype(np.float32), end * 0, end
    )
    algo = make(args.algo, 256, args.depth, args.samples, 256)
    fit(algo, dataset, 5)
    begin = time.perf_counter()
    fit(algo, dataset, args.updates)
    print(f"{args.updates / (time.perf_counter() - begin):.4f}")


def speed_atari(args):
    """The same of its DiscreteCQL with 200 quantiles on random frames, stacked by itself."""
    n, rng = 5_000, np.random.default_rng(0)
    end = (np.arange(1, n + 1) % 1000 == 0).astype(np.float32)
    dataset = d3rlpy.dataset.MDPDataset(
        rng.integers(256, size=(n, 1, 84, 84), dtype=np.uint8), rng.integers(6, size=(n, 1)),
        rng.normal(size=(n, 1)).astype(np.float32), end * 0, end,
        transition_picker=d3rlpy.dataset.FrameStackTransitionPicker(n_frames=4),
        trajectory_slicer=d3rlpy.dataset.FrameStackTrajectorySlicer(n_frames=4),
    )  # fmt: skip
    algo = d3rlpy.algos.DiscreteCQLConfig(
        learning_rate=5e-5,
        batch_size=32,
        alpha=4.0,
        n_critics=1,
        target_update_interval=2000,
        q_func_factory=d3rlpy.models.QRQFunctionFactory(n_quantiles=200),
        observation_scaler=d3rlpy.preprocessing.PixelObservationScaler(),
    ).create(device="cpu")
    fit(algo, dataset, 5)
    begin = time.perf_counter()
    fit(algo, dataset, args.updates)
    print(f"{args.updates / (time.perf_counter() - begin):.4f}")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("train")
    p.add_argument("file")
    p.add_argument("env")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", default="benchmarks/raw/d3rlpy.csv")
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--depth", type=int, default=2)
    p.add_argument("--samples", type=int, default=4)
    p.add_argument("--updates", type=int, default=25_000)
    p.add_argument("--eval-frequency", type=int, default=0, help="updates; 0: only at the end")
    p.add_argument("--algo", choices=["cql", "awac", "awac-hard", "crr"], default="cql")
    p.set_defaults(run=train)
    p = commands.add_parser("speed")
    p.add_argument("--depth", type=int, default=3)
    p.add_argument("--samples", type=int, default=10)
    p.add_argument("--updates", type=int, default=60)
    p.add_argument("--algo", choices=["cql", "awac", "crr"], default="cql")
    p.set_defaults(run=speed)
    p = commands.add_parser("speed-atari")
    p.add_argument("--updates", type=int, default=40)
    p.set_defaults(run=speed_atari)
    args = parser.parse_args()
    args.run(args)
