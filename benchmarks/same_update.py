"""Updates of the scripts beside a peer's: the same weights, minibatches and noise, in float64.

  sb3/bin/python benchmarks/same_update.py sac td3 ppo    # pip install tyro tensorboard there
  peer/bin/python benchmarks/same_update.py cql atari constraints    # likewise

Both do --updates updates on the same random minibatches (HalfCheetah's shapes) through their own
training code; ppo: on rollouts of 256 random steps in which episodes end, the advantages computed
by each; atari: discrete CQL on vectors. Printed after each: the distance between our weights and
theirs, relative to the distance that ours have moved. Status 1 if one is above the tolerance of
its comparison: rounding, where all of both codes can be made to use float64. The last update's
numbers go to benchmarks/raw/same_update_*.csv. Not compared: initial weights, replay and its
sampling, environments, time limits.
"""

import argparse
import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
OBS, ACT, B, WIDTH = 17, 6, 256, 256
ROWS = []  # comparison, network, update, relative distance, tolerance
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # where either code asks for fp32


class Shapes(gym.Env):
    """Nothing but the spaces, which the peer reads."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACT,), np.float32)


def random_batches(n: int, Batch):
    for _ in range(n):
        columns = {
            "obs": torch.randn(B, OBS),
            "act": torch.rand(B, ACT) * 2 - 1,
            "rew": torch.randn(B),
        }
        columns |= {"next_obs": torch.randn(B, OBS), "done": (torch.rand(B) < 0.1).float()}
        columns |= {"next_act": torch.rand(B, ACT) * 2 - 1}  # SARSA's
        yield Batch(**{k: columns[k] for k in Batch._fields})


class drawn:
    """Within it, random numbers are read from lists, whichever way they are asked for."""

    def __init__(self, normal, uniform=()):
        self.normal, self.uniform = [x.clone() for x in normal], [x.clone() for x in uniform]

    def __enter__(self):
        import torch.distributions.normal as distribution

        self.kept = (distribution._standard_normal, torch.randn, torch.rand)
        self.methods = (torch.Tensor.normal_, torch.Tensor.uniform_)
        normal, uniform = lambda: self.normal.pop(0), lambda: self.uniform.pop(0)
        distribution._standard_normal = lambda shape, **k: normal().reshape(shape)
        torch.randn, torch.rand = lambda *a, **k: normal(), lambda *a, **k: uniform()
        torch.Tensor.normal_ = lambda x, mean=0.0, std=1.0, **k: x.copy_(mean + std * normal())
        torch.Tensor.uniform_ = lambda x, low=0.0, high=1.0, **k: x.copy_(
            low + (high - low) * uniform()
        )

    def __exit__(self, error, *_):
        import torch.distributions.normal as distribution

        distribution._standard_normal, torch.randn, torch.rand = self.kept
        torch.Tensor.normal_, torch.Tensor.uniform_ = self.methods
        assert error or not (self.normal or self.uniform), "some noise was not drawn"


# ------------------------------------------- weights, as a list of tensors in the peers' order
def of_linears(net) -> list:
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    return [p for m in layers for p in (m.weight, m.bias)]


def of_stacked(critic) -> list:
    """Member by member, layer by layer, each weight as torch.nn.Linear has it."""
    layers = [*critic.layers, critic.head]
    return [p for i in range(critic.n) for x in layers for p in (x.weight[i].T, x.bias[i, 0])]


def of_gaussian(actor) -> list:
    """The peers have two last layers, for the mean and for the log deviation; ours is one."""
    *hidden, weight, bias = of_linears(actor)
    return [*hidden, *(p for pair in zip(weight.chunk(2), bias.chunk(2)) for p in pair)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in tensors])


def compare(title: str, pairs: dict, batches, update, tolerance: float):
    """pairs: name -> (function that gives our tensors, function that gives theirs)."""
    for ours, theirs in pairs.values():
        for p, q in zip(theirs(), ours(), strict=True):
            p.data.copy_(q)
    start = {k: flat(ours()).clone() for k, (ours, _) in pairs.items()}
    print(f"{title} (tolerance {tolerance:g})")
    for i, batch in enumerate(batches):
        update(i, batch)
        moved = {k: float((flat(ours()) - start[k]).norm()) for k, (ours, _) in pairs.items()}
        apart = {
            k: float((flat(ours()) - flat(theirs())).norm()) for k, (ours, theirs) in pairs.items()
        }
        share = {
            k: apart[k] / moved[k] if moved[k] else apart[k] for k in pairs
        }  # a delayed one stands still
        print(f"  update {i + 1}: " + ", ".join(f"{k} {x:.1e}" for k, x in share.items()))
    ROWS.extend([title, k, i + 1, f"{x:.3g}", tolerance] for k, x in share.items())


def our_learner(module, args):
    torch.manual_seed(0)
    return module.Learner(OBS, ACT, args, torch.device("cpu"))


def sac(updates: int, alpha: float | None):
    """alpha None: tuned (sac.py descends Eq. 18 in alpha, Stable-Baselines3 in log alpha)."""
    import sac as module
    import stable_baselines3 as sb3

    ours = our_learner(module, module.Args(alpha=alpha))
    peer = sb3.SAC(
        "MlpPolicy", Shapes(), learning_rate=3e-4, batch_size=B, buffer_size=B, device="cpu",
        policy_kwargs=dict(net_arch=[WIDTH, WIDTH]), ent_coef="auto" if alpha is None else alpha,
    )  # fmt: skip
    peer._logger = SimpleNamespace(record=lambda *a, **k: None)
    peer.actor.action_dist.epsilon = (
        0.0  # its guard in log(1 - a^2 + 1e-6); sac.py's form needs none
    )
    pairs = {
        "critic": (lambda: of_stacked(ours.critic), lambda: of_linears(peer.critic)),
        "target": (lambda: of_stacked(ours.target), lambda: of_linears(peer.critic_target)),
        "actor": (lambda: of_gaussian(ours.actor), lambda: of_linears(peer.actor)),
    }
    if alpha is None:
        pairs["log alpha"] = (lambda: [ours.log_alpha[None]], lambda: [peer.log_ent_coef])

    def update(i, batch):
        noise = torch.randn(2, B, ACT)  # for a' and a; the peer draws them in the other order
        with drawn(noise):
            ours.update(batch, with_policy=True)
        with drawn(noise.flip(0)):
            sb3_update(peer, batch)

    batches = random_batches(updates, module.Batch)
    title = f"sac.py, alpha {alpha or 'tuned'}, and Stable-Baselines3"
    tolerance = 1e-10 if alpha else 1e-4  # the two forms differ a little
    compare(title, pairs, batches, update, tolerance)


def td3(updates: int):
    import stable_baselines3 as sb3
    import td3 as module

    args = module.Args()
    ours = our_learner(module, args)
    peer = sb3.TD3(
        "MlpPolicy", Shapes(), learning_rate=3e-4, batch_size=B, buffer_size=B, device="cpu",
        policy_kwargs=dict(net_arch=[WIDTH, WIDTH]),
    )  # fmt: skip
    peer._logger = SimpleNamespace(record=lambda *a, **k: None)
    pairs = {
        "critic": (lambda: of_stacked(ours.critic), lambda: of_linears(peer.critic)),
        "target": (lambda: of_stacked(ours.target), lambda: of_linears(peer.critic_target)),
        "actor": (lambda: of_linears(ours.actor), lambda: of_linears(peer.actor)),
        "target actor": (
            lambda: of_linears(ours.target_actor),
            lambda: of_linears(peer.actor_target),
        ),
    }

    def update(i, batch):
        noise = torch.randn(1, B, ACT)
        with drawn(noise):
            ours.update(batch, with_policy=(i + 1) % args.policy_frequency == 0)
        with drawn(noise):
            sb3_update(peer, batch)

    batches = random_batches(updates, module.Batch)
    compare("td3.py and Stable-Baselines3", pairs, batches, update, tolerance=1e-10)


def ppo(updates: int):
    """One minibatch an epoch, the whole rollout, since both shuffle. Their vf_coef multiplies the
    squared error, ours half of it."""
    import ppo as module
    import stable_baselines3 as sb3

    torch.manual_seed(0)
    args = module.Args(num_minibatches=1, update_epochs=10, clip_vloss=False, vf_coef=1.0)
    ours = module.Learner(Shapes.observation_space, Shapes.action_space, args, torch.device("cpu"))
    peer = sb3.PPO(
        "MlpPolicy", Shapes(), n_steps=B, batch_size=B, n_epochs=10, device="cpu",
        learning_rate=args.learning_rate, gamma=args.gamma, gae_lambda=args.gae_lambda,
        ent_coef=args.ent_coef, vf_coef=0.5, max_grad_norm=args.max_grad_norm,
        clip_range=args.clip_coef,
    )  # fmt: skip
    peer._logger = SimpleNamespace(record=lambda *a, **k: None)
    peer.rollout_buffer = sb3.common.buffers.RolloutBuffer(
        B, peer.observation_space, peer.action_space, "cpu", args.gae_lambda, args.gamma
    )
    net, theirs = peer.policy, peer.policy.mlp_extractor
    pairs = {
        "actor": (
            lambda: [*of_linears(ours.agent.actor), ours.agent.log_std],
            lambda: [*of_linears(theirs.policy_net), *of_linears(net.action_net), net.log_std],
        ),
        "critic": (
            lambda: of_linears(ours.agent.critic),
            lambda: [*of_linears(theirs.value_net), *of_linears(net.value_net)],
        ),
    }

    def rollouts():
        """Of random steps; each end is a terminal one."""
        for _ in range(updates):
            states, act, rew = torch.randn(B + 1, OBS), torch.randn(B, 1, ACT), torch.randn(B, 1)
            over = torch.rand(B, 1) < 0.05
            ends = over, torch.zeros_like(over)
            with torch.no_grad():
                head, value, next_value = module.assess(ours.agent, states, *ends)
                logp = ours.agent.log_prob(head, act[:, 0])[:, None]
                last = ours.agent(states[-1:])[1]
            yield module.Rollout(states, act, logp, value, next_value, rew, *ends, []), last

    def update(i, drawn_rollout):
        r, last = drawn_rollout
        peer.rollout_buffer.reset()
        first = np.append(1.0, r.terminated[:-1].numpy())
        for t in range(B):
            row = (r.states[t : t + 1].numpy(), r.act[t].numpy(), r.rew[t].numpy())
            peer.rollout_buffer.add(*row, first[t : t + 1], r.value[t], r.logp[t])
        peer.rollout_buffer.compute_returns_and_advantage(last, r.terminated[-1].numpy())
        peer.train()
        ours.update(r)

    title = "ppo.py and Stable-Baselines3"
    compare(title, pairs, rollouts(), update, tolerance=1e-5)  # its buffer is fp32


def sb3_update(peer, batch):
    seen = SimpleNamespace(
        observations=batch.obs, actions=batch.act, next_observations=batch.next_obs,
        rewards=batch.rew[:, None], dones=batch.done[:, None], discounts=None,
    )  # fmt: skip
    peer.replay_buffer = SimpleNamespace(sample=lambda *a, **k: seen)
    peer.train(1, B)


def cql(updates: int):
    """CQL(H), the authors' estimator, a fixed temperature (d3rlpy tunes it before the policy)."""
    import cql_continuous as module
    from d3rlpy.algos import CQLConfig
    from d3rlpy.models.encoders import VectorEncoderFactory
    from d3rlpy.torch_utility import TorchMiniBatch

    args = module.Args(backup="mean", alpha=0.2, width=WIDTH, depth=2, cql_backward=0)
    ours, n = our_learner(module, args), args.cql_samples
    encoder = VectorEncoderFactory([WIDTH, WIDTH])
    peer = CQLConfig(
        actor_learning_rate=args.policy_lr, critic_learning_rate=args.q_lr, temp_learning_rate=0.0,
        initial_temperature=0.2, alpha_learning_rate=0.0, initial_alpha=1.0,
        conservative_weight=args.cql_alpha, n_action_samples=n,
        actor_encoder_factory=encoder, critic_encoder_factory=encoder,
    ).create(device="cpu")  # fmt: skip
    peer.create_impl((OBS,), ACT)
    theirs = peer.impl.modules
    pairs = {
        "critic": (lambda: of_stacked(ours.critic), lambda: of_linears(theirs.q_funcs)),
        "target": (lambda: of_stacked(ours.target), lambda: of_linears(theirs.targ_q_funcs)),
        "actor": (lambda: of_gaussian(ours.actor), lambda: of_linears(theirs.policy)),
    }

    def update(i, batch):
        rew, done = batch.rew[:, None], batch.done[:, None]
        seen = TorchMiniBatch(
            batch.obs, batch.act, rew, batch.next_obs, batch.next_act, returns_to_go=rew,
            terminals=done, intervals=torch.ones(B, 1), device="cpu",
        )  # fmt: skip
        normal = [torch.randn(B, n, ACT), torch.randn(B, n, ACT), torch.randn(B, 1, ACT)]
        uniform = torch.rand(B, n, ACT)
        with drawn(normal, [uniform]):
            ours.update(lambda: batch, cloning=False)
        with drawn([x.transpose(0, 1) for x in normal], [uniform.flatten(0, 1)]):
            peer.impl.inner_update(seen, i)

    title = "cql_continuous.py, --backup mean, alpha 0.2, and d3rlpy"
    batches = random_batches(updates, module.Batch)
    compare(
        title, pairs, batches, update, tolerance=1e-6
    )  # its temperature and weight are fp32 parameters


def atari(updates: int):
    """Double Q-learning with 200 quantiles and the conservative term, on vectors; targets copied
    every third
    time."""
    import cql_atari as module
    import d3rlpy
    from d3rlpy.torch_utility import TorchMiniBatch

    torch.manual_seed(0)
    args = module.Args(env_id=("CartPole-v1",), n_step=1, cql_alpha=4.0, width=WIDTH // 16)
    ours = module.Learner((OBS,), [ACT], args, torch.device("cpu"))
    adam_eps = 0.01 / 32
    peer = d3rlpy.algos.DiscreteCQLConfig(
        learning_rate=args.learning_rate, optim_factory=d3rlpy.optimizers.AdamFactory(eps=adam_eps),
        alpha=args.cql_alpha, n_critics=1, target_update_interval=3,
        q_func_factory=d3rlpy.models.QRQFunctionFactory(n_quantiles=200),
        encoder_factory=d3rlpy.models.encoders.VectorEncoderFactory([WIDTH, WIDTH]),
    ).create(device="cpu")  # fmt: skip
    peer.create_impl((OBS,), ACT)
    theirs = peer.impl.modules
    pairs = {
        "network": (lambda: of_linears(ours.net), lambda: of_linears(theirs.q_funcs)),
        "target": (lambda: of_linears(ours.target), lambda: of_linears(theirs.targ_q_funcs)),
    }

    def update(i, batch):
        rew, done = batch.rew[:, None], (batch.discount == 0).float()[:, None]
        seen = TorchMiniBatch(
            batch.obs, batch.act[:, None], rew, batch.next_obs, batch.act[:, None],
            returns_to_go=rew, terminals=done, intervals=torch.ones(B, 1), device="cpu",
        )  # fmt: skip
        ours.update([batch])
        if i % 3 == 0:
            ours.refresh_target()
        peer.impl.inner_update(seen, i)

    def batches():
        for _ in range(updates):
            discount = args.gamma * (torch.rand(B) > 0.1)
            act = torch.randint(ACT, (B,))
            yield module.Batch(
                torch.randn(B, OBS), act, torch.randn(B), torch.randn(B, OBS), discount
            )

    compare("cql_atari.py, 200 quantiles, and d3rlpy", pairs, batches(), update, tolerance=1e-10)


def constraints(updates: int):
    """AWAC and CRR with binary weights. d3rlpy's policy is a Gaussian around tanh(mean), with one
    deviation for all states; here it gets the squashed Gaussian of ours, in the module that trains
    it. Its AWAC's target has an entropy bonus, which is turned off; its CRR's comes from a slowly
    moving policy, for which the policy itself is put."""
    import policy_constraints as module
    from d3rlpy.algos import AWACConfig, CRRConfig
    from d3rlpy.algos.qlearning import awac, crr
    from d3rlpy.algos.qlearning.torch import awac_impl, crr_impl
    from d3rlpy.models.builders import create_normal_policy
    from d3rlpy.models.encoders import VectorEncoderFactory
    from d3rlpy.models.torch import build_squashed_gaussian_distribution
    from d3rlpy.optimizers import AdamFactory
    from d3rlpy.torch_utility import TorchMiniBatch

    def squashed_policy(*words, **named):
        head = {"min_logstd": -5.0, "max_logstd": 2.0, "use_std_parameter": False}
        return create_normal_policy(*words, **named | head)

    for part, own in ((awac, awac_impl), (crr, crr_impl)):
        part.create_normal_policy = squashed_policy
        own.build_gaussian_distribution = build_squashed_gaussian_distribution
    encoder = VectorEncoderFactory([WIDTH, WIDTH])
    common = dict(
        actor_learning_rate=1e-4, critic_learning_rate=3e-4,
        actor_encoder_factory=encoder, critic_encoder_factory=encoder,
    )  # fmt: skip
    summed = AdamFactory(eps=1e-8 * B)  # its AWAC's loss is a sum over the minibatch
    both = {
        "AWAC": (
            dict(extract="exp", normalise_weights=True, advantage_samples=1, temperature=0.7),
            AWACConfig(**common, actor_optim_factory=summed, lam=0.7),
        ),
        "CRR": (
            dict(extract="binary", advantage_samples=4, num_critics=1),
            CRRConfig(**common, n_critics=1, weight_type="binary", target_update_type="soft"),
        ),
    }
    for name, (flags, config) in both.items():
        args = module.Args(**flags)
        ours, n = our_learner(module, args), args.advantage_samples
        peer = config.create(device="cpu")
        peer.create_impl((OBS,), ACT)
        theirs = peer.impl.modules
        if name == "AWAC":
            next(theirs.log_temp.parameters()).data.fill_(-1e3)
        else:
            object.__setattr__(theirs, "targ_policy", theirs.policy)
            peer.impl.update_actor_target = lambda: None
        pairs = {
            "critic": (lambda o=ours: of_stacked(o.critic), lambda t=theirs: of_linears(t.q_funcs)),
            "target": (
                lambda o=ours: of_stacked(o.target),
                lambda t=theirs: of_linears(t.targ_q_funcs),
            ),
            "actor": (
                lambda o=ours: [*of_linears(o.actor.net), *of_heads(o.actor.head)],
                lambda t=theirs: of_linears(t.policy),
            ),
        }

        def update(i, batch, ours=ours, peer=peer, n=n):
            rew, done = batch.rew[:, None], batch.done[:, None]
            seen = TorchMiniBatch(
                batch.obs, batch.act, rew, batch.next_obs, batch.act, returns_to_go=rew,
                terminals=done, intervals=torch.ones(B, 1), device="cpu",
            )  # fmt: skip
            normal = [torch.randn(B, 1, ACT), torch.randn(B, n, ACT)]
            with drawn(normal):
                ours.update(lambda: batch, cloning=False)
            with drawn([x.transpose(0, 1) for x in normal]):
                peer.impl.inner_update(seen, i)

        batches = random_batches(updates, module.Batch)
        title = f"policy_constraints.py, {name}, and d3rlpy"
        compare(title, pairs, batches, update, tolerance=1e-8)


def of_heads(head) -> list:
    """Of one layer for mean and log deviation, the two layers that the peer has."""
    return [p for pair in zip(head.weight.chunk(2), head.bias.chunk(2)) for p in pair]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="+", choices="sac td3 ppo cql atari constraints".split())
    parser.add_argument("--updates", type=int, default=5)
    args = parser.parse_args()
    for name in args.scripts:
        if name == "sac":
            sac(args.updates, alpha=0.2)
            sac(args.updates, alpha=None)
        else:
            found = {"td3": td3, "ppo": ppo, "cql": cql, "atari": atari, "constraints": constraints}
            found[name](args.updates)
    out = Path(__file__).resolve().parent / "raw" / f"same_update_{'_'.join(args.scripts)}.csv"
    with open(out, "w", newline="") as f:
        csv.writer(f).writerows(
            ["comparison network update relative_distance tolerance".split(), *ROWS]
        )
    sys.exit(any(float(share) > tolerance for *_, share, tolerance in ROWS))


if __name__ == "__main__":
    main()
