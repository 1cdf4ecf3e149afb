#!/usr/bin/env bash
# Minari's combine_datasets brings back the episodes that were filtered or split away.
#
# filter_episodes and split_dataset return data sets: their len, iteration and samples are of the chosen
# episodes. One would expect the combination of such to have these. It copies the files that stand
# behind, whole: "the good half of A with the good half of B" has the bad halves as well, a training part
# that was split off and combined with other data has its own test part in it, and two parts of one set
# combined have each episode twice. Nothing is raised; the names in `combined_datasets` are as expected,
# and only the count tells. Minari's pull request 350, open in September 2026, is about this.
# What works: create_dataset_from_buffers with the buffers of the chosen episodes, or combining first
# and filtering afterwards.
#
# Seen with minari 0.5.4, gymnasium 1.4.0, h5py 3.16.0, Python 3.11, a set with the returns 0 to 9:
#   filtered to returns of 5 and more: 5 episodes, least return 5; combined: 10 episodes, least return 0
#   training part: 8 episodes; combined: 10 episodes, with 2 of the 2 test episodes
#   both parts combined: 20 episodes, 10 different
#   combined first, filtered then: 5 episodes, least return 5
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet minari==0.5.4 gymnasium==1.4.0 h5py==3.16.0 pillow==11.3.0
cat > "$folder/combine.py" <<'PYTHON'
import warnings

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

warnings.filterwarnings("ignore")  # no author, no code link
buffers = [
    EpisodeBuffer(
        id=k,
        observations=[np.full(1, k, np.float32)] * 2,
        actions=[0],
        rewards=[float(k)],
        terminations=[True],
        truncations=[False],
        infos={},
    )
    for k in range(10)
]
spaces = {"observation_space": gym.spaces.Box(0, 10, (1,)), "action_space": gym.spaces.Discrete(2)}
data = minari.create_dataset_from_buffers("test/all-v0", buffer=buffers, **spaces)


def returns(part):
    return sorted(float(episode.rewards.sum()) for episode in part)


def good(episode):
    return episode.rewards.sum() >= 5


kept = data.filter_episodes(good)
back = minari.combine_datasets([kept], "test/good-v0")
print(
    f"filtered to returns of 5 and more: {len(kept)} episodes, "
    f"least return {returns(kept)[0]:.0f}; "
    f"combined: {len(back)} episodes, least return {returns(back)[0]:.0f}"
)
assert returns(back) == returns(data), "the filter survives now"

train, test = minari.split_dataset(data, [8, 2], seed=0)
whole = minari.combine_datasets([train], "test/train-v0")
leaked = len(set(returns(test)) & set(returns(whole)))
print(
    f"training part: {len(train)} episodes; combined: {len(whole)} episodes, "
    f"with {leaked} of the {len(test)} test episodes"
)
assert leaked == 2, "the split survives now"

both = minari.combine_datasets([train, test], "test/both-v0")
print(f"both parts combined: {len(both)} episodes, {len(set(returns(both)))} different")
assert len(both) == 20

then = minari.combine_datasets([data], "test/copy-v0").filter_episodes(good)
least = returns(then)[0]
print(f"combined first, filtered then: {len(then)} episodes, least return {least:.0f}")
assert returns(then) == returns(kept)
PYTHON
export MINARI_DATASETS_PATH="$folder/data"
"$folder/venv/bin/python" "$folder/combine.py"
