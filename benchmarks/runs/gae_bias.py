"""What lambda trades: bias and spread of ppo.py's targets A + V, the lambda-returns, measured one
by one.

  python benchmarks/runs/gae_bias.py && python benchmarks/figures.py gae_bias

From each of 10 states that ppo.py's own policy meets on CartPole-v1, 128 independent
continuations of 500 steps. Half of them say what the state is worth, the mean discounted return;
over the other half the targets' mean less that is the bias, their deviation the spread; both as
root mean squares over the states. Early and late in the training of one policy, three seeds, to
benchmarks/raw/gae_bias.csv.
"""

import csv
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent))
import ppo  # noqa: E402

LAMBDAS, N, T, STATES = (0, 0.5, 0.9, 0.95, 0.99, 1), 128, 500, 10


@torch.no_grad()
def continuations(agent, envs, state, seed: int):
    """rew, V(s), V(s') and over, each (T, N), of N episodes from one state; what follows the first
    end of each goes nowhere, since gae() cuts there."""
    envs.reset(seed=ppo.env_seeds(seed, N))
    for env in envs.envs:
        env.unwrapped.state = np.array(state)
    obs, columns = np.tile(np.float32(state), (N, 1)), []
    for _ in range(T):
        x = torch.from_numpy(obs)
        act = agent.sample(agent.policy(x))
        value, (obs, rew, terminated, truncated, infos) = agent(x)[1], envs.step(act.numpy())
        over, last_obs = terminated | truncated, obs.copy()
        if over.any():
            last_obs[over] = np.stack(infos["final_obs"][over])
        next_value = agent(torch.from_numpy(last_obs))[1] * torch.from_numpy(~terminated)
        tensors = (torch.from_numpy(rew), value, next_value, torch.from_numpy(over))
        columns.append(tensors)
    rew, value, next_value, over = (torch.stack(x) for x in zip(*columns))
    return rew, value.double(), next_value.double(), over


@torch.no_grad()
def states_of(agent, stack, seed: int):
    """STATES observations of its own episodes, every 17th."""
    envs, found = ppo.make_envs("CartPole-v1", 1, stack), []
    obs, _ = envs.reset(seed=ppo.env_seeds(seed, 1))
    for t in range(17 * STATES):
        if t % 17 == 0:
            found.append(obs[0])
        obs, *_ = envs.step(agent.sample(agent.policy(torch.from_numpy(obs))).numpy())
    return found


def errors(agent, envs, stack, seed: int, gamma: float) -> dict:
    """lambda -> (bias, spread), root mean squares over the states."""
    found = {x: [] for x in LAMBDAS}
    for i, state in enumerate(states_of(agent, stack, seed)):
        rew, value, next_value, over = continuations(agent, envs, state, 1000 * seed + i)
        targets = {x: ppo.gae(rew, value, next_value, over, gamma, x) + value for x in LAMBDAS}
        worth = targets[1][0, : N // 2].mean()
        for x, target in targets.items():
            sample = target[0, N // 2 :]
            found[x].append((sample.mean() - worth, sample.std(correction=0)))
    return {x: np.sqrt(np.mean(np.square(pairs), axis=0)).tolist() for x, pairs in found.items()}


def main():
    rows = []
    with ExitStack() as stack:
        envs = ppo.make_envs("CartPole-v1", N, stack)
        spaces = envs.single_observation_space, envs.single_action_space
        for seed in (1, 2, 3):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            quiet = dict(eval_episodes=0, eval_frequency=0, checkpoint_frequency=0)
            args = ppo.Args(seed=seed, run_dir=folder, anneal_lr=False, cuda=False, **quiet)
            for steps in (4_000, 40_000):
                runs = [str(p) for p in Path(folder).iterdir()]
                args = replace(args, total_timesteps=steps, resume=runs[0] if runs else None)
                ppo.train(args)
                (run,) = Path(folder).iterdir()
                learner = ppo.Learner(*spaces, args, torch.device("cpu"))
                saved = torch.load(run / "checkpoint.pt", weights_only=True)
                learner.load_state_dict(saved["networks"])
                found = errors(learner.agent, envs, stack, seed, args.gamma)
                for x, (bias, spread) in found.items():
                    row = {"seed": seed, "step": steps, "lambda": x, "bias": bias}
                    rows.append(row | {"spread": spread})
                    print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    with open(HERE / "raw" / "gae_bias.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
