#!/usr/bin/env bash
# Gymnasium's MaxAndSkipObservation: a cut episode's last observation is an old one.
#
# The wrapper repeats an action `skip` times and returns the maximum of the last two frames. One
# would expect that of the frames that were played. But only frames skip - 1 and skip are kept: where
# the episode ends before them, the step returns what the step before it returned (both frames old), or
# a mix (one old), or, in an episode shorter than that, the end of the episode before it. The wrapper
# it was modelled on had the excuse that nobody looks at the observation of a terminal state. A time
# limit is no terminal state: one asks for the value of exactly that observation, and gets the value
# of a state up to skip steps ago; a limit that `skip` does not divide hits it in each episode. The
# reward of the step is complete, flags and info are right. Gymnasium's pull request 1692, open in
# September 2026, is about this.
# What works: a time limit that `skip` divides, or TimeLimit outside of MaxAndSkipObservation.
#
# Seen with gymnasium 1.4.0, numpy 2.4.6, Python 3.11, an environment whose observation is its clock:
#   limit 10 inside:  returned [4, 8, 8], played [4, 8, 10]
#   limit 11 inside:  returned [4, 8, 11], played [4, 8, 11]
#   limit 2 inside, after an episode to 8: returned [8], played [2]
#   limit 3 steps outside: returned [4, 8, 12], played [4, 8, 12]
#   Pendulum, limit 10: the truncated step returns the step before it, its angle 0.58 rad away
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/skip.py" <<'PYTHON'
import gymnasium as gym
import numpy as np
from gymnasium.wrappers import MaxAndSkipObservation, TimeLimit


class Clock(gym.Env):
    observation_space = gym.spaces.Box(0, 1_000, (1,))
    action_space = gym.spaces.Discrete(1)
    limit = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 1.0, False, self.t == self.limit, {}


def episode(env):
    env.reset()
    returned, played, cut = [], [], False
    while not cut:
        obs, _, _, cut, _ = env.step(0)
        returned.append(int(obs[0]))
        played.append(env.unwrapped.t)
    return returned, played


env = MaxAndSkipObservation(Clock(), skip=4)
for limit in (10, 11):
    env.unwrapped.limit = limit
    returned, played = episode(env)
    print(f"limit {limit} inside:  returned {returned}, played {played}")
    assert (returned != played) == (limit == 10), "the last observation is that of the end now"
env.unwrapped.limit = 8
episode(env)
env.unwrapped.limit = 2
returned, played = episode(env)
print(f"limit 2 inside, after an episode to 8: returned {returned}, played {played}")
assert (returned, played) == ([8], [2]), "a short episode has an end of its own now"
returned, played = episode(TimeLimit(MaxAndSkipObservation(Clock(), skip=4), 3))
print(f"limit 3 steps outside: returned {returned}, played {played}")
assert returned == played

env = MaxAndSkipObservation(gym.make("Pendulum-v1", max_episode_steps=10), skip=4)
obs, _ = env.reset(seed=0)
cut = False
while not cut:
    before, angle = obs, env.unwrapped.state[0]
    obs, _, _, cut, _ = env.step(np.zeros(1, np.float32))
away = abs(env.unwrapped.state[0] - angle)
assert np.array_equal(obs, before), "the truncated step has an observation of its own now"
print(
    "Pendulum, limit 10: the truncated step returns the step before it, "
    f"its angle {away:.2f} rad away"
)
PYTHON
"$folder/venv/bin/python" "$folder/skip.py"
