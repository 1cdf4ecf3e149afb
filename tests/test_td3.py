"""td3.py: what differs from sac.py. The replay, environments, promises and commands of both are
tested together in test_online.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import td3
import torch

CPU = torch.device("cpu")


def a_learner(**changes):
    args = td3.Args(**dict(width=8) | changes)
    learner = td3.Learner(3, 2, args, CPU)
    for net in (learner.target, learner.target_actor):  # apart from the networks that they follow
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return learner, args


def a_batch(n=64, done=0.3):
    r = torch.randn
    return td3.Batch(r(n, 3), r(n, 2).tanh(), r(n), r(n, 3), (torch.rand(n) < done).float())


def mlp(x, layers):
    """float64 numpy; ReLU between the layers, each (weight (in, out), bias)."""
    for i, (w, b) in enumerate(layers):
        x = x @ w + b
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def as_numpy(x):
    return x.detach().double().numpy()


def q_values(critic, obs, act):
    layers = [*critic.layers, critic.head]
    inputs = np.hstack([obs, act])
    return np.array(
        [
            mlp(inputs, [(as_numpy(m.weight[i]), as_numpy(m.bias[i])) for m in layers])[:, 0]
            for i in (0, 1)
        ]
    )


def policy(actor, obs):
    linear = [m for m in actor.net if isinstance(m, torch.nn.Linear)]
    return np.tanh(mlp(obs, [(as_numpy(m.weight).T, as_numpy(m.bias)) for m in linear]))


def test_backup_and_losses_by_hand():
    learner, args = a_learner(gamma=0.9, policy_noise=0.6, noise_clip=0.5)
    batch = a_batch()
    b = {k: as_numpy(v) for k, v in batch._asdict().items()}
    torch.manual_seed(3)
    noise = np.clip(0.6 * as_numpy(torch.randn(64, 2)), -0.5, 0.5)
    assert (abs(noise) == 0.5).any()
    next_act = np.clip(policy(learner.target_actor, b["next_obs"]) + noise, -1, 1)
    y = b["rew"] + 0.9 * (1 - b["done"]) * q_values(learner.target, b["next_obs"], next_act).min(0)
    torch.manual_seed(3)
    loss, info = td3.critic_loss(learner, batch, args)
    expected = ((q_values(learner.critic, b["obs"], b["act"]) - y) ** 2).mean(1)
    assert abs(float(info["qf1_loss"]) - expected[0]) < 1e-5 * expected[0]
    assert abs(loss.item() - expected.sum()) < 1e-5 * expected.sum()
    loss, _ = td3.actor_loss(learner, batch, args)
    first = q_values(learner.critic, b["obs"], policy(learner.actor, b["obs"]))[0]
    assert abs(loss.item() + first.mean()) < 1e-6


def test_the_targets_action_stays_in_the_box():
    learner, args = a_learner(policy_noise=5.0, noise_clip=3.0)
    act, _ = td3.backup(learner, a_batch(1000), args)
    assert act.abs().max() == 1 and (act.abs() < 1).any()


def test_target_smoothing_off_is_the_target_policy():
    learner, args = a_learner(policy_noise=0.0)
    batch = a_batch()
    assert torch.equal(td3.backup(learner, batch, args)[0], learner.target_actor(batch.next_obs))


def test_exploration_noise_is_drawn_for_each_environment_and_dimension():
    learner, _ = a_learner(exploration_noise=0.01)
    obs = torch.zeros(1, 3).expand(5000, 3)
    noise = learner.act(obs, explore=True) - learner.act(obs, explore=False)
    assert torch.allclose(noise.std(0), torch.full((2,), 0.01), rtol=0.05)
    assert len(noise[:, 0].unique()) > 4000 and abs(torch.corrcoef(noise.T)[0, 1]) < 0.06
    act = a_learner(exploration_noise=9.0)[0].act(obs, explore=True)
    assert act.abs().max() <= 1


@pytest.mark.parametrize("delayed", [True, False])
def test_the_policy_and_all_targets_wait_together(delayed):
    learner, args = a_learner(tau=0.25)
    nets = {k: getattr(learner, k) for k in ("actor", "critic", "target", "target_actor")}
    before = {k: [p.clone() for p in net.parameters()] for k, net in nets.items()}
    info = learner.update(a_batch(), with_policy=delayed)
    moved = {
        k: any(not torch.equal(p, q) for p, q in zip(before[k], nets[k].parameters())) for k in nets
    }
    assert moved == {"critic": True, "actor": delayed, "target": delayed, "target_actor": delayed}
    assert ("actor_loss" in info) == delayed
    if delayed:
        for name, target in (("critic", "target"), ("actor", "target_actor")):
            for p, old, new in zip(
                nets[name].parameters(), before[target], nets[target].parameters()
            ):
                assert torch.allclose(new, 0.75 * old + 0.25 * p, atol=1e-7)


def test_ddpg_is_three_switches():
    """One critic, no smoothing, no delay: y = r + gamma Qt(s', pit(s')); each update moves all."""
    learner, args = a_learner(num_critics=1, policy_noise=0.0, policy_frequency=1)
    batch = a_batch()
    with torch.no_grad():
        _, y = td3.backup(learner, batch, args)
        q = learner.target(batch.next_obs, learner.target_actor(batch.next_obs))[0]
    assert torch.allclose(y, batch.rew + 0.99 * (1 - batch.done) * q)
    ddpg = dict(num_critics=1, policy_noise=0.0, policy_frequency=1, width=8)
    args = td3.Args(**ddpg, total_timesteps=60, learning_starts=20, eval_episodes=0)
    counts = []
    update = td3.Learner.update

    class Counted(td3.Learner):
        def update(self, batch, with_policy):
            counts.append(with_policy)
            return update(self, batch, with_policy)

    original, td3.Learner = td3.Learner, Counted
    try:
        td3.train(args)
    finally:
        td3.Learner = original
    assert counts == [True] * 40


def test_maximisation_bias_and_its_cure_by_a_second_estimator():
    """A policy that picks the best-looking of ten worthless actions by the first critic: 1.54 with
    that critic alone, about 0 with the smaller of two."""
    n, k = 20_000, 10
    noise = torch.randn(2, n, k)
    best = noise[0].argmax(1).float()[:, None] / k  # an action in the box, ten cells wide
    batch = td3.Batch(
        torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n), torch.zeros(n, 1), torch.zeros(n)
    )
    means = {}
    for critics in (1, 2):
        seen = noise[:critics]

        def q(obs, act, seen=seen):
            cell = (act * k).round().long().expand(*seen.shape[:2], 1)
            return seen.gather(2, cell)[..., 0]

        learner = SimpleNamespace(target_actor=lambda obs: best, target=q)
        args = td3.Args(num_critics=critics, policy_noise=0.0, gamma=0.99999)
        means[critics] = float(td3.backup(learner, batch, args)[1].mean())
    assert abs(means[1] - 1.5388) < 0.02 and -0.2 < means[2] < 0


def test_td3_learns_pendulum():
    """A random policy has about -1,200, standing up about -150."""
    fast = dict(learning_starts=500, batch_size=128, width=64, eval_frequency=0)
    fast |= dict(policy_lr=1e-3, q_lr=1e-3, checkpoint_frequency=0)
    assert td3.train(td3.Args(total_timesteps=7_000, **fast))["final_return_mean"] > -400
