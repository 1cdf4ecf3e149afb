"""Updates of sac.py, td3.py and cql_continuous.py beside a peer's: the same weights, minibatches and noise.

  sb3/bin/pip install tyro && sb3/bin/python benchmarks/same_update.py sac td3         # Stable-Baselines3
  peer/bin/pip install tyro tensorboard && peer/bin/python benchmarks/same_update.py cql    # d3rlpy

Both do --updates updates on the same random minibatches (HalfCheetah's shapes) through their own training
code. Printed after each: the distance between our weights and theirs, relative to the distance that ours have
moved. Rounding alone gives 1e-7 to 1e-4, since Adam divides by gradients that may be small differences; for
target networks, which move by tau as much, 1e-3.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
OBS, ACT, B, WIDTH = 17, 6, 256, 256


class Shapes(gym.Env):
    """Nothing but the spaces, which the peer reads."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACT,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(OBS, np.float32), {}


def random_batches(n: int, Batch):
    for _ in range(n):
        columns = {"obs": torch.randn(B, OBS), "act": torch.rand(B, ACT) * 2 - 1, "rew": torch.randn(B)}
        columns |= {"next_obs": torch.randn(B, OBS), "done": (torch.rand(B) < 0.1).float()}
        columns |= {"next_act": torch.rand(B, ACT) * 2 - 1}  # SARSA's
        yield Batch(**{k: columns[k] for k in Batch._fields})


def linears(net) -> list:
    return [m for m in net.modules() if isinstance(m, torch.nn.Linear)]


def weights_of(critic) -> list:
    """A stacked ensemble's weights as torch.nn.Linear has them: for each member, weight and bias of each layer."""
    layers = [*critic.layers, critic.head]
    return [p for i in range(critic.n) for x in layers for p in (x.weight[i].T, x.bias[i, 0])]


def params(modules) -> list:
    return [p for m in modules for p in (m.weight, m.bias)]


@torch.no_grad()
def copy_into(theirs: list, ours: list):
    for p, q in zip(theirs, ours, strict=True):
        p.copy_(q)


class Same:
    """Compares the weights of both after each update."""

    def __init__(self, pairs: dict):
        self.pairs = pairs  # name -> functions that give our and their tensors
        self.start = {
            k: torch.cat([p.detach().reshape(-1) for p in ours()]) for k, (ours, _) in pairs.items()
        }

    def show(self, update: int):
        words = []
        for k, (ours, theirs) in self.pairs.items():
            mine, peers = (torch.cat([p.detach().reshape(-1) for p in both()]) for both in (ours, theirs))
            moved, apart = (mine - self.start[k]).norm().item(), (mine - peers).norm().item()
            words.append(f"{k} {apart / moved:.1e}" if moved else f"{k} {apart:.1e} (not moved)")
        print(f"  update {update}: " + ", ".join(words))


def stable_baselines(name: str, updates: int):
    """SAC with a fixed and with a tuned temperature, or TD3, with their delays and target networks."""
    import stable_baselines3 as sb3

    module = __import__(name)
    for alpha in (0.2, None) if name == "sac" else (None,):
        torch.manual_seed(0)
        args = module.Args(**({"alpha": alpha} if name == "sac" else {}))
        ours = module.Learner(OBS, ACT, args, torch.device("cpu"))
        for net in (
            ours.critic,
            ours.target,
        ):  # its start near 0 gives gradients that rounding can turn around
            net.head.weight.data *= 100
        common = dict(policy="MlpPolicy", env=Shapes(), learning_rate=3e-4, batch_size=B, device="cpu")
        common |= dict(policy_kwargs=dict(net_arch=[WIDTH, WIDTH]), buffer_size=B)
        if name == "sac":
            peer = sb3.SAC(**common, ent_coef="auto" if alpha is None else alpha)
        else:
            peer = sb3.TD3(**common)
        if name == "sac":
            peer.actor.action_dist.epsilon = 0.0  # its guard in log(1 - a^2 + 1e-6); sac.py's form needs none
        peer._logger = SimpleNamespace(record=lambda *a, **k: None)

        heads = (lambda a: params(linears(a.latent_pi) + [a.mu, a.log_std])) if name == "sac" else None
        actor_of = heads or (lambda a: params(linears(a)))

        def split_head(actor):  # sac.py has mean and log std in one layer
            *hidden, last = linears(actor)
            if name == "td3":
                return params([*hidden, last])
            (w, v), (b, c) = last.weight.chunk(2), last.bias.chunk(2)
            return [*params(hidden), w, b, v, c]

        pairs = {
            "critic": (lambda: weights_of(ours.critic), lambda: params(linears(peer.critic))),
            "target": (lambda: weights_of(ours.target), lambda: params(linears(peer.critic_target))),
            "actor": (lambda: split_head(ours.actor), lambda: actor_of(peer.actor)),
        }
        if name == "td3":
            pairs["target actor"] = (
                lambda: split_head(ours.target_actor),
                lambda: actor_of(peer.actor_target),
            )
        elif alpha is None:
            pairs["log alpha"] = (lambda: [ours.log_alpha[None]], lambda: [peer.log_ent_coef])
        for mine, theirs in pairs.values():
            copy_into(theirs(), mine())
        same = Same(pairs)
        print(
            f"{name}, "
            + ("" if name == "td3" else f"alpha {alpha or 'tuned'}, ")
            + "against Stable-Baselines3"
        )
        for i, batch in enumerate(random_batches(updates, module.Batch)):
            seen = SimpleNamespace(
                observations=batch.obs, actions=batch.act, next_observations=batch.next_obs,
                rewards=batch.rew[:, None], dones=batch.done[:, None], discounts=None,
            )  # fmt: skip
            peer.replay_buffer = SimpleNamespace(sample=lambda *a, seen=seen, **k: seen)
            noise = torch.randn(2, B, ACT)  # for the states, for the next states
            with drawn(noise.flip(0) if name == "sac" else noise[1:]):
                ours.update(batch, policy=(i + 1) % args.policy_frequency == 0)
            with drawn(noise if name == "sac" else noise[1:]):
                peer.train(1, B)
            same.show(i + 1)


def d3rlpy(updates: int):
    """CQL(H) with the authors' estimator and a fixed temperature: d3rlpy tunes it before the policy's step."""
    import cql_continuous as module
    from d3rlpy.algos import CQLConfig
    from d3rlpy.models.encoders import VectorEncoderFactory
    from d3rlpy.torch_utility import TorchMiniBatch

    torch.manual_seed(0)
    args = module.Args(backup="mean", alpha=0.2, cql_proposals="three-sets", critic_depth=2, policy_depth=2)
    ours = module.Learner(OBS, ACT, args, torch.device("cpu"))
    for net in (ours.critic, ours.target):
        net.head.weight.data *= 100
    encoder = VectorEncoderFactory([WIDTH, WIDTH])
    peer = CQLConfig(
        actor_learning_rate=args.policy_lr, critic_learning_rate=args.q_lr, temp_learning_rate=0.0,
        alpha_learning_rate=0.0, initial_temperature=0.2, initial_alpha=1.0, conservative_weight=args.cql_alpha,
        n_action_samples=args.cql_samples, actor_encoder_factory=encoder, critic_encoder_factory=encoder,
    ).create(device="cpu")  # fmt: skip
    peer.create_impl((OBS,), ACT)
    m = peer.impl.modules

    def split_head(actor):
        *hidden, last = linears(actor)
        (w, v), (b, c) = last.weight.chunk(2), last.bias.chunk(2)
        return [*params(hidden), w, b, v, c]

    pairs = {
        "critic": (lambda: weights_of(ours.critic), lambda: params(linears(m.q_funcs))),
        "target": (lambda: weights_of(ours.target), lambda: params(linears(m.targ_q_funcs))),
        "actor": (lambda: split_head(ours.actor), lambda: params(linears(m.policy))),
    }
    for mine, theirs in pairs.values():
        copy_into(theirs(), mine())
    same, n = Same(pairs), args.cql_samples
    print("cql_continuous, --backup mean, alpha 0.2, against d3rlpy")
    for i, batch in enumerate(random_batches(updates, module.Batch)):
        column = {k: getattr(batch, k)[:, None] for k in ("rew", "done")}
        seen = TorchMiniBatch(
            batch.obs, batch.act, column["rew"], batch.next_obs, batch.next_act, column["rew"], column["done"],
            intervals=torch.ones(B, 1), device="cpu",
        )  # fmt: skip
        normal = [torch.randn(B, n, ACT), torch.randn(B, n, ACT), torch.randn(B, 1, ACT)]
        uniform = torch.rand(B, n, ACT)
        with drawn(normal, [uniform]):
            ours.update(lambda batch=batch: batch, cloning=False)
        with drawn([x.transpose(0, 1) for x in normal], [uniform.flatten(0, 1)]):
            peer.impl.inner_update(seen, i)
        same.show(i + 1)


class drawn:
    """Within it, random numbers are read from lists, whichever way they are asked for."""

    def __init__(self, normal, uniform=()):
        self.normal, self.uniform = [x.clone() for x in normal], [x.clone() for x in uniform]

    def __enter__(self):
        import torch.distributions.normal as distribution

        self.kept = (distribution._standard_normal, torch.randn, torch.rand)
        self.methods = (torch.Tensor.normal_, torch.Tensor.uniform_)
        distribution._standard_normal = lambda shape, **k: self.normal.pop(0).reshape(shape)
        torch.randn, torch.rand = lambda *a, **k: self.normal.pop(0), lambda *a, **k: self.uniform.pop(0)
        torch.Tensor.normal_ = lambda x, mean=0.0, std=1.0, **k: x.copy_(mean + std * self.normal.pop(0))
        torch.Tensor.uniform_ = lambda x, low=0.0, high=1.0, **k: x.copy_(
            low + (high - low) * self.uniform.pop(0)
        )

    def __exit__(self, kind, *_):
        import torch.distributions.normal as distribution

        distribution._standard_normal, torch.randn, torch.rand = self.kept
        torch.Tensor.normal_, torch.Tensor.uniform_ = self.methods
        assert kind or not (self.normal or self.uniform), "some noise was not drawn"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="+", choices=["sac", "td3", "cql"])
    parser.add_argument("--updates", type=int, default=5)
    args = parser.parse_args()
    for name in args.scripts:
        d3rlpy(args.updates) if name == "cql" else stable_baselines(name, args.updates)


if __name__ == "__main__":
    main()
