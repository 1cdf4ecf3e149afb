#!/usr/bin/env bash
# Stable-Baselines3's DQN with several environments explores in all of them at once or in none.
#
# With n environments and exploration rate e one would expect each of them to take a random action in
# a share e of its steps, independently. DQN.predict draws one number for the whole batch: below e all
# n actions are random, else all are greedy. The share is right, so logs look right. But data come in
# blocks: as long as e is small, whole stretches of n transitions have no exploration and few have
# nothing else, the environments' transitions are correlated, and of a fixed number of steps
# only one in n is a decision whether to explore: with e = 0.01, eight environments and 10,000 steps
# there are about 12 moments of exploration instead of 100.
# An evaluation with deterministic=False over a vector has it, too.
# What works: a subclass whose predict() draws for each row.
#
# Seen with stable-baselines3 2.9.2, torch 2.13.0, gymnasium 1.4.0, Python 3.11, learn(16_000) with
# 8 environments, exploration rate 0.3, 1,000 actions to choose from:
#   random in 0 of 8: 1393 times, in 1 to 7: 2 times, in all 8: 605 times
#   independent draws would give about 115, 1885 and 0
# (The two are random actions that happened to be the greedy one.)
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0
cat > "$folder/explore.py" <<'PYTHON'
import gymnasium as gym
import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env


class Still(gym.Env):
    """The observation is always zero, so that the greedy action is always the same."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(1_000)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


n, rate, steps = 8, 0.3, 2_000
model = DQN(
    "MlpPolicy",
    make_vec_env(Still, n),
    seed=0,
    learning_starts=0,
    gradient_steps=0,  # collects only: the greedy action stays
    train_freq=1,
    exploration_initial_eps=rate,
    exploration_final_eps=rate,
    buffer_size=n * steps,
)
model.learn(n * steps)
greedy = model.predict(np.zeros(1, np.float32), deterministic=True)[0]
random = (model.replay_buffer.actions[..., 0] != greedy).sum(1)
none, some, every = (random < 1).sum(), ((random > 0) & (random < n)).sum(), (random == n).sum()
print(f"random in 0 of {n}: {none} times, in 1 to {n - 1}: {some} times, in all {n}: {every} times")
expect = [(1 - rate) ** n, 1 - (1 - rate) ** n - rate**n, rate**n]
expect = [round(steps * share) for share in expect]
print(f"independent draws would give about {expect[0]}, {expect[1]} and {expect[2]}")
assert some <= 5 and every > 500, "the environments explore one by one now"
PYTHON
"$folder/venv/bin/python" "$folder/explore.py"
