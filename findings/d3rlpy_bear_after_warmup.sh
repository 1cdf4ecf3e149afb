#!/usr/bin/env bash
# d3rlpy's BEAR has no constraint once its warm-up is over.
#
# In the first `warmup_steps` updates (40,000) the actor minimises MMD alone. After that its loss is
# SAC's plus alpha (MMD - threshold), and alpha is tuned in the same function: it calls backward() on
# -alpha (MMD - threshold) after the actor's gradients were set to zero, so that this lands in the
# actor, too, and the actor's own term then cancels it. The policy's gradient is that of SAC, whatever
# the multiplier; `alpha_learning_rate=0` changes nothing. Logged MMD and alpha look as they should.
# So it is since a change of November 2023; scores from before do not tell about it.
#
# Seen with d3rlpy 2.8.1, torch 2.13.0, Python 3.11, norm of the actor's gradient with a multiplier of
# exp(-5) and of exp(10):
#   warm-up: 0.00142 and 4641
#   after it: 2.271 and 2.271
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 d3rlpy==2.8.1
cat > "$folder/bear.py" <<'PYTHON'
import d3rlpy
import numpy as np
import torch
from d3rlpy.torch_utility import TorchMiniBatch

rng = np.random.default_rng(0)
n = 1_000
obs, act = rng.normal(size=(n, 3)), rng.uniform(-0.9, 0.9, (n, 2))
end = np.arange(1, n + 1) % 100 == 0
data = d3rlpy.dataset.MDPDataset(
    obs.astype(np.float32), act.astype(np.float32), rng.normal(size=n).astype(np.float32), end * 0.0, end
)
d3rlpy.seed(0)
algo = d3rlpy.algos.BEARConfig(batch_size=64).create(device="cpu")
algo.build_with_dataset(data)
impl = algo.impl
batch = TorchMiniBatch.from_batch(data.sample_transition_batch(64), 0.99, False, "cpu")
policy = impl.modules.policy
multiplier = next(impl.modules.log_alpha.parameters())


def gradient(compute, log_alpha: float):
    multiplier.data.fill_(log_alpha)
    torch.manual_seed(1)
    compute(batch)
    return torch.cat([p.grad.flatten() for p in policy.parameters()]).double()


stages = {"warm-up": impl.compute_warmup_actor_grad, "after it": impl._compute_actor_grad}
for name, compute in stages.items():
    light, heavy = gradient(compute, -5.0), gradient(compute, 10.0)
    print(f"{name}: {light.norm():.4g} and {heavy.norm():.4g}")
    if name == "warm-up":
        assert heavy.norm() > 1e6 * light.norm()
    else:
        assert (heavy - light).norm() < 0.01 * light.norm(), "the multiplier has an effect now"
PYTHON
"$folder/venv/bin/python" "$folder/bear.py"
