"""qt_opt.py: the cross-entropy method against its theory and exact maxima, targets of planted
networks, the lag, the loss by hand, one resume offline and one online, and runs that learn."""

import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qt_opt as qt
import torch
import torch.nn.functional as F
import tyro
from conftest import (
    ROOT,
    assert_same_checkpoint,
    metrics,
    one_thread,
    only_run,
    refused,
    run_script,
    stop_at,
)
from qt_opt import Args, Batch, Learner, cem, train
from test_cql_continuous_math import UP, curve
from test_cql_continuous_runs import point_data

CPU = torch.device("cpu")
WIDE = Args(cem_samples=64_000, cem_elites=6_000, cem_std=0.01, cem_min_std=0.0)
LONG = Args(cem_samples=256, cem_elites=64, cem_iterations=20)  # comes to the corners, too


# ------------------------------------------------------------------------ cross-entropy method
def toward(best):
    """Q = -|a - a*|^2."""
    return lambda obs, a: -((a - (best[:, None] if a.dim() == 3 else best)) ** 2).sum(-1)


def moments(args: Args, q, act_dim: int = 1) -> list[tuple[float, float]]:
    """Mean and deviation of each iteration's samples."""
    tried = cem(lambda obs, act: q(act), torch.zeros(1, 2), act_dim, args).tried[0]
    return [(float(x.mean()), float(x.std())) for x in tried.split(args.cem_samples)]


def test_an_iteration_at_the_top_and_on_a_slope():
    """Of the best 6 in 64, z = Phi^-1(1 - rho / 2), at the top of a quadratic the deviation becomes
    sqrt(1 - 2 z phi(z) / rho) = 0.0679 of it; on a slope the mean moves phi(z) / rho = 1.785
    deviations and the deviation falls to 0.407: in all 1.785 / (1 - 0.407) = 3.01 of them."""
    (_, before), (_, after) = moments(WIDE, lambda a: -(a**2).sum(-1))
    assert abs(after / before - 0.0679) < 0.002
    found = moments(replace(WIDE, cem_iterations=12), lambda a: a.sum(-1))
    (at, std), (then, narrower) = found[:2]
    assert abs((then - at) / std - 1.785) < 0.01 and abs(narrower / std - 0.407) < 0.005
    assert abs(found[-1][0] / std - 3.01) < 0.03


@pytest.mark.parametrize("act_dim, reach", [(1, 3.0), (3, 6.6)])
def test_the_reach_on_a_slope_grows_with_the_dimension(act_dim, reach):
    """In each coordinate, in first deviations: selection is shared among the coordinates, so that
    their deviations shrink less. The figure for three is that of an independent program."""
    args = replace(WIDE, cem_samples=6_400, cem_elites=600, cem_iterations=40)
    assert abs(moments(args, lambda a: a.sum(-1), act_dim)[-1][0] / args.cem_std - reach) < 0.3


def test_the_error_is_that_of_another_program():
    """One state at a time in NumPy, by the same rules."""
    rng, n = np.random.default_rng(0), 1_500
    best = rng.uniform(-1, 1, (n, 3))
    errors = {"best": [], "mean": []}
    for target in best:
        mean, std = np.zeros(3), np.full(3, 0.5)
        for _ in range(2):
            act = np.clip(rng.normal(mean, std, (64, 3)), -1, 1)
            elites = act[np.argsort(((act - target) ** 2).sum(1))[:6]]
            mean, std = elites.mean(0), np.maximum(elites.std(0, ddof=1), 0.01)
        errors["best"].append(((elites[0] - target) ** 2).sum())
        errors["mean"].append(((mean - target) ** 2).sum())
    best = torch.as_tensor(best, dtype=torch.float32).repeat(20, 1)
    for choice, found in errors.items():
        ours = cem(toward(best), best, 3, Args(cem_choice=choice)).act - best
        noise = 4 * np.std(found) / n**0.5
        assert abs(float(ours.pow(2).sum(1).mean()) - np.mean(found)) < noise < np.mean(found) / 3


def test_the_argmax_of_a_function_of_the_state():
    w = 0.2 * torch.randn(2, 3)  # inside the box
    obs = torch.randn(200, 3)
    exact = torch.tanh(obs @ w.T)

    def q(obs, act):
        return -((act - torch.tanh(obs @ w.T)[:, None]) ** 2).sum(-1)

    for choice in ("best", "mean"):
        args = replace(LONG, cem_min_std=1e-4, cem_choice=choice)
        assert (cem(q, obs, 2, args).act - exact).abs().max() < 0.01


def test_many_states_at_once_are_each_state_alone(monkeypatch):
    learner, obs = Learner(3, 2, Args(width=16), CPU), torch.randn(5, 3)
    noise, real = torch.randn(2, 5, 64, 2), torch.randn
    draws = iter(noise)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: next(draws))
    together = cem(learner.critic, obs, 2, Args())
    for i in range(5):
        draws = iter(noise[:, i : i + 1])
        alone = cem(learner.critic, obs[i : i + 1], 2, Args())
        assert torch.allclose(alone.act[0], together.act[i], atol=1e-6)
        assert torch.allclose(alone.q[0], together.q[i], atol=1e-6)
    monkeypatch.setattr(torch, "randn", real)


def test_samples_stay_in_the_box_and_the_deviation_above_its_floor():
    """A maximum at the corner, where all elites coincide."""
    args = Args(cem_iterations=6, cem_min_std=0.05)
    found = cem(lambda obs, a: a.sum(-1), torch.zeros(3, 1), 2, args)
    assert found.tried.abs().max() == 1 and torch.equal(found.act, torch.ones(3, 2))
    assert 0.015 < found.tried[:, -64:].std() < 0.05  # half of a Gaussian, the rest is clipped


def test_the_best_is_that_of_the_last_iteration():
    """Whatever was found before: the argmax is one of the last samples, and their best."""
    best = torch.rand(50, 2) * 2 - 1
    args = Args(cem_iterations=3, cem_samples=16, cem_elites=2)
    found = cem(toward(best), best, 2, args)
    last = found.tried[:, -16:][torch.arange(50), found.q[:, -16:].argmax(1)]
    assert torch.equal(found.act, last)
    assert (found.q.argmax(1) < 32).any()  # there an earlier one was better


def test_the_mean_lies_between_two_maxima_and_the_best_sample_on_one():
    def q(obs, act):
        return act[..., 0].abs()

    args = Args(cem_samples=6_400, cem_elites=600, cem_iterations=1)
    best = cem(q, torch.zeros(1, 1), 1, args).act.abs()
    mean = cem(q, torch.zeros(1, 1), 1, replace(args, cem_choice="mean")).act.abs()
    assert best > 0.99 and mean < 0.2


# ---------------------------------------------------------------------------- network and target
@pytest.mark.parametrize("depth", [1, 3])
def test_the_network_is_a_plain_one(depth):
    """One state's part of the first layer for all of its actions changes nothing."""
    learner = Learner(3, 2, Args(width=16, depth=depth), CPU).double()
    obs, act = torch.randn(4, 3).double(), torch.randn(4, 7, 2).double()
    critic = learner.critic
    critic.mean += 0.3
    critic.std *= 1.7
    x = torch.cat([((obs - 0.3) / 1.7)[:, None].expand(-1, 7, -1), act], -1)
    for layer in critic.layers:
        x = F.relu(layer(x))
    assert torch.allclose(critic(obs, act), critic.head(x)[..., 0])
    assert torch.allclose(critic(obs, act[:, 0]), critic(obs, act)[:, 0])


def batch(n: int, obs_dim=3, act_dim=2) -> Batch:
    done = (torch.arange(n) % 2).float()
    act = torch.rand(n, act_dim) * 2 - 1
    return Batch(torch.randn(n, obs_dim), act, torch.randn(n), torch.randn(n, obs_dim), done)


def plant(net, slope, level: float):
    """Q(s,a) = level + slope . a, on actions in the box."""
    for layer in net.layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    n = len(slope)
    first = net.layers[0]
    with torch.no_grad():
        first.weight[:n, -n:] = torch.eye(n)
        first.bias[:n] = 1.0
        torch.nn.init.zeros_(net.head.weight)
        net.head.weight[0, :n] = torch.tensor(slope)
        net.head.bias.fill_(level - sum(slope))


def test_the_target_takes_the_lesser_of_both_copies_at_the_newer_ones_action():
    """Q_1 rises with a, so that a' = (1, 1); Q_2 is less there, though more elsewhere."""
    args = replace(LONG, width=8, depth=1, gamma=0.9)
    learner, some = Learner(3, 2, args, CPU), batch(6)
    plant(learner.target, [1.0, 2.0], 5.0)  # 8 at (1, 1)
    plant(learner.past[0], [-1.0, -1.0], 6.0)  # 4 there, 8 at (-1, -1)
    act, y = qt.backup(learner, some, args)
    assert torch.allclose(act, torch.ones(6, 2), atol=1e-6)
    assert torch.allclose(y, some.rew + 0.9 * (1 - some.done) * 4, atol=1e-5)
    plant(learner.past[0], [-1.0, -1.0], 60.0)
    assert torch.allclose(
        qt.backup(learner, some, args)[1], some.rew + 0.9 * (1 - some.done) * 8, atol=1e-5
    )
    alone = Learner(3, 2, replace(args, lag=0), CPU)
    plant(alone.target, [1.0, 2.0], 5.0)
    assert len(alone.past) == 0
    y = qt.backup(alone, some, alone.args)[1]
    assert torch.allclose(y, some.rew + 0.9 * (1 - some.done) * 8, atol=1e-5)


def test_the_second_target_is_the_first_of_lag_updates_ago():
    """Between 0.9 of --lag and all of it; before that the untrained network; Q_1 is a Polyak
    average."""
    args = Args(width=8, depth=1, lag=30, tau=0.25)
    learner, seen = Learner(3, 2, args, CPU), []
    q, q_1 = (net.head.bias.item() for net in (learner.critic, learner.target))
    assert q == q_1 == learner.past[0].head.bias.item()
    for step in range(1, 100):
        seen.append(learner.target.head.bias.item())
        learner.update(lambda: batch(8), shift=step % 3 == 0)
        q_1 = q_1 + 0.25 * (learner.critic.head.bias.item() - q_1)
        assert abs(learner.target.head.bias.item() - q_1) < 1e-6
        q_2 = learner.past[0].head.bias.item()
        (age,) = {step - k for k, x in enumerate(seen, 0) if x == q_2} or {None}
        assert age == step or 27 <= age <= 30, (step, age)
        if step > 30:
            assert age < step


# --------------------------------------------------------------------------------------- losses
def test_the_cross_entropy_by_hand():
    """-(y log p + (1 - y) log(1 - p)), whose slope in the logit is p - y."""
    logit = torch.tensor([0.0, math.log(3.0), 60.0], requires_grad=True)
    y = torch.tensor([0.25, 1.0, 0.0])
    loss = qt.td_loss(logit, y, Args(loss="cross-entropy"))
    assert abs(float(loss.detach()) - (math.log(2) - math.log(0.75) + 60) / 3) < 1e-5
    loss.backward()
    assert torch.allclose(3 * logit.grad, torch.tensor([0.25, -0.25, 1.0]), atol=1e-6)
    assert float(qt.td_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]), Args())) == 2.5


def test_the_values_of_the_cross_entropy_are_probabilities():
    """And their target is one, too."""
    learner, some = Learner(3, 2, Args(width=8, loss="cross-entropy"), CPU), batch(50)
    q = learner.critic(some.obs, some.act)
    assert torch.allclose((q / (1 - q)).log(), learner.critic.logit(some.obs, some.act), atol=1e-5)
    learner.target.head.bias.data += 100
    learner.past[0].head.bias.data += 100
    y = qt.backup(learner, some, learner.args)[1]
    assert torch.allclose(y, (some.rew + 0.99 * (1 - some.done)).clamp(0, 1))
    assert 0 < (y == 1).sum() < 50 and (y == 0).any()


def test_one_drawn_action_has_the_gradient_of_the_log_mean_exp(monkeypatch):
    """Weighted by the probability of its draw, over all draws: exactly."""
    learner = Learner(3, 2, Args(width=8, depth=1), CPU).double()
    some = Batch(*(x.double() for x in batch(4)))
    tried = torch.rand(4, 6, 2).double() * 2 - 1
    q = learner.critic(some.obs, tried).detach() * 9
    learner.critic.head.weight.data *= 9
    learner.critic.head.bias.data *= 9

    def planted(critic, obs, *_):
        assert critic == learner.critic.logit and obs is some.obs
        return qt.Argmax(None, tried, q)

    monkeypatch.setattr(qt, "cem", planted)
    monkeypatch.setattr(qt, "softmax_draw", lambda logits: drawn)
    params = list(learner.critic.parameters())
    expected = [torch.zeros_like(p) for p in params]
    for m in range(6):  # in every state the same, so that one state at a time is weighted
        for i in range(4):
            drawn = torch.full((4, 1), m)
            q_data = learner.critic(some.obs, some.act)
            value, surrogate = qt.conservative_loss(learner, some, q_data, learner.args)
            only = learner.critic(some.obs, tried[torch.arange(4)[:, None], drawn])[i, 0]
            weight = q.softmax(1)[i, m]
            for e, g in zip(expected, torch.autograd.grad(weight * (only - q_data[i]) / 4, params)):
                e += g
    q_all = learner.critic(some.obs, tried)
    exact = (q_all.logsumexp(1) - math.log(6) - learner.critic(some.obs, some.act)).mean()
    assert torch.allclose(exact, value)
    for e, g in zip(expected, torch.autograd.grad(exact, params)):
        assert torch.allclose(e, g)
    assert torch.allclose(
        surrogate, (learner.critic(some.obs, tried[:, 5]) - q_data).mean()
    )  # the last draw's


def test_actions_are_drawn_by_their_softmax_weight():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0])
    drawn = qt.softmax_draw(logits.expand(200_000, 4))[:, 0]
    found = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (found - logits.softmax(0)).abs().max() < 0.005


def test_the_whole_loss():
    args = Args(width=8, cql_alpha=3.0)
    learner, some = Learner(3, 2, args, CPU), batch(16)
    torch.manual_seed(4)
    loss, info = qt.critic_loss(learner, some, args)
    torch.manual_seed(4)
    y = qt.backup(learner, some, args)[1]
    q = learner.critic(some.obs, some.act)
    gap, surrogate = qt.conservative_loss(learner, some, q, args)
    assert torch.allclose(loss, F.mse_loss(q, y) + 3 * surrogate)
    assert torch.equal(info["cql_loss"], gap) and torch.allclose(info["qf_loss"], F.mse_loss(q, y))
    assert "cql_loss" not in qt.critic_loss(learner, some, Args())[1]


# ------------------------------------------------------------------------------ acting, diagnostics
def test_exploration():
    obs = torch.zeros(1_000, 3)
    learner = Learner(3, 2, replace(LONG, width=8, depth=1, epsilon=0.3), CPU)
    plant(learner.critic, [50.0, 50.0], 0.0)
    best = learner.act(obs, explore=False)
    act = learner.act(obs, explore=True)
    low = (act < 0.5).any(1).float().mean()
    assert (best == 1).all() and abs(low - 0.3 * (1 - 0.25**2)) < 0.05
    learner.args = replace(learner.args, epsilon=0.0, exploration_noise=0.2)
    act = learner.act(obs, explore=True)
    assert act.abs().max() == 1 and abs((1 - act).mean() - 0.2 / math.sqrt(2 * math.pi)) < 0.01


def test_a_probability_near_1_still_has_a_slope():
    """In fp32 a sigmoid of 20 is 1, whatever the action adds: its logit says which is better."""
    args = replace(LONG, width=8, depth=1, loss="cross-entropy")
    learner, obs = Learner(3, 2, args, CPU), torch.zeros(500, 3)
    plant(learner.critic, [3.0, 3.0], 20.0)
    plant(learner.target, [3.0, 3.0], 20.0)
    assert (learner.critic(obs, torch.zeros(500, 2)) == 1).all()
    some = batch(500)
    for act in (learner.act(obs, explore=False), qt.backup(learner, some, args)[0]):
        assert (act > 0.9).all()


def test_evaluations_draw_nothing_from_the_training():
    learner, obs = Learner(3, 2, Args(width=8), CPU), torch.zeros(2, 3)
    state = torch.get_rng_state()
    learner.eval()
    one = learner.act(obs, explore=False)
    learner.eval()
    assert torch.equal(one, learner.act(obs, explore=False))
    assert torch.equal(state, torch.get_rng_state())


def test_the_argmaxs_share():
    """Near 1 where CEM suffices, less where one iteration has to find a peak in six dimensions;
    the most of a linear Q's share is known."""
    draw = torch.Generator().manual_seed(0)
    obs = torch.rand(64, 6) * 2 - 1

    class Peak(torch.nn.Module):
        def forward(self, obs, act):
            aim = obs[:, : act.shape[-1]]
            return -((act - (aim if act.dim() == 2 else aim[:, None])) ** 2).sum(-1)

        logit, squash = forward, torch.nn.Identity()

    learner, shares = Learner(6, 6, Args(width=8), CPU), {}
    learner.critic = Peak()
    for n in (1, 2, 6):
        shares[n] = float(qt.argmax_share(learner, obs, Args(cem_iterations=n), draw))
    assert shares[1] < 0.85 < shares[2] < shares[6] and 0.99 < shares[6] <= 1
    learner = Learner(6, 1, Args(width=8, depth=1), CPU)
    plant(learner.critic, [2.0], 0.0)
    assert 0.95 < float(qt.argmax_share(learner, obs, Args(), draw)) <= 1
    short = Args(cem_std=0.05)  # no longer search reaches farther than 0.15, uniform actions do
    assert 0.05 < float(qt.argmax_share(learner, obs, short, draw)) < 0.2


def test_the_numbers_of_a_moment():
    """Of planted networks: Q = 5 + a_1 + 2 a_2, Q_1 = 3, Q_2 = 9, so that y = r + gamma 3."""
    args = Args(width=8, depth=1, gamma=0.9, cql_alpha=2.0)
    learner, n = Learner(3, 2, args, CPU), 40
    data = qt.Replay(n, 3, 2, CPU)
    rows = batch(n)
    for name, x in rows._asdict().items():
        data.columns[name] = x
    data.columns |= {"to_go": rows.rew * 3, "start": (torch.arange(n) % 10 == 0).float()}
    data.size.fill_(n)
    data.info = {"reward_min": -1.0, "reward_max": 2.0}
    plant(learner.critic, [1.0, 2.0], 5.0)
    plant(learner.target, [0.0, 0.0], 3.0)
    plant(learner.past[0], [0.0, 0.0], 9.0)
    found = qt.diagnose(learner, data, args)
    q, y = 5 + rows.act @ torch.tensor([1.0, 2.0]), rows.rew + 0.9 * (1 - rows.done) * 3
    error = (q - y).pow(2).mean()
    expected = {
        "q_data": q.mean(),
        "td_error": error / y.var(correction=0),
        "q_minus_return": (q - 3 * rows.rew).mean(),
        "return_std": (3 * rows.rew).std(),
        "q_bound": 20.0,
        "q_range": 30.0,
        "q_lift": 10.0,
        "cql_push": 1 / error.sqrt(),
    }
    for name, x in expected.items():
        assert abs(found[name] - float(x)) < 1e-4 * (1 + abs(float(x))), name
    box = 5 + math.log(math.sinh(1)) + math.log(math.sinh(2) / 2)  # log mean exp over the box
    assert abs(found["cql_gap"] - (box - float(q.mean()))) < 0.1
    assert abs(found["q_rand"] - 5) < 0.1 and 7 < found["v_s0"] <= 8 and 7 < found["q_pi"] <= 8
    assert "td_error_holdout" not in found
    data.size.fill_(n // 2)
    held = qt.diagnose(learner, data, args)
    late = [x[n // 2 :] for x in (q, y)]
    error = (late[0] - late[1]).pow(2).mean() / late[1].var(correction=0)
    assert abs(held["td_error_holdout"] - float(error)) < 1e-3 * float(error)


def test_novelty():
    """The data act like a = x with a spread of 0.1; the policy does so, too, or always 1."""
    obs = torch.rand(4_000, 1) * 2 - 1
    act = obs + 0.1 * torch.randn_like(obs)
    data = Batch(obs, act, obs[:, 0], obs, obs[:, 0])
    learner = Learner(1, 1, Args(width=8, depth=1), CPU)
    for aim, least, most in ((lambda x: x, 0.2, 0.8), (lambda x: x + 0.3, 2.7, 3.8)):
        learner.act = lambda obs, explore, aim=aim: aim(obs)
        assert least < float(qt.novelty(learner, data)) < most
    learner.act = lambda obs, explore: obs
    narrow = data._replace(act=obs * 0 + 0.5)  # all alike: the unit is 0.02
    far = (obs[:256] - 0.5).abs().mean() / 0.02
    assert torch.allclose(qt.novelty(learner, narrow), far)
    few = Batch(*(x[:11] for x in data))  # of eleven rows each has the ten others as neighbours
    others = [few.act[torch.arange(11) != i] for i in range(11)]
    z = [(x - known.mean()).abs() / known.std(correction=0) for x, known in zip(few.obs, others)]
    assert torch.allclose(qt.novelty(learner, few), torch.stack(z).mean())


def test_watching_changes_nothing():
    data, runs = point_data("point.hdf5", episodes=20), []
    for words in ("--diagnostics-frequency 7 --eval-frequency 5", "--eval-episodes 0"):
        words += " --num-updates 20 --online-steps 10 --run-dir " + str(len(runs))
        words += "" if len(runs) == 0 else " --diagnostics-frequency 0"
        run(words, data)
        (folder,) = Path(str(len(runs))).iterdir()
        runs.append(qt.load_checkpoint(folder)["networks"])
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


# ---------------------------------------------------------------------------------- whole runs
FAST = """--env Point-v0 --num-updates 300 --online-steps 0 --width 32 --batch-size 128 --q-lr 0.003
--tau 0.05 --gamma 0.9 --lag 50 --eval-frequency 0 --diagnostics-frequency 20 --cem-samples 32
--cem-elites 4"""


def run(words: str, data: str) -> dict:
    return train(tyro.cli(Args, args=shlex.split(f"{FAST} --dataset {data} {words}")))


VARIANTS = {
    "QT-Opt": "",
    "no lag": "--lag 0",
    "mean": "--cem-choice mean",
    "conservative": "--cql-alpha 0.1",
    "cross-entropy": "--loss cross-entropy --reward-scale 0.03 --reward-shift 0.1",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name):
    """Random data earn about -10 on the line, going home -1.5."""
    out = run(VARIANTS[name], point_data("point.hdf5"))
    assert out["final_return_mean"] > -3 > out["dataset_return_mean"], out["final_return_mean"]
    assert out["offline_return_mean"] == out["final_return_mean"]


def test_online_from_scratch_learns():
    words = "--num-updates 0 --online-steps 400 --offline-share 0.1"
    out = run(words, point_data("point.hdf5", episodes=3))
    assert out["final_return_mean"] > -3 and out["verdict"] == "not judged"
    assert "offline_return_mean" not in out


def test_the_stated_share_of_a_minibatch_is_offline(monkeypatch):
    shares, update = [], Learner.update

    def counted(self, sample, shift=False):
        shares.append(float((sample().rew == 7).float().mean()))
        return update(self, sample, shift)

    monkeypatch.setattr(Learner, "update", counted)
    data = point_data("point.hdf5", reward=lambda x: 7.0, episodes=20)
    run("--num-updates 5 --online-steps 5 --offline-share 0.25 --eval-episodes 0", data)
    assert shares == [1.0] * 5 + [0.25] * 5


def test_judgement():
    found, sentence = qt.judge(curve(UP, argmax_share=0.8), Args(num_updates=4_000), 1.0)
    assert found == "argmax too weak" and "80%" in sentence and "--cem-iterations 5" in sentence
    found, _ = qt.judge(curve(UP, argmax_share=0.95), Args(num_updates=4_000), 1.0)
    assert found == "no sign of trouble"
    sick = curve(UP, argmax_share=0.8, q_max=1e9)
    found, sentence = qt.judge(sick, Args(num_updates=4_000), 1.0)
    assert found == "divergence" and "--cql-alpha 5" in sentence and "argmax too weak" in sentence
    found, sentence = qt.judge(curve(UP, argmax_share=0.8, novelty=3.4), Args(num_updates=4_000), 1)
    assert found == "acts beyond the data" and "3.4 deviations" in sentence
    calm = curve(UP, argmax_share=0.95, novelty=3.2)
    assert qt.judge(calm, Args(num_updates=4_000), 1)[0] == "no sign of trouble"
    assert qt.judge([], Args(num_updates=0), 1.0)[0] == "not judged"
    slow = Args(num_updates=4_000, lag=1_000)  # a Q that rises, by a backup each --lag updates
    assert qt.judge(curve(UP, argmax_share=1.0), slow, 1.0)[0] == "too short to judge"
    costs = curve(-UP, argmax_share=1.0, q_bound=0.0, q_max=0.0)
    assert qt.judge(costs, slow, 1.0)[0] == "no sign of trouble"


def test_what_a_verdict_recommends_is_accepted():
    for args in (Args(num_updates=8_000), Args(cql_alpha=1.0), Args(loss="cross-entropy")):
        for advised in qt.advice(args).values():
            for words in advised.split(" or "):
                changed = tyro.cli(Args, default=args, args=words.split())
                qt.check(changed)
                assert changed != args or words == "--cql-alpha 0"


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    """Stopped offline, and online with some exploration."""
    data = str(Path(point_data("point.hdf5")).absolute())
    words = f"{FAST} --num-updates 80 --online-steps 40 --exploration-noise 0.1 --cql-alpha 0.1"
    words += f" --eval-frequency 15 --eval-episodes 2 --dataset {data}"
    words = words.replace("Point-v0", "test_cql_continuous_runs:Point-v0").split()
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    (tmp_path / "whole").mkdir()
    run_script("qt_opt.py", *words, cwd=tmp_path / "whole", env=here)
    whole = only_run(tmp_path / "whole")
    for n in (40, 100):
        half = tmp_path / str(n)
        half.mkdir()
        done = stop_at("qt_opt", "Learner.update", n, *words, cwd=half, env=one_thread() | here)
        assert done.returncode == 143, done.stderr
        folder = only_run(half)
        run_script("qt_opt.py", "--resume", folder, cwd=half, env=here)
        assert_same_checkpoint(whole / "checkpoint.pt", folder / "checkpoint.pt")
        assert_same_checkpoint(whole / "selected.pt", folder / "selected.pt")
        assert metrics(whole) == metrics(folder)


WRONG = """--lag 15 | --cem-elites 64 | --cem-min-std 0.6 | --num-updates 0 --online-steps 0
--loss cross-entropy --cql-alpha 1 | --action-low data --action-high data"""


@pytest.mark.parametrize("words", [x.strip() for x in WRONG.replace("\n", "|").split("|")])
def test_what_no_run_could_use_is_refused(words, capsys):
    refused(capsys, lambda: train(tyro.cli(Args, args=words.split())))
    assert not list(Path().glob("runs/*"))


def test_one_iteration_of_few_samples_or_a_small_deviation_can_be_had():
    for given in (dict(cem_samples=4, cem_elites=2), dict(cem_std=0.005, cem_min_std=0.001)):
        qt.check(Args(cem_iterations=1, **given))


def test_the_smallest_data_are_judged_too():
    tiny = dict(num_updates=20, diagnostics_frequency=2, eval_episodes=0, batch_size=4, width=8)
    assert train(Args(collect_steps=8, **tiny))["verdict"]
    tags = {tag for _, tag, _ in metrics(only_run("."))}
    assert "diagnostics/q_data" in tags and "diagnostics/novelty" not in tags


def test_returns_that_are_no_probabilities_are_refused(capsys):
    data = point_data("point.hdf5", episodes=3)
    err = refused(capsys, lambda: run("--loss cross-entropy", data))
    assert "returns-to-go unknown, not in [0, 1]" in err and "--reward-scale" in err
    bad = point_data("bad.hdf5", episodes=3, reward=lambda x: -0.1, ends=True)
    assert "from -" in refused(capsys, lambda: run("--loss cross-entropy", bad))
    good = point_data("good.hdf5", episodes=40, reward=lambda x: float(abs(x) > 1), ends=True)
    run("--loss cross-entropy --num-updates 5 --eval-episodes 0", good)  # 1 at the end


def test_the_commands_of_the_docstring_run(capsys):
    commands = [x.strip() for x in qt.__doc__.replace("\\\n", " ").splitlines() if "python qt" in x]
    assert len(commands) == 4
    for command in commands:
        args = tyro.cli(Args, args=shlex.split(command)[2:])
        qt.check(args)
        if args.dataset:
            continue
        changes = dict(num_updates=min(4, args.num_updates), collect_steps=1_005)
        changes["online_steps"] = min(4, args.online_steps)
        train(Args(**vars(args) | changes | dict(width=8, eval_episodes=1)))
        assert "verdict" in capsys.readouterr().out
    assert (ROOT / "docs" / "qt_opt.md").exists()
