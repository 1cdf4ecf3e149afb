#!/usr/bin/env bash
# d3rlpy's get_minari pairs observations with actions of other time steps, from episode 2 on.
#
# A Minari episode of T steps has T + 1 observations. One would expect get_minari to leave the last one
# out before it puts all episodes into one array, as d3rlpy's MDPDataset wants as many observations as
# actions. It does not; MDPDataset compares no lengths and cuts both arrays at the same places. So the
# observations of episode k (from 0) come k rows too early: the last ones of episode k - 1 stand at its
# start, its own actions and rewards beside them. After as many episodes as an episode is long the
# shift is a whole episode. Nothing is raised, losses look ordinary, and what is learned is nonsense:
# the more episodes, the worse, so that a small test set with one or two long episodes shows nothing.
# What works: MDPDataset from one's own arrays, with observations[:-1] of each episode.
#
# Seen with d3rlpy 2.8.1, minari 0.5.4, gymnasium 1.0.0, h5py 3.16.0, torch 2.13.0, Python 3.11,
# 20 episodes of 20 steps of Pendulum:
#   Minari: 420 observations, 400 actions
#   rows by which d3rlpy's episodes are early: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19
#   transitions with the observation that the action was chosen for: 20 of 400
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 d3rlpy==2.8.1 minari==0.5.4 gymnasium==1.0.0 \
  h5py==3.16.0 pillow==11.3.0
cat > "$folder/rows.py" <<'PYTHON'
import gymnasium as gym
import minari
import numpy as np
from d3rlpy.datasets import get_minari
from minari.data_collector import EpisodeBuffer

env, episodes = gym.make("Pendulum-v1", max_episode_steps=20), []
env.action_space.seed(1)
for k in range(20):
    obs, _ = env.reset(seed=k)
    observations, actions, rewards, cuts = [obs], [], [], []
    cut = False
    while not cut:
        action = env.action_space.sample()
        obs, reward, _, cut, _ = env.step(action)
        observations.append(obs)
        actions.append(action)
        rewards.append(float(reward))
        cuts.append(cut)
    episodes.append(
        EpisodeBuffer(
            id=k,
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminations=[False] * len(cuts),
            truncations=cuts,
            infos={},
        )
    )
data = minari.create_dataset_from_buffers("test/pendulum-v0", buffer=episodes, env=env)
rows = np.concatenate([episode.observations for episode in data])
actions = np.concatenate([episode.actions for episode in data])
first = np.cumsum([0] + [len(episode.observations) for episode in data])
loaded, _ = get_minari("test/pendulum-v0")
early, right = [], 0
for k, (theirs, ours) in enumerate(zip(loaded.episodes, data)):
    assert np.array_equal(theirs.actions, ours.actions)
    found = int(np.flatnonzero((rows == theirs.observations[0]).all(1))[0])
    early.append(int(first[k] - found))
    right += int((theirs.observations == ours.observations[:-1]).all(1).sum())
print(f"Minari: {len(rows)} observations, {len(actions)} actions")
print("rows by which d3rlpy's episodes are early:", *early)
print(f"transitions with the observation that the action was chosen for: {right} of {len(actions)}")
assert early == list(range(20)), "the rows fit now"
PYTHON
export MINARI_DATASETS_PATH="$folder/data"
"$folder/venv/bin/python" "$folder/rows.py" | grep -v "info  "
