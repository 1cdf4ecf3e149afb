"""td3.py --replay: probabilities, weights and losses by hand, the structure of priorities, what
resumes, and what it buys on the Blind Cliffwalk."""

import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import td3
import torch
import tyro
from conftest import ROOT, assert_same_checkpoint, load, metrics, refused

CPU = torch.device("cpu")
OTHERS = ("per", "lap", "pal", "discor")
KIND = pytest.mark.parametrize("kind", OTHERS)


def priorities_of(p, alpha=1.0, beta=0.0) -> tuple[td3.Priorities, torch.Tensor]:
    found = td3.Priorities(len(p), CPU)
    found.set(torch.arange(len(p)), torch.as_tensor(p, dtype=torch.float64) ** alpha)
    found.beta.fill_(beta)
    return found, torch.tensor(float(len(p)), dtype=torch.float64)


# ---------------------------------------------------------------------------- formulas, by hand
@pytest.mark.parametrize(
    "alpha, probability, weight",
    [
        (1.0, (0.1, 0.2, 0.3, 0.4), (1, 0.757858, 0.644394, 0.574349)),
        (0.6, (0.148230, 0.224674, 0.286555, 0.340542), (1, 0.846745, 0.768229, 0.716978)),
    ],
)
def test_probabilities_and_weights_of_per(alpha, probability, weight):
    drawn, size = priorities_of([1, 2, 3, 4], alpha, beta=0.4)
    rows, found = drawn.sample(200_000, size)
    share = torch.bincount(rows, minlength=4) / len(rows)
    assert torch.allclose(share, torch.tensor(probability), atol=0.005)
    assert torch.allclose(found, torch.tensor(weight)[rows], atol=1e-6)


def test_with_beta_1_the_weights_undo_the_draws():
    drawn, size = priorities_of(torch.rand(300) + 0.01, beta=1.0)
    rows, weight = drawn.sample(5_000, size)
    product = drawn.p.view(-1)[rows] * weight
    assert torch.allclose(product, product[0].expand(5_000), rtol=1e-5)


def test_a_draw_by_hand(monkeypatch):
    """u = 5.5 of 10 falls to p = 3, whose share goes from 3 to 6; just below 10 to the last."""
    drawn, size = priorities_of([1, 2, 3, 4])
    for u, row in ((0.55, 2), (0.0, 0), (np.nextafter(1, 0), 3), (0.1, 1), (0.3, 2), (0.6, 3)):
        monkeypatch.setattr(torch, "rand", lambda n, u=u, **_: torch.full((n,), u).double())
        assert drawn.sample(1, size)[0].tolist() == [row]


def test_priorities_are_of_the_largest_td_error():
    delta = torch.tensor([[0.5, -2.0, 3.0], [-0.1, -8.0, 0.2]])
    assert torch.allclose(td3.priority(delta, "lap", 0.4), torch.tensor([1, 8.0**0.4, 3.0**0.4]))
    assert torch.allclose(td3.priority(delta, "per", 0.6), torch.tensor([0.5, 8, 3]) ** 0.6)
    assert (td3.priority(0 * delta, "per", 0.6) > 0).all()  # no row is lost for ever


def test_the_expected_gradient_of_lap_is_that_of_pal():
    expected = torch.tensor([0.129154, -0.340839, 0.400853])
    delta = torch.tensor([[0.5, -2.0, 3.0]], requires_grad=True)
    td3.td_loss(delta, "pal", 0.4).mean().backward()
    assert torch.allclose(delta.grad[0], expected, atol=1e-6)
    delta.grad = None
    p = td3.priority(delta.detach(), "lap", 0.4)
    (p / p.sum() * td3.td_loss(delta, "lap", 0.4)[0]).sum().backward()
    assert torch.allclose(delta.grad[0], expected, atol=1e-6)


def test_losses_by_hand():
    delta = torch.tensor([[0.5, -2.0]])
    weight = torch.tensor([1.0, 0.25])
    assert td3.td_loss(delta, "uniform", None).tolist() == [[0.25, 4]]
    assert td3.td_loss(delta, "per", 0.6, weight).tolist() == [[0.25, 1]]
    assert td3.td_loss(delta, "lap", 0.4, weight).tolist() == [[0.125, 1.5]]  # it has no weight
    scale = (1 + 2**0.4) / 2
    expected = torch.tensor([[0.125, 2**1.4 / 1.4]]) / scale
    assert torch.allclose(td3.td_loss(delta, "pal", 0.4), expected)
    zero = torch.zeros(1, 2, requires_grad=True)
    td3.td_loss(zero, "pal", 0.4).sum().backward()
    assert (zero.grad == 0).all()


def test_discors_chain():
    """s0 -> s1 -> s2 -> end with TD errors .1, .5, 1, gamma .9, T 1: Delta is (1.36, 1.4, 1), and
    the transition nearest the end counts most. What the network says beyond the end has no say."""
    state = torch.arange(3.0)[:, None]
    batch = td3.Batch(state, state, torch.zeros(3), state + 1, torch.tensor([0.0, 0, 1]))
    error, q = torch.tensor([0.0, 0, 0, 5]), torch.tensor([0.1, -0.5, 1.0])
    learner = SimpleNamespace(
        target_actor=lambda obs: 0 * obs,
        target=lambda obs, act: torch.zeros(1, 3),
        critic=lambda obs, act: q[None],
        target_error=lambda obs, act: error[obs[:, 0].long()][None],
        temperature=torch.ones(1),
        replay_alpha=None,
    )
    args = td3.Args(replay="discor", gamma=0.9, policy_noise=0.0)
    for _ in range(3):
        loss, info = td3.critic_loss(learner, batch, args)
        error[:3] = info["td_errors"][0]
    assert torch.allclose(error[:3], torch.tensor([1.36, 1.4, 1]))
    loss, _ = td3.critic_loss(learner, batch, args)
    weight = torch.tensor([0.167820, 0.240542, 0.591638])
    assert torch.allclose(loss, (weight * q**2).sum(), atol=1e-6)
    learner.error = lambda obs, act: torch.tensor([[1.0, 1.0, 3.0]])
    loss, info = td3.error_loss(learner, batch, error[None, :3])
    assert torch.allclose(loss, torch.tensor((0.36**2 + 0.4**2 + 4) / 3))
    assert info["errors"].tolist() == pytest.approx([5 / 3])


def test_discors_weights_of_each_critic_average_one():
    weight = td3.discor_weight(5 * torch.rand(3, 64), torch.tensor([0.5, 10.0, 0.0]))
    assert torch.allclose(weight.mean(1), torch.ones(3), atol=1e-5)  # not NaN where T is 0


# ------------------------------------------------------------------------------------- structure
def test_sums_are_computed_anew_for_they_drift():
    """Priorities over many orders of magnitude, then small ones: what was large leaves its rounding
    in a sum that is incremented."""
    drawn, size = priorities_of(torch.ones(1_000))
    rng, incremented, p = np.random.default_rng(0), 1_000.0, np.ones(1_000)
    for _ in range(1_500):
        rows = rng.permutation(1_000)[:256]
        new = np.exp(rng.normal(0, 6, 256))
        incremented += (new - p[rows]).sum()
        p[rows] = new
        drawn.set(torch.from_numpy(rows), torch.from_numpy(new))
    incremented += (1e-6 - p).sum()
    drawn.set(torch.arange(1_000), torch.full((1_000,), 1e-6, dtype=torch.float64))
    assert torch.equal(drawn.sums, drawn.p.sum(1))
    assert abs(float(drawn.sums.sum()) / 1e-3 - 1) < 1e-12
    assert abs(incremented / 1e-3 - 1) > 0.01


def test_draws_over_many_blocks_follow_the_priorities():
    p = torch.randn(1_000, generator=torch.Generator().manual_seed(0)).exp()
    drawn, size = priorities_of(p)
    count = torch.bincount(drawn.sample(400_000, size)[0], minlength=1_000)
    expected = 400_000 * p / p.sum()
    assert float(((count - expected) ** 2 / expected).sum()) < 1_000 + 5 * 2_000**0.5  # chi^2


def test_rows_that_are_not_there_yet_are_never_drawn():
    drawn, replay = td3.Priorities(1_000, CPU), td3.Replay(1_000, 1, 1, CPU)
    for n in (1, 62, 2, 300):
        x = torch.zeros(n, 1)
        replay.add(x, x, x[:, 0], x, x[:, 0], x[:, 0])
        drawn.add(replay, n)
        rows, _ = drawn.sample(20_000, replay.size)
        assert rows.max() == replay.added - 1 and len(rows.unique()) == replay.added


def test_a_row_that_is_overwritten_starts_again_at_the_top():
    drawn, replay = td3.Priorities(5, CPU), td3.Replay(5, 1, 1, CPU)
    x = torch.zeros(1, 1)

    def add():
        replay.add(x, x, x[:, 0], x, x[:, 0], x[:, 0])
        drawn.add(replay, 1)

    for _ in range(5):
        add()
    drawn.set(torch.arange(5), torch.tensor([2.0, 7.0, 3.0, 4.0, 5.0]))
    drawn.set(torch.tensor([1]), torch.tensor([6.0]))
    for _ in range(2):
        add()
    assert drawn.p.view(-1)[:5].tolist() == [7, 7, 3, 4, 5]  # the highest that ever was
    assert torch.equal(drawn.sums, drawn.p.sum(1))


def test_a_row_drawn_twice_has_the_larger_priority():
    drawn, _ = priorities_of([1, 1, 1])
    drawn.set(torch.tensor([0, 1, 0, 0]), torch.tensor([2.0, 3.0, 5.0, 4.0]))
    assert drawn.p.view(-1)[:3].tolist() == [5, 3, 1] and float(drawn.sums) == 9


def a_problem(kind: str, gamma=0.0, n=600, **changes):
    """A learner, a replay of n transitions with reward sin(3 obs), and its priorities."""
    args = td3.Args(replay=kind, width=32, gamma=gamma, q_lr=3e-3, batch_size=64, **changes)
    replay, drawn = td3.Replay(n, 1, 1, CPU), td3.Priorities(n, CPU)
    obs = torch.linspace(-1, 1, n)[:, None]
    replay.add(obs, 0 * obs, torch.sin(3 * obs[:, 0]), obs, 0 * obs[:, 0], 0 * obs[:, 0])
    drawn.add(replay, n)
    return td3.Learner(1, 1, args, CPU), replay, drawn


@pytest.mark.parametrize("kind", ["per", "lap", "discor"])
def test_nothing_of_an_update_waits_for_the_device(kind, monkeypatch):
    """Tensors without values: whatever asks for one raises. So a CUDA graph can hold it."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    monkeypatch.setattr(torch.nn.Module, "to", lambda net, device: net)  # fails without values
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner, replay, drawn = a_problem(kind)
        for with_policy in (False, True):
            if kind == "discor":
                info = learner.update(replay.sample(64), with_policy)
            else:
                info = td3.prioritised_update(learner, replay, drawn, with_policy)
        with pytest.raises(DataDependentOutputException):
            float(info["qf_loss"])


# ---------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("kind", ["per", "lap"])
def test_the_policys_minibatch_is_drawn_uniformly(kind, monkeypatch):
    learner, replay, drawn = a_problem(kind)
    drawn.set(torch.tensor([7]), torch.tensor([1e9]))
    seen = {"critic_loss": [], "actor_loss": []}
    for name in seen:

        def spy(net, batch, *rest, name=name):
            seen[name].append(batch.obs)
            return getattr(td3, name)(net, batch, *rest)

        setattr(learner, name, spy)
    td3.prioritised_update(learner, replay, drawn, True)
    assert (seen["critic_loss"][0] == replay.columns["obs"][7]).all() and len(
        seen["actor_loss"][0].unique()
    ) > 40
    assert drawn.p.view(-1)[7] < 100  # its own TD error from now on
    td3.prioritised_update(learner, replay, drawn, False)
    assert len(seen["critic_loss"][1].unique()) > 40 and len(seen["actor_loss"]) == 1


@pytest.mark.parametrize(
    "kind, given, alpha",
    [("per", None, 0.6), ("per", 0.3, 0.3), ("lap", None, 0.4), ("lap", 0.7, 0.7), ("lap", 0, 0)],
)
def test_a_prioritised_update_by_hand(kind, given, alpha):
    """Weights go with the rows that were drawn, and their new p are of |delta| before the step,
    neither squared nor weighted: delta is Q - r with gamma 0."""
    learner, replay, drawn = a_problem(kind, replay_alpha=given)
    replay.columns["rew"].mul_(5)  # beyond 1, where LAP's p is not flat
    p = torch.rand(600, dtype=torch.float64) + 0.1
    drawn.set(torch.arange(600), p)
    drawn.beta.fill_(0.5)
    seen = []

    def spy(net, batch, args, weight):
        seen.append((batch, weight, learner.critic(batch.obs, batch.act).detach() - batch.rew))
        return td3.critic_loss(net, batch, args, weight)

    learner.critic_loss = spy
    td3.prioritised_update(learner, replay, drawn, False)
    ((batch, weight, delta),) = seen
    rows = ((batch.obs[:, 0] + 1) / 2 * 599).round().long()
    expected = p[rows] ** -0.5
    assert torch.allclose(weight, (expected / expected.max()).float())
    size = delta.abs().amax(0)
    assert size.max() > 2
    expected = (size + 1e-6) ** alpha if kind == "per" else size.clamp(min=1) ** alpha
    assert torch.allclose(drawn.p.view(-1)[rows].float(), expected, atol=1e-5)


def test_lap_with_alpha_0_is_hubers_loss_on_uniform_draws():
    learner, replay, drawn = a_problem("lap", replay_alpha=0.0)
    replay.columns["rew"].mul_(5)
    for _ in range(20):
        td3.prioritised_update(learner, replay, drawn, False)
    assert (drawn.p.view(-1)[:600] == 1).all()
    assert a_problem("pal", replay_alpha=0.0)[0].replay_alpha == 0


@KIND
def test_each_kind_learns_a_function(kind):
    """gamma 0: Q is the reward. The TD error is a share of the target's variance."""
    learner, replay, drawn = a_problem(kind)
    first = td3.diagnose(learner, replay, learner.args)["td_error"]
    for i in range(300):
        if kind in ("per", "lap"):
            info = td3.prioritised_update(learner, replay, drawn, i % 2 == 0)
        else:
            info = learner.update(replay.sample(64), i % 2 == 0)
    assert td3.diagnose(learner, replay, learner.args)["td_error"] < 0.02 < 0.5 < first
    assert all(x.numel() == 1 for x in info.values())


def test_delta_learns_the_errors_that_follow():
    """Q is held at 0 with rewards of 1 and gamma .5: every TD error is 1, Delta comes to 2, T
    follows it."""
    learner, replay, _ = a_problem("discor", gamma=0.5)
    replay.columns["rew"].fill_(1.0)
    for p in [*learner.critic.parameters(), *learner.target.parameters()]:
        p.data.zero_()
    learner.optim["critic"].param_groups[0]["lr"] = 0.0
    learner.args.tau = 0.05
    for _ in range(400):
        learner.update(replay.sample(64), True)
    batch = replay.sample(64)
    assert (learner.error(batch.obs, batch.act) - 2).abs().mean() < 0.2
    assert (learner.temperature - 2).abs().max() < 0.2
    assert len(learner.error.layers) == len(learner.critic.layers) + 1


# ----------------------------------------------------------------------------------------- a run
def tiny(kind, **changes):
    args = td3.Args(replay=kind, width=16, batch_size=16, log_frequency=20, eval_episodes=1)
    args = replace(args, total_timesteps=150, learning_starts=30, eval_frequency=60)
    return replace(args, checkpoint_frequency=50, **changes)


@KIND
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(kind, monkeypatch):
    """A ring that has gone round, two environments, an odd count of updates."""
    args = tiny(kind, num_envs=2, buffer_size=70, utd=0.5)
    td3.train(replace(args, run_dir="whole"))
    add, count = td3.Replay.add, []

    def stopping(self, *columns):
        add(self, *columns)
        count.append(1)
        if len(count) == 56:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(td3.Replay, "add", stopping)
    with pytest.raises(SystemExit) as stop:
        td3.train(replace(args, run_dir="parts"))
    assert stop.value.code == 143
    whole, parts = (next(Path(x).iterdir()) for x in ("whole", "parts"))
    saved = load(parts / "checkpoint.pt")
    assert saved["step"] == 112 and ("priorities" in saved) == (kind in ("per", "lap"))
    td3.train(replace(args, run_dir="parts", resume=str(parts)))
    assert_same_checkpoint(whole / "checkpoint.pt", parts / "checkpoint.pt")
    assert metrics(whole) == metrics(parts)


def test_beta_rises_to_1_and_every_environments_rows_can_be_drawn(monkeypatch):
    """The last of 76 steps in two environments ends at 152, beyond the 151 that were asked for."""
    update, beta = td3.prioritised_update, []

    def spy(learner, replay, priorities, with_policy):
        beta.append(float(priorities.beta))
        assert (priorities.p.view(-1)[: replay.added] > 0).all()
        return update(learner, replay, priorities, with_policy)

    monkeypatch.setattr(td3, "prioritised_update", spy)
    td3.train(replace(tiny("per", num_envs=2), total_timesteps=151))
    assert beta[0] == pytest.approx(0.4 + 0.6 * 32 / 151) and beta[-1] == 1
    assert beta == sorted(beta)


def test_a_longer_run_goes_on_with_the_priorities():
    td3.train(tiny("per"))
    (run,) = Path("runs").iterdir()
    p = load(run / "checkpoint.pt")["priorities"]["p"].view(-1)
    assert (p[:150] > 0).all() and (p[150:] == 0).all()
    td3.train(replace(tiny("per", resume=str(run)), total_timesteps=400))
    assert (load(run / "checkpoint.pt")["priorities"]["p"].view(-1)[:400] > 0).all()


def test_uniform_and_pal_draw_the_same_random_numbers():
    for kind in ("uniform", "pal"):
        td3.train(tiny(kind, run_dir=kind))
    a, b = (load(next(Path(k).iterdir()) / "checkpoint.pt") for k in ("uniform", "pal"))
    assert torch.equal(a["random"], b["random"]) and a["networks"].keys() == b["networks"].keys()


@pytest.mark.parametrize(
    "line",
    ["--replay-alpha 0", "--replay discor --replay-alpha 0.5", "--replay lap --replay-alpha 1.5"],
)
def test_what_would_have_no_effect_is_refused(line, capsys):
    args = tyro.cli(td3.Args, args=line.split())
    assert "--replay-alpha" in refused(capsys, lambda: td3.train(args))


@KIND
def test_non_finite_numbers_stop_the_run(kind, monkeypatch, capsys):
    """A reward that turns NaN in the replay: status 3, and no index out of range on the way."""
    add, count = td3.Replay.add, []

    def poisoned(self, *columns):
        add(self, *columns)
        count.append(1)
        if len(count) == 75:
            self.columns["rew"][:] = float("nan")

    monkeypatch.setattr(td3.Replay, "add", poisoned)
    with pytest.raises(SystemExit) as stop:
        td3.train(tiny(kind, eval_episodes=0))
    assert stop.value.code == 3 and "not finite" in capsys.readouterr().err


def test_another_kind_on_resume_is_refused(capsys):
    td3.train(tiny("uniform"))
    (run,) = Path("runs").iterdir()
    err = refused(capsys, lambda: td3.train(tiny("lap", resume=str(run))))
    assert "that run has --replay uniform" in err
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved["args"]["replay"]  # as in a run that is older than the flag: its default holds
    torch.save(saved, run / "checkpoint.pt")
    err = refused(capsys, lambda: td3.train(tiny("lap", resume=str(run))))
    assert "that run has --replay uniform" in err
    td3.train(tiny("uniform", resume=str(run)))


def test_another_alpha_on_resume_is_refused(capsys):
    td3.train(tiny("lap"))
    (run,) = Path("runs").iterdir()
    err = refused(capsys, lambda: td3.train(tiny("lap", resume=str(run), replay_alpha=0.0)))
    assert "that run has --replay-alpha None" in err


# -------------------------------------------------------------------------------- what it is for
def test_the_blind_cliffwalk(monkeypatch):
    """PER needs at most a fifth of uniform's updates to learn ten states."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "runs"))
    import cliffwalk

    median = {}
    for kind in ("uniform", "per"):
        found = [cliffwalk.updates(kind, 10, seed) for seed in (1, 2, 3)]
        median[kind] = statistics.median(found)
    assert median["uniform"] >= 5 * median["per"]
