#!/usr/bin/env bash
# np.random.seed(s) and torch.manual_seed(s) make the same integers.
#
# The usual first lines of a script seed both. One would expect two independent sources. Both are
# the Mersenne Twister, set up from the number in the same way, and both cut an integer out of the low
# bits of a word: for a range that is a power of two, np.random.randint and torch.randint (on the CPU)
# then return the same sequence, word for word. Coin flips of an exploring policy with one and masks of
# a bootstrapped ensemble with the other are one sequence; so are the minibatch indices of a buffer of
# 2^k places and any choice among 2^j ensemble members, augmentations or actions, reduced to j bits.
# With other ranges numpy rejects words where torch takes a remainder, so it goes unseen in a test;
# floats are cut from other bits of the same words.
# What works: np.random.default_rng(s), a generator of another kind, or another number for one.
#
# Seen with torch 2.13.0, numpy 2.4.6, Python 3.11, equal ones of 1,000 draws, seeds 0, 1 and 42:
#   range 2:       np.random and torch 1000 1000 1000, default_rng and torch 509 487 497
#   range 4:       np.random and torch 1000 1000 1000, default_rng and torch 222 251 250
#   range 65536:   np.random and torch 1000 1000 1000, default_rng and torch 0 0 0
#   range 60000:   np.random and torch 0 0 0, default_rng and torch 0 0 0
#   index below 65536 with numpy, one of 4 members with torch: the index says which in 1000 of 1000
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/draws.py" <<'PYTHON'
import numpy as np
import torch

n, seeds = 1_000, (0, 1, 42)
for high in (2, 4, 65_536, 60_000):
    legacy, modern = [], []
    for seed in seeds:
        np.random.seed(seed)
        torch.manual_seed(seed)
        draws = torch.randint(high, (n,)).numpy()
        legacy.append(int((np.random.randint(high, size=n) == draws).sum()))
        modern.append(int((np.random.default_rng(seed).integers(high, size=n) == draws).sum()))
    name = f"range {high}:"
    print(f"{name:14} np.random and torch", *legacy, end=", ")
    print("default_rng and torch", *modern)
    assert max(modern) < 1.2 * n / high + 20
    if high & (high - 1) == 0:
        assert legacy == [n] * len(seeds), "the two are independent now"

np.random.seed(0)
torch.manual_seed(0)
known = sum(
    int(np.random.randint(65_536) % 4 == torch.randint(4, ()).item()) for _ in range(n)
)
print(
    "index below 65536 with numpy, one of 4 members with torch: "
    f"the index says which in {known} of {n}"
)
assert known == n
PYTHON
"$folder/venv/bin/python" "$folder/draws.py"
