#!/usr/bin/env bash
# Minari's combine_datasets turns losslessly stored images into JPEG.
#
# Minari stores single images, (H, W) or (H, W, 3) of uint8, as JPEG unless the set is created with
# jpeg_encoding=False; its documentation says so. One would expect a combination of sets that were
# created in this way to be like them. But the new set is made with the default, and its images pass
# through JPEG. On Atari screens, small things of one colour on another one, that puts rings around
# them and spots into what is empty; a policy trained on the new set then acts on screens of
# another kind. `combined_datasets`, spaces and counts are as expected. Stacks
# like (4, 84, 84) are no single images and stay as they are, which is easily taken for "all is well".
# What works: create_dataset_from_buffers(..., jpeg_encoding=False) with the episodes of all sets, and a
# look at dataset.storage.jpeg_encoding.
#
# Seen with minari 0.5.4, gymnasium 1.4.0, h5py 3.16.0, pillow 11.3.0, Python 3.11, screens of 84 x 84
# with a ball of 2 x 4:
#   created with jpeg_encoding=False: 0.0 % of the pixels differ, by up to 0
#   combined: jpeg_encoding is True, 8.5 % of the pixels differ, by up to 30
#   stacks of (4, 84, 84), combined: 0.0 % of the pixels differ, by up to 0
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet minari==0.5.4 gymnasium==1.4.0 h5py==3.16.0 pillow==11.3.0
cat > "$folder/pixels.py" <<'PYTHON'
import warnings

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

warnings.filterwarnings("ignore")  # no author, no code link
rng = np.random.default_rng(0)


def screens(shape):
    """A dark court, a bright wall at the top, a ball somewhere."""
    images = np.full((21, 84, 84), 87, np.uint8)
    images[:, 10:16] = 148
    for image in images:
        y, x = rng.integers(20, 80, size=2)
        image[y : y + 4, x : x + 2] = 236
    return np.broadcast_to(images.reshape(21, *[1] * (len(shape) - 2), 84, 84), (21, *shape))


def make(name, shape):
    images = screens(shape)
    episode = EpisodeBuffer(
        id=0,
        observations=list(images),
        actions=[0] * 20,
        rewards=[0.0] * 20,
        terminations=[False] * 20,
        truncations=[False] * 19 + [True],
        infos={},
    )
    data = minari.create_dataset_from_buffers(
        name,
        buffer=[episode],
        observation_space=gym.spaces.Box(0, 255, shape, np.uint8),
        action_space=gym.spaces.Discrete(2),
        jpeg_encoding=False,
    )
    return images, data


def difference(images, data):
    off = np.abs(data[0].observations.astype(int) - images)
    return f"{100 * (off > 0).mean():.1f} % of the pixels differ, by up to {off.max()}", off.max()


images, data = make("test/raw-v0", (84, 84))
text, most = difference(images, data)
print(f"created with jpeg_encoding=False: {text}")
assert most == 0
combined = minari.combine_datasets([data], "test/combined-v0")
text, most = difference(images, combined)
print(f"combined: jpeg_encoding is {combined.storage.jpeg_encoding}, {text}")
assert combined.storage.jpeg_encoding and most > 10, "the pixels stay as they are now"
images, data = make("test/stack-v0", (4, 84, 84))
text, most = difference(images, minari.combine_datasets([data], "test/stacks-v0"))
print(f"stacks of (4, 84, 84), combined: {text}")
assert most == 0
PYTHON
export MINARI_DATASETS_PATH="$folder/data"
"$folder/venv/bin/python" "$folder/pixels.py"
