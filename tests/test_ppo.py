"""ppo.py: mathematics against independent answers, ends of episodes, normalisers, promises, learning."""

import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import ppo
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    assert_same_checkpoint,
    metrics,
    one_thread,
    only_run,
    run_script,
    summary,
)

CPU = torch.device("cpu")
TINY = dict(
    total_timesteps=400, num_envs=2, num_steps=40, num_minibatches=2, update_epochs=2, width=16
)
TINY |= dict(eval_episodes=2, eval_frequency=200, diagnostics_frequency=100, log_frequency=80)
TINY |= dict(checkpoint_frequency=150)
BOX, FOUR = gym.spaces.Box(-2, 2, (2,)), gym.spaces.Discrete(4)
OBS = gym.spaces.Box(-np.inf, np.inf, (3,))


def tiny(**changes):
    return ppo.Args(**TINY | changes)


class Counting(gym.Env):
    """Observes (episode, time); episode e lasts 3 + e % 3 steps; even ones terminate, odd ones time out."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.episode, self.t = -1, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), (
            "an action outside the box"
        )
        self.t += 1
        over, even = self.t == 3 + self.episode % 3, self.episode % 2 == 0
        return (
            np.array([self.episode, float(self.t)]),
            float(self.t),
            over and even,
            over and not even,
            {},
        )


class Target(gym.Env):
    """One step long: the reward of action a is -(a - 0.7 s)^2, s = +-1 is seen."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-2, 2, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = np.float32([self.np_random.choice([-1, 1])])
        return self.s, {}

    def step(self, action):
        return self.s, -float((action[0] - 0.7 * self.s[0]) ** 2), True, False, {}


class Broken(gym.Env):
    """`bad` is what it hands out at the tenth step: NaN or an infinity."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Discrete(2)

    def __init__(self, what, bad):
        self.what, self.bad = what, bad

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        now = self.bad if self.t == 10 else 0.0
        obs = np.array([now if self.what == "observation" else self.t, 0], np.float32)
        return obs, now if self.what == "reward" else 1.0, False, False, {}


class Bytes(gym.Env):
    """Observes two bytes, as a console's memory does; takes 3 or 4; the reward of 4 is 5."""

    observation_space = gym.spaces.Box(0, 255, (2,), np.uint8)
    action_space = gym.spaces.Discrete(2, start=3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([200, 100], np.uint8), {}

    def step(self, action):
        assert action in (3, 4), action
        return np.array([100, 200], np.uint8), 5.0 * (action == 4), False, False, {}


BROKEN = {
    f"Broken-{what}-{bad}-v0": (Broken, {"what": what, "bad": bad})
    for what in ("reward", "observation")
    for bad in (math.nan, math.inf)
}
MADE = {
    "PPOCounting-v0": (Counting, {}),
    "Target-v0": (Target, {}),
    "Bytes-v0": (Bytes, {}),
} | BROKEN
for name, (kind, options) in MADE.items():
    if name not in gym.registry:
        gym.register(name, entry_point=kind, max_episode_steps=100, kwargs=options)


# ---------------------------------------------------------------------------------------- mathematics
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_the_weighted_sum_of_n_step_advantages(lam):
    """Seed 004's sum with its missing factor: (1 - lambda) sum_n lambda^(n-1) A^(n), the rest of the weight
    on the longest one. One episode that is still running at the end of the rollout."""
    rng, T, gamma = np.random.default_rng(0), 12, 0.9
    rew, value = rng.normal(size=(T, 1)), rng.normal(size=(T + 1, 1))
    zero = np.zeros((T, 1))
    advantage = ppo.gae(rew, value, zero, zero, gamma, lam)
    for t in range(T):
        n_step = [
            sum(gamma**k * rew[t + k, 0] for k in range(n))
            + gamma**n * value[t + n, 0]
            - value[t, 0]
            for n in range(1, T - t + 1)
        ]
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, T - t)] + [lam ** (T - t - 1)]
        assert abs(sum(weights) - 1) < 1e-12
        assert abs(advantage[t, 0] - np.dot(weights, n_step)) < 1e-10


def test_gae_of_a_perfect_critic_is_zero_and_of_constant_rewards_closed_form():
    gamma, lam, T = 0.9, 0.8, 50
    rew, zero = np.ones((T, 1)), np.zeros((T, 1))
    assert np.allclose(ppo.gae(rew, np.full((T + 1, 1), 10.0), zero, zero, gamma, lam), 0)
    advantage = ppo.gae(rew, np.zeros((T + 1, 1)), zero, zero, gamma, lam)[:, 0]
    assert np.allclose(advantage, (1 - (gamma * lam) ** np.arange(T, 0, -1)) / (1 - gamma * lam))


def test_gae_at_the_ends_of_episodes():
    """Row 1 ends an episode (and row 2 is its reset): a termination has no value after it, a truncation has
    that of its true last observation; neither hears of what follows."""
    rew, value = (
        np.array([[1.0], [2.0], [0.0], [5.0]]),
        np.array([[0.5], [0.7], [3.0], [9.0], [4.0]]),
    )
    over, zero = np.array([[0.0], [1.0], [0.0], [0.0]]), np.zeros((4, 1))
    g, lam = 0.9, 0.5
    for end, last in ((over, 0.0), (zero, 3.0)):
        a = ppo.gae(rew, value, end, over, g, lam)[:, 0]
        d1 = 2 + g * last - 0.7
        assert abs(a[1] - d1) < 1e-12 and abs(a[0] - (1 + g * 0.7 - 0.5 + g * lam * d1)) < 1e-12
        assert abs(a[3] - (5 + g * 4 - 9)) < 1e-12


@pytest.mark.parametrize("space", [BOX, FOUR])
def test_log_prob_and_entropy_against_torch_distributions(space):
    agent = ppo.Agent(OBS, space, ppo.Args(width=8, log_std_init=-0.3))
    head = torch.randn(64, 4 if space is FOUR else 2)
    act = agent.sample(head)
    if space is FOUR:
        other = torch.distributions.Categorical(logits=head)
    else:
        other = torch.distributions.Independent(
            torch.distributions.Normal(head, agent.log_std.exp()), 1
        )
    assert torch.allclose(agent.log_prob(head, act), other.log_prob(act), atol=1e-5)
    assert torch.allclose(agent.entropy(head), other.entropy(), atol=1e-5)


def test_samples_have_the_policys_probabilities():
    agent = ppo.Agent(OBS, FOUR, ppo.Args(width=8))
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    counts = torch.bincount(agent.sample(p.log().expand(40_000, 4)), minlength=4) / 40_000
    assert (abs(counts - p) < 4 * (p * (1 - p) / 40_000).sqrt()).all()
    agent = ppo.Agent(OBS, BOX, ppo.Args(width=8, log_std_init=math.log(0.5)))
    x = agent.sample(torch.tensor([1.0, -1.0]).expand(40_000, 2))
    assert torch.allclose(x.mean(0), torch.tensor([1.0, -1.0]), atol=0.012)
    assert torch.allclose(x.std(0), torch.tensor([0.5, 0.5]), atol=0.008)


def a_batch(agent, n=200):
    obs = torch.randn(n, 3)
    with torch.no_grad():
        head, value = agent(obs)
        act = agent.sample(head)
        logp = agent.log_prob(head, act)
    return ppo.Batch(obs, act, logp, value, torch.randn(n), torch.randn(n))


@pytest.mark.parametrize("space", [BOX, FOUR])
@pytest.mark.parametrize(
    "clip_vloss, norm_adv, entropy", [(True, "minibatch", "bonus"), (False, "none", "return")]
)
def test_the_loss_by_hand(space, clip_vloss, norm_adv, entropy):
    """Row by row in plain Python, with ratios on both sides of both clips."""
    args = ppo.Args(
        width=8,
        clip_vloss=clip_vloss,
        norm_adv=norm_adv,
        entropy=entropy,
        ent_coef=0.03,
        clip_coef=0.2,
    )
    agent = ppo.Agent(OBS, space, args)
    b = a_batch(agent)
    b = b._replace(logp=b.logp + 0.3 * torch.randn(200), value=b.value + 0.3 * torch.randn(200))
    loss, info = ppo.ppo_loss(agent, b, args)
    head, value = agent(b.obs)
    logp, adv = agent.log_prob(head, b.act).tolist(), b.advantage
    if norm_adv == "minibatch":
        adv = (adv - adv.mean()) / adv.std()
    policy = error = clipped = 0.0
    kinds = set()
    for i in range(200):
        w, a = math.exp(logp[i] - b.logp[i].item()), adv[i].item()
        limit = 1.2 if a > 0 else 0.8
        held = w > limit if a > 0 else w < limit
        policy += limit * a if held else w * a
        kinds.add((a > 0, held))
        clipped += abs(w - 1) > 0.2
        v, v0, y = value[i].item(), b.value[i].item(), b.target[i].item()
        near = min(max(v, v0 - 0.2), v0 + 0.2)
        error += max((v - y) ** 2, (near - y) ** 2) if clip_vloss else (v - y) ** 2
    assert len(kinds) == 4
    bonus = 0.03 * agent.entropy(head).mean().item() if entropy == "bonus" else 0.0
    assert abs(loss.item() - (-policy / 200 + 0.5 * 0.5 * error / 200 - bonus)) < 1e-5
    assert abs(info["clipfrac"].item() - clipped / 200) < 1e-6


@pytest.mark.parametrize("space", [BOX, FOUR])
def test_the_first_step_is_the_policy_gradient(space):
    """At pi = pi_old the clip is silent: the gradient is that of -E[A log pi(a|s)]."""
    args = ppo.Args(width=8, norm_adv="none", ent_coef=0.0, vf_coef=0.0)
    agent = ppo.Agent(OBS, space, args)
    b = a_batch(agent)
    params = list(agent.actor.parameters())
    ours = torch.autograd.grad(ppo.ppo_loss(agent, b, args)[0], params)
    plain = torch.autograd.grad(
        -(b.advantage * agent.log_prob(agent(b.obs)[0], b.act)).mean(), params
    )
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, plain))


def test_kl_estimates_agree_with_the_kl_of_two_gaussians():
    args = ppo.Args(width=8, norm_adv="none")
    agent = ppo.Agent(OBS, BOX, args)
    b = a_batch(agent, 100_000)
    agent.actor[-1].bias.data += 0.2  # KL of two unit Gaussians: |shift|^2 / 2 = 0.04
    _, info = ppo.ppo_loss(agent, b, args)
    assert abs(info["approx_kl"] - 0.04) < 0.001 and abs(info["old_approx_kl"] - 0.04) < 0.004


def test_moments_merged_batch_by_batch_are_those_of_all_rows():
    x = np.random.default_rng(0).normal(3, [1, 10], (1000, 2))
    m = ppo.Moments((2,))
    for part in np.split(x, [0, 1, 10, 500]):
        m.update(torch.from_numpy(part))
    assert np.allclose(m.mean, x.mean(0)) and np.allclose(m.var, x.var(0)) and m.count == 1000
    z = m.standardise(torch.from_numpy(x).float())
    assert torch.allclose(z.mean(0), torch.zeros(2), atol=1e-5) and torch.allclose(
        z.var(0, unbiased=False), torch.ones(2)
    )


@pytest.mark.parametrize("discrete", [True, False])
def test_initialisation(discrete):
    """[2] Orthogonal hidden weights of gain sqrt 2, a policy head of gain 0.01, zero biases."""
    agent = ppo.Agent(OBS, FOUR if discrete else BOX, ppo.Args())
    w = agent.actor[2].weight
    assert torch.allclose(w @ w.T, 2 * torch.eye(64), atol=1e-5)
    head = agent.actor[-1].weight
    assert torch.allclose(head @ head.T, 1e-4 * torch.eye(len(head)), atol=1e-8)
    assert all((p == 0).all() for n, p in agent.named_parameters() if n.endswith("bias"))


# ------------------------------------------------------------------------------------ episodes' ends
def collected(steps=40, **changes):
    args = tiny(env_id="PPOCounting-v0", num_steps=steps, **changes)
    envs = ppo.make_train_envs(args)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    rollout, ended = ppo.Player(envs, 0).collect(learner, args)
    return learner, rollout, ended, args


def test_reset_rows_are_no_experience():
    learner, r, ended, args = collected()
    obs, after = r.obs[:-1], r.obs[1:]
    v = r.valid
    assert (obs[v][:, 0] == after[v][:, 0]).all() and (after[v][:, 1] == obs[v][:, 1] + 1).all()
    assert (
        (after[~v][:, 1] == 0).all()
        and (r.rew[~v] == 0).all()
        and (~v).sum() == 2 * (r.over[:-1, 0].sum())
    )
    length = 3 + obs[..., 0] % 3
    assert torch.equal(r.over.bool() & v, (after[..., 1] == length) & v)
    assert torch.equal(r.terminated.bool(), r.over.bool() & (obs[..., 0] % 2 == 0))
    batch = learner.batch_of(r)
    assert len(batch.logp) == int(v.sum()) and ended[0] == (6.0, 3) and ended[2] == (10.0, 4)


def test_truncation_bootstraps_from_the_true_last_observation():
    """With lambda 0: target = r + gamma V(last observation) after a time-out, r after a termination. The flag
    shows the old behaviour."""
    for bootstrap in (True, False):
        learner, r, _, args = collected(gae_lambda=0.0, bootstrap_truncation=bootstrap)
        batch, valid = learner.batch_of(r), r.valid.flatten()
        rew, over, terminated = (x.flatten()[valid] for x in (r.rew, r.over, r.terminated))
        v_next = r.value[1:].flatten()[valid]
        last = batch.obs.clone()
        last[:, 1] += 1
        assert torch.allclose(v_next, learner.agent(last)[1], atol=1e-6)
        cut = terminated if bootstrap else over
        assert torch.allclose(batch.target, rew + args.gamma * v_next * (1 - cut), atol=1e-5)


def test_the_maximum_entropy_return():
    """--entropy return: -c_e log pi(a|s) is part of each reward."""
    learner, r, _, args = collected(gae_lambda=0.0)
    plain = learner.batch_of(r).target
    learner.args = replace(args, entropy="return", ent_coef=0.5)
    rows = r.valid.flatten()
    assert torch.allclose(
        learner.batch_of(r).target, plain - 0.5 * r.logp.flatten()[rows], atol=1e-5
    )


def test_normalisers_leave_reset_rows_out_and_forget_at_the_end_of_an_episode():
    learner, r, _, args = collected(normalize_obs=True, normalize_reward=True)
    sums, seen = [], []
    for env in (0, 1):
        running = 0.0
        for t in range(40):
            if r.valid[t, env]:
                reward = (
                    float(r.obs[t, env, 1]) + 1
                )  # the first rollout's observations are as they came
                running = running * args.gamma + reward
                sums.append(running)
                seen.append(r.obs[t, env].tolist())
            if r.over[t, env]:
                running = 0.0
    assert (
        learner.return_stats.count == len(sums)
        and abs(learner.return_stats.var - np.var(sums)) < 1e-9
    )
    expected = [float(r.obs[t, e, 1]) + 1 for t in range(40) for e in (0, 1) if r.valid[t, e]]
    assert np.allclose(
        r.rew.flatten()[r.valid.flatten()], np.array(expected) / np.std(sums), rtol=1e-5
    )
    learner.obs_stats.update(r.raw_obs)
    assert np.allclose(learner.obs_stats.mean, np.mean(seen, 0)) and np.allclose(
        learner.obs_stats.var, np.var(seen, 0)
    )


def test_evaluation_leaves_normalisers_and_generators_alone():
    learner, r, _, args = collected(normalize_obs=True, normalize_reward=True)
    learner.obs_stats.update(r.raw_obs)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    state = torch.get_rng_state()
    returns = ppo.evaluate(learner, ppo.make_eval_envs(args), args)
    assert returns.tolist() == [6.0, 6.0]  # true rewards: 1 + 2 + 3
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_reset_at_the_start_of_a_rollout_is_no_experience_either():
    """Rollouts of three steps, as long as the first episode: what is left to do crosses their border."""
    args = tiny(env_id="PPOCounting-v0", num_steps=3, normalize_reward=True)
    envs = ppo.make_train_envs(args)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    player, seen, ended = ppo.Player(envs, 0), [], []
    for _ in range(4):  # 3 steps and a reset; 4 and a reset; 3 of the third
        r, now = player.collect(learner, args)
        seen.append(r.valid[:, 0].tolist())
        ended += now
    assert sum(seen, []) == [True] * 3 + [False] + [True] * 4 + [False] + [True] * 3
    assert ended == [(6.0, 3)] * 2 + [(10.0, 4)] * 2
    sums, running = [], 0.0
    for n in (3, 4, 3):  # discounted sums go on over the border of rollouts, not of episodes
        running = 0.0
        for t in range(n):
            running = running * args.gamma + t + 1
            sums += [running] * 2
    assert learner.return_stats.count == 20 and abs(learner.return_stats.var - np.var(sums)) < 1e-9


def test_observations_and_rewards_are_normalised_apart():
    _, plain, _, _ = collected()
    learner, r, _, _ = collected(normalize_obs=True)
    assert learner.return_stats is None and torch.equal(r.rew, plain.rew) and r.raw_obs is not None
    learner, r, _, _ = collected(normalize_reward=True)
    assert learner.obs_stats is None and not torch.equal(r.rew, plain.rew) and r.raw_obs is None


def test_what_is_normalised_is_clipped_at_ten():
    learner, r, _, args = collected(normalize_obs=True, normalize_reward=True)
    learner.obs_stats.update(torch.randn(1000, 2))
    far = learner.standardised(np.array([[1e6, -1e6]]))
    assert far.tolist() == [[10.0, -10.0]]
    learner.return_stats.update(torch.randn(100_000, dtype=torch.float64))
    player, one = ppo.Player(ppo.make_train_envs(args), 0), np.ones((1, 2), np.float32)
    rew = player.scaled(one * [1e6, -1e6], one, one > 0, learner, args)
    assert rew.tolist() == [[10.0, -10.0]]


def test_the_environment_gets_clipped_actions_the_batch_the_sample():
    _, r, _, _ = collected(log_std_init=1.0)  # Counting asserts that its actions are in the box
    assert r.act.abs().max() > 1.5


# --------------------------------------------------------------------------------------------- update
def test_every_valid_row_is_used_once_an_epoch(monkeypatch):
    learner, r, _, args = collected(update_epochs=3, num_minibatches=4)
    seen, loss = [], learner.loss

    def noted(agent, batch, args):
        seen.append(batch.logp)
        return loss(agent, batch, args)

    learner.loss = noted
    learner.update(r)
    everything = learner.batch_of(r).logp.sort().values
    assert len(seen) == 12
    for epoch in range(3):
        assert torch.equal(torch.cat(seen[4 * epoch : 4 * epoch + 4]).sort().values, everything)
    assert not torch.equal(seen[0], seen[4])


@pytest.mark.parametrize("steps, parts", [(4, 2), (40, 8)])
def test_no_minibatch_has_fewer_than_two_rows(steps, parts):
    """Episodes of one step: every second row is a reset, so that 2 x 4 rows hold 4 of experience."""
    args = tiny(env_id="Target-v0", num_steps=steps, num_minibatches=8, update_epochs=1)
    envs = ppo.make_train_envs(args)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    r, _ = ppo.Player(envs, 0).collect(learner, args)
    sizes, loss = [], learner.loss
    learner.loss = lambda agent, batch, args: (
        sizes.append(len(batch.logp)) or loss(agent, batch, args)
    )
    info = learner.update(r)
    assert len(sizes) == parts and min(sizes) >= 2 and sum(sizes) == steps
    assert all(torch.isfinite(x).all() for x in [*info.values(), *learner.parameters()])


def test_explained_variance_is_finite_where_nothing_varies():
    learner, r, _, _ = collected()
    batch = learner.batch_of(r)
    expected = 1 - float((batch.target - batch.value).var() / batch.target.var())
    assert abs(float(learner.update(r)["explained_variance"]) - expected) < 1e-5
    r = r._replace(rew=r.rew * 0, value=r.value * 0)
    assert torch.isfinite(learner.update(r)["explained_variance"])


def test_advantages_standardised_over_the_batch():
    learner, r, _, args = collected(norm_adv="none")
    plain = learner.batch_of(r).advantage
    learner.args = replace(args, norm_adv="batch")
    assert torch.allclose(
        learner.batch_of(r).advantage, (plain - plain.mean()) / plain.std(), atol=1e-5
    )


def test_settings_of_networks_and_learning_rate():
    """--activation relu, --no-orthogonal (nn.Linear's own weights), --no-anneal-lr, and a run with them."""
    torch.manual_seed(0)
    args = tiny(
        activation="relu", orthogonal=False, anneal_lr=False, norm_adv="batch", log_frequency=1
    )
    agent = ppo.Agent(OBS, FOUR, args)
    assert [type(m) for m in agent.actor] == [torch.nn.Linear, torch.nn.ReLU] * 2 + [
        torch.nn.Linear
    ]
    torch.manual_seed(0)
    assert torch.equal(agent.actor[0].weight, torch.nn.Linear(3, 16).weight)
    ppo.train(args)
    rates = [float(v) for _, tag, v in metrics(only_run(".")) if tag == "charts/learning_rate"]
    assert len(rates) > 2 and set(rates) == {2.5e-4}


def test_what_is_logged_lies_on_the_learners_device():
    learner, r, _, _ = collected()
    with torch.device("meta"):  # a tensor made without a device lands here
        info = learner.update(r)
    assert {x.device for x in info.values()} == {CPU}


def test_early_stop_recomputed_advantages_and_the_clipped_gradient(monkeypatch):
    for target_kl, epochs in ((1e-9, 1), (1e9, 5)):
        learner, r, _, _ = collected(update_epochs=5, target_kl=target_kl)
        assert learner.update(r)["epochs"] == epochs
    calls = []
    original = ppo.Learner.batch_of
    monkeypatch.setattr(
        ppo.Learner, "batch_of", lambda self, x: calls.append(1) or original(self, x)
    )
    for recompute, count in ((False, 1), (True, 5)):
        calls.clear()
        learner, r, _, _ = collected(update_epochs=5, recompute_advantages=recompute)
        assert learner.update(r)["epochs"] == 5 and len(calls) == count
    norms, step = [], torch.optim.Adam.step

    def noted(self, *a):
        grads = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        norms.append(torch.cat(grads).norm())
        return step(self, *a)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    collected(max_grad_norm=0.01)[0].update(r)
    assert max(norms) <= 0.0101


def test_recomputed_advantages_follow_the_critic():
    learner, r, _, args = collected(recompute_advantages=True, gae_lambda=0.0)
    before = learner.batch_of(r)
    learner.agent.critic[-1].bias.data += 1.0  # V + 1: delta falls by 1 - gamma or, at an end, by 1
    after = learner.batch_of(r)
    ended = r.terminated.flatten()[r.valid.flatten()] > 0
    change = after.advantage - before.advantage
    assert torch.allclose(change[ended], torch.tensor(-1.0), atol=1e-4)
    assert torch.allclose(change[~ended], torch.tensor(-(1 - args.gamma)), atol=1e-4)


def test_the_learning_rate_falls_to_zero():
    ppo.train(tiny(env_id="CartPole-v1", log_frequency=1))
    rates = [(s, float(v)) for s, tag, v in metrics(only_run(".")) if tag == "charts/learning_rate"]
    assert len(rates) > 2
    steps = [0] + [s for s, _ in rates]
    assert all(abs(rate - 2.5e-4 * (1 - s / 400)) < 1e-12 for s, (_, rate) in zip(steps, rates))


# ---------------------------------------------------------------------------------- spaces, precision
@pytest.mark.parametrize("normalize", [False, True])
def test_bytes_are_a_vector_and_a_discrete_space_may_start_anywhere(normalize):
    """A vector of uint8 is no frame: its rewards are not clipped, and --normalize acts on it."""
    args = tiny(env_id="Bytes-v0", normalize_obs=normalize, normalize_reward=normalize)
    envs = ppo.make_train_envs(args)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    r, _ = ppo.Player(envs, 0).collect(learner, args)
    assert r.obs.dtype == torch.float32 and set(r.act.unique().tolist()) == {0, 1}
    if normalize:
        learner.obs_stats.update(r.raw_obs)
        assert abs(learner.standardised(np.array([[200, 100]], np.uint8))).max() < 10
    else:
        assert torch.equal(r.rew, 5.0 * (r.act == 1))
    assert torch.isfinite(learner.update(r)["policy_loss"])
    assert ppo.acting(learner, r.obs[0].numpy(), envs.single_action_space).min() >= 3


def test_strict_fp32_is_strict_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    with ppo.strict_fp32():
        assert (
            torch.get_float32_matmul_precision() == "highest"
            and not torch.backends.cudnn.allow_tf32
        )
        assert not torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


# ---------------------------------------------------------------------------------------------- Atari
def test_atari_frames_rewards_and_lives():
    """Breakout by chance: a lost life cuts the bootstrap but plays on; the return is the whole game's."""
    args = tiny(env_id="ALE/Breakout-v5", num_steps=600, num_envs=2)
    envs = ppo.make_train_envs(args)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    learner.agent.forward = lambda obs: (torch.zeros(len(obs), 4), torch.zeros(len(obs)))
    learner.agent.policy = lambda obs: torch.zeros(len(obs), 4)
    rollout, ended = ppo.Player(envs, 0).collect(learner, args)
    assert rollout.obs.dtype == torch.uint8 and rollout.obs.shape == (601, 2, 4, 84, 84)
    assert set(rollout.rew.unique().tolist()) <= {0.0, 1.0}
    lost = int(rollout.over.sum())
    assert len(ended) >= 2 and 5 * len(ended) <= lost <= 5 * len(ended) + 8
    assert len(ended) - 2 <= int((~rollout.valid).sum()) <= len(ended)
    assert all(length > 60 for _, length in ended)  # five lives, not one
    assert sum(score for score, _ in ended) <= float(rollout.rew.sum())


class Frames:
    """Two games that hand out rewards of 4 and -7; the second one loses a life at its first step."""

    num_envs, metadata = 2, {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_action_space, single_observation_space = (
        FOUR,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
    )
    frames = np.zeros((2, 4, 84, 84), np.uint8)

    def reset(self, seed=None):
        self.t = 0
        return self.frames, {}

    def step(self, act):
        self.t += 1
        lives = {"lives": np.array([5, 4])}
        return (
            self.frames,
            np.array([4.0, -7.0]),
            np.array([False, self.t == 1]),
            np.zeros(2, bool),
            lives,
        )


def test_rewards_of_games_are_clipped_to_their_sign_in_learning_alone():
    args = tiny(num_steps=4)
    learner = ppo.Learner(Frames.single_observation_space, FOUR, args, CPU)
    player = ppo.Player(Frames(), 0)
    r, ended = player.collect(learner, args)
    assert (
        r.rew.tolist() == [[1.0, -1.0]] * 4
        and player.returns.tolist() == [16.0, -28.0]
        and not ended
    )
    assert (
        r.over[:, 1].tolist() == [1.0, 0.0, 0.0, 0.0] and r.valid.all()
    )  # a life, and no reset after it


def test_atari_trains_in_bf16():
    line = [
        "--env",
        "ALE/Pong-v5",
        "--total-timesteps",
        "32",
        "--num-envs",
        "2",
        "--num-steps",
        "8",
    ]
    line += [
        "--num-minibatches",
        "2",
        "--update-epochs",
        "1",
        "--eval-episodes",
        "0",
        "--log-frequency",
        "1",
    ]
    ppo.train(tyro.cli(ppo.Args, args=[*line, "--precision", "bf16"]))
    losses = [float(v) for _, tag, v in metrics(only_run(".")) if tag == "losses/policy_loss"]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_atari_trains_and_resumes(capsys):
    short = dict(num_envs=2, num_steps=16, update_epochs=1, num_minibatches=2, eval_episodes=0)
    args = ppo.Args(
        env_id="ALE/Pong-v5", total_timesteps=64, log_frequency=1, diagnostics_frequency=32, **short
    )
    ppo.train(args)
    result = ppo.train(replace(args, total_timesteps=96, resume=str(only_run("."))))
    assert result["global_step"] == 96 and "cannot be restored exactly" in capsys.readouterr().out
    tags = {tag for _, tag, _ in metrics(only_run("."))}
    assert {"diagnostics/srank_policy", "losses/policy_loss", "losses/explained_variance"} <= tags


# ------------------------------------------------------------------------------------------- promises
@pytest.mark.parametrize(
    "more",
    [
        ["--env", "HalfCheetah-v5", "--normalize-obs", "--normalize-reward"],
        ["--env", "CartPole-v1", "--num-envs", 3],
    ],
)
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(more, tmp_path):
    line = [
        "--total-timesteps",
        700,
        "--num-steps",
        50,
        "--width",
        16,
        "--log-frequency",
        60,
        *more,
    ]
    line += ["--eval-frequency", 200, "--eval-episodes", 1, "--checkpoint-frequency", 200]
    line += ["--diagnostics-frequency", 150]
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    run_script("ppo.py", *line, cwd=tmp_path / "whole")
    code = f"""
import os, sys, signal
sys.path.insert(0, {str(ROOT)!r})
import ppo, tyro
collect, count = ppo.Player.collect, [0]
def counted(*a):
    count[0] += 1
    if count[0] == 3: os.kill(os.getpid(), {int(signal.SIGTERM)})
    return collect(*a)
ppo.Player.collect = counted
ppo.train(tyro.cli(ppo.Args, args={[str(x) for x in line]!r}))
"""
    options = dict(
        cwd=tmp_path / "parts", capture_output=True, text=True, env=one_thread(), timeout=180
    )
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(tmp_path / "parts")
    time.sleep(1.1)
    run_script("ppo.py", *line, "--resume", run, cwd=tmp_path / "parts")
    whole = only_run(tmp_path / "whole")
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 60


def test_diagnostics_logging_evaluation_and_video_change_nothing():
    on = tiny(env_id="CartPole-v1", exp_name="on", capture_video=True)
    off = replace(on, exp_name="off", eval_episodes=0, diagnostics_frequency=0, log_frequency=10**6)
    for args in (on, replace(off, checkpoint_frequency=0, capture_video=False)):
        ppo.train(args)
    runs = {p.name.split("__")[1]: p for p in Path("runs").iterdir()}
    a, b = (torch.load(runs[k] / "checkpoint.pt", weights_only=True) for k in ("on", "off"))
    assert all(
        torch.equal(v, b["learner"]["networks"][k]) for k, v in a["learner"]["networks"].items()
    )
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    assert list((runs["on"] / "videos").glob("step-*/*.mp4"))


def test_same_seed_same_numbers_another_seed_others():
    results = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        ppo.train(tiny(seed=seed, exp_name=name))
        (run,) = Path("runs").glob(f"*__{name}__*")
        results.append(metrics(run))
    assert results[0] == results[1] != results[2]


def test_non_finite_numbers_stop_the_run_before_a_checkpoint(monkeypatch, capsys):
    collect, count = ppo.Player.collect, [0]

    def poisoned(*a):
        rollout, ended = collect(*a)
        count[0] += 1
        return (rollout._replace(rew=rollout.rew * math.nan) if count[0] == 4 else rollout), ended

    monkeypatch.setattr(ppo.Player, "collect", poisoned)
    with pytest.raises(SystemExit) as stop:
        ppo.train(tiny())
    assert stop.value.code == 3 and "not finite" in capsys.readouterr().err
    assert torch.load(only_run(".") / "checkpoint.pt", weights_only=True)["step"] < 300


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Target-v0"])
def test_non_finite_parameters_never_reach_the_sampler(env_id, monkeypatch, capsys):
    update = ppo.Learner.update

    def poisoned(self, rollout):
        info = update(self, rollout)
        self.agent.actor[-1].bias.data[0] = math.nan
        return info

    monkeypatch.setattr(ppo.Learner, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        ppo.train(
            tiny(env_id=env_id, log_frequency=10**6, eval_episodes=0, diagnostics_frequency=0)
        )
    assert stop.value.code == 3 and "agent.actor.4.bias is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("env_id", BROKEN)
def test_non_finite_numbers_of_the_environment_are_named(env_id, normalize, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.train(
            tiny(
                env_id=env_id, normalize_obs=normalize, normalize_reward=normalize, eval_episodes=0
            )
        )
    err = capsys.readouterr().err
    assert stop.value.code == 3 and env_id in err and f"{env_id.split('-')[1]} is not finite" in err
    assert not (only_run(".") / "checkpoint.pt").exists()


def files(run: Path) -> dict:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir() if p.is_file()}


def test_a_finished_run_resumed_is_left_as_it_is(capsys):
    """Even by a command that would evaluate what was not evaluated before."""
    first = ppo.train(tiny(eval_episodes=0))
    run = only_run(".")
    before = files(run)
    again = ppo.train(tiny(eval_episodes=2, resume=str(run)))
    assert again == first and again["steps_per_second"] > 0 and files(run) == before
    assert "complete" in (out := capsys.readouterr().out) and "--total-timesteps" in out
    longer = ppo.train(tiny(total_timesteps=600, resume=str(run)))
    assert longer["global_step"] >= 600 and math.isfinite(longer["final_return_mean"])


def test_a_summary_from_before_a_run_was_made_longer_is_not_taken_for_its_own():
    ppo.train(tiny())
    run = only_run(".")
    old = (run / "summary.json").read_bytes()
    step = ppo.train(tiny(total_timesteps=600, resume=str(run)))["global_step"]
    (run / "summary.json").write_bytes(old)  # as if killed just before the last line
    assert ppo.train(tiny(total_timesteps=600, resume=str(run)))["global_step"] == step
    assert summary(run)["global_step"] == step


def test_where_new_episodes_start_no_discounted_return_goes_on(capsys):
    learner, _, _, args = collected(normalize_obs=True, normalize_reward=True)
    player = ppo.Player(ppo.make_train_envs(args), 0)
    player.collect(learner, args)
    saved, fresh = player.checkpoint(), ppo.Player(ppo.make_train_envs(args), 0)
    assert saved["envs"] is None and (saved["discounted"] > 0).any()
    fresh.restore(saved, 7)
    assert (fresh.discounted == 0).all() and "new episodes" in capsys.readouterr().out
    args = replace(args, env_id="CartPole-v1")
    envs = ppo.make_train_envs(args)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    player = ppo.Player(envs, 0)
    player.collect(learner, args)
    fresh = ppo.Player(ppo.make_train_envs(args), 0)
    fresh.restore(player.checkpoint(), 7)
    assert (fresh.discounted == player.discounted).all() and (fresh.discounted > 0).any()


BAD = [
    (["--env", "NoSuch-v1"], "NoSuch"),
    (["--env", "ALE/NoSuch-v5"], "NoSuch"),
    (["--env", "PPODict-v0"], "observations"),
    (["--env", "PPOPixels-v0"], "observations"),
    (["--gamma", "1"], "--gamma"),
    (["--gae-lambda", "nan"], "--gae-lambda"),
    (["--num-steps", "0"], "--num-steps"),
    (["--num-steps", "3"], "--num-steps"),
    (["--num-minibatches", "257"], "--num-minibatches"),
    (["--seed", "1000001"], "--seed"),
    (["--env", "ALE/Pong-v4"], "-v5"),
    (["--env", "ALE/Pong"], "-v5"),
    (["--sticky", "0.5"], "--sticky"),
    (["--ent-coef", "0", "--entropy", "return"], "--entropy"),
    (["--env", "ALE/Pong-v5", "--normalize-obs"], "--normalize-obs"),
    (["--env", "ALE/Pong-v5", "--normalize-reward"], "--normalize-reward"),
    (["--env", "ALE/Pong-v5", "--width", "32"], "--width"),
    (["--env", "ALE/Pong-v5", "--capture-video"], "--capture-video"),
    (["--precision", "bf16"], "bf16"),
    (["--precision", "tf32"], "GPU"),
    (["--resume", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize("line, named", BAD, ids=[" ".join(x[0]) for x in BAD])
def test_a_users_mistake_is_one_line_and_status_2(line, named, capfd):
    class Dict(Target):
        observation_space = gym.spaces.Dict({"x": OBS})

    class Pixels(Target):
        observation_space = Frames.single_observation_space

    for name, kind in (("PPODict-v0", Dict), ("PPOPixels-v0", Pixels)):
        if name not in gym.registry:
            gym.register(name, entry_point=kind, max_episode_steps=5)
    with pytest.raises(SystemExit) as stop:
        ppo.train(tyro.cli(ppo.Args, args=line))
    err = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert stop.value.code == 2 and len(err) == 1 and named in err[0] and not Path("runs").exists()


# -------------------------------------------------------------------------------- commands, learning
def documented_commands() -> list:
    commands = []
    for file in ("README.md", "benchmarks/README.md", "ppo.py"):
        text = (ROOT / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.endswith(".md") else text.split('"""')[1]
        commands += re.findall(r"python ppo\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to one or two rollouts and one evaluation episode."""
    args = tyro.cli(ppo.Args, args=shlex.split(command)[2:])
    short = dict(
        num_steps=32, num_minibatches=min(args.num_minibatches, 4), update_epochs=2, eval_episodes=1
    )
    if args.env_id.startswith("ALE/"):
        short |= dict(num_envs=2, num_steps=8, eval_episodes=0)
    ppo.check(args)
    assert ppo.train(replace(args, total_timesteps=40, **short))["global_step"] >= 40


def test_ppo_learns_cartpole():
    """Balancing by chance lasts about 20 steps, the limit is 500."""
    assert ppo.train(ppo.Args(total_timesteps=40_000, eval_frequency=0))["final_return_mean"] > 300


def test_ppo_learns_a_continuous_target():
    """-(a - 0.7 s)^2: from -0.49 at a = 0 to near 0; mean +-0.7."""
    args = ppo.Args(env_id="Target-v0", total_timesteps=8_000, num_envs=8, num_steps=64, learning_rate=3e-3,
                    log_std_init=-0.7, ent_coef=0.0, update_epochs=10)  # fmt: skip
    assert ppo.train(args)["final_return_mean"] > -0.03
    assert summary(only_run("."))["eval_episodes"] == 10
