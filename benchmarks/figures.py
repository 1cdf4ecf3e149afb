"""Draws the figures of README.md, docs/ and benchmarks/ from benchmarks/raw, and prints tables.

  python benchmarks/figures.py    # all whose numbers are there
  python benchmarks/figures.py online triad

The numbers come from `python tools/report.py runs/* --curves benchmarks/raw/NAME.csv` after the
script that is named beside each figure below, and from the peers' scripts. A curve is the mean
over seeds, its band runs from the lowest to the highest seed. In tables: interquartile mean over
seeds [95 % bootstrap interval, arXiv 2108.13264; with fewer than five seeds the lowest and the
highest, since that bootstrap of three covers the truth in three cases of four only], then the
seeds themselves.
"""

import csv
import math
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
RETURN = "eval/episodic_return"
SPS = "charts/SPS"
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999"]
LINES = ["-", "--", "-.", ":"]


def iqm(values) -> float:
    """Mean of the middle half: a quarter of the values is cut at each end, edges count in part."""
    x, n = np.sort(np.asarray(values, float)), len(values)
    weight = np.clip(
        np.minimum(np.arange(1, n + 1), 0.75 * n) - np.maximum(np.arange(n), 0.25 * n), 0, 1
    )
    return float((x * weight).sum() / weight.sum())


def pooled(strata: list) -> float:
    """The iqm of all environments' values together."""
    return iqm(np.concatenate(strata))


def improvement(x: list, y: list) -> float:
    """How often a run of x ends above one of y, equal ones half: the mean over environments of the
    Mann-Whitney statistic (arXiv 2108.13264)."""
    return statistics.mean(
        float((np.sign(np.subtract.outer(a, b)) + 1).mean() / 2) for a, b in zip(x, y)
    )


def profile(strata: list, thresholds) -> list[float]:
    """The share of runs above each threshold, mean over environments (arXiv 2108.13264)."""
    above = [(np.asarray(s)[:, None] > thresholds).mean(0) for s in strata]
    return np.mean(above, axis=0).tolist()


def bootstrap(*groups: list, statistic=pooled, repeats: int = 10_000) -> tuple[float, float]:
    """95 % interval of statistic(*groups). A group is a list of strata (environments), each the
    values of its seeds, and every stratum is resampled by itself."""
    draw = np.random.default_rng(0)
    samples = [[draw.choice(s, (repeats, len(s))) for s in group] for group in groups]
    found = [statistic(*([s[i] for s in group] for group in samples)) for i in range(repeats)]
    return tuple(float(q) for q in np.quantile(found, (0.025, 0.975)))


def read(name: str) -> list[dict]:
    """Rows of a CSV of report.py --curves, or of peers/sb3.py brought to the same form."""
    with open(HERE / "raw" / name) as f:
        rows = list(csv.DictReader(f))
    if name != "sb3.csv":
        return rows
    rows = [r | {"exp_name": f"SB3 {r['algo']}"} for r in rows]
    rates = [r | {"tag": SPS, "value": float(r["step"]) / float(r["seconds"])} for r in rows]
    return [r | {"tag": RETURN, "value": r["return_mean"]} for r in rows] + rates


def d3rlpy_rows(name: str) -> list[dict]:
    """Those of peers/d3rlpy.py: returns, and updates a second so far."""
    rows = []
    for r in read(name):
        own = {"env_id": r["env"], "exp_name": r["peer"], "seed": r["seed"], "step": r["updates"]}
        rows.append(own | {"tag": RETURN, "value": r["return_mean"]})
        rows.append(own | {"tag": SPS, "value": float(r["updates"]) / float(r["seconds"])})
    return rows


def curves(rows: list[dict], env: str, name: str, tag: str) -> dict:
    """step -> {seed: value}"""
    out = defaultdict(dict)
    for r in rows:
        if (r["env_id"], r["exp_name"], r["tag"]) == (env, name, tag):
            out[int(r["step"])][r["seed"]] = float(r["value"])
    return out


def plot(axis, rows, env: str, names: dict, tag: str = RETURN, scale=None):
    """A line with its band for each of `names` (exp_name: label); scale(name): x of a step."""
    for i, (name, label) in enumerate(names.items()):
        points = curves(rows, env, name, tag)
        n = max((len(v) for v in points.values()), default=0)
        steps = [s for s in sorted(points) if len(points[s]) == n]
        if not steps:
            continue
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 4]}
        x = np.array(steps) * (scale(name) if scale else 1)
        values = [list(points[s].values()) for s in steps]
        axis.plot(x, [statistics.mean(v) for v in values], label=f"{label} ({n})", **style)
        low, high = ([f(v) for v in values] for f in (min, max))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def table(rows, env: str, names: dict, at: int | None = None, tag: str = RETURN) -> str:
    """A markdown line a name: iqm, interval, seeds; at the last step, or at `at`."""
    lines = []
    for name, label in names.items():
        points = curves(rows, env, name, tag)
        if not points or (at and at not in points):
            continue
        values = list(points[at or max(points)].values())
        low, high = bootstrap([values]) if len(values) >= 5 else (min(values), max(values))
        seeds = ", ".join(f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values)
        middle, low, high = (
            f"{v:,.1f}" if abs(v) >= 1 else f"{v:.3g}" for v in (iqm(values), low, high)
        )
        lines.append(f"| {env} | {label} | {middle} [{low}, {high}] | {seeds} |")
    return "\n".join(lines)


def save(figure, name: str):
    figure.tight_layout()
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    plt.close(figure)


def online():
    """online.sh"""
    rows = [
        r for path in sorted((HERE / "raw").glob("online*.csv")) for r in read(path.name)
    ] + read("sb3.csv")
    found = {(r["env_id"], r["exp_name"].removesuffix("_online")) for r in rows}
    pairs = sorted((env, algo) for env, algo in found if algo in ("sac", "td3"))
    figure, axes = plt.subplots(1, len(pairs), figsize=(5 * len(pairs), 3.5), squeeze=False)
    for axis, (env, algo) in zip(axes.flat, pairs):
        names = {
            f"{algo}_online": f"{algo}.py",
            f"SB3 {algo}": f"Stable-Baselines3's {algo.upper()}",
        }
        plot(axis, rows, env, names)
        axis.set(title=env, xlabel="environment steps", ylabel="return")
        axis.legend(fontsize=8, frameon=False)
        print(table(rows, env, names))
    save(figure, "online")


def updates_per_step():
    """updates_per_step.sh"""
    rows, env = read("updates_per_step.csv"), "Hopper-v5"
    names = {"sac_utd1": "SAC, 1 update a step", "sac_utd4": "SAC, 4", "sac_utd16": "SAC, 16"}
    names |= {"sac_utd16_rare": "SAC, 16, policy once"}
    names |= {"droq_utd16": "DroQ, 16", "redq_utd16": "REDQ, 16"}
    panels = {RETURN: "return", "diagnostics/srank": "srank of the features"}
    panels |= {"diagnostics/td_error": "TD error / variance of target"}
    panels |= {"diagnostics/overestimation": "overestimation"}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5))
    for axis, (tag, title) in zip(axes, panels.items()):
        plot(axis, rows, env, names, tag)
        axis.set(title=title, xlabel="environment steps")
        print(f"{title}\n{table(rows, env, names, tag=tag)}")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=8, frameon=False)
    save(figure, "updates_per_step")


def datasets():
    """datasets.sh: return by kind of data and method; return, Q, held-out error by its amount."""
    with open(HERE / "raw" / "datasets.csv") as f:
        rows = list(csv.DictReader(f))
    of = defaultdict(list)
    for r in rows:
        of[r["exp_name"].removeprefix("data_")].append(r)
    number = lambda name, key: [float(r[key]) for r in of[name] if r[key]]
    methods = {"cql_h": "CQL(H)", "naive": "naive SAC", "bc": "cloning"}
    kinds = ("random", "medium_replay", "medium", "expert")
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5))
    print("| data | mean return of the data | " + " | ".join(methods.values()) + " |")
    for i, kind in enumerate(kinds):
        mean = number(f"{kind}_cql_h", "dataset_return_mean")[0]
        axes[0].plot([i - 0.4, i + 0.4], [mean, mean], "k:", label="the data" if i == 0 else None)
        cells = []
        for j, (name, label) in enumerate(methods.items()):
            values = number(f"{kind}_{name}", "final_return_mean")
            x = i + 0.25 * (j - 1)
            axes[0].bar(
                x, statistics.mean(values), 0.22, color=COLOURS[j], label=label if i == 0 else None
            )
            axes[0].plot([x] * len(values), values, "k.", markersize=3)
            cells.append(
                f"{statistics.mean(values):,.0f} ({', '.join(f'{v:,.0f}' for v in values)})"
            )
        print(f"| {kind} | {mean:,.0f} | " + " | ".join(cells) + " |")
    axes[0].set_xticks(range(4), [kind.replace("_", "\n") for kind in kinds])
    axes[0].set(ylabel="return", title=rows[0]["env_id"])
    axes[0].legend(fontsize=8, frameon=False)
    sizes = sorted({int(n.split("_")[1]) for n in of if n.startswith("replay_")})
    panels = {
        "final_return_mean": "return",
        "q_max": "largest Q",
        "td_error_holdout": "held-out TD error",
    }
    print("| transitions | method | " + " | ".join(panels.values()) + " |")
    for j, name in enumerate(("cql_h", "naive")):
        for axis, (key, title) in zip(axes[1:], panels.items()):
            values = {n: number(f"replay_{n}_{name}", key) for n in sizes}
            axis.plot(
                sizes,
                [statistics.mean(values[n]) for n in sizes],
                "o-",
                color=COLOURS[j],
                label=methods[name],
            )
            for n in sizes:
                axis.plot([n] * len(values[n]), values[n], ".", color=COLOURS[j], markersize=4)
            axis.set(xscale="log", xlabel="transitions", ylabel=title)
            axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
            axis.minorticks_off()
        for n in sizes:
            means = (statistics.mean(number(f"replay_{n}_{name}", key)) for key in panels)
            print(f"| {n:,} | {methods[name]} | " + " | ".join(f"{m:.4g}" for m in means) + " |")
    axes[1].legend(fontsize=8, frameon=False)
    save(figure, "datasets")


def triad():
    """triad.sh: when a run's Q first passes its bound, how far its features have grown by then,
    and what left
    the range of the runs that stay before that."""
    rows, env, utds, shares = read("triad.csv"), "Hopper-v5", (1, 4, 16), {}
    print(
        "| target network | updates a step | Q beyond its bound | first at step | growth of norm |"
    )
    for target in ("target", "no_target"):
        for utd in utds:
            name = f"{target}_utd{utd}"
            q, bound, norm = (
                curves(rows, env, name, f"diagnostics/{k}")
                for k in ("q_max", "q_bound", "feature_norm")
            )
            seeds = sorted({seed for v in q.values() for seed in v})
            first = {s: next((t for t in sorted(q) if q[t][s] > bound[t][s]), None) for s in seeds}
            passed = [s for s in seeds if first[s]]
            shares[target, utd] = len(passed) / max(1, len(seeds))
            steps = sorted(first[s] for s in passed)
            growth = [norm[first[s]][s] / norm[min(norm)][s] for s in passed]
            late = f"{steps[0]:,} to {steps[-1]:,}" if steps else ""
            times = f"{statistics.median(growth):.1f}" if growth else ""
            print(f"| {target} | {utd} | {len(passed)} of {len(seeds)} | {late} | {times} |")
    print("\n| 1 update a step, with target networks | without: first step outside, by seed |")
    for key in ("srank", "feature_norm", "feature_dot", "td_error"):
        known = curves(rows, env, "target_utd1", f"diagnostics/{key}").values()
        low, high = (f(v for of in known for v in of.values()) for f in (min, max))
        other = curves(rows, env, "no_target_utd1", f"diagnostics/{key}")
        first = {
            s: [t for t in sorted(other) if not low <= other[t][s] <= high][:1]
            for s in other[min(other)]
        }
        print(f"| {key} from {low:.3g} to {high:.3g} | {first} |")
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.5))
    for i, target in enumerate(("target", "no_target")):
        x = np.arange(3) + 0.4 * i - 0.2
        label = "target network (tau 0.005)" if target == "target" else "none (tau 1)"
        axes[0].bar(x, [100 * shares[target, u] for u in utds], 0.38, color=COLOURS[i], label=label)
    axes[0].set(xlabel="updates a step", ylabel="% of runs beyond the bound")
    axes[0].set_xticks(range(3), utds)
    axes[0].set_ylim(0, 130)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    names = {
        f"{t}_utd{u}": f"{t.replace('_', ' ')}, {u}" for t in ("target", "no_target") for u in utds
    }
    plot(axes[1], rows, env, names, "diagnostics/q_max")
    axes[1].set(yscale="symlog", xlabel="environment steps", ylabel="largest Q")
    axes[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "triad")


def policy_gradients():
    """policy_gradients.sh: return by steps and by wall time."""
    rows = read("policy_gradients.csv") + read("sb3.csv")
    alone = [r for r in rows if r["seed"] == "0"]  # run for their rates
    rows = [r for r in rows if r["seed"] != "0"]
    last = {
        e: max(int(r["step"]) for r in rows if r["env_id"] == e)
        for e in {r["env_id"] for r in rows}
    }
    unit = {
        e: max(1000, round(last[e] / 20, -3)) for e in last
    }  # rollouts end at slightly other steps
    rows = [
        r | {"step": int(unit[r["env_id"]] * round(int(r["step"]) / unit[r["env_id"]]))}
        for r in rows
    ]
    names = {"ppo": "ppo.py", "npg_kfac": "K-FAC", "npg_trpo": "TRPO", "npg_none": "plain gradient"}
    names |= {"SB3 ppo": "SB3's PPO"}
    envs = sorted({r["env_id"] for r in rows if r["exp_name"] in names})

    def seconds(env, name):
        rates = curves(alone, env, name, SPS)
        return 1 / statistics.median(rates[max(rates)].values()) if rates else np.nan

    figure, axes = plt.subplots(2, len(envs), figsize=(4.5 * len(envs), 6.5), squeeze=False)
    for (above, below), env in zip(axes.T, envs):
        plot(above, rows, env, names)
        plot(below, rows, env, names, scale=partial(seconds, env))
        above.set(title=env, xlabel="environment steps", ylabel="return")
        below.set(xlabel="seconds of one thread", ylabel="return")
        print(table(rows, env, names))
    max(axes[0], key=lambda axis: len(axis.lines)).legend(
        fontsize=8, frameon=False
    )  # SB3: on MuJoCo only
    save(figure, "policy_gradients")


def gae_lambda():
    """gae_lambda.sh"""
    rows = read("gae_lambda.csv")
    rows = [
        r | {"step": round(int(r["step"]), -4)} for r in rows
    ]  # rollouts end at slightly other steps
    names = {f"lambda_{x}": f"lambda = {x}" for x in ("0", "0.5", "0.9", "0.95", "1")}
    envs = list(dict.fromkeys(r["env_id"] for r in rows))
    figure, axes = plt.subplots(1, len(envs), figsize=(5 * len(envs), 3.5), squeeze=False)
    for axis, env in zip(axes.flat, envs):
        plot(axis, rows, env, names)
        axis.set(title=env, xlabel="environment steps", ylabel="return")
        axis.legend(fontsize=8, frameon=False)
        print(table(rows, env, names))
    save(figure, "gae_lambda")


def gae_bias():
    """gae_bias.py"""
    with open(HERE / "raw" / "gae_bias.csv") as f:
        rows = list(csv.DictReader(f))
    steps, lambdas = ([*dict.fromkeys(r[k] for r in rows)] for k in ("step", "lambda"))
    figure, axes = plt.subplots(1, len(steps), figsize=(5 * len(steps), 3.5), sharey=True)
    print("| lambda | " + " | ".join(f"bias, spread after {int(s):,} steps" for s in steps) + " |")
    for axis, step in zip(axes, steps):
        for i, key in enumerate(("bias", "spread")):
            values = [
                [float(r[key]) for r in rows if (r["step"], r["lambda"]) == (step, x)]
                for x in lambdas
            ]
            style = {"color": COLOURS[i], "linestyle": LINES[i]}
            axis.plot(lambdas, [statistics.mean(v) for v in values], marker="o", label=key, **style)
            axis.fill_between(
                lambdas, *([f(v) for v in values] for f in (min, max)), alpha=0.15, **style
            )
        axis.set(title=f"CartPole-v1, {int(step):,} steps", xlabel="lambda", yscale="log")
    axes[0].set(ylabel="of the target A + V, rms over states")
    axes[0].legend(fontsize=8, frameon=False)
    mean = lambda step, x, key: statistics.mean(
        float(r[key]) for r in rows if (r["step"], r["lambda"]) == (step, x)
    )
    for x in lambdas:
        cells = [f"{mean(s, x, 'bias'):.3g}, {mean(s, x, 'spread'):.3g}" for s in steps]
        print(f"| {x} | " + " | ".join(cells) + " |")
    save(figure, "gae_bias")


def pong():
    """the README's Pong command with --sticky 0 (lines of metrics.csv)"""
    with open(HERE / "raw" / "pong.csv") as f:
        rows = list(csv.DictReader(f))
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for tag, style in (("charts/episodic_return", "."), (RETURN, "o-")):
        points = [(int(r["step"]), float(r["value"])) for r in rows if r["tag"] == tag]
        label = "evaluation, mean of 10" if tag == RETURN else "training, an episode"
        axis.plot(*zip(*points), style, markersize=3, color=COLOURS[tag == RETURN], label=label)
        for begin in range(0, 1_000_000, 200_000):
            values = [v for s, v in points if begin < s <= begin + 200_000]
            print(f"{label}, up to step {begin + 200_000:,}: {statistics.mean(values):.1f}")
    axis.set(title="ALE/Pong-v5", xlabel="environment steps (4 frames each)", ylabel="return")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    save(figure, "pong")


def kfac_cost():
    """kfac_cost.py"""
    with open(HERE / "raw" / "kfac_cost.csv") as f:
        rows = list(csv.DictReader(f))
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for i, solver in enumerate(dict.fromkeys(r["solver"] for r in rows)):
        by_width = defaultdict(list)
        for r in rows:
            if r["solver"] == solver:
                by_width[int(r["width"])].append(1000 * float(r["seconds"]))
        medians = {w: statistics.median(v) for w, v in by_width.items()}
        style = {"color": COLOURS[i], "linestyle": LINES[i], "marker": "o"}
        axis.plot(medians.keys(), medians.values(), label=solver, **style)
        print(f"| {solver} | " + " | ".join(f"{w}: {v:.3g} ms" for w, v in medians.items()) + " |")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="width of the two hidden layers",
        ylabel="ms a policy update",
    )
    axis.set_xticks(sorted(by_width), [str(w) for w in sorted(by_width)])
    axis.legend(fontsize=8, frameon=False)
    save(figure, "kfac_cost")


def atari_heads():
    """atari_heads.sh"""
    rows, panels = (
        read("atari_heads.csv"),
        {RETURN: "return", "diagnostics/srank": "srank of phi(s)"},
    )
    panels |= {
        "diagnostics/feature_dot": "phi(s) . phi(s')",
        "diagnostics/td_error": "TD error / variance",
    }
    names = {f"{h}_alpha{a}": f"{h}, alpha {a}" for h in ("dqn", "c51", "qr") for a in ("0.1", "0")}
    names |= {"c51_alpha0.1_dr3": "c51, 0.1, DR3", "c51_alpha0.1_unit": "c51, 0.1, unit norm"}
    env = rows[0]["env_id"]
    figure, axes = plt.subplots(4, 1, figsize=(7.5, 11), sharex=True)
    for axis, (tag, title) in zip(axes, panels.items()):
        plot(axis, rows, env, names, tag)
        axis.set(ylabel=title)
        print(f"{title}\n{table(rows, env, names, tag=tag)}")
    axes[2].set_yscale("log")
    axes[0].set(title=env)
    axes[-1].set(xlabel="updates")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "atari_heads")


def divergences():
    """benchmarks/runs/divergences.py"""
    rows = read("divergences.csv")
    figure, (axes, lower) = plt.subplots(2, 3, figsize=(12, 6.6))
    panels = {  # case: title, what moves, where D is taken as 1
        "gap": ("modes at -0.5 (90 %) and 0.5 (10 %)", "mean", 0.5),
        "uniform": ("b uniform on [-1, 1]", "mean", 0.0),
        "width": ("b = N(0, 1), pi = N(0, std^2)", "std", 0.1),
    }
    for axis, (case, (title, x, unit)) in zip(axes, panels.items()):
        names = ["kl", "forward-kl", "mmd, N = 4"]
        names = names[:1] + ["mmd, N = 4", "mmd, N = 10", "mmd, N = 100"] if x == "std" else names
        for i, name in enumerate(names):
            found = [r for r in rows if (r["case"], r["divergence"]) == (case, name)]
            points = {float(r[x]): float(r["value"]) for r in found}
            y = [value / points[unit] for value in points.values()]
            axis.plot(points.keys(), y, label=name, color=COLOURS[i], linestyle=LINES[i])
            if x == "std":
                low = min(points, key=points.get)
                print(f"  {name}: least D at std {low}")
        axis.set(title=title, xlabel=f"{x} of pi", ylim=(0, 4.5 if x == "mean" else 1.1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set(ylabel="D over D at the small mode")
    axes[1].set(ylabel="D over D at 0")
    axes[2].set(ylabel="D over D at 0.1")
    axes[0].axvline(0, color="grey", linewidth=0.8)

    def bell(x, mean: float, std: float):
        return np.exp(-0.5 * ((x - mean) / std) ** 2)

    x = np.linspace(-1.2, 1.2, 601)
    modes = bell(x, -0.5, 0.1) + bell(x, 0.5, 0.1) / 9
    panels = {  # case: b over its highest value, the reward's peak
        "reward in the gap": (modes, 0.0),
        "reward at the small mode": (modes, 0.5),
        "reward near the border": (np.abs(x) <= 1, 0.8),
    }
    for axis, (case, (b, peak)) in zip(lower, panels.items()):
        axis.fill_between(x, b, color="#DDDDDD", label="b")
        axis.plot(
            x, bell(x, peak, 0.1), color="black", linewidth=0.8, linestyle=":", label="reward"
        )
        for i, r in enumerate(r for r in rows if r["case"] == f"best, {case}"):
            y = bell(x, float(r["mean"]), float(r["std"]))
            label = f"{r['divergence']}: {float(r['value']):.2f}"
            axis.plot(x, y, label=label, color=COLOURS[i], linestyle=LINES[i])
        axis.set(title=case, xlabel="action", yticks=[], ylim=(0, 1.5))
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    save(figure, "divergences")


METHODS = {
    "bc": "cloning",
    "bc_best": "cloning the best tenth",
    "naive": "naive",
    "bear": "BEAR, eps 0.05",
    "bear_half": "BEAR, eps 0.5",
    "brac_p": "BRAC-p",
    "brac_v": "BRAC-v",
    "awac": "AWAC",
    "crr": "CRR",
    "cql_h": "CQL(H)",
}
SETS = {
    "HalfCheetah-v5, replay": "constraints.csv",
    "HalfCheetah-v5, medium": "constraints_medium.csv",
}


def constraints():
    """constraints.sh: returns, selected returns, learned minus achieved value, the constraint."""

    def cell(group, key: str) -> str:
        values = [float(r[key]) for r in group if r[key]]
        form = ",.0f" if max(map(abs, values), default=0) >= 20 else ".2g"
        return ", ".join(f"{x:{form}}" for x in values) or "-"

    for name_of_set, file in SETS.items():
        rows = [r for r in read(file) if r["final_return_mean"]]
        heads = ["last", "mean of the middle half", "score", "selected", "learned - achieved"]
        heads = [name_of_set, *heads, "D", "weight", "distance"]
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        for name, label in METHODS.items():
            group = [r for r in rows if r["exp_name"] == f"pc_{name}"]
            if group:
                found = [cell(group, "final_return_mean")]
                found.append(f"{iqm([float(r['final_return_mean']) for r in group]):,.0f}")
                found.append(f"{iqm([float(r['normalized_score']) for r in group]):.0f}")
                found += [cell(group, key) for key in ("selected_return_mean", "overestimation")]
                found.append(cell(group, "divergence"))
                found.append(cell(group, "weight") if name.startswith(("bear", "brac")) else "")
                found.append(cell(group, "distance"))
                print(f"| {label} | " + " | ".join(found) + " |")


def protocol():
    """constraints.sh: D4RL scores of all sets together, as arXiv 2108.13264 asks: interquartile
    mean, probability of improvement, performance profiles, each with stratified bootstraps."""
    rows = [r for file in SETS.values() for r in read(file) if r["normalized_score"]]
    # bear_half was run on one set alone, bc_best has a part of a set, with a hash of its own
    everywhere = [name for name in METHODS if name not in ("bear_half", "bc_best")]
    scores = {name: [] for name in everywhere}
    sets = sorted({r["dataset_sha256"] for r in rows})
    for chosen in sets:
        found = {name: [] for name in everywhere}
        for r in rows:
            name = r["exp_name"].removeprefix("pc_")
            if r["dataset_sha256"] == chosen and name in found:
                found[name].append(float(r["normalized_score"]))
        if all(found.values()):  # a set that some method has not seen would favour the others
            for name, values in found.items():
                scores[name].append(values)
    heads = ["runs", "score", "P(better than cloning)", "P(better than CQL(H))"]
    print(f"| {len(scores['bc'])} sets | " + " | ".join(heads) + " |\n" + "|---" * 5 + "|")

    def cell(statistic, *groups) -> str:
        low, high = bootstrap(*groups, statistic=statistic)
        few = min(sum(map(len, group)) for group in groups) < 5  # such an interval is too narrow
        return f"{statistic(*groups):.3g}" + ("" if few else f" [{low:.3g}, {high:.3g}]")

    thresholds = np.linspace(-5, 110, 231)
    figure, axis = plt.subplots(figsize=(6, 4))
    for i, (name, strata) in enumerate(scores.items()):
        cells = [cell(pooled, strata)]
        for other in ("bc", "cql_h"):
            cells.append("" if other == name else cell(improvement, strata, scores[other]))
        n = "+".join(str(len(s)) for s in strata)
        print(f"| {METHODS[name]} | {n} | " + " | ".join(cells) + " |")
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 4]}
        axis.plot(thresholds, profile(strata, thresholds), label=METHODS[name], **style)
    axis.set_xlabel("D4RL score")
    axis.set_ylabel("share of runs above")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    if len(scores["bc"]) > 1:  # of one set the table says as much
        save(figure, "protocol")


def workflow():
    """Does the workflow help? The selected checkpoint against the last one, and the verdict against
    whether the policy is better than its data, over all offline runs. In these files selected is
    the peak itself, however little Q fell from it."""
    files = "constraints constraints_medium datasets diseases offline_halfcheetah".split()
    rows = [r for name in files for r in read(f"{name}.csv") if r["selected_return_mean"]]
    gains = {"overfitting": [], "any other verdict": []}
    for r in rows:
        gain = float(r["selected_return_mean"]) - float(r["final_return_mean"])
        if int(float(r["selected_step"])) != int(r["num_updates"]):
            gains[r["verdict"] if r["verdict"] in gains else "any other verdict"].append(gain)
    print(f"of {len(rows)} runs selected is not the last checkpoint, by verdict:")
    for verdict, found in gains.items():
        better = sum(g > 0 for g in found)
        print(f"{verdict}: {len(found)}, better in {better}: {[round(g) for g in sorted(found)]}")
    print("| verdict | above the data's return | below |\n|---|---|---|")
    for verdict in sorted({r["verdict"] for r in rows}):
        mine = [r for r in rows if r["verdict"] == verdict]
        above = sum(float(r["final_return_mean"]) > float(r["dataset_return_mean"]) for r in mine)
        print(f"| {verdict} | {above} | {len(mine) - above} |")


def cem():
    """benchmarks/runs/cem.py"""
    rows = read("cem.csv")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))

    def line(axis, i, label, kind, x, **fixed):
        found = [r for r in rows if r["kind"] == kind and all(r[k] == v for k, v in fixed.items())]
        points = {int(r[x]): float(r["value"]) for r in found}
        look = {"color": COLOURS[i], "linestyle": LINES[i % 4], "marker": ".", "label": label}
        axis.plot(points.keys(), points.values(), **look)

    for i, k in enumerate(("2", "3", "5", "12")):
        line(axes[0], i, f"{k} iterations", "error", "dimension", iterations=k, choice="best")
    line(axes[0], 4, "best of 128 uniform", "error", "dimension", iterations="2", choice="uniform")
    for i, (k, n) in enumerate((("2", "6"), ("5", "6"), ("12", "6"), ("12", "16"))):
        name = f"{k} iterations, {n} elites"
        line(axes[1], i, name, "missed", "dimension", iterations=k, elites=n)
    for i, (d, n) in enumerate((("1", "2"), ("1", "6"), ("1", "16"), ("3", "6"), ("6", "6"))):
        name = f"{n} elites of 64, {d} dimensions"
        line(axes[2], i, name, "travel", "iterations", dimension=d, elites=n)
    axes[0].set(title="squared error a dimension", xlabel="dimensions of the action", yscale="log")
    axes[1].set(title="a maximum in a corner: missed by 0.1", xlabel="dimensions of the action")
    axes[2].set(title="reach on a slope, in first deviations", xlabel="iterations", xscale="log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    axes[1].legend(fontsize=8, frameon=False, loc="upper left")
    axes[1].set(ylim=(-0.05, 1.6))
    axes[2].legend(fontsize=8, frameon=False, loc="upper left")
    axes[2].set(ylim=(-0.2, 9))
    save(figure, "cem")


def qt_opt():
    """qt_opt.sh, parts pair and hopper: offline, then online; beside all steps online. Part
    iterations: returns by iterations of CEM."""
    rows = []
    steps_of = {  # first evaluation to show, environment steps at it
        ("Reacher-v5", "qt_pair"): (8_000, 4_000),
        ("Hopper-v5", "qt_pair"): (10_000, 10_000),
        ("Reacher-v5", "qt_scratch"): (0, 1_000),
        ("Hopper-v5", "qt_scratch"): (0, 1_000),
    }
    for r in read("qt_opt_curves.csv"):
        first, steps = steps_of.get((r["env_id"], r["exp_name"]), (math.inf, 0))
        if int(r["step"]) >= first:  # of the online phase
            rows.append(r | {"step": int(r["step"]) - first + steps})
    names = {"qt_pair": "offline, then online", "qt_scratch": "online from scratch"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    times = {"Reacher-v5": (4_000, 6_000, 12_000), "Hopper-v5": (10_000, 12_000, 15_000, 20_000)}
    for axis, (env, ats) in zip(axes, times.items()):
        plot(axis, rows, env, names)
        axis.set(title=env, xlabel="environment steps, the data's included", ylabel="return")
        axis.legend(fontsize=8, frameon=False)
        for at in ats:
            print(f"at {at}\n{table(rows, env, names, at)}")
    save(figure, "qt_opt")
    returns = defaultdict(list)
    for r in read("qt_opt.csv"):
        if r["exp_name"].startswith("qt_online"):
            key = r["env_id"], r["exp_name"].removeprefix("qt_online")
            returns[key].append(f"{float(r['final_return_mean']):,.1f}")
    for (env, iterations), found in sorted(returns.items()):
        print(f"| {env} | {iterations} | {', '.join(found)} |")


def weighted():
    """weighted.sh"""
    rows = read("weighted.csv") + d3rlpy_rows("weighted_peer.csv")
    panels = {
        "AWAC": {"weighted_awac": "policy_constraints.py", "d3rlpy awac": "d3rlpy"},
        "CRR": {"weighted_crr": "policy_constraints.py", "d3rlpy crr": "d3rlpy"},
    }
    panels["AWAC"]["d3rlpy awac-hard"] = "d3rlpy, no entropy in the target"
    env = rows[0]["env_id"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    for axis, (title, names) in zip(axes, panels.items()):
        plot(axis, rows, env, names)
        axis.set(title=f"{title}, {env}", xlabel="updates", ylabel="return")
        axis.legend(fontsize=8, frameon=False)
        for at in (5_000, 10_000, 20_000):
            print(f"{title} at {at}\n{table(rows, env, names, at)}")
    save(figure, "weighted")


def equal_time():
    """equal_time.sh"""
    rows = read("equal_time.csv") + d3rlpy_rows("equal_time_peer.csv")
    names = {"equal_time": "cql_continuous.py", "d3rlpy": "d3rlpy"}
    names["equal_time_mean"] = "cql_continuous.py --backup mean"
    env = rows[0]["env_id"]

    def minutes(name: str) -> float:
        """Of one update: the last rate, mean over seeds."""
        rates = curves(rows, env, name, SPS)
        return 1 / statistics.mean(rates[max(rates)].values()) / 60

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    plot(axes[0], rows, env, names)
    timed = {name: label for name, label in names.items() if name != "equal_time_mean"}
    plot(axes[1], rows, env, timed, scale=minutes)
    axes[0].set(title=env, xlabel="updates", ylabel="return")
    axes[1].set(title=env, xlabel="minutes, one thread")
    axes[0].legend(fontsize=8, frameon=False)
    for name in timed:
        print(f"{name}: {1 / minutes(name) / 60:.1f} updates/s")
    for at in (2_500, 5_000, 10_000, 25_000):
        print(f"at {at}\n{table(rows, env, names, at)}")
    save(figure, "equal_time")


REPLAYS = ("uniform", "per", "lap", "pal", "discor")


def replay():
    """replay.sh"""
    rows = read("replay.csv")
    names = {f"td3_replay_{kind}": kind for kind in REPLAYS}
    envs = sorted({r["env_id"] for r in rows})
    figure, axes = plt.subplots(1, len(envs), figsize=(5 * len(envs), 3.5), squeeze=False)
    for axis, env in zip(axes.flat, envs):
        plot(axis, rows, env, names)
        axis.set(title=env, xlabel="environment steps", ylabel="return")
        axis.legend(fontsize=8, frameon=False)
        print(table(rows, env, names))
    save(figure, "replay")


def cliffwalk():
    """benchmarks/runs/cliffwalk.py"""
    rows = read("cliffwalk.csv")
    kinds, states = ([*dict.fromkeys(r[k] for r in rows)] for k in ("kind", "states"))
    figure, axis = plt.subplots(figsize=(5.5, 3.8))
    print("| states | transitions | " + " | ".join(kinds) + " |")
    most = max(int(r["updates"]) for r in rows)  # the program stops there
    of = {
        (k, n): [int(r["updates"]) for r in rows if (r["kind"], r["states"]) == (k, n)]
        for k in kinds
        for n in states
    }
    for i, kind in enumerate(kinds):
        middle = [statistics.median(of[kind, n]) for n in states]
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 4]}
        axis.plot([int(n) for n in states], middle, marker="o", label=kind, **style)
    for n in states:
        (total,) = {r["transitions"] for r in rows if r["states"] == n}
        cells = []
        for k in kinds:
            late = of[k, n].count(most)
            over = f"{late} of {len(of[k, n])} over {most:,}"
            cells.append(over if late else f"{statistics.median(of[k, n]):,.0f}")
        print(f"| {n} | {int(total):,} | " + " | ".join(cells) + " |")
    axis.set(yscale="log", xlabel="states", ylabel="updates to a mean squared error of 0.001")
    axis.set_title("Blind Cliffwalk, median of 10 seeds", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    save(figure, "cliffwalk")


def replay_pictures():
    """benchmarks/runs/replay_pictures.py"""
    rows = read("replay_pictures.csv")
    panels = {  # title: rewards, kinds
        "(a) the present policy's transitions": ("dense", ("all pairs", "on-policy")),
        "(b) uniform replay": ("dense", ("all pairs", "uniform")),
        "(c) sparse rewards, uniform replay": ("sparse", ("all pairs", "uniform")),
        "(d) sparse rewards, other draws": ("sparse", ("uniform", "per", "lap", "pal", "discor")),
    }
    kinds = [*dict.fromkeys(r["kind"] for r in rows)]
    figure, axes = plt.subplots(2, 4, figsize=(16, 6), sharex=True, sharey="row")
    values = defaultdict(lambda: defaultdict(list))
    for r in rows:
        for key in ("error", "return"):
            values[r["rewards"], r["kind"], key][int(r["step"])].append(float(r[key]))
    for column, (title, (rewards, shown)) in zip(axes.T, panels.items()):
        for axis, key in zip(column, ("error", "return")):
            for kind in shown:
                found = values[rewards, kind, key]
                style = {"color": COLOURS[kinds.index(kind) % 8]}
                mean = [statistics.mean(v) for v in found.values()]
                axis.plot(found.keys(), mean, label=kind, **style)
                if not title.startswith("(d)"):  # each seed
                    axis.plot(found.keys(), [*found.values()], linewidth=0.5, alpha=0.6, **style)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(title, fontsize=10)
        column[1].set(xlabel="steps, updates")
        column[0].legend(fontsize=8, frameon=False)
    axes[0, 0].set(ylabel="mean |Q - Q*|")
    axes[1, 0].set(ylabel="return, 1 is the best")
    print("| rewards | kind | found | error | return | falls | last below 0.9 |")
    for rewards in ("dense", "sparse"):
        for kind in kinds:
            error, reached = (values[rewards, kind, k] for k in ("error", "return"))
            late = [s for s in error if s > max(error) - 1_000]
            ends = [
                [statistics.mean(x) for x in zip(*(v[s] for s in late))] for v in (error, reached)
            ]
            seeds = [*zip(*reached.values())]  # each seed's returns
            falls = [sum(a - b > 0.5 for a, b in zip(x, x[1:])) for x in seeds]
            low = [max([s for s, y in zip(reached, x) if y < 0.9], default=0) for x in seeds]
            own = [r for r in rows if (r["rewards"], r["kind"]) == (rewards, kind)]
            found = {r["seed"]: r["found"] for r in own}
            first = [
                int(x) if x else float("inf") for x in found.values()
            ]  # of those that never did
            cells = [f"{statistics.median(first):,.0f}"]
            for x, digits in ((ends[0], 3), (ends[1], 3), (falls, 1), (low, 0)):
                half = statistics.stdev(x) / len(x) ** 0.5
                cells.append(f"{statistics.mean(x):,.{digits}f} ± {half:,.{digits}f}")
            print(f"| {rewards} | {kind} | {' | '.join(cells)} |")
    save(figure, "replay_pictures")


def safety_signs():
    """benchmarks/runs/safety_signs.py"""
    rows = read("safety_signs.csv")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    panels = {"v": ("FrozenLake, uniform pi", "alpha", (0, 1.1))}
    panels |= {"unseen": ("an action that the data never takes", "steps on the term alone", (0, 5))}
    for axis, (case, (title, x, limits)) in zip(axes, panels.items()):
        for i, form in enumerate(dict.fromkeys(r["form"] for r in rows if r["case"] == case)):
            points = [r for r in rows if (r["case"], r["form"]) == (case, form)]
            style = {"color": COLOURS[4 if form == "exact" else i % 4], "linestyle": LINES[i % 4]}
            x_y = ([float(r[key]) for r in points] for key in ("x", "value"))
            axis.plot(*x_y, label=form, **style)
        axis.set(title=title, xlabel=x, ylim=limits)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set(ylabel="V_C of the first state")
    axes[1].set(ylabel="Q_C")
    save(figure, "safety_signs")


def navigation():
    """benchmarks/runs/navigation.py"""
    rows = read("navigation.csv")
    names = {"nav_all": "all", "nav_trpo": "nothing: TRPO"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    for axis, (name, title) in zip(axes, names.items()):
        grid, paths = [], defaultdict(list)
        for r in rows:
            if r["run"] == name:
                x, y, value = (float(r[key]) for key in ("x", "y", "value"))
                (grid if r["what"] == "v_c" else paths[r["what"]]).append((x, y, value))
        x, y, v = np.array(grid).T.reshape(3, 41, 41)
        shown = axis.pcolormesh(x, y, v, cmap="Greys", vmin=0, vmax=1, shading="nearest")
        for path in paths.values():
            xs, ys, over = zip(*path)
            axis.plot(xs, ys, color=COLOURS[0], linewidth=0.8)
            if over[-1]:
                axis.plot(xs[-1], ys[-1], "x", color=COLOURS[1])
        axis.add_patch(plt.Rectangle((-1, -1.5), 2, 2, fill=False, edgecolor=COLOURS[1]))
        axis.add_patch(plt.Circle((4, 0), 0.75, fill=False, edgecolor=COLOURS[2]))
        accidents = sum(path[-1][2] for path in paths.values())
        axis.set(title=f"{title}: {accidents:.0f} accidents in {len(paths)}", aspect="equal")
    figure.colorbar(shown, ax=axes, label="V_C, pi without a shield")
    figure.savefig(HERE / "figures" / "navigation.png", dpi=110)
    plt.close(figure)


def safety():
    """safety.sh, then safety_table.py"""
    rows = read("safety_curves.csv")
    names = {
        "safety_csc": "all",
        "safety_trpo": "none (TRPO)",
        "safety_lagrange": "multiplier, alpha 0",
    }
    names |= {"safety_shield": "shield"}
    envs = [*dict.fromkeys(r["env_id"] for r in rows)]
    figure, axes = plt.subplots(2, len(envs), figsize=(4.5 * len(envs), 6.5), squeeze=False)
    for (above, below), env in zip(axes.T, envs):
        plot(above, rows, env, names, "charts/accidents")
        above.set(title=env, ylabel="accidents so far")
        above.legend(fontsize=8, frameon=False)
        for i, tag in enumerate(("predicted", "realised")):
            for j, name in enumerate(("safety_csc", "safety_trpo")):
                points = curves(rows, env, name, f"diagnostics/{tag}")
                most = max(map(len, points.values()))  # seeds: a mean of fewer would zigzag
                steps = sorted(s for s in points if len(points[s]) == most)
                values = [statistics.mean(points[s].values()) for s in steps]
                style = {"color": COLOURS[j], "linestyle": LINES[i]}
                below.plot(steps, values, label=f"{tag}, {names[name]}", **style)
        below.set(xlabel="environment steps", ylabel="accident, discounted")
        below.spines[["top", "right"]].set_visible(False)
        below.legend(fontsize=8, frameon=False)
    save(figure, "safety")


FIGURES = (
    online,
    updates_per_step,
    datasets,
    triad,
    policy_gradients,
    gae_lambda,
    gae_bias,
    pong,
    kfac_cost,
    atari_heads,
    divergences,
    constraints,
    protocol,
    workflow,
    cem,
    qt_opt,
    weighted,
    equal_time,
    replay,
    cliffwalk,
    replay_pictures,
    safety_signs,
    navigation,
    safety,
)
FIGURES = {f.__name__: f for f in FIGURES}


def main():
    for name in sys.argv[1:] or FIGURES:
        if name not in FIGURES:
            sys.exit(f"{name}: expected some of {', '.join(FIGURES)}")
        print(f"\n{name}")
        try:
            FIGURES[name]()
        except FileNotFoundError as e:
            if sys.argv[1:]:
                sys.exit(
                    f"{e.filename} is missing: {FIGURES[name].__doc__.splitlines()[0]} makes it"
                )
            print(f"  {e.filename} is missing")


if __name__ == "__main__":
    main()
