"""ppo.py: mathematics against independent answers, episodes' ends, promises, learning."""

import math
import re
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import conftest
import gymnasium as gym
import numpy as np
import ppo
import pytest
import torch
import tyro
from conftest import ROOT, metrics, only_run, run_script, stop_at
from gymnasium.spaces import Box, Discrete

CPU = torch.device("cpu")
TINY = {"total_timesteps": 400, "num_envs": 2, "num_steps": 40, "width": 16, "log_frequency": 80}
TINY |= {"num_minibatches": 2, "update_epochs": 2, "eval_episodes": 2, "eval_frequency": 200}
OBS, BOX, FOUR = Box(-np.inf, np.inf, (3,)), Box(-2, 2, (2,)), Discrete(4)


class Target(gym.Env):
    """One step long: the reward of action a is -(a / 1000 - 0.5 - 0.3 s)^2, s = +-1 is seen."""

    observation_space, action_space = Box(-1, 1, (1,)), Box(0, 1000, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = np.float32([self.np_random.choice([-1, 1])])
        return self.s, {}

    def step(self, action):
        return self.s, -float((action[0] / 1000 - 0.5 - 0.3 * self.s[0]) ** 2), True, False, {}


class Toy(gym.Env):
    """Any spaces; the reward of a Discrete's action is the action. At the tenth step `bad` stands
    in the reward or in the observation, which may be an episode's last."""

    def __init__(self, obs=OBS, act=FOUR, where="", bad=0.0):
        self.observation_space, self.action_space, self.where, self.bad = obs, act, where, bad

    def see(self):
        obs = self.observation_space.sample()
        if self.t == 10 and "observation" in self.where:
            obs[0] = self.bad
        return obs

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.see(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        rew = self.bad if self.where == "reward" and self.t == 10 else float(action)
        return self.see(), rew, False, self.where == "last observation" and self.t == 10, {}


REFUSED = {
    "Pixels": {"obs": Box(0, 255, (4, 84, 84), np.uint8)},
    "Number": {"obs": Discrete(3)},
    "Many": {"act": gym.spaces.MultiDiscrete([2, 2])},
    "Infinite": {"act": Box(-np.inf, np.inf, (1,))},
    "OneSided": {"act": Box(0, np.inf, (1,))},
    "Largest": {"act": Box(-3.4e38, 3.4e38, (1,))},
    "Integers": {"act": Box(0, 10, (1,), np.int64)},
}
BYTES = {"obs": Box(0, 255, (2,), np.uint8), "act": Discrete(2, start=3)}
for name, spaces in (REFUSED | {"Toy": {}, "Bytes": BYTES}).items():
    gym.register(f"PPO{name}-v0", entry_point=Toy, kwargs=spaces, max_episode_steps=20)
gym.register("PPOTarget-v0", entry_point=Target, max_episode_steps=20)


@pytest.fixture
def stack():
    with ExitStack() as opened:
        yield opened


def tiny(**changes):
    return ppo.Args(**TINY | changes)


def make(args, stack):
    """Learner and collector."""
    envs = ppo.make(args, args.num_envs, stack, training=True)
    learner = ppo.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    return learner, ppo.Collector(envs, args)


def collected(stack, env_id="Counting-v0", **changes):
    args = tiny(env_id=env_id, **changes)
    learner, collector = make(args, stack)
    return learner, *collector.collect(learner), args


# -------------------------------------------------------------------------------------- mathematics
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_the_weighted_sum_of_n_step_advantages(lam):
    """Seed 004's sum with its missing factor: (1 - lambda) sum_n lambda^(n-1) A^(n), the rest of
    the weight on the longest one. One episode that is still running at the end of the rollout."""
    T, gamma = 12, 0.9
    rew, value = torch.randn(T, 1).double(), torch.randn(T + 1, 1).double()
    advantage = ppo.gae(rew, value[:-1], value[1:], torch.zeros(T, 1) > 0, gamma, lam)
    for t in range(T):
        n_step = []
        for n in range(1, T - t + 1):
            rewards = sum(gamma**k * rew[t + k, 0] for k in range(n))
            n_step.append(rewards + gamma**n * value[t + n, 0] - value[t, 0])
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, T - t)] + [lam ** (T - t - 1)]
        assert abs(sum(weights) - 1) < 1e-12
        assert abs(advantage[t, 0] - np.dot(weights, n_step)) < 1e-10


def test_gae_of_constant_rewards_and_at_an_episodes_end():
    gamma, lam, T = 0.9, 0.8, 50
    one, zero = torch.ones(T, 1).double(), torch.zeros(T, 1).double()
    exact = (1 - (gamma * lam) ** torch.arange(T, 0, -1)[:, None]) / (1 - gamma * lam)
    assert torch.allclose(ppo.gae(one, zero, zero, zero > 0, gamma, lam), exact.double())
    over = torch.arange(T)[:, None] == 19  # row 19 does not hear of row 20
    cut = ppo.gae(one, zero, zero, over, gamma, lam)
    assert torch.allclose(cut, torch.cat([exact[30:], exact[20:]]).double())


@pytest.mark.parametrize("space", [BOX, FOUR])
def test_log_prob_entropy_and_samples_against_torch_distributions(space):
    agent = ppo.Agent(OBS, space, ppo.Args(width=8, log_std_init=-0.3))
    head = torch.randn(64, 4 if space is FOUR else 2)
    act = agent.sample(head)
    if space is FOUR:
        other = torch.distributions.Categorical(logits=head)
    else:
        normal = torch.distributions.Normal(head, agent.log_std.exp())
        other = torch.distributions.Independent(normal, 1)
    assert torch.allclose(agent.log_prob(head, act), other.log_prob(act), atol=1e-5)
    assert torch.allclose(agent.entropy(head), other.entropy(), atol=1e-5)
    many = agent.sample(head[0].expand(40_000, -1)).float()
    if space is FOUR:
        many = torch.nn.functional.one_hot(many.long(), 4).float()
    mean = other.probs[0] if space is FOUR else head[0]
    std = other.variance[0].sqrt() if space is BOX else (mean * (1 - mean)).sqrt()
    assert (abs(many.mean(0) - mean) < 4 * std / 200).all()
    assert (abs(many.std(0) - std) < 0.015).all()


def a_batch(agent, n=200):
    obs = torch.randn(n, 3)
    with torch.no_grad():
        head, value = agent(obs)
        act = agent.sample(head)
        logp = agent.log_prob(head, act)
    return ppo.Batch(obs, act, logp, value, torch.randn(n), torch.randn(n))


@pytest.mark.parametrize("space", [BOX, FOUR])
@pytest.mark.parametrize("entropy", ["bonus", "return"])
@pytest.mark.parametrize("switch", [True, False])
def test_the_loss_by_hand(space, switch, entropy):
    """Row by row in plain Python, with ratios on both sides of both clips."""
    switches = {"clip_vloss": switch, "norm_adv": switch, "entropy": entropy}
    args = ppo.Args(width=8, ent_coef=0.03, clip_coef=0.2, **switches)
    agent = ppo.Agent(OBS, space, args)
    b = a_batch(agent)
    b = b._replace(logp=b.logp + 0.3 * torch.randn(200), value=b.value + 0.3 * torch.randn(200))
    loss, info = ppo.ppo_loss(agent, b, args)
    head, value = agent(b.obs)
    logp, adv = agent.log_prob(head, b.act).tolist(), b.advantage
    if switch:
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
        error += max((v - y) ** 2, (near - y) ** 2) if switch else (v - y) ** 2
    assert len(kinds) == 4  # gains and losses, held and free
    bonus = 0.03 * agent.entropy(head).mean().item() if entropy == "bonus" else 0.0
    assert abs(loss.item() - (-policy / 200 + 0.5 * 0.5 * error / 200 - bonus)) < 1e-5
    assert abs(info["clipfrac"].item() - clipped / 200) < 1e-6


@pytest.mark.parametrize("space", [BOX, FOUR])
def test_the_first_step_is_the_policy_gradient(space):
    """At pi = pi_old the clip is silent: the gradient is that of -E[A log pi(a|s)]."""
    args = ppo.Args(width=8, norm_adv=False, ent_coef=0.0, vf_coef=0.0)
    agent = ppo.Agent(OBS, space, args)
    b, params = a_batch(agent), list(agent.actor.parameters())
    ours = torch.autograd.grad(ppo.ppo_loss(agent, b, args)[0], params)
    logp = agent.log_prob(agent(b.obs)[0], b.act)
    plain = torch.autograd.grad(-(b.advantage * logp).mean(), params)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, plain))


def test_kl_estimates_agree_with_the_kl_of_two_gaussians():
    args = ppo.Args(width=8, norm_adv=False, log_std_init=0.0)
    agent = ppo.Agent(OBS, BOX, args)
    b = a_batch(agent, 100_000)
    agent.actor[-1].bias.data += 0.2  # KL of two unit Gaussians: |shift|^2 / 2 = 0.04
    _, info = ppo.ppo_loss(agent, b, args)
    assert abs(info["approx_kl"] - 0.04) < 0.001 and abs(info["old_approx_kl"] - 0.04) < 0.004


def test_statistics_merged_batch_by_batch_are_those_of_all_rows():
    x = np.random.default_rng(0).normal(3, [1, 10], (1000, 2))
    stats = ppo.RunningMeanStd((2,))
    for part in np.split(x, [1, 10, 500]):
        stats.update(torch.from_numpy(part))
    assert np.allclose(stats.mean, x.mean(0)) and np.allclose(stats.var, x.var(0))
    z = stats.standardise(torch.from_numpy(x).float())
    assert torch.allclose(z.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(z.var(0, correction=0), torch.ones(2))


@pytest.mark.parametrize("space", [BOX, FOUR])
def test_initialisation(space):
    """[2] Orthogonal hidden weights of gain sqrt 2, a policy head of gain 0.01, zero biases."""
    agent = ppo.Agent(OBS, space, ppo.Args())
    w, head = agent.actor[2].weight, agent.actor[-1].weight
    assert torch.allclose(w @ w.T, 2 * torch.eye(64), atol=1e-5)
    assert torch.allclose(head @ head.T, 1e-4 * torch.eye(len(head)), atol=1e-8)
    assert all((p == 0).all() for n, p in agent.named_parameters() if n.endswith("bias"))


# ----------------------------------------------------------------------------------- episodes' ends
def test_a_rollout_holds_experience_and_the_true_ends(stack):
    learner, r, ended, args = collected(stack)
    obs, K = r.states[:80].view(40, 2, 2), int(r.truncated.sum())
    length = 3 + obs[..., 0] % 3
    over, even = obs[..., 1] == length - 1, obs[..., 0] % 2 == 0
    assert torch.equal(r.terminated, over & even) and torch.equal(r.truncated, over & ~even)
    assert torch.equal(r.rew, obs[..., 1] + 1)
    assert (obs[1:][over[:-1]][:, 1] == 0).all() and len(r.states) == 82 + K and K > 3
    assert torch.equal(r.states[82:], obs[r.truncated] + torch.tensor([0, 1]))
    assert ended[:4] == [(6.0, 3), (6.0, 3), (10.0, 4), (10.0, 4)]
    _, value = learner.agent(obs.flatten(0, 1) + torch.tensor([0, 1]))
    expected = torch.where(r.terminated, 0, value.view(40, 2))  # V(s') of each row's own episode
    assert torch.allclose(r.next_value, expected, atol=1e-6)


def test_the_target_of_one_step_and_the_maximum_entropy_return(stack):
    """With lambda 0: r + gamma V(s'). --entropy return: -c_e log pi(a|s) is part of each reward."""
    learner, r, _, args = collected(stack, gae_lambda=0.0)
    plain = learner.batch_of(r)
    assert torch.allclose(plain.target, (r.rew + args.gamma * r.next_value).flatten(), atol=1e-5)
    learner.args = replace(args, entropy="return", ent_coef=0.5)
    soft = learner.batch_of(r).target
    assert torch.allclose(soft, plain.target - 0.5 * r.logp.flatten(), atol=1e-5)


def test_recomputed_advantages_follow_the_critic(stack):
    learner, r, _, args = collected(stack, recompute_advantages=True, gae_lambda=0.0)
    before = learner.batch_of(r)
    learner.agent.critic[-1].bias.data += 1.0  # V + 1: delta falls by 1 - gamma, or at an end by 1
    after = learner.batch_of(r)
    expected = torch.where(r.terminated, -1.0, -(1 - args.gamma)).flatten()
    assert torch.allclose(after.advantage - before.advantage, expected, atol=1e-4)
    assert torch.equal(after.value, before.value)  # V_old of the clip


def test_statistics_of_rewards_and_observations(stack):
    """Discounted sums go on over the border of rollouts (of four steps), not of episodes; the
    observations' statistics stand still while the policy plays, and take the rollout in after."""
    both = {"normalize_obs": True, "normalize_reward": True}
    learner, collector = make(tiny(env_id="Counting-v0", num_steps=4, **both), stack)
    args, sums, seen = learner.args, [], []
    for _ in range(5):
        mean = learner.obs_stats.mean.clone()
        r, _ = collector.collect(learner)
        assert torch.equal(learner.obs_stats.mean, mean)
        seen += np.concatenate(r.raw_obs).tolist()
        learner.update(r)
    for n in (3, 4, 5, 3, 4, 1):  # 20 steps of each environment
        running = 0.0
        for t in range(n):
            running = running * args.gamma + t + 1
            sums += [running] * 2
    assert learner.return_stats.count == 40 and np.isclose(learner.return_stats.var, np.var(sums))
    raw = np.array(seen)[-8:, 1] + 1
    assert np.allclose(r.rew.flatten(), raw / np.std(sums), rtol=1e-5)
    assert np.allclose(learner.obs_stats.mean, np.mean(seen, 0))
    assert np.allclose(learner.obs_stats.var, np.var(seen, 0))
    assert learner.standardised(np.array([[1e6, -1e6]])).tolist() == [[10.0, -10.0]]
    rew = collector.scaled(np.array([[1e6, -1e6]]), np.ones((1, 2), bool), learner.return_stats)
    assert abs(rew).max() <= 10


def test_evaluation_leaves_statistics_and_generators_alone(stack):
    learner, r, _, args = collected(stack, normalize_obs=True, normalize_reward=True)
    learner.update(r)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    state = torch.get_rng_state()
    returns = ppo.evaluate(learner, ppo.make(args, 2, stack, training=False), args)
    assert returns.tolist() == [6.0, 6.0]  # true rewards: 1 + 2 + 3
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_actions_reach_the_environment_scaled_and_clipped(stack):
    _, r, _, args = collected(stack, log_std_init=1.0)  # Counting asserts its bounds
    assert r.act.abs().max() > 1.5
    envs = ppo.make(args, 4, stack, training=True)  # -3 .. 1, 0 .. 4
    act = torch.tensor([[-7.0, -1.0], [-1.0, 0.5], [0.5, 1.0], [1.5, 9.0]])
    assert ppo.to_actions(act, envs).tolist() == [[-3, 0], [-3, 3], [0, 4], [1, 4]]


# ------------------------------------------------------------------------------------------- update
def test_every_row_is_used_once_an_epoch(stack):
    learner, r, _, args = collected(stack, update_epochs=3, num_minibatches=4)
    seen, loss = [], learner.loss

    def noted(agent, batch, args):
        seen.append(batch.logp)
        return loss(agent, batch, args)

    learner.loss = noted
    learner.update(r)
    assert len(seen) == 12 and not torch.equal(seen[0], seen[4])
    for epoch in range(3):
        rows = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert torch.equal(rows.sort().values, r.logp.flatten().sort().values)


def test_early_stop_recomputed_advantages_and_the_clipped_gradient(stack):
    for changes, epochs, estimates in (
        ({"target_kl": 1e-9, "recompute_advantages": True}, 1, 1),
        ({"target_kl": 1e9}, 5, 1),
        ({"recompute_advantages": True}, 5, 5),
    ):
        learner, r, _, _ = collected(stack, update_epochs=5, **changes)
        calls, batch_of = [], learner.batch_of
        learner.batch_of = lambda x: calls.append(1) or batch_of(x)  # noqa: B023
        assert learner.update(r)["epochs"] == epochs and len(calls) == estimates
    learner, r, _, _ = collected(stack, max_grad_norm=1e-12)  # far below Adam's epsilon
    before = learner.agent.actor[0].weight.clone()
    learner.update(r)
    assert torch.equal(learner.agent.actor[0].weight, before)


def test_explained_variance_also_where_nothing_varies(stack):
    learner, r, _, _ = collected(stack)
    batch = learner.batch_of(r)
    expected = 1 - float((batch.target - batch.value).var() / batch.target.var())
    assert abs(float(learner.update(r)["explained_variance"]) - expected) < 1e-5
    r = r._replace(rew=r.rew * 0, value=r.value * 0, next_value=r.value * 0)
    assert torch.isfinite(learner.update(r)["explained_variance"])


def test_bytes_are_a_vector_and_a_discrete_space_may_start_anywhere(stack):
    learner, r, _, _ = collected(stack, env_id="PPOBytes-v0")
    assert r.states.dtype == torch.float32 and set(r.act.unique().tolist()) == {0, 1}
    assert torch.equal(r.rew, r.act + 3.0)


# -------------------------------------------------------------------------------------------- Atari
def test_atari_frames_rewards_and_lives(stack):
    """Breakout by chance: a lost life terminates and plays on; the return is the whole game's."""
    args = ppo.Args(env_id="ALE/Breakout-v5", num_steps=600, num_envs=2)
    learner, collector = make(args, stack)
    learner.agent.forward = lambda obs: (torch.zeros(len(obs), 4), torch.zeros(len(obs)))
    learner.agent.policy = lambda obs: torch.zeros(len(obs), 4)
    r, ended = collector.collect(learner)
    assert r.states.dtype == torch.uint8 and r.states.shape == (1202, 4, 84, 84)
    assert set(r.rew.unique().tolist()) <= {0.0, 1.0} and not r.truncated.any()
    lost = int(r.terminated.sum())
    assert len(ended) >= 2 and 5 * len(ended) <= lost <= 5 * len(ended) + 8
    assert all(length > 60 for _, length in ended)  # five lives, not one
    assert sum(score for score, _ in ended) <= float(r.rew.sum())


def test_adventure_ends_with_a_life_left_and_games_have_ale_pys_names(stack):
    """By chance a dragon eats the player within some hundred steps, who has one life then, too."""
    args = ppo.Args(env_id="ALE/Adventure-v5")
    envs, rng = ppo.make(args, 4, stack, training=True), np.random.default_rng(0)
    envs.reset(seed=ppo.env_seeds(1, 4))
    t, terminated = 0, np.zeros(4, bool)
    while not terminated.any() and t < 3000:
        _, _, terminated, _, infos = envs.step(rng.integers(0, 18, 4))
        t += 1
        assert (envs.lives == 1).all() and terminated.any() == ("final_info" in infos)
    assert infos["final_info"]["length"][terminated].tolist() == [t] and t > 100
    assert (envs.lengths == np.where(terminated, 0, t)).all()
    tictactoe = ppo.make(replace(args, env_id="ALE/TicTacToe3D-v5"), 1, stack, training=True)
    assert tictactoe.single_observation_space.shape == (4, 84, 84)


class Games(gym.vector.VectorEnv):
    """Three games in three steps: game 0 loses a life, game 1 ends, game 2 is cut."""

    num_envs, single_action_space = 3, FOUR
    single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros((3, 4, 84, 84), np.uint8), {"lives": np.array([3, 1, 3])}

    def step(self, act):
        self.t += 1
        now = np.array([self.t == 2] * 3)
        lives = np.array([3, 1, 3]) if self.t < 2 else np.array([2, 5, 5])
        rew = np.array([4, -7, 4], np.int32)
        infos = {"lives": lives, "final_obs": np.full((3, 4, 84, 84), 9, np.uint8)}
        ends = (now & [True, True, False], now & [False, False, True])
        return np.full((3, 4, 84, 84), self.t, np.uint8), rew, *ends, infos


def test_lives_ends_and_cuts_of_games(monkeypatch, stack):
    monkeypatch.setattr("ale_py.vector_env.AtariVectorEnv", lambda *a, **k: Games())
    args = ppo.Args(env_id="ALE/Pong-v5", num_envs=3, num_steps=3, num_minibatches=1)
    learner, collector = make(args, stack)
    r, ended = collector.collect(learner)
    assert r.rew.tolist() == [[1, -1, 1]] * 3 and ended == [(-14.0, 2), (8.0, 2)]
    assert r.terminated.tolist() == [[False] * 3, [True, True, False], [False] * 3]
    assert r.truncated.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert r.states[:, 0, 0, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [9]
    assert collector.envs.returns.tolist() == [12, -7, 4]


def test_atari_trains_and_resumes_with_new_episodes(capsys):
    short = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "eval_episodes": 0}
    args = ppo.Args(env_id="ALE/Pong-v5", total_timesteps=64, log_frequency=1, **short)
    ppo.train(args)
    result = ppo.train(replace(args, total_timesteps=96, resume=str(only_run("."))))
    assert result["global_step"] == 96 and "new episodes start" in capsys.readouterr().out
    tags = {tag for _, tag, _ in metrics(only_run("."))}
    assert {"diagnostics/srank_policy", "losses/policy_loss", "losses/explained_variance"} <= tags


# ----------------------------------------------------------------------------------------- promises
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    line = ["--env", "Pendulum-v1", "--normalize-obs", "--normalize-reward", "--width", 16]
    line += ["--total-timesteps", 700, "--num-steps", 50, "--log-frequency", 60]
    line += ["--eval-frequency", 200, "--eval-episodes", 1, "--checkpoint-frequency", 200]
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    run_script("ppo.py", *line, cwd=tmp_path / "whole")
    done = stop_at("ppo", "Collector.collect", 3, *line, cwd=tmp_path / "parts")
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    whole, run = only_run(tmp_path / "whole"), only_run(tmp_path / "parts")
    run_script("ppo.py", "--resume", run, cwd=tmp_path / "parts")
    conftest.assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 60


def test_diagnostics_logging_and_evaluation_change_nothing_another_seed_does():
    on, off = {"checkpoint_frequency": 80}, {"eval_frequency": 0, "log_frequency": 10**6}
    runs = {"on": on, "off": off | {"eval_episodes": 0}, "other": {"seed": 2}}
    saved = []
    for name, changes in runs.items():
        ppo.train(tiny(run_dir=name, **changes))
        (run,) = Path(name).iterdir()
        saved.append(conftest.load(run / "checkpoint.pt"))
    on, off, other = (x["networks"] for x in saved)
    assert all(torch.equal(x, off[key]) for key, x in on.items())
    assert not all(torch.equal(x, other[key]) for key, x in on.items())
    assert torch.equal(saved[0]["random"], saved[1]["random"])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "PPOTarget-v0"])
def test_non_finite_parameters_never_reach_the_sampler(env_id, monkeypatch, capsys):
    update = ppo.Learner.update

    def poisoned(self, rollout):
        info = update(self, rollout)
        self.agent.actor[-1].bias.data[0] = math.nan
        return info

    monkeypatch.setattr(ppo.Learner, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        ppo.train(tiny(env_id=env_id, log_frequency=10**6, eval_episodes=0))
    assert stop.value.code == 3 and "actor.4.bias is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("where", ["reward", "observation", "last observation"])
def test_non_finite_numbers_of_the_environment_are_named(where, normalize, monkeypatch, capsys):
    bad = math.inf if normalize else math.nan
    monkeypatch.setitem(gym.registry["PPOToy-v0"].kwargs, "where", where)
    monkeypatch.setitem(gym.registry["PPOToy-v0"].kwargs, "bad", bad)
    both = {"normalize_obs": normalize, "normalize_reward": normalize}
    with pytest.raises(SystemExit) as stop:
        ppo.train(tiny(env_id="PPOToy-v0", eval_episodes=0, **both))
    named = f"{where.split()[-1]} of the environment is not finite" in capsys.readouterr().err
    assert stop.value.code == 3 and named and not (only_run(".") / "checkpoint.pt").exists()


def test_a_finished_run_resumed_and_extended_a_thousandfold(capsys):
    """The learning rate falls to 0 at the run's end; one given anew takes effect."""
    first = ppo.train(tiny())
    run = only_run(".")
    again = ppo.train(tiny(resume=str(run)))
    assert again["final_return_mean"] == first["final_return_mean"]
    words = ["--resume", run, "--total-timesteps", 400_000, "--learning-rate", 1e-3]
    done = stop_at("ppo", "Collector.collect", 2, *words, cwd=".")
    assert done.returncode == 143 and "from here on --learning-rate 0.001" in done.stdout
    rates = [(s, float(v)) for s, tag, v in metrics(run) if tag == "charts/learning_rate"]
    assert rates[:5] == [(s, 2.5e-4 * (1 - (s - 80) / 400)) for s in (80, 160, 240, 320, 400)]
    assert rates[-1] == (560, 1e-3 * (1 - 480 / 400_000))


BAD = [
    *(f"--env PPO{name}-v0" for name in REFUSED),
    "--env NoSuch-v1",
    "--env ALE/NoSuch-v5",
    "--gae-lambda nan",
    "--num-minibatches 257",
    "--entropy return --ent-coef 0",
    "--normalize-obs --env ALE/Pong-v5",
    "--width 32 --env ALE/Pong-v5",
    "--sticky 0.5",
    "--log-std-init -1",
    "--target-kl 0.1 --update-epochs 1",
]


@pytest.mark.parametrize("line", BAD)
def test_a_users_mistake_is_one_line_that_names_it(line, capsys):
    line = line.split()
    err = conftest.refused(capsys, lambda: ppo.train(tyro.cli(ppo.Args, args=line)))
    assert (line[1] if line[0] == "--env" else line[0]) in err and not Path("runs").exists()


# ------------------------------------------------------------------------------- commands, learning
def documented_commands() -> list:
    commands = []
    for file in (ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "ppo.py"):
        text = file.read_text().replace("\\\n", " ")
        text = text if file.suffix == ".md" else text.split('"""')[1]
        commands += re.findall(r"python ppo\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to one or two rollouts and one evaluation episode."""
    args = tyro.cli(ppo.Args, args=shlex.split(command)[2:])
    ppo.check(args)
    short = {"num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 1}
    if args.env_id.startswith("ALE/"):
        short |= {"num_envs": 2, "num_steps": 8, "eval_episodes": 0}
    assert ppo.train(replace(args, total_timesteps=40, **short))["global_step"] >= 40


def test_ppo_learns_cartpole():
    """Balancing by chance lasts about 20 steps, the limit is 500."""
    assert ppo.train(ppo.Args(total_timesteps=40_000, eval_frequency=0))["final_return_mean"] > 300


def test_ppo_learns_actions_in_a_wide_box():
    """From -0.09 at the middle of 0 .. 1000 to near 0 at 200 and 800."""
    many = {"num_envs": 8, "num_steps": 64, "update_epochs": 10, "eval_frequency": 0}
    args = ppo.Args(env_id="PPOTarget-v0", total_timesteps=8_000, learning_rate=3e-3, **many)
    assert ppo.train(replace(args, ent_coef=0.0))["final_return_mean"] > -0.01
