#!/usr/bin/env bash
# d3rlpy's AWAC has SAC's soft target, with a temperature of 1 that nothing sets or tunes.
#
# AWAC's target is r + gamma Q(s', a'). d3rlpy's is r + gamma (Q(s', a') - log pi(a'|s')): the target is
# inherited from SAC, and the log of the temperature, which AWAC has no use for, is a parameter of 0, so
# that the temperature is exp(0). A policy as narrow as AWAC's gets that much less at each step, whatever
# the reward: with rewards of order 1 and gamma 0.99 it is most of Q. No flag turns it off. And a' comes
# from another distribution than the one that is trained and acts: there the tanh is on the mean alone.
#
# Seen with d3rlpy 2.8.1, torch 2.13.0, Python 3.11, a new AWAC with two actions, all target Qs made 0:
#   value of the next state where Q is 0: -3.17; with a log temperature of -100: 0.00
#   log temperature: 0.0, tuned: False
#   deviation of the next action's first entry, policy's std 1.00: in the target 0.63, in training 0.72
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 d3rlpy==2.8.1
cat > "$folder/awac.py" <<'PYTHON'
import d3rlpy
import torch
from d3rlpy.models.torch import build_gaussian_distribution
from d3rlpy.torch_utility import TorchMiniBatch

d3rlpy.seed(0)
algo = d3rlpy.algos.AWACConfig().create(device="cpu")
algo.create_impl((3,), 2)
impl, n = algo.impl, 20_000
parts = impl.modules
for p in parts.targ_q_funcs.parameters():
    p.data.zero_()
obs, zero = torch.randn(n, 3), torch.zeros(n, 1)
act = torch.zeros(n, 2)
batch = TorchMiniBatch(
    obs, act, zero, obs, act, returns_to_go=zero, terminals=zero, intervals=zero + 1, device="cpu"
)
(log_temp,) = parts.log_temp.parameters()
before, values = log_temp.item(), []
for given in (before, -100.0):
    log_temp.data.fill_(given)
    values.append(-impl.compute_target(batch).mean().item())
print("value of the next state where Q is 0: -{:.2f}; with a log temperature of -100: {:.2f}".format(values[0], abs(values[1])))
print(f"log temperature: {before}, tuned: {parts.temp_optim is not None}")
assert values[0] > 2 and abs(values[1]) < 1e-6, "AWAC's target has no entropy now"

seen = []
forward = impl._targ_q_func_forwarder.compute_target
impl._targ_q_func_forwarder.compute_target = lambda x, a, **k: seen.append(a) or forward(x, a, **k)
for p in parts.policy.parameters():
    p.data.zero_()  # a mean of 0
with torch.no_grad():
    next(p for name, p in parts.policy.named_parameters() if "logstd" in name).fill_(50.0)
    impl.compute_target(batch)
    dist = build_gaussian_distribution(parts.policy(obs))
    own = dist.sample()
std = dist.std[0, 0]
print(f"deviation of the next action's first entry, policy's std {std:.2f}:", end=" ")
print(f"in the target {seen[0][:, 0].std():.2f}, in training {own[:, 0].std():.2f}")
assert abs(seen[0][:, 0].std() - own[:, 0].std()) > 0.05, "both are one distribution now"
PYTHON
"$folder/venv/bin/python" "$folder/awac.py"
