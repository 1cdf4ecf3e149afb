"""Stable-Baselines3's SAC, TD3 and PPO at the sizes and settings of the scripts here, in its own
environment.

  python -m venv sb3
  sb3/bin/pip install torch==2.13.0 stable-baselines3==2.9.2 "gymnasium[mujoco,classic-control]"
  sb3/bin/python benchmarks/peers/sb3.py sac train --env HalfCheetah-v5 --seed 1 --out curve.csv
  sb3/bin/python benchmarks/peers/sb3.py ppo train --env Hopper-v5 --steps 500000 --normalize
  sb3/bin/python benchmarks/peers/sb3.py td3 speed --steps 3000

`train` appends a line an evaluation (10 deterministic episodes in a second environment): peer,
algorithm, env, seed, step, mean and deviation of the returns, seconds so far without evaluations;
a run that the file holds already is refused. `speed` prints steps per second of the whole loop,
the environment's steps included, after the random ones.
"""

import argparse
import csv
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import stable_baselines3 as sb3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize


def make(algo: str, env, seed: int, learning_starts: int):
    """Two hidden layers of 256 ReLU, batch 256, one update a step, learning rates 3e-4."""
    common = dict(
        policy="MlpPolicy", env=env, seed=seed, learning_starts=learning_starts, device="cpu"
    )
    common |= dict(policy_kwargs=dict(net_arch=[256, 256]), learning_rate=3e-4, batch_size=256)
    if algo == "ppo":  # its defaults: 2,048 steps, batches of 64, 10 epochs, 2 x 64; annealed
        return sb3.PPO("MlpPolicy", env, lambda left: 3e-4 * left, seed=seed, device="cpu")
    common |= dict(train_freq=1, gradient_steps=1)
    if algo == "sac":
        return sb3.SAC(**common)
    d = env.action_space.shape[0]
    return sb3.TD3(**common, action_noise=NormalActionNoise(np.zeros(d), 0.1 * np.ones(d)))


def first_seeds(seed: int, n: int) -> list[int]:
    """Of the first episode in each of n evaluation environments of sac.py, td3.py and ppo.py."""
    streams = np.random.SeedSequence([seed, 1]).generate_state(n, np.uint64).tolist()
    return [int(np.random.SeedSequence([s, 0]).generate_state(1)[0]) for s in streams]


class Evaluate(BaseCallback):
    """Episodes from the seeds that the scripts evaluate on."""

    def __init__(self, args):
        super().__init__()
        self.args, self.begin, self.env = args, time.time(), gym.make(args.env)

    def _on_step(self) -> bool:
        if self.num_timesteps % self.args.eval_frequency:
            return True
        returns, paused = [], time.time()
        for seed in first_seeds(self.args.seed, self.args.eval_episodes):
            obs, done, total = self.env.reset(seed=seed)[0], False, 0.0
            while not done:
                if normalized := self.model.get_vec_normalize_env():
                    obs = normalized.normalize_obs(obs)
                act, _ = self.model.predict(obs, deterministic=True)
                obs, rew, terminated, truncated, _ = self.env.step(act)
                total, done = total + float(rew), terminated or truncated
            returns.append(total)
        self.begin += time.time() - paused
        a = self.args
        row = ["sb3", a.algo, a.env, a.seed, self.num_timesteps, np.mean(returns), np.std(returns)]
        with open(a.out, "a", newline="") as f:
            writer = csv.writer(f)
            if not f.tell():
                writer.writerow("peer algo env_id seed step return_mean return_std seconds".split())
            writer.writerow([*row, time.time() - self.begin])
        print(row, flush=True)
        return True


class Clock(BaseCallback):
    """Times the steps after the first of them that updated."""

    def __init__(self, start: int):
        super().__init__()
        self.start = start

    def _on_step(self) -> bool:
        if self.num_timesteps == self.start:
            self.begin = time.perf_counter()
        return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algo", choices=["sac", "td3", "ppo"])
    parser.add_argument("mode", choices=["train", "speed"])
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--learning-starts", type=int, default=5_000)
    parser.add_argument("--eval-frequency", type=int, default=5_000)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument(
        "--normalize", action="store_true", help="observations and rewards, by VecNormalize"
    )
    parser.add_argument("--out", default="benchmarks/raw/sb3.csv")
    args = parser.parse_args()
    env = gym.make(args.env)
    if args.normalize:
        env = VecNormalize(DummyVecEnv([lambda: gym.make(args.env)]))
    if args.mode == "train":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        run = ["sb3", args.algo, args.env, str(args.seed)]
        if Path(args.out).exists() and any(r[:4] == run for r in csv.reader(open(args.out))):
            parser.error(f"{args.out} holds {' '.join(run)} already: give another --out")
        model = make(args.algo, env, args.seed, args.learning_starts)
        model.learn(args.steps, callback=Evaluate(args))
    else:
        begin = (
            2048 if args.algo == "ppo" else 500
        )  # after the first rollout; after the random steps
        clock = Clock(begin + 1)
        make(args.algo, env, args.seed, 300).learn(args.steps + begin, callback=clock)
        print("steps per second", args.steps / (time.perf_counter() - clock.begin))


if __name__ == "__main__":
    main()
