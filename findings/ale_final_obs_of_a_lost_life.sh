#!/usr/bin/env bash
# ale-py's vector environment: the final observation of a lost life is no picture of the game.
#
# With `life_loss_info=True` a lost life is a row of `terminated`, and the game goes on. With
# autoreset SAME_STEP `infos["final_obs"]` holds the last observation of an ended episode; gymnasium's
# own vector environments give None for rows that did not end. Here it is one dense array without a
# mask, right where the game was over and reset. Where only a life was lost, the row is terminated
# and its final_obs was never written: zeros in one process, leftovers of memory in another. Code
# that stores `final_obs[terminated]` as the next observation, as one does with SyncVectorEnv, stores
# that for every lost life. What followed a lost life is the ordinary `obs`: nothing was reset.
#
# Seen with ale-py 0.12.1, gymnasium 1.4.0, numpy 2.4.6, Python 3.11:
#   lives lost: 8, obs goes on from the frames before in 8, final_obs in 0
#   games over: 1, obs goes on from the frames before in 0, final_obs in 1
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/lives.py" <<'PYTHON'
import gymnasium as gym
import numpy as np
from ale_py.vector_env import AtariVectorEnv

how = {"noop_max": 0, "use_fire_reset": False, "life_loss_info": True}
env = AtariVectorEnv("breakout", 1, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP, **how)
obs, info = env.reset(seed=np.array([1]))
rng, lives = np.random.default_rng(0), info["lives"][0]
lost, over = [], []
for _ in range(400):
    before = obs
    obs, _, terminated, _, info = env.step(rng.integers(4, size=1))
    if terminated[0]:
        final, left = info["final_obs"][0], info["lives"][0]
        goes_on = [np.array_equal(x[:3], before[0, 1:]) for x in (obs[0], final)]
        (lost if left < lives else over).append(goes_on)
    lives = info["lives"][0]
for what, ends in (("lives lost", lost), ("games over", over)):
    on, final = (sum(x) for x in zip(*ends))
    print(f"{what}: {len(ends)}, obs goes on from the frames before in {on}, final_obs in {final}")
assert lost and all(x == [True, False] for x in lost), "a lost life has another final_obs now"
assert over and all(x == [False, True] for x in over), "a game's end has another final_obs now"
PYTHON
"$folder/venv/bin/python" "$folder/lives.py"
