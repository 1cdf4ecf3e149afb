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
    """rew (T, N), V (T + 1, N), end, over (T, N) of N episodes from one state; what follows the
    first end of
    each goes nowhere, since gae() cuts there."""
    envs.reset(seed=seed)
    for env in envs.envs:
        env.unwrapped.state = np.array(state)
    obs = np.tile(np.float32(state), (N, 1))
    observations, columns = [obs], []
    for _ in range(T):
        act = agent.sample(agent.policy(torch.from_numpy(obs)))
        obs, rew, terminated, truncated, _ = envs.step(act.numpy())
        observations.append(obs)
        columns.append((rew, terminated, terminated | truncated))
    value = agent(torch.from_numpy(np.stack(observations)).flatten(0, 1))[1].view(T + 1, N)
    rew, end, over = (np.stack(x).astype(np.float64) for x in zip(*columns))
    return rew, value.double().numpy(), end, over


@torch.no_grad()
def states_of(agent, seed: int):
    """STATES observations of its own episodes, every 17th."""
    envs, found = ppo.make_envs("CartPole-v1", 1), []
    obs, _ = envs.reset(seed=seed)
    for t in range(17 * STATES):
        if t % 17 == 0:
            found.append(obs[0])
        obs, *_ = envs.step(agent.sample(agent.policy(torch.from_numpy(obs))).numpy())
    return found


def main():
    rows, envs = [], ppo.make_envs("CartPole-v1", N)
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            quiet = dict(
                eval_episodes=0, diagnostics_frequency=0, checkpoint_frequency=0, anneal_lr=False
            )
            args = ppo.Args(seed=seed, run_dir=folder, **quiet)
            for steps in (4_000, 40_000):
                runs = [str(p) for p in Path(folder).iterdir()]
                args = replace(args, total_timesteps=steps, resume=runs[0] if runs else None)
                ppo.train(args)
                (run,) = Path(folder).iterdir()
                saved = torch.load(run / "checkpoint.pt", weights_only=True)
                learner = ppo.Learner(
                    envs.single_observation_space, envs.single_action_space, args, "cpu"
                )
                learner.load_state_dict(saved["learner"]["networks"])
                errors = {x: [] for x in LAMBDAS}
                for i, state in enumerate(states_of(learner.agent, seed)):
                    rew, value, end, over = continuations(
                        learner.agent, envs, state, 1000 * seed + i
                    )
                    target = lambda x: (ppo.gae(rew, value, end, over, args.gamma, x) + value[:-1])[
                        0
                    ]  # noqa: B023
                    worth = target(1)[: N // 2].mean()
                    for x in LAMBDAS:
                        sample = target(x)[N // 2 :]
                        errors[x].append((sample.mean() - worth, sample.std()))
                for x in LAMBDAS:
                    bias, spread = (float(np.sqrt(np.mean(np.square(e)))) for e in zip(*errors[x]))
                    rows.append(
                        {"seed": seed, "step": steps, "lambda": x, "bias": bias, "spread": spread}
                    )
                    print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    with open(HERE / "raw" / "gae_bias.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
