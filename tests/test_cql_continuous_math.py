"""Each formula of cql_continuous.py against an answer found another way: quadrature, loops, closed
forms; its verdicts on planted curves."""

import itertools
import math
import shlex
from dataclasses import replace

import cql_continuous as cql
import numpy as np
import pytest
import torch
import tyro
from cql_continuous import Actor, Args, Batch, Critic, Learner

CPU = torch.device("cpu")


def tiny(**changes) -> Args:
    args = Args(**{"width": 16, "batch_size": 8} | changes)
    cql.check(args)
    return args


def random_batch(n=8, obs=3, act=2) -> Batch:
    done = (torch.rand(n) < 0.3).float()
    a, b = torch.rand(n, act) * 1.8 - 0.9, torch.rand(n, act) * 1.8 - 0.9
    return Batch(torch.randn(n, obs), a, torch.randn(n), torch.randn(n, obs), done, b)


def fixed_actor(mean: list[float], std: float) -> Actor:
    """An actor whose Gaussian is the same in every state."""
    actor = Actor(1, len(mean), tiny())
    for p in actor.parameters():
        torch.nn.init.zeros_(p)
    actor.net[-1].bias.data = torch.tensor(mean + [math.log(std)] * len(mean))
    return actor.requires_grad_(False)


def grid(d: int, n: int):
    """Midpoints of a regular grid on [-1, 1]^d, (n^d, d), and the volume of a cell."""
    x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1).tolist()
    return torch.tensor(list(itertools.product(x, repeat=d))), (2 / n) ** d


def normal_log_density(act, mean: list[float], std: float):
    """log of the density of a = tanh(u), u ~ N(mean, std^2), by torch.distributions."""
    normal = torch.distributions.Normal(torch.tensor(mean).double(), std)
    act = act.double()
    return (normal.log_prob(torch.atanh(act)) - torch.log(1 - act**2)).sum(-1)


# ------------------------------------------------------------------------------- squashed Gaussian
@pytest.mark.parametrize("mean, std", [([0.0], 1.0), ([-1.0], 0.05), ([0.3, -0.5], 0.4)])
def test_squashed_density_integrates_to_one(mean, std):
    d = len(mean)
    act, cell = grid(d, 200_001 if d == 1 else 1_501)
    log_std = torch.full((d,), math.log(std))
    logp = cql.squashed_log_prob(torch.atanh(act), torch.tensor(mean), log_std)
    assert abs(float(logp.exp().sum()) * cell - 1) < 1e-3


def test_squashed_density_is_stable_far_out():
    """At |u| = 20 tanh is 1 in float32; the exact log density is known: 2u - log 4 for large u."""
    u = torch.tensor([[20.0], [-20.0]], requires_grad=True)
    logp = cql.squashed_log_prob(u, torch.zeros(1), torch.zeros(1))
    exact = -200 - 0.5 * math.log(2 * math.pi) + 40 - math.log(4)
    assert torch.allclose(logp, torch.full((2,), exact), atol=1e-3)
    logp.sum().backward()
    assert torch.isfinite(u.grad).all()


def test_log_prob_of_given_actions_and_of_samples_agree():
    actor, obs = Actor(3, 2, tiny()), torch.randn(50, 3)
    act, logp = actor.sample(obs, 4)
    assert torch.allclose(actor.log_prob(obs, act), logp, atol=2e-3)
    assert torch.isfinite(actor.log_prob(obs, torch.ones(50, 1, 2))).all()  # data holds exactly 1
    actor.net[-1].weight.data.zero_()
    actor.net[-1].bias.data = torch.tensor([0.0, 0.0, -100.0, 100.0])
    assert actor(torch.zeros(1, 3))[1].tolist() == [[-5.0, 2.0]]


# --------------------------------------------------------------------------- log-sum-exp estimators
def sloped(act):
    return 2.5 * act.sum(-1)


def peaked(act):
    return 6 * torch.exp(-8 * (act - 0.5).pow(2).sum(-1))


CASES = {
    "peaked": (peaked, [math.atanh(0.5)], 0.1),
    "sloped": (sloped, [0.3], 0.5),
    "sloped 2-D": (sloped, [0.3, -0.4], 0.5),
}


def estimates(q, mean, std, kind: str, n: int, repeats: int) -> torch.Tensor:
    """`repeats` independent estimates of log E_Unif exp Q, (repeats,)."""
    obs = torch.zeros(repeats, 1)
    act, log_ratio = cql.proposals(fixed_actor(mean, std), obs, obs, kind, n)
    return cql.log_mean_exp(q(act), log_ratio)


def is_mean_of(exact: float, x) -> bool:
    """Within 4 standard errors, which are small enough for that to mean something."""
    error = float(x.std()) / math.sqrt(len(x))
    return abs(float(x.mean()) - exact) < 4 * error < 0.08 * exact


@pytest.mark.parametrize("n", [1, 4, 50])
@pytest.mark.parametrize("case", CASES)
def test_exp_of_the_mixture_estimate_is_unbiased(case, n):
    """Traps: the log is biased low at small N, its exp is not."""
    q, mean, std = CASES[case]
    act, _ = grid(len(mean), 100_001 if len(mean) == 1 else 1_001)
    x = estimates(q, mean, std, "mixture", n, 40_000).double().exp()
    assert is_mean_of(float(torch.exp(q(act)).mean()), x)
    obs = torch.zeros(1000, 1)
    _, log_ratio = cql.proposals(fixed_actor(mean, std), obs, obs, "mixture", n)
    assert float((-log_ratio).max()) <= math.log(2) + 1e-5  # no weight exceeds two


def test_three_sets_are_three_importance_samplers():
    """n of Unif, of pi(.|s) and of pi(.|s'), each with the density that it was drawn from."""
    mean, std, n, b = [0.3, -0.4], 0.5, 3, 2_000
    here = fixed_actor(mean, std)

    class Two(Actor):  # pi(.|s') differs from pi(.|s)
        def forward(self, x):
            m, log_std = here(x)
            return m + 0.5 * (x.abs() > 0), log_std

    obs = torch.zeros(b, 1)
    act, log_ratio = cql.proposals(Two(1, 2, tiny()), obs, obs + 1, "three-sets", n)
    uniform, at_s, at_next = act.split(n, 1)
    ratio_uniform, ratio_s, ratio_next = log_ratio.split(n, 1)
    assert not ratio_uniform.any() and abs(float(uniform.mean())) < 0.05
    for sample, ratio, shift in ((at_s, ratio_s, 0.0), (at_next, ratio_next, 0.5)):
        density = normal_log_density(sample, [m + shift for m in mean], std)
        assert torch.allclose(ratio.double(), density + 2 * math.log(2), atol=0.05)
        assert abs(float(torch.atanh(sample).mean(dim=(0, 1))[0]) - mean[0] - shift) < 0.05
    assert len(act[:9].unique()) == act[:9].numel()  # every proposal is a draw of its own


def test_three_sets_plateau_with_a_narrow_policy():
    """A finding: with a narrow policy only the uniform third is alive, and the estimate of a flat Q
    heads for log(1/3) instead of 0, at any affordable N. The mixture does not have this."""

    def flat(act):
        return torch.zeros(act.shape[:-1])

    for n in (10, 1000):
        assert -1.15 < float(estimates(flat, [0.0], 0.01, "three-sets", n, 400).median()) < -0.9
        assert abs(float(estimates(flat, [0.0], 0.01, "mixture", n, 400).mean())) < 0.12


def test_without_density_it_is_cql_rho():
    """log E_{a~pi} exp Q, by quadrature over the policy."""
    actor, obs, args = fixed_actor([0.3], 0.5), torch.zeros(20_000, 1), tiny(cql_variant="rho")
    act, log_ratio = cql.proposals(actor, obs, obs, "policy", 4)
    x = cql.conservative_term(sloped(act)[None], log_ratio, torch.zeros(1, 20_000), args)[0]
    u = torch.linspace(-4.2, 4.8, 20_001, dtype=torch.float64)
    density = torch.distributions.Normal(0.3, 0.5).log_prob(u).exp()
    exact = float((density * torch.exp(2.5 * torch.tanh(u))).sum() * (u[1] - u[0]))
    assert is_mean_of(exact, x.double().exp())


def test_conservative_terms_by_hand():
    q, q_data = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[0.5, 3.0]])
    log_ratio = torch.tensor([[0.0, math.log(2)], [0.0, 0.0]])
    soft = {"H": math.e + math.e**2 / 2, "rho": math.e + math.e**2}
    expect = {name: [math.log(x / 2) - 0.5, -3.0] for name, x in soft.items()}
    expect |= {"eq2": [1.0, -3.0], "eq1": [1.5, 0.0]}
    for variant, value in expect.items():
        term = cql.conservative_term(q, log_ratio, q_data, tiny(cql_variant=variant))
        assert torch.allclose(term, torch.tensor([value]))
    clipped = cql.conservative_term(q, log_ratio, q_data, tiny(cql_clip_diff=-1.0))
    assert float(clipped[0, 1]) == -1.0
    for variant, x in soft.items():  # T = 2 with twice the Q: 2 log mean exp(Q / 2) - Q(s, a)
        args = tiny(cql_variant=variant, cql_temperature=2.0)
        term = cql.conservative_term(2 * q, log_ratio, q_data, args)
        assert float(term[0, 0]) == pytest.approx(2 * math.log(x / 2) - 0.5, abs=1e-5)


# ---------------------------------------------------------------------------- the sampled backward
def cql_gradient(nets, batch, args, seed=7):
    """Value, and gradient of the term by the critics' weights as one vector."""
    torch.manual_seed(seed)  # proposals are the same; then draw() takes its number
    q_data = nets.critic(batch.obs, batch.act)
    term, info = cql.conservative_loss(nets, batch, q_data, args)
    grads = torch.autograd.grad(term.sum(), list(nets.critic.parameters()))
    return info["cql_loss"], torch.cat([g.flatten() for g in grads])


def double_case(**changes):
    """Networks and a batch in float64, with a Q that differs enough for the weights to matter."""
    args = tiny(cql_samples=3, cql_backward=0, **changes)
    nets, batch = Learner(3, 2, args, CPU).double(), random_batch(4)
    nets.critic.head.weight.data *= 12
    return args, nets, Batch(*(x.double() for x in batch))


FORMS = {
    "three sets": {},
    "mixture": {"cql_proposals": "mixture"},
    "policy": {"cql_proposals": "policy"},
    "rho": {"cql_variant": "rho"},
    "temperature": {"cql_temperature": 3.0},
    "ten critics": {"num_critics": 10},
    "clip": {"cql_clip_diff": 0.1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_sampled_gradient_is_unbiased(form, k, monkeypatch):
    """Integrated over its one random number it is the full pass's: the finer the grid, the nearer.
    The value is the exact one."""
    args, nets, batch = double_case(**FORMS[form])
    value, exact = cql_gradient(nets, batch, args)
    if form == "clip":
        q_data = nets.critic(batch.obs, batch.act)
        torch.manual_seed(7)
        act, log_ratio = cql.proposals(nets.actor, batch.obs, batch.next_obs, "three-sets", 3)
        q = nets.critic(batch.obs, act)
        clipped = cql.conservative_term(q, log_ratio, q_data, args) == 0.1
        assert clipped.any() and not clipped.all()
    errors = []
    for n in (16, 512):
        mean = 0
        for u in (torch.arange(n) + 0.5) / n:
            monkeypatch.setattr(torch, "rand_like", lambda x, u=u: torch.full_like(x, u))
            same, gradient = cql_gradient(nets, batch, replace(args, cql_backward=k))
            assert torch.equal(same, value)
            mean = mean + gradient / n
        errors.append(float((mean - exact).norm() / exact.norm()))
    assert errors[1] < 5e-3 and errors[1] < errors[0] / 8, errors


def test_a_states_part_of_the_first_layer_is_the_same_for_its_actions():
    """Q of M actions a state, shared or each critic's own, is Q of the rows one by one."""
    args = tiny(num_critics=3, depth=3, residual=True, layer_norm=True)
    critic, obs = cql.Critic(3, 2, args).double(), torch.randn(5, 3).double()
    shared, own = torch.randn(5, 4, 2).double(), torch.randn(3, 5, 4, 2).double()
    for act in (shared, own):
        q = critic(obs, act)
        for m in range(4):
            for i in range(3):
                rows = act[..., m, :] if act.dim() == 3 else act[i, :, m]
                assert torch.allclose(q[i, :, m], critic(obs, rows)[i], atol=1e-14)


def test_where_it_would_be_biased_it_is_off(capsys):
    forms = {1: [{}, {"cql_variant": "rho"}, {"cql_backward": 1}]}
    forms[0] = [{"cql_backward": 0}, {"dropout": 0.1}, {"vib_coef": 0.1}]
    forms[0] += [{"cql_variant": "eq1"}, {"cql_variant": "eq2"}]
    for k, cases in forms.items():
        assert all(cql.backward_samples(tiny(**case)) == k for case in cases)
        capsys.readouterr()
        for case in cases:
            tiny(**case)  # check() speaks
            said = "--cql-backward is 0" in capsys.readouterr().out
            assert said == bool({"dropout", "vib_coef"} & case.keys())


def test_with_equal_weights_and_all_of_them_it_is_exact():
    args, nets, batch = double_case(cql_variant="rho")
    nets.critic.head.weight.data.zero_()  # one Q for all actions, whose gradients differ
    _, exact = cql_gradient(nets, batch, args)
    _, found = cql_gradient(nets, batch, replace(args, cql_backward=3))
    assert float((found - exact).norm()) < 1e-12 * float(exact.norm()) > 0


@pytest.mark.parametrize("form", ["three sets", "rho"])
def test_more_draws_divide_the_variance(form, monkeypatch):
    """By k or by more, for they are spread evenly."""
    args, nets, batch = double_case(**FORMS[form])
    own = torch.Generator().manual_seed(1)
    fresh = lambda x: torch.rand(x.shape, dtype=x.dtype, generator=own)  # noqa: E731
    monkeypatch.setattr(torch, "rand_like", fresh)
    variances = []
    for k in (1, 2, 4):
        drawn = replace(args, cql_backward=k)
        x = torch.stack([cql_gradient(nets, batch, drawn)[1] for _ in range(600)])
        variances.append(float(x.var(0).sum()))
    assert variances[1] < 1.1 * variances[0] / 2 and variances[2] < 1.1 * variances[0] / 4
    assert variances[0] > 0


@pytest.mark.parametrize("m, k", [(3, 1), (12, 5), (300, 2)])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])  # what torch.rand can give
def test_draws_are_spread_and_never_meet_a_weight_of_zero(m, k, u, monkeypatch):
    """Index i is met floor(k w) or ceil(k w) times; in float32, with weights that underflow."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    log_w = torch.randn(50, m) * 4
    log_w[torch.rand(50, m) < 0.4] = -1e4
    log_w[0], log_w[0, m // 2] = -1e4, 0.0  # one weight is 1
    w = torch.softmax(log_w, -1)
    index = cql.draw(w, k)
    assert index.shape == (50, k) and (w.gather(-1, index) > 0).all()
    assert (index[0] == m // 2).all()
    met = torch.zeros(50, m).scatter_add_(-1, index, torch.ones(50, k))
    assert ((met - k * w).abs() < 1 + 1e-4).all()
    assert cql.draw(torch.full((2, m), math.nan), k).max() < m  # a NaN is for the guard to name


def test_ensemble_equals_separate_critics():
    """Every member, cut out of the stack, gives the same Q and the same gradients; it starts like
    nn.Linear, U(+-1/sqrt(in)), whose fan torch.nn.init misreads in a stack."""
    args = tiny(num_critics=3, layer_norm=True, residual=True, depth=3)
    critic, batch = Critic(3, 2, args), random_batch()
    for weight in critic.layers[1].weight.detach():
        assert abs(float(weight.std()) * 48**0.5 - 1) < 0.1
    q = critic(batch.obs, batch.act)
    q.pow(2).sum().backward()
    for i in range(3):
        weights = [x.weight[i].detach().clone().requires_grad_() for x in critic.layers]
        h, x = None, torch.cat([batch.obs, batch.act], -1)
        for w, layer in zip(weights, critic.layers):
            z = (x if h is None else h) @ w + layer.bias[i, 0].detach()
            z = torch.relu(torch.nn.functional.layer_norm(z, (16,)))
            h = z if h is None else h + z
        alone = (h @ critic.head.weight[i].detach() + critic.head.bias[i].detach()).squeeze(-1)
        assert torch.allclose(alone, q[i].detach(), atol=1e-6)
        alone.pow(2).sum().backward()
        for layer, w in zip(critic.layers, weights):
            assert torch.allclose(layer.weight.grad[i], w.grad, atol=1e-5)


def test_networks_standardise_what_the_environment_shows():
    learner, data = Learner(3, 2, tiny(), CPU), torch.randn(500, 3) * 5 + 2
    act, fresh = torch.zeros(500, 2), (data - data.mean(0)) / (data.std(0, correction=0) + 1e-3)
    expected = learner.critic(fresh, act), learner.target(fresh, act), learner.actor(fresh)[0]
    learner.standardise(data)
    found = learner.critic(data, act), learner.target(data, act), learner.actor(data)[0]
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(found, expected))


@pytest.mark.parametrize("kind, n", [("sac", 1), ("max", 5), ("sarsa", 1), ("mean", 1)])
def test_backups_by_hand(kind, n):
    """y = r + gamma (1 - done) min_i max_a' Q_i(s', a') less the entropy term."""
    args = tiny(backup=kind, cql_samples=5, num_critics=3, backup_entropy=kind == "sac")
    nets, batch = Learner(3, 2, args, CPU), random_batch()
    torch.manual_seed(3)
    next_act, y = cql.backup(nets, batch, args)
    torch.manual_seed(3)
    act, logp = nets.actor.sample(batch.next_obs, n)
    if kind in ("sarsa", "mean"):
        mean = torch.tanh(nets.actor(batch.next_obs)[0])
        act = (batch.next_act if kind == "sarsa" else mean)[:, None]
    for b in range(8):
        state = batch.next_obs[b : b + 1]
        q = torch.stack([nets.target(state, a[None])[:, 0] for a in act[b]])  # (n, critics)
        value = q.max(0).values.min() - nets.log_alpha.exp() * logp[b, 0] * (kind == "sac")
        exact = batch.rew[b] + 0.99 * (1 - batch.done[b]) * value
        assert torch.allclose(y[b], exact, atol=1e-5)
        assert torch.equal(next_act[b], act[b, q.min(1).values.argmax()])


@pytest.mark.parametrize("kind", [None, "policy", "mixture"])
def test_critic_loss_and_what_it_reports_by_loops(kind):
    """Squared error without 1/2 + 5 x gap + DR3, written out for each critic and state, summed over
    the ensemble; the effective share of the samples."""
    args = tiny(dr3_coef=0.1, num_critics=3, cql_samples=3, cql_temperature=2.0, cql_proposals=kind)
    nets, batch = Learner(3, 2, args, CPU), random_batch()
    torch.manual_seed(5)
    loss, info = cql.critic_loss(nets, batch, args)
    torch.manual_seed(5)
    next_act, y = cql.backup(nets, batch, args)
    kind = kind or "three-sets"  # CQL(H)'s own
    act, log_ratio = cql.proposals(nets.actor, batch.obs, batch.next_obs, kind, 3)
    q, q_data = nets.critic(batch.obs, act), nets.critic(batch.obs, batch.act)
    phi = nets.critic.features(batch.obs, batch.act)[0]
    phi_next = nets.critic.features(batch.next_obs, next_act)[0]
    errors, gaps, dots, shares = [], [], [], []
    for i, b in itertools.product(range(3), range(8)):
        w = [math.exp(float(x) / 2 - float(r)) for x, r in zip(q[i, b], log_ratio[b])]
        errors.append(float(q_data[i, b] - y[b]) ** 2)
        gaps.append(2 * math.log(sum(w) / len(w)) - float(q_data[i, b]))
        shares.append(sum(w) ** 2 / sum(x**2 for x in w) / len(w))
        dots.append(float(phi[i, b] @ phi_next[i, b]) * float(1 - batch.done[b]))
    assert float(loss) == pytest.approx(
        sum(errors + [5 * x for x in gaps]) / 8 + 0.1 * sum(dots) / 8
    )
    first, second = np.mean(errors[:8]), np.mean(errors[8:16])
    expected = {"qf1_loss": first, "qf2_loss": second, "qf_loss": np.mean(errors)}
    expected |= {f"qf{i + 1}_values": float(q_data[i].mean()) for i in (0, 1)}
    expected |= {"cql_loss": np.mean(gaps), "cql_ess": np.mean(shares), "cql_alpha": 5.0}
    expected["dr3_loss"] = sum(dots) / 24
    assert {k: float(v) for k, v in info.items()} == pytest.approx(expected, abs=1e-5)


def test_the_bottleneck_by_closed_form():
    """phi is a draw of N(mean, std^2), its mean in eval mode; the loss has the KL to N(0, I)."""
    light, heavy = (tiny(vib_coef=c, cql_alpha=0.0) for c in (0.1, 0.4))
    nets, batch, losses = Learner(3, 2, light, CPU), random_batch(), []
    for args in (light, heavy):
        torch.manual_seed(0)
        loss, info = cql.critic_loss(nets, batch, args)
        losses.append(float(loss))
    _, kl, hidden = nets.critic.features(batch.obs, batch.act)
    mean, log_std = nets.critic.bottleneck(hidden[-1]).chunk(2, -1)
    normal, unit = (torch.distributions.Normal(*x) for x in ((mean, log_std.exp()), (0.0, 1.0)))
    exact = torch.distributions.kl_divergence(normal, unit).sum(-1)
    assert torch.allclose(kl, exact, atol=1e-5)
    assert losses[1] - losses[0] == pytest.approx(0.3 * float(exact.mean(1).sum()), abs=1e-5)
    assert float(info["vib_loss"]) == pytest.approx(float(exact.mean()), abs=1e-5)
    phi = [nets.critic.features(batch.obs, batch.act)[0].detach() for _ in range(4000)]
    assert torch.allclose(torch.stack(phi).mean(0), mean, atol=6 / 4000**0.5)
    nets.eval()
    assert torch.equal(nets.critic.features(batch.obs, batch.act)[0], mean)
    nets.train()
    assert not nets.target.training  # nor has the target dropout


def test_unit_norm_and_dropout():
    batch = random_batch()
    phi = Critic(3, 2, tiny(unit_norm=True)).features(batch.obs, batch.act)[0]
    assert torch.allclose(phi.norm(dim=-1), torch.ones(2, 8), atol=1e-5)
    nets = Learner(3, 2, tiny(dropout=0.3, depth=1, width=256), CPU)
    dropped = nets.critic.features(batch.obs, batch.act)[2][0]
    whole = nets.target.features(batch.obs, batch.act)[2][0]  # the same weights
    ratio = (dropped / whole)[whole > 0]
    assert abs(float((ratio == 0).float().mean()) - 0.3) < 4 * math.sqrt(0.21 / len(ratio))
    assert torch.allclose(ratio[ratio > 0], torch.tensor(1 / 0.7))


def test_the_multiplier_weighs_the_term_and_stops_at_a_million():
    args = tiny(cql_target_gap=-1000.0, num_critics=3)
    nets, batch, losses = Learner(3, 2, args, CPU), random_batch(), []
    for weight in (2.0, 7.0):
        nets.log_cql_alpha.data.fill_(math.log(weight))
        torch.manual_seed(0)
        loss, info = cql.critic_loss(nets, batch, args)
        losses.append(float(loss))
        assert float(info["cql_alpha"]) == pytest.approx(weight)
    assert losses[1] - losses[0] == pytest.approx(5 * 3 * float(info["cql_loss"]), rel=1e-4)
    nets.log_cql_alpha.data.fill_(math.log(1e6))
    nets.update(lambda: batch, cloning=False)
    assert float(nets.log_cql_alpha) == pytest.approx(math.log(1e6), abs=1e-5)
    x = torch.tensor(math.log(1e6), requires_grad=True)  # and it can come back from there
    (slope,) = torch.autograd.grad(cql.dual_loss(x, torch.tensor(-2.0)), x)
    assert float(slope) == pytest.approx(2e6, rel=1e-4)


def test_bf16_is_for_the_sampled_actions_alone():
    nets, batch, infos = Learner(3, 2, tiny(), CPU), random_batch(), []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        infos.append(cql.critic_loss(nets, batch, tiny(precision=precision))[1])
    assert infos[0]["qf_loss"] == infos[1]["qf_loss"]
    assert 0 < abs(float(infos[0]["cql_loss"] - infos[1]["cql_loss"])) < 0.01


def test_with_the_same_draws_bf16_has_fp32s_gradient(monkeypatch):
    """Only which actions are drawn depends on it."""
    nets, batch, found = Learner(3, 2, tiny(), CPU), random_batch(), []
    drawn = lambda w, k: torch.zeros(*w.shape[:-1], k, dtype=torch.long)
    monkeypatch.setattr(cql, "draw", drawn)
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        loss, _ = cql.critic_loss(nets, batch, tiny(precision=precision))
        found.append(torch.autograd.grad(loss, list(nets.critic.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_dr3_gradient_flows_through_both_sides():
    nets, batch = Learner(3, 2, tiny(), CPU), random_batch()
    weight, gradients = nets.critic.layers[0].weight, []
    for coef in (1.0, 0.0):
        torch.manual_seed(1)
        loss, _ = cql.critic_loss(nets, batch, tiny(dr3_coef=coef, cql_alpha=0.0))
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.manual_seed(1)
    next_act, _ = cql.backup(nets, batch, tiny())
    phi = nets.critic.features(batch.obs, batch.act)[0]
    phi_next = nets.critic.features(batch.next_obs, next_act)[0]
    dot = ((phi * phi_next).sum(-1) * (1 - batch.done)).mean(1).sum()
    both = torch.autograd.grad(dot, weight)[0]
    assert torch.allclose(gradients[0] - gradients[1], both, atol=1e-5)


def test_actor_and_cloning_loss_by_hand():
    """alpha log pi(a|s) less the lowest Q of a sampled action; -log pi of the data's action. The
    entropy, for the temperature, is of sampled actions in both."""
    nets, batch = Learner(3, 2, tiny(num_critics=3), CPU), random_batch()
    nets.log_alpha.data.fill_(math.log(0.3))
    torch.manual_seed(2)
    loss, info = cql.actor_loss(nets, batch, nets.args)
    torch.manual_seed(2)
    cloning, cloning_info = cql.cloning_loss(nets, batch, nets.args)
    torch.manual_seed(2)
    act, logp = nets.actor.sample(batch.obs, 1)
    lows = [float(nets.critic(batch.obs[b : b + 1], act[b]).min()) for b in range(8)]
    expected = np.mean([0.3 * float(x) - low for x, low in zip(logp, lows)])
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    for x in (info, cloning_info):
        assert float(x["entropy"]) == pytest.approx(-float(logp.mean()), abs=1e-5)
    mean, log_std = nets.actor(batch.obs)
    normal = torch.distributions.Normal(mean, log_std.exp())
    logs = normal.log_prob(torch.atanh(batch.act)) - torch.log(1 - batch.act**2)
    assert float(cloning) == pytest.approx(-float(logs.sum(-1).mean()), abs=1e-4)
    nets.minimise("actor", loss)
    assert all(p.grad is None for p in nets.critic.parameters())


def test_duals_move_the_right_way():
    """The temperature rises while entropy is below -d, the conservative weight while the gap is
    above its target."""
    for entropy, sign in ((-2.1, 1), (-1.9, -1)):
        nets = Learner(3, 2, tiny(), CPU)
        info = {"actor_loss": torch.zeros(()), "entropy": torch.tensor(entropy)}
        loss = sum(p.sum() for p in nets.actor.parameters()) * 0
        nets.actor_loss = lambda *_, loss=loss, info=info: (loss, info)
        nets.update(random_batch, cloning=False)
        assert float(nets.log_alpha) * sign > 0
    for target, sign in ((-100.0, 1), (100.0, -1)):
        nets = Learner(3, 2, tiny(cql_target_gap=target), CPU)
        nets.update(random_batch, cloning=False)
        assert (float(nets.log_cql_alpha) - math.log(5)) * sign > 0


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_an_update_has_two_minibatches_and_moves_the_target(alpha):
    nets, asked = Learner(3, 2, tiny(tau=0.25, alpha=alpha, q_lr=1e-3), CPU), []
    start = [p.clone() for p in nets.target.parameters()]
    nets.update(lambda: asked.append(1) or random_batch(), cloning=False)
    assert len(asked) == 2
    steps = {name: {float(x["step"]) for x in o.state.values()} for name, o in nets.optim.items()}
    moved = set() if alpha else {1.0}
    assert steps == {"critic": {1.0}, "actor": {1.0}, "alpha": moved, "cql_alpha": set()}
    for p, before, target in zip(nets.critic.parameters(), start, nets.target.parameters()):
        assert torch.allclose(target, 0.75 * before + 0.25 * p.detach(), atol=1e-6)
    rates = {name: o.param_groups[0]["lr"] for name, o in nets.optim.items()}
    assert rates == {"critic": 1e-3, "cql_alpha": 1e-3, "actor": 1e-4, "alpha": 1e-4}


# ----------------------------------------------------------------- theory on exact small problems
S, A, GAMMA = 4, 3, 0.8


def mdp(seed=0):
    """Transitions (S, A, S), rewards (S, A), behaviour beta and policy pi, both of full support."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(S), (S, A))
    beta, pi = rng.dirichlet(np.ones(A) * 3, S), rng.dirichlet(np.ones(A) * 3, S)
    return p, rng.uniform(-1, 1, (S, A)), beta, pi


def true_q(p, r, pi):
    """Q^pi by a linear solve."""
    step = np.einsum("sat,tb->satb", p, pi).reshape(S * A, S * A)
    return np.linalg.solve(np.eye(S * A) - GAMMA * step, r.ravel()).reshape(S, A)


def cql_fixed_point(variant, p, r, beta, pi):
    """Iterates the *script's* conservative_term + squared error to convergence, in exact
    expectations: states uniformly, actions by beta, mu = pi as 2,000 equal samples a state."""
    args = tiny(cql_variant=variant, cql_alpha=1.0)
    counts = np.round(pi * 2000).astype(int)
    counts[:, 0] += 2000 - counts.sum(1)
    pi, b = counts / 2000, torch.tensor(beta)
    mu = torch.tensor(np.stack([np.repeat(np.arange(A), c) for c in counts]))
    q = torch.zeros(S, A, dtype=torch.float64, requires_grad=True)

    def bellman():
        with torch.no_grad():
            return torch.tensor(r) + GAMMA * torch.tensor(p) @ (torch.tensor(pi) * q).sum(1)

    def loss():
        optim.zero_grad()
        sampled = torch.gather(q, 1, mu)[None]  # (1, S, 2000)
        terms = [cql.conservative_term(sampled, 0.0, q[:, a][None], args)[0] for a in range(A)]
        value = ((b * (q - y) ** 2).sum(1) + sum(b[:, a] * x for a, x in enumerate(terms))).mean()
        value.backward()
        return value

    for _ in range(60):
        y = bellman()
        optim = torch.optim.LBFGS([q], max_iter=50, tolerance_grad=1e-12, tolerance_change=1e-14)
        optim.step(loss)
    return q.detach().numpy(), bellman().numpy(), pi


def test_eq1_fixed_point_and_pointwise_bound():
    """Theorem 3.1. (Q - BQ)^2 beta + alpha mu Q is stationary at BQ - alpha mu / (2 beta): half of
    --cql-alpha is the paper's alpha. It bounds Q^pi at every state and action."""
    p, r, beta, pi = mdp()
    q, y, mu = cql_fixed_point("eq1", p, r, beta, pi)
    assert np.allclose(q, y - 0.5 * mu / beta, atol=1e-5)
    assert (q < true_q(p, r, mu)).all()


def test_eq2_bounds_the_value_but_not_every_q():
    """Theorem 3.2: fixed point BQ - alpha (mu / beta - 1); V is bounded, Q need not be. mu differs
    from beta only in state 0, to which nothing returns: else later states' pessimism hides it."""
    p, r, beta, pi = mdp()
    pi[1:] = beta[1:]
    p[:, :, 0] = 0
    p /= p.sum(-1, keepdims=True)
    q, y, mu = cql_fixed_point("eq2", p, r, beta, pi)
    exact = true_q(p, r, mu)
    assert np.allclose(q, y - 0.5 * (mu / beta - 1), atol=1e-5)
    assert ((mu * q).sum(1) <= (mu * exact).sum(1) + 1e-5).all()
    assert (q[0] > exact[0]).any()


def test_without_the_term_and_with_the_max_backup_q_is_optimal():
    """Networks and update on two states s in {0, 1} with reward 1 - (a - s)^2 and s' = (a > 0) find
    Q*, known by dynamic programming, within 5 %."""
    a = torch.linspace(-1, 1, 401)
    v = torch.zeros(2)
    for _ in range(500):
        star = torch.stack([1 - (a - s) ** 2 + 0.5 * v[(a > 0).long()] for s in (0, 1)])
        v = star.max(1).values
    rates = dict(gamma=0.5, tau=0.05, q_lr=2e-3, policy_lr=1e-3)
    nets = Learner(2, 1, tiny(width=64, cql_alpha=0.0, backup="max", cql_samples=20, **rates), CPU)

    def sample():
        s, act, states = torch.randint(2, (128,)), torch.rand(128, 1) * 2 - 1, torch.eye(2)
        rew, after = 1 - (act[:, 0] - s) ** 2, (act[:, 0] > 0).long()
        return Batch(states[s], act, rew, states[after], torch.zeros(128), act)

    for _ in range(1500):
        nets.update(sample, cloning=False)
    with torch.no_grad():
        states = torch.eye(2).repeat_interleave(401, 0)
        q = nets.critic(states, a.repeat(2)[:, None]).mean(0).view(2, 401)
    away = (a.abs() > 0.05).expand(2, 401)  # Q* jumps at a = 0
    assert float((q - star).abs()[away].mean() / star.abs().mean()) < 0.05


# ----------------------------------------------------------------------------------------- verdicts
def curve(q, **constants) -> list[dict]:
    """A history of 40 diagnostics with the dataset's Q of `q`, healthy but for `constants`."""
    calm = {"td_error": 0.05, "td_error_holdout": 0.06, "cql_gap": 0.5, "q_max": 50.0}
    calm |= {"q_bound": 100.0, "q_range": 200.0, "q_lift": 250.0}
    calm |= {"q_minus_return": 0.0, "return_std": 10.0}
    moments = [calm | {"step": 100 * (i + 1), "q_data": float(x)} for i, x in enumerate(q)]
    for name, value in constants.items():
        for i, moment in enumerate(moments):
            moment[name] = float(value[i]) if np.ndim(value) else value
    return moments


def approach(level: float, share: float, n=40):
    """Q on its way from 0 to `level`; after `share` of its time constant the run ends."""
    return level * (1 - np.exp(-share * np.arange(1, n + 1) / n))


GOOD, SARSA = "no sign of trouble", {"backup": "sarsa"}
UP = np.minimum(np.linspace(0, 60, 40), 30)  # up to its level in the first half
PEAK = np.r_[np.linspace(0, 30, 20), np.linspace(30, 20, 20)]
COST = {
    "q_bound": -100.0,
    "q_range": 0.5,
    "q_lift": 0.0,
    "q_minus_return": math.nan,
    "return_std": 0,
}
SHORT, ALPHA = "too short to judge", "alpha too large"
FELL = approach(-100, 6)

VERDICTS = [
    (GOOD, UP, {}, {}),
    (GOOD, -UP, dict(q_bound=0.0, q_max=0.0, q_lift=0.0), {}),
    (GOOD, UP, dict(q_minus_return=math.nan, return_std=0.0), {}),  # Pendulum: returns unknown
    (GOOD, UP, dict(cql_gap=-9.0), {}),  # narrow data has such gaps by itself
    # divergence: 100, lifted by 250, and a slack of 5 % and 1
    (GOOD, UP, dict(q_max=360.0), {}),
    ("divergence", UP, dict(q_max=362.0), {}),
    ("divergence", np.linspace(0, 500, 40), dict(q_max=500.0), {}),
    (GOOD, UP, dict(q_max=[1000.0] * 39 + [50.0]), {}),  # the last moment counts
    ("divergence", approach(-50, 6), dict(COST, q_max=np.linspace(1, 211, 40)), {}),
    ("divergence", approach(-60, 20), dict(COST, q_max=approach(-60, 20)), {}),
    # never while Q is on its way from 0 to a bound below, whatever the share of the way
    (SHORT, approach(-100, 0.05), dict(COST, q_max=0.3 + approach(-100, 0.05)), {}),
    (SHORT, approach(-100, 0.5), dict(COST, q_max=0.3 + approach(-100, 0.5)), {}),
    (GOOD, approach(-100, 1.5), dict(COST, q_max=0.3 + approach(-100, 1.5)), {}),
    (GOOD, approach(-100, 3), dict(COST, q_max=0.3 + approach(-100, 3)), {}),
    (SHORT, approach(1e-3, 0.1), dict(q_max=0.3, q_bound=1e-3, q_range=1e-3, q_lift=0), {}),
    (SHORT, approach(1e6, 0.3), dict(q_bound=1e6, q_range=2e6, q_max=3e5, return_std=1e5), {}),
    # overfitting: a fall of a tenth of a deviation, or held-out episodes
    ("overfitting", PEAK, {}, {}),
    (GOOD, np.r_[PEAK[:20], np.full(20, 29.1)], {}, {}),
    ("overfitting", np.r_[PEAK[:20], np.full(20, 28.9)], {}, {}),
    ("overfitting", UP, dict(td_error_holdout=0.4), {}),
    (GOOD, UP, dict(td_error_holdout=0.2), {}),  # four times the other: five are asked
    # the untrained network's Q of 0 is no peak; a rise and a fall later on is one
    (GOOD, FELL, dict(q_bound=0.0, td_error=np.r_[np.ones(8), np.full(32, 0.05)]), {}),
    ("overfitting", np.r_[FELL[::2], -100 + 20 * np.sin(np.linspace(0, 2.9, 20))], {}, {}),
    # alpha too large: the term has got its way, Q not, and Q does not rise any more
    (ALPHA, np.linspace(0, -120, 40), dict(cql_gap=-9.0, q_minus_return=-40.0), {}),
    (SHORT, np.linspace(0, 30, 40), dict(cql_gap=-9.0, q_minus_return=-40.0), {}),
    (ALPHA, UP, dict(cql_gap=-9.0, q_minus_return=-40.0), {}),
    (ALPHA, np.linspace(20, 30, 40), dict(cql_gap=-9.0, q_minus_return=-60.0), {}),
    (GOOD, UP, dict(cql_gap=-9.0, q_minus_return=-9.0), {}),
    (GOOD, UP, dict(cql_gap=-0.4, q_minus_return=-11.0), {}),
    (GOOD, UP, dict(cql_gap=-9.0, q_minus_return=-40.0), {"cql_alpha": 0.0}),
    # underfitting: both stay high
    ("underfitting", UP, dict(td_error=0.5, cql_gap=2.0), {}),
    ("underfitting", UP, dict(td_error=0.15, cql_gap=-0.4, q_minus_return=-11.0), {}),
    ("underfitting", UP, dict(td_error=0.5, cql_gap=2.0, cql_push=0.9), {}),
    (ALPHA, UP, dict(td_error=0.5, cql_gap=2.0, cql_push=1.1), {}),
    (GOOD, UP, dict(td_error=np.linspace(1, 0.2, 40), td_error_holdout=0.2), {}),
    (GOOD, UP, dict(td_error=0.5, td_error_holdout=0.5, cql_gap=-1.0), {}),
    (SHORT, approach(30, 0.1), dict(td_error=0.9, td_error_holdout=0.9), {}),
    # SARSA first
    ("sarsa passes", UP, {}, SARSA),
    ("sarsa fails", UP, dict(q_minus_return=20.0), SARSA),
    ("sarsa fails", UP, dict(q_minus_return_holdout=20.0), SARSA),
    ("sarsa fails", UP, dict(td_error_holdout=0.3), SARSA),
    (SHORT, approach(30, 0.2), dict(q_minus_return=-100.0), SARSA),
    # short runs
    (SHORT, [], {}, {}),
    (SHORT, UP[:9], {}, {}),
    (GOOD, UP[20:30], {}, {}),
]


@pytest.mark.parametrize("expected, q, constants, flags", VERDICTS)
def test_verdicts_on_planted_curves(expected, q, constants, flags):
    args = tiny(num_updates=4000, **flags)
    name, sentence = cql.verdict(curve(q, **constants), args, 1.0)
    assert name == expected, sentence
    assert sentence.endswith(cql.advice(args).get(name, "")) and "nan" not in sentence


@pytest.mark.parametrize("q", [UP, -UP, 0 * UP, PEAK, np.linspace(0, 500, 40), UP[:3]])
@pytest.mark.parametrize("rewarded", [0.0, 0.001, 0.0011])
def test_equal_rewards_teach_nothing(rewarded, q):
    name, _ = cql.verdict(curve(q, q_max=1e9), tiny(num_updates=4000), rewarded)
    assert (name == "nothing to learn from") == (rewarded < 0.0011)


def test_a_tenth_of_the_time_that_q_needs_is_too_short():
    for settling, expected in ((40_000, GOOD), (40_001, SHORT)):
        assert cql.verdict(curve(UP), tiny(num_updates=4000), 1.0, settling)[0] == expected


def test_nothing_counts_in_the_first_tenth_of_a_run():
    """Q rises to 30 at update 200 and falls, with a TD error low from the start."""
    history = curve(np.r_[10, 30, 20, np.linspace(10, 12, 37)])
    found = {n: cql.peak(history, tiny(num_updates=n))[0]["step"] for n in (2000, 2001, 4000)}
    assert found == {2000: 200, 2001: 300, 4000: 4000}


@pytest.mark.parametrize("above, warns", [(4.0, False), (6.0, True), (-6.0, False)])
def test_a_q_that_rises_above_the_returns_is_not_told_to_go_on(above, warns):
    """In deviations of 10: more than half a one above the data's returns, and still rising."""
    name, text = cql.verdict(curve(np.linspace(0, 39, 40), q_minus_return=above), Args(), 1.0)
    assert name == SHORT and "Q went from 31 to 39 in the last fifth" in text
    assert text.endswith(cql.advice(Args())["divergence"] if warns else "try --num-updates 16000")
    assert ("a better policy's value, or overestimation" in text) == warns


def test_what_evaluations_add(capsys):
    seen = {"final_return_mean": -1428.04, "dataset_return_mean": -1287.2, "overestimation": 559.0}
    told = "the policy returns -1428.0, its data -1287.2; at first states Q is +559.0"
    assert told in cql.conclude("fine", "All is well.", seen)["verdict_text"]
    assert "returns: dataset -1287.2, final -1428.0\nverdict: fine." in capsys.readouterr().out
    blind = cql.conclude("fine", "All is well.", {"dataset_return_mean": 1.0})
    assert blind["verdict_text"] == "All is well."


ON = dict(layer_norm=True, dropout=0.2, vib_coef=0.1, residual=True, dr3_coef=0.1)


@pytest.mark.parametrize("flags", [{}, {"depth": 1}, {"cql_alpha": 0.0}, {"width": 4}, SARSA, ON])
def test_a_recommended_flag_is_one_that_the_run_takes(flags):
    args = tiny(**flags)
    for text in cql.advice(args).values():
        assert text
        for words in text.replace("a larger --tau", "--tau 0.01").split(" or "):
            changed = tyro.cli(Args, args=shlex.split(words), default=args)
            cql.check(changed)
            assert changed != args or words == "--cql-alpha 0", words


def test_the_unit_of_q():
    moments = {"return_std": 3.0}, {"return_std": 0.0}, {}, {"q_range": 0.0}
    assert [cql.q_unit({"q_range": 200.0} | m) for m in moments] == [3.0, 20.0, 20.0, 1.0]
