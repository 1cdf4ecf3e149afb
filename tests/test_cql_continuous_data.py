"""What cql_continuous.py makes of data: each row of each layout where it belongs, each bad file one
line; what it plays itself; and the numbers of a moment. All against answers found another way."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import cql_continuous as cql
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import Counting, load, metrics, only_run, refused, summary, write_d4rl

# numpy's warnings would be further lines on the user's stderr, which promises a single one
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "ignore::UserWarning")
CPU = torch.device("cpu")
SMALL = dict(width=8, batch_size=8, num_updates=1, bc_steps=0, eval_episodes=0)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


# ----------------------------------------------------------------------------- files made by hand
def episode(first: int, length: int, end: str, obs_dim=3, act_dim=1) -> dict:
    """One episode whose every number is its own, exact in float16: a row that is lost, doubled or
    joined to a wrong neighbour cannot look right. `end` is terminal, timeout, both or open."""
    t = np.arange(first, first + length + 1)
    obs = np.stack([t + 0.25 * j for j in range(obs_dim)], 1).astype(np.float32)
    act = np.stack([(t[:-1] * 7 + 3 * j) % 127 / 64 - 63 / 64 for j in range(act_dim)], 1)
    rew = (t[:-1] / 4 - 20).astype(np.float32)
    return {"obs": obs, "act": act.astype(np.float32), "rew": rew, "end": end}


ENDS = [(0, 4, "terminal"), (100, 3, "timeout"), (150, 1, "both"), (200, 5, "open")]
FOUR = [episode(*e) for e in ENDS]


def ends_by(e: dict, *kinds) -> np.ndarray:
    """True on the last row, if the episode ended in one of these ways."""
    return (np.arange(len(e["rew"])) == len(e["rew"]) - 1) & (e["end"] in kinds)


def columns(episodes: list[dict]) -> dict:
    """The episodes as D4RL's columns."""
    parts = {
        "observations": [e["obs"][:-1] for e in episodes],
        "next_observations": [e["obs"][1:] for e in episodes],
        "actions": [e["act"] for e in episodes],
        "rewards": [e["rew"] for e in episodes],
        "terminals": [ends_by(e, "terminal", "both") for e in episodes],
        "timeouts": [ends_by(e, "timeout", "both") for e in episodes],
    }
    return {key: np.concatenate(x) for key, x in parts.items()}


def write(arrays: dict, path="d.hdf5", **options) -> str:
    with h5py.File(path, "w") as f:
        for key, x in arrays.items():
            f.create_dataset(key, data=x, **(options if np.ndim(x) else {}))
    return str(path)


def d4rl(drop="", floats="f4", flags="?", column=False, **options):
    """Writes D4RL's layout without the columns of `drop`, in these types, vectors as (N, 1)."""

    def make(episodes):
        c = {key: x for key, x in columns(episodes).items() if key not in drop.split()}
        for key, x in c.items():
            c[key] = x.astype(flags if x.dtype == bool else floats)
            if column and x.ndim == 1:
                c[key] = c[key][:, None]
        return write(c, **options)

    return make


def with_other_things(episodes):
    """D4RL's own files are compressed in chunks and hold more than the columns."""
    more = {"infos/qpos": np.full((13, 3), np.nan), "metadata/algorithm": "SAC"}
    return write(columns(episodes) | more, compression="gzip", chunks=True)


def d3rlpy_1(episodes):
    c = columns(episodes)
    ends = (c.pop("timeouts") | c["terminals"]).astype("f4")
    c |= {"terminals": c["terminals"].astype("f4"), "episode_terminals": ends}
    del c["next_observations"]
    return write(c | {"discrete_action": False, "version": "1.0"})


def d3rlpy_2(episodes):
    c = {"num_episodes": len(episodes)}
    for i, e in enumerate(episodes):
        c |= {f"observations_{i}": e["obs"][:-1], f"actions_{i}": e["act"]}
        c |= {f"rewards_{i}": e["rew"][:, None], f"terminated_{i}": e["end"] in "terminal both"}
    return write(c)


def minari_set(kind="id", as_dict=False, **options):
    """Through Minari's own writer; `kind` is the way to name the set."""

    def make(episodes):
        import minari
        from minari.data_collector import EpisodeBuffer

        box, spaces = gym.spaces.Box(-np.inf, np.inf, (3,)), {}
        if as_dict:  # gymnasium sorts the keys: a, b
            parts = {"b": gym.spaces.Box(-9e9, 9e9, (1,)), "a": gym.spaces.Box(-9e9, 9e9, (2,))}
            box = gym.spaces.Dict(parts)
        spaces = {"observation_space": box, "action_space": gym.spaces.Box(-1, 1, (1,))}
        buffers = []
        for e in episodes:
            obs = {"a": e["obs"][:, :2], "b": e["obs"][:, 2:]} if as_dict else e["obs"]
            ends = {"terminations": ends_by(e, "terminal", "both").tolist()}
            ends |= {"truncations": ends_by(e, "timeout", "both", "open").tolist()}
            buffers.append(
                EpisodeBuffer(observations=obs, actions=e["act"], rewards=e["rew"], **ends)
            )
        minari.create_dataset_from_buffers("made/up-v0", buffers, **spaces, **options)
        folder = Path("sets/made/up-v0").resolve()
        names = {"id": "made/up-v0", "folder": folder, "data": folder / "data"}
        return str(names.get(kind, folder / "data" / "main_data.hdf5"))

    return make


LAYOUTS = {  # how it is written, and whether the last s' of an episode is in it
    "D4RL": (d4rl(), True),
    "D4RL without next_observations": (d4rl("next_observations"), False),
    "D4RL without timeouts": (d4rl("timeouts"), True),
    "doubles, flags as bytes": (d4rl(floats="f8", flags="u1"), True),
    "halves of the other byte order": (d4rl(floats=">f2", flags="f4"), True),
    "rlkit's columns (N, 1)": (d4rl(column=True, floats="f8", flags="f8"), True),
    "compressed, with other things": (with_other_things, True),
    "d3rlpy 1": (d3rlpy_1, False),
    "d3rlpy 2": (d3rlpy_2, False),
    "Minari by id": (minari_set(), True),
    "Minari by folder": (minari_set("folder"), True),
    "Minari by data folder": (minari_set("data"), True),
    "Minari by file": (minari_set("file"), True),
    "Minari of Dicts": (minari_set(as_dict=True), True),
    "Minari in arrow": (minari_set(data_format="arrow"), True),
}


def expected(episodes, has_final=True, backup="sac") -> list[tuple]:
    """(s, a, r, s', done, a') of every step by the definition; None for what has no meaning. Rows
    that neither end nor can be bootstrapped from are not there."""
    rows = []
    for e in episodes:
        for t in range(len(e["rew"])):
            ends = t == len(e["rew"]) - 1
            done = ends and e["end"] in ("terminal", "both")
            next_obs = None if done or (ends and not has_final) else e["obs"][t + 1]
            next_act = None if ends else e["act"][t + 1]
            if done or not (next_obs is None or (backup == "sarsa" and ends)):
                rows.append((e["obs"][t], e["act"][t], e["rew"][t], next_obs, done, next_act))
    return rows


def read(name, env=None, **changes):
    """With nothing held out, so that the training rows are all usable ones."""
    return cql.load(str(name), cql.Args(**{"holdout": 0.0} | changes), env, CPU)


def assert_rows(data, rows: list[tuple], low=-1.0, high=1.0):
    """Exactly these rows, in their order."""
    assert int(data.size) == len(rows) == data.capacity
    for i, row in enumerate(rows):
        for name, value in zip(("obs", "act", "rew", "next_obs", "done", "next_act"), row):
            got = data.columns[name][i].numpy()
            if value is not None and name in ("act", "next_act"):
                np.testing.assert_allclose((got + 1) / 2 * (high - low) + low, value, atol=1e-6)
            elif value is not None:
                np.testing.assert_array_equal(got, value, f"{name} of row {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_row_by_row(layout, capsys, monkeypatch):
    """An episode's last step is neither lost nor joined to the next one; what cannot be used is
    counted. Thirteen episodes: names sorted as text would be in another order."""
    make, has_final = LAYOUTS[layout]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("sets").resolve()))
    many = (
        FOUR[:3] + [episode(300 + 10 * i, 1 + i % 3, ENDS[i % 2][2]) for i in range(9)] + FOUR[3:]
    )
    episodes = FOUR if "other things" in layout else many
    name = make(episodes)
    assert sum(len(e["rew"]) for e in FOUR) == 13
    for backup in ("sac", "sarsa"):
        rows = expected(episodes, has_final, backup)
        data = read(name, backup=backup)
        assert_rows(data, rows)
        steps = sum(len(e["rew"]) for e in episodes)
        terminal = sum(e["end"] in ("terminal", "both") for e in episodes)
        out = capsys.readouterr().out
        assert f": {steps} transitions, {len(episodes)} episodes (" in out
        assert f", {terminal} terminal" in out and f" {len(rows)} to train on, 0 held out" in out
    assert ("a (2), b (1)" in out) == ("Dict" in layout)
    returns = [float(e["rew"].sum()) for e in episodes]
    assert data.info["dataset_return_mean"] == pytest.approx(np.mean(returns))
    assert f"returns {np.mean(returns):.1f} mean, {min(returns):.1f} to {max(returns):.1f}" in out


def test_random_episodes_row_by_row():
    """Many of one step, any end, in any order."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        lengths = [int(rng.integers(1, 7)) if rng.random() < 0.7 else 1 for _ in range(8)]
        kinds = rng.choice(["terminal", "timeout", "both"], 8)
        kinds[-1] = rng.choice(["terminal", "timeout", "both", "open"])
        episodes = [episode(20 * i, n, str(k)) for i, (n, k) in enumerate(zip(lengths, kinds))]
        for drop in ("", "timeouts", "next_observations"):
            for backup in ("sac", "sarsa"):
                rows = expected(episodes, drop != "next_observations", backup)
                if rows:
                    data = read(d4rl(drop)(episodes), backup=backup)
                    assert_rows(data, rows)
                    firsts = data.columns["obs"][data.columns["start"] > 0]
                    kept = {float(x) for x in data.columns["obs"][:, 0]}
                    begins = [e["obs"][0, 0] for e in episodes if e["obs"][0, 0] in kept]
                    assert firsts[:, 0].tolist() == begins


def fake_env(low, high, obs_dim=3, limit=200, spaces=None):
    """What load() asks of an environment: spaces, bounds and time limit."""
    obs = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
    one = SimpleNamespace(spec=SimpleNamespace(max_episode_steps=limit))
    one.unwrapped = SimpleNamespace(observation_space=spaces or obs)
    box = gym.spaces.Box(np.float32(low), np.float32(high))
    return SimpleNamespace(envs=[one], single_observation_space=obs, single_action_space=box)


def test_without_timeouts_and_next_observations_the_limit_cuts(capsys):
    """As D4RL does: four steps an episode, counted from the last terminal."""
    e = [episode(0, 2, "terminal"), episode(2, 9, "terminal"), episode(11, 5, "open")]
    cut = [(0, 2, "terminal"), (2, 4, "timeout"), (6, 4, "timeout"), (10, 1, "terminal")]
    cut = [episode(*x) for x in (*cut, (11, 4, "timeout"), (15, 1, "open"))]
    data = read(d4rl("timeouts next_observations")(e), fake_env([-1], [1], limit=4))
    assert_rows(data, expected(cut, has_final=False))
    assert "limit" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("missing", ["", "timeouts", "next_observations"])
@pytest.mark.parametrize("end", ["timeout", "terminal"])
def test_it_is_said_where_nothing_tells_time_outs(limit, missing, end, capsys):
    """Without timeouts, next_observations and a limit the rows after a reset pass for what follows,
    and nothing else would show it."""
    episodes = [episode(10 * i, 4 + i, end) for i in range(3)]
    read(d4rl(missing)(episodes), limit and fake_env([-1], [1], limit=limit))
    assert "nothing tells time-outs" not in capsys.readouterr().out
    read(d4rl("timeouts next_observations")(episodes), limit and fake_env([-1], [1], limit=limit))
    assert ("odd: nothing tells time-outs" in capsys.readouterr().out) == (limit is None)


@pytest.mark.parametrize("end", ["terminal", "open"])
@pytest.mark.parametrize("limit", [9, 10, None])
def test_an_episode_longer_than_the_limit_is_pointed_at(end, limit, capsys):
    """Also the last one, which nothing ends."""
    episodes = [episode(0, 5, "timeout"), episode(10, 10, end)]
    read(d4rl()(episodes), limit and fake_env([-1], [1], limit=limit))
    said = "odd: an episode of 10 steps in an environment of 9" in capsys.readouterr().out
    assert said == (limit == 9)


UNFINISHED = [(5, "terminal"), (5, "terminal"), (2, "open")]  # the recording stopped
ODD = {  # episodes, and the line about their flags
    "terminals are timeouts as well": [episode(0, 3, "both"), episode(10, 4, "terminal")],
    "2 terminals follow a terminal": [
        episode(10 * i, n, "terminal") for i, n in enumerate((5, 1, 1))
    ],
    "is that a time limit": [episode(10 * i, 5, "terminal") for i in range(3)],
    "after 5 steps": [episode(10 * i, n, how) for i, (n, how) in enumerate(UNFINISHED)],
    "": [episode(0, 5, "terminal"), episode(10, 5, "timeout"), episode(20, 3, "terminal")],
}


def test_spaces_are_flattened_by_gymnasiums_rule():
    box, spaces = gym.spaces.Box(-1, 1, (2, 3)), gym.spaces
    inner = spaces.Dict({"m": spaces.MultiDiscrete([3, 4]), "d": spaces.Discrete(3, start=-1)})
    every = spaces.Dict({"z": box, "a": inner, "b": spaces.MultiBinary(2)})
    pair = spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 1, (1,))))
    for space in (box, inner, every, pair, spaces.Discrete(5)):
        space.seed(0)
        values = [space.sample() for _ in range(4)]
        stacked = gym.vector.utils.create_empty_array(space, 4)
        stacked = gym.vector.utils.concatenate(space, values, stacked)
        rows = np.stack([spaces.flatten(space, x) for x in values])
        assert np.array_equal(cql.flat(space, stacked, 4), rows.astype(np.float32)), space


def test_the_parts_of_a_dict_that_a_file_lacks_are_named(capsys):
    space = gym.spaces.Dict({k: gym.spaces.Box(-1, 1, (n,)) for k, n in (("b", 27), ("a", 2))})
    base = SimpleNamespace(observation_space=space)
    env = fake_env([-1], [1])
    env.envs[0].unwrapped, env.single_observation_space = base, gym.spaces.Box(-1, 1, (29,))
    err = refused(capsys, lambda: cql.check_widths((27, 1), env, "Maze-v0"))
    assert "a (2), b (27)" in err and "the data lack a" in err


@pytest.mark.parametrize("line", ODD)
def test_odd_flags_are_read_as_they_are_and_pointed_at(line, capsys):
    assert_rows(read(d4rl()(ODD[line])), expected(ODD[line]))
    odd = [x for x in capsys.readouterr().out.splitlines() if x.startswith("odd")]
    assert len(odd) == bool(line) and all(line in x for x in odd), odd


# ----------------------------------------------------------------------------------- returns to go
def plain_returns(rew, lengths, gamma: float) -> np.ndarray:
    """The backward recursion G_t = r_t + gamma G_{t+1}, episode by episode, in float64."""
    out, i = np.zeros(len(rew)), 0
    for length in lengths:
        g = 0.0
        for t in reversed(range(i, i + length)):
            out[t] = g = float(rew[t]) + gamma * g
        i += length
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 0.99999])
def test_returns_to_go_against_a_backward_loop(gamma):
    """Doubling must stop at the episode's end: powers of two, one more, one less, 1."""
    rng = np.random.default_rng(5)
    cases = [rng.integers(1, 70, size=rng.integers(1, 30)).tolist() for _ in range(30)]
    for lengths in cases + [[1], [1, 1], [64, 63, 65, 128, 127, 129, 1], [1023, 1, 1025]]:
        rew = rng.normal(size=sum(lengths)).astype(np.float32)
        last = np.repeat(np.cumsum(lengths) - 1, lengths).astype(np.int32)
        before, g = rew.copy(), cql.returns_to_go(rew, last, gamma)
        np.testing.assert_array_equal(rew, before)
        np.testing.assert_allclose(g, plain_returns(rew, lengths, gamma), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_returns_are_left_out_where_a_time_out_cuts_off_more_than_one_percent(gamma):
    """The missing share by definition: of a reward of 1 for ever, what the data lack. At 0.99 the
    last 458 steps before a time-out know too little: log 0.01 / log 0.99 = 458.2."""
    lengths, ends = (1, 470, 700, 2, 30, 471), ["timeout", "timeout", "terminal"] * 2
    episodes = [episode(800 * i, n, e) for i, (n, e) in enumerate(zip(lengths, ends))]
    data = read(d4rl()(episodes), gamma=gamma, reward_scale=0.5, reward_shift=2.0)
    rew = np.concatenate([0.5 * e["rew"] + 2.0 for e in episodes])
    truth, i = plain_returns(rew, lengths, gamma), 0
    for n, end in zip(lengths, ends):
        for t in range(n):
            present = sum(gamma**k for k in range(n - t)) * (1 - gamma)
            if end == "timeout" and 1 - present > 0.01:
                truth[i + t] = np.nan
        i += n
    assert gamma < 0.99 or np.isnan(truth[1:471]).sum() == 458
    np.testing.assert_allclose(data.columns["to_go"].numpy(), truth, rtol=2e-5, atol=2e-3)
    np.testing.assert_allclose(data.columns["rew"].numpy(), rew, rtol=1e-6)
    assert data.info["reward_min"] == rew.min() and data.info["reward_max"] == rew.max()


# ------------------------------------------------------------------------------------------ actions
def actions_file(act) -> str:
    act = np.float32(act).reshape(len(act), -1)
    return write(columns([episode(0, len(act), "terminal")]) | {"actions": act})


@pytest.mark.parametrize("low, high", [(-1, 1), (-2, 2), (-0.4, 0.4), (0, 5)])
def test_actions_are_scaled_by_the_box_and_rounding_is_clipped(low, high, capsys):
    """0.1 % of the range is rounding; a whisker more is a file in other units."""
    size, env = high - low, fake_env([low], [high])
    act = np.linspace(low + 0.1 * size, high - 0.1 * size, 12)
    act[[2, 5]] = high + 0.0009 * size, low - 0.0009 * size
    data = read(actions_file(act), env)
    scaled = (2 * (act - low) / size - 1).clip(-1, 1)
    np.testing.assert_allclose(data.columns["act"][:, 0], scaled, atol=1e-5)
    assert ", 2 clipped" in capsys.readouterr().out
    act[7] = high + 0.0012 * size
    name = actions_file(act)
    err = refused(capsys, lambda: read(name, env))
    assert "row 7 by 0.1%" in err and "--clip-actions" in err and "'actions' of 8.3%" in err
    assert read(name, env, clip_actions=True).columns["act"][7] == 1


@pytest.mark.parametrize("low, high", [(-1, 1), (-2, 2), (-1.2, 1.2), (0, 5)])
@pytest.mark.parametrize("least, most", [(0, 1), (0.005, 0.995), (0.1, 0.9)])
def test_actions_that_lie_in_the_unit_box_of_wider_bounds_are_pointed_at(
    low, high, least, most, capsys
):
    """Such actions were scaled, as peers do, and would be read as timid ones; not those that fill
    their bounds, or that stop short of 1."""
    fills = low + np.linspace(least, most, 12) * (high - low)
    read(actions_file(fills), fake_env([low], [high]))
    assert "odd: actions" not in capsys.readouterr().out
    if low >= 0:
        return
    scaled = np.linspace(2 * least - 1, 2 * most - 1, 12)
    read(actions_file(scaled), fake_env([low], [high]))
    odd = (least, most) != (0.1, 0.9) and high > 1
    assert ("odd: actions reach -1 and 1" in capsys.readouterr().out) == odd


def test_every_dimension_has_its_own_bounds():
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([3.0, 10.0, 2.5])
    episodes = [episode(*e, act_dim=3) for e in ENDS]
    for e in episodes:
        e["act"] = (low + (e["act"] + 1) / 2 * (high - low)).astype(np.float32)
    env = fake_env(low, high)
    data = read(d4rl()(episodes), env, backup="sarsa")
    rows = expected(episodes, backup="sarsa")
    assert_rows(data, rows, low, high)
    np.testing.assert_allclose(
        cql.to_env(data.columns["act"], env), [r[1] for r in rows], atol=1e-5
    )


BOUNDS = {  # flags of bounds: the bounds of two dimensions that hold, or words of the one line
    "": "leave [-1.] to [1.]",
    "--action-low data --action-high data": ([-3, 2], [5, 4]),
    "--action-low -4 --action-high 6": ([-4, -4], [6, 6]),
    "--action-low -4 0 --action-high data": ([-4, 0], [5, 4]),
    "--action-low -4 --action-high 4": "--action-low and --action-high set others",
    "--action-low 1 2 3 --action-high 9": "one number, or 2",
    "--action-low 7 --action-high 6": "expected low < high",
    "--action-low nan --action-high 6": "expected low < high",
}


@pytest.mark.parametrize("line", BOUNDS)
def test_bounds_may_be_named_where_there_is_no_environment(line, capsys):
    act = np.array([[-3, 2], [5, 4], [0, 3], [1, 2]])
    words = ["--dataset", actions_file(act), "--env", "Mine-v0", "--eval-episodes", "0"]
    args = cql.tyro.cli(cql.Args, args=[*words, "--holdout", "0", *line.split()])
    cql.check(args)
    if isinstance(BOUNDS[line], str):
        err = refused(capsys, lambda: cql.load(args.dataset, args, None, CPU))
        assert BOUNDS[line] in err
    else:
        low, high = map(np.array, BOUNDS[line])
        data = cql.load(args.dataset, args, None, CPU)
        got = data.columns["act"].numpy()
        np.testing.assert_allclose(low + (got + 1) / 2 * (high - low), act, atol=1e-5)
        assert np.array_equal(data.info["action_bounds"], [low, high])  # for who uses the policy


def test_whose_bounds_hold(stack, capsys):
    """Without evaluation the environment's, where it is registered; else [-1, 1], which is said.
    What is to be played must be there, and has bounds of its own."""
    args = cql.Args(dataset="d.hdf5", eval_episodes=0)
    assert cql.find_env(args, None, stack).single_action_space.high == 2
    for env_id in ("Mine-v0", "nomodule:Pendulum-v1"):
        args.env_id = env_id
        assert cql.find_env(args, None, stack) is None
        assert "lie in [-1, 1]" in capsys.readouterr().out
    write_d4rl("d.hdf5", n=40, length=8)
    for words in ({"online_steps": 5}, {"eval_episodes": 1}):
        played = cql.Args(**SMALL | dict(dataset="d.hdf5", env_id="Mine-v0") | words)
        assert "Mine-v0" in refused(capsys, lambda args=played: cql.train(args))
        bounds = cql.Args(**SMALL | dict(dataset="d.hdf5", action_low=(-2.0,)) | words)
        assert "--action-low" in refused(capsys, lambda args=bounds: cql.train(args))


# ----------------------------------------------------------------------- holdout, standardisation
def test_holdout_takes_whole_episodes_drawn_by_the_seed():
    """Rows of an episode are nearly copies of each other: a split by rows would measure memory."""
    episodes = [episode(100 * i, 3 + i % 4, ("terminal", "timeout")[i % 2]) for i in range(20)]
    name, state = d4rl()(episodes), torch.get_rng_state()
    for share, count in ((0.1, 2), (0.25, 5), (0.001, 1)):
        chosen = []
        for seed in (1, 1, 2, 3, 4, 5):
            data = read(name, holdout=share, seed=seed)
            of, size = (data.columns["obs"][:, 0] // 100).int().tolist(), int(data.size)
            kept, held = set(of[:size]), set(of[size:])
            assert len(of) == sum(len(e["rew"]) for e in episodes)
            assert len(held) == count and not held & kept
            chosen.append(frozenset(held))
        assert chosen[0] == chosen[1] and len(set(chosen)) > 3
    seen = {tuple(x) for x in data.sample(3000).obs.tolist()}
    assert seen == {tuple(x) for x in data.columns["obs"][:size].tolist()}
    torch.set_rng_state(state)  # after sample(); load() itself must draw nothing
    read(name, holdout=0.25)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(read(d4rl()([episode(0, 9, "terminal")]), holdout=0.5).size) == 9


@pytest.mark.parametrize("on", [True, False])
def test_observations_are_standardised_unless_told_otherwise(on):
    """By mean and deviation of all rows, held-out ones too; an entry that never varies stays 0."""
    obs = np.random.default_rng(0).normal(size=(2000, 3)) * [5, 0.5, 0] + [100, -7, 3]
    path = write_d4rl("d.hdf5", observations=obs.astype("f4"), scale=1.0)
    cql.train(cql.Args(**SMALL | dict(dataset=str(path), normalize_obs=on)))
    networks = load(only_run(".") / "checkpoint.pt")["networks"]
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if on else (np.zeros(3), np.ones(3))
    for place in ("actor.net.0", "critic.standardise", "target.standardise"):
        np.testing.assert_allclose(networks[f"{place}.mean"], mean, rtol=1e-4)
        np.testing.assert_allclose(networks[f"{place}.std"], std, rtol=1e-4)


# --------------------------------------------------------------------------------------- refusals
def good(**changes) -> dict:
    rng = np.random.default_rng(0)
    obs, end = rng.normal(size=(41, 3)).astype("f4"), np.arange(40) % 8 == 7
    c = {"observations": obs[:-1], "next_observations": obs[1:], "timeouts": end}
    c |= {"actions": rng.uniform(-1, 1, (40, 1)).astype("f4"), "rewards": obs[1:, 0]}
    return c | {"terminals": np.zeros(40, bool)} | changes


def raw(content: bytes):
    return lambda: Path("x.hdf5").write_bytes(content) and "x.hdf5"


def cut(share):
    """A download that stopped."""
    return lambda: raw(Path(write(good())).read_bytes()[: int(share * 20_000)])()


def h5(**changes):
    """A good file with these columns changed or, by None, left out."""
    return lambda: write({k: x for k, x in good(**changes).items() if x is not None})


def orbax():
    Path("x.hdf5/17").mkdir(parents=True)
    Path("x.hdf5/17/manifest.ocdbt").touch()
    return "x.hdf5"


def pointer_in_a_set():
    name = minari_set("folder")(FOUR)
    text = "version https://git-lfs.github.com/spec/v1\n"
    Path(name, "data", "main_data.hdf5").write_text(text)
    return name


def small_set(damage):
    """A set by Minari's library, then damaged."""

    def make():
        name = minari_set("folder")(FOUR)
        with h5py.File(f"{name}/data/main_data.hdf5", "a") as f:
            damage(f["episode_2"])
        return name

    return make


def drop_rewards(group):
    del group["rewards"]


def long_rewards(group):
    del group["rewards"]
    group["rewards"] = np.ones(9)


def nan_observation(group):
    group["observations"][0] = np.nan


BAD_FILES = {  # how it is made, and words of the one line
    "missing": (lambda: "gone.hdf5", "minari download gone.hdf5"),
    "empty": (lambda: Path("x.hdf5").touch() or "x.hdf5", "no HDF5 file"),
    "folder": (lambda: Path("x.hdf5").mkdir() or "x.hdf5", "a folder that is no dataset"),
    "orbax": (orbax, "an orbax checkpoint"),
    "arrow": (raw(b"ARROW1\0\0"), "folder of its Minari set"),
    "old pickle": (raw(b"(lp0\n."), "tools/convert.py FILE NEW.hdf5"),
    "gzip": (raw(b"\x1f\x8b\x08"), "gzipped"),
    "Minari's pointer": (pointer_in_a_set, "git lfs pull"),
    "text": (raw(b"s,a,r\n1,2,3\n"), "no HDF5 file"),
    "pickle": (raw(b"\x80\x04}."), "a pickle"),
    "npz": (raw(b"PK\3\4"), "npz"),
    "pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid x\n"), "git lfs pull"),
    "cut": (cut(0.1), "damaged, incomplete"),
    "something else": (
        lambda: write({"weights": np.zeros(3)}),
        "no array 'observations' (found: w",
    ),
    "no rows": (h5(**{k: x[:0] for k, x in good().items()}), "no transitions"),
    "a lone Minari file": (lambda: write({"episode_0/rewards": np.zeros(3)}), "metadata.json"),
    "narrow next_observations": (h5(next_observations=np.zeros((40, 2), "f4")), "(40, 3)|(40, 2)"),
    "Minari without rewards": (small_set(drop_rewards), "rewards"),
    "Minari of another length": (small_set(long_rewards), "9 rewards"),
    "Minari with NaN": (small_set(nan_observation), "observations"),
    "nothing usable": (lambda: d4rl()([episode(0, 1, "timeout")]), "nothing to train on"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(what, capsys, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("sets").resolve()))
    make, words = BAD_FILES[what]
    name = make()
    args = cql.Args(**SMALL | dict(dataset=name, backup="sarsa", env_id="Mine-v0"))
    err = refused(capsys, lambda: cql.train(args))
    assert name in err and any(x in err for x in words.split("|")), err
    assert not Path("runs").exists()


def at(row, value):
    """x with this value in one row."""

    def change(x):
        x = x.astype(np.float64)
        x[row] = value
        return x

    return change


BAD_ARRAYS = {
    "cut": lambda x: x[:-1],
    "longer": lambda x: np.concatenate([x, x[:1]]),
    "no rows": lambda x: x[:0],
    "deeper": lambda x: x[:, None, None],
    "scalar": lambda x: np.float32(1),
    "null": lambda x: h5py.Empty("f4"),
    "bytes": lambda x: np.full(x.shape, b"1.0"),
    "complex": lambda x: x.astype(np.complex64),
    "compound": lambda x: np.zeros(x.shape, [("a", "f4")]),
    "text": lambda x: np.full(x.shape, "1.0", dtype=object),
    "nan": at(0, np.nan),
    "inf": at(20, np.inf),
    "too large": at(39, -1e300),
}
BAD_FLAGS = {"two": at(3, 2), "minus one": at(3, -1), "a half": at(3, 0.5)}
BAD_WIDTHS = {
    "flat": lambda x: x[:, 0],
    "no columns": lambda x: x[:, :0],
}


@pytest.mark.parametrize("key", good())
def test_a_bad_array_is_refused_by_name(key, capsys):
    """The culprit, or its first neighbour where only lengths differ; never a traceback."""
    flag, wide = key in ("terminals", "timeouts"), good()[key].ndim == 2
    changes = BAD_ARRAYS | (BAD_FLAGS if flag else {}) | (BAD_WIDTHS if wide else {})
    args = cql.Args(**SMALL | {"env_id": "Mine-v0"})
    for name, change in changes.items():
        path = write(good(**{key: change(good()[key])}))
        err = refused(capsys, lambda path=path: cql.load(path, args, None, CPU))
        assert path in err, (name, err)
        lengths = name in ("cut", "longer", "no rows", "scalar", "null")
        assert key in err or lengths, (name, err)
    if key in ("observations", "actions", "rewards", "terminals"):
        missing = write({k: x for k, x in good().items() if k != key})
        err = refused(capsys, lambda: cql.load(missing, args, None, CPU))
        assert f"no array '{key}'" in err and "tools/convert.py" in err


@pytest.mark.parametrize("obs, act", [(4, 1), (3, 2), (27, 8)])
def test_widths_of_another_environment(obs, act, capsys, stack):
    name = str(write_d4rl("d.hdf5", n=40, obs_dim=obs, act_dim=act, length=8))
    env = cql.make_envs("Pendulum-v1", 1, stack)
    err = refused(capsys, lambda: read(name, env))
    assert f"({obs}, {act})" in err and "(3, 1)" in err and "Pendulum-v1" in err
    assert ("include_cfrc_ext_in_observation=False" in err) == (obs == 27)


# ------------------------------------------------------------------------------------- collecting
COLLECT = SMALL | dict(collect_steps=300, seed=5)  # fewer than RANDOM_STEPS: no updates


def collected(args=None) -> dict:
    cql.train(args or cql.Args(**COLLECT))
    (path,) = Path("datasets").iterdir()
    with h5py.File(path) as f:
        return {key: x[()] for key, x in f.items()}


def test_collected_rows_are_what_the_environment_did():
    """Each row played again from its own state; where one ends and the next one starts."""
    c, env = collected(), gym.make("Pendulum-v1")
    assert len(c["rewards"]) == 300 and not c["terminals"].any()
    assert c["timeouts"].nonzero()[0].tolist() == [199, 299]
    env.reset(seed=0)
    for i in range(300):
        x, y, speed = c["observations"][i]
        env.unwrapped.state = np.array([np.arctan2(y, x), speed])
        obs, rew, *_ = env.unwrapped.step(c["actions"][i])
        np.testing.assert_allclose(c["next_observations"][i], obs, atol=1e-4)
        np.testing.assert_allclose(c["rewards"][i], rew, atol=1e-3)
    joined = (c["next_observations"][:-1] == c["observations"][1:]).all(1)
    assert np.flatnonzero(~joined).tolist() == [199]
    assert c["actions"].min() < -1.8 and c["actions"].max() > 1.8
    assert len(np.unique(c["actions"])) > 290


def test_the_file_is_kept_by_what_made_it(monkeypatch, capsys):
    """A second run takes it; another seed, length or environment does not; a spoilt one is refused,
    and a fault while writing leaves nothing."""
    first = collected()
    (path,) = Path("datasets").iterdir()
    before = path.stat().st_mtime_ns
    collected(cql.Args(**COLLECT | dict(cql_alpha=0.5, gamma=0.9)))
    assert path.stat().st_mtime_ns == before and f"using {path}" in capsys.readouterr().out
    for other in ({"seed": 6}, {"collect_steps": 301}, {"env_id": "MountainCarContinuous-v0"}):
        again = cql.Args(**COLLECT | other | {"data_dir": "others"})
        cql.train(again)
    assert len(list(Path("others").iterdir())) == 3
    assert path.name not in {p.name for p in Path("others").iterdir()}
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(capsys, lambda: cql.train(cql.Args(**COLLECT)))
    path.unlink()
    put = h5py.Group.__setitem__

    def full(self, name, value):
        if name == "terminals":
            raise OSError(28, "No space left on device")
        put(self, name, value)

    with monkeypatch.context() as m:
        m.setattr(h5py.Group, "__setitem__", full)
        assert "No space" in refused(capsys, lambda: cql.train(cql.Args(**COLLECT)))
    assert not list(Path("datasets").iterdir())
    second = collected()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_the_collector_has_settings_of_its_own(monkeypatch):
    """The file's name does not tell them: whoever changes one changes the name's version."""
    made, updates, init = [], [], cql.Learner.__init__

    def note(self, obs_dim, act_dim, args, device):
        made.append(args)
        init(self, obs_dim, act_dim, args, device)

    monkeypatch.setattr(cql.Learner, "__init__", note)
    monkeypatch.setattr(cql, "RANDOM_STEPS", 20)
    real = cql.Learner.update
    monkeypatch.setattr(
        cql.Learner,
        "update",
        lambda self, *rest, **k: updates.append(self) or real(self, *rest, **k),
    )
    cql.train(cql.Args(**COLLECT | dict(collect_steps=30, gamma=0.5, cql_alpha=1.0)))
    own = dict(cql_alpha=0.0, backup_entropy=True, policy_lr=3e-4, q_lr=3e-4)
    assert made[0] == cql.Args(**own) and len(made) == 2 and len(updates) == 10 + 1
    (path,) = Path("datasets").iterdir()
    assert path.name == "Pendulum-v1_sac-replay_30_seed5_v4.hdf5"


# ---------------------------------------------------------------------------------------- playing
class Noting(Counting):
    def __init__(self):
        super().__init__()
        self.seen = []

    def step(self, action):
        self.seen.append(np.array(action))
        return super().step(action)


if "Noting-v0" not in gym.registry:
    gym.register("Noting-v0", Noting, max_episode_steps=100)


def a_learner(**changes):
    """Observations are standardised by mean 1 and deviation 2; Q says 7, its second member 8."""
    learner = cql.Learner(2, 2, cql.Args(env_id="Noting-v0", **SMALL | changes), CPU)
    for net in (learner.actor.net[0], learner.critic.standardise, learner.target.standardise):
        net.mean.fill_(1.0), net.std.fill_(2.0)
    for p in learner.critic.parameters():
        p.data.zero_()
    learner.critic.head.bias.data += torch.tensor([7.0, 8.0])[:, None, None]
    return learner, learner.args


def greedy(learner, obs) -> np.ndarray:
    """tanh(mean) for observations as the environment has them, in its bounds."""
    x = (torch.tensor(obs, dtype=torch.float32) - 1) / 2
    mean = learner.actor.net[1:](x).chunk(2, -1)[0]
    return np.array([-3.0, 0.0]) + (torch.tanh(mean).detach().numpy() + 1) / 2 * 4


def test_evaluation_by_hand(stack):
    """Episodes of 3 and of 5 steps: what the first does while the second goes on is not counted."""
    learner, args = a_learner(gamma=0.5, reward_scale=2.0, reward_shift=-1.0)
    envs = cql.make_envs(args.env_id, 2, stack)
    envs.envs[1].unwrapped.episode = 1
    out = cql.evaluate(learner, envs, args)
    assert out["final_return_mean"] == (6 + 15) / 2 and out["final_return_std"] == (15 - 6) / 2
    achieved = [sum((2 * (t + 1) - 1) * 0.5**t for t in range(n)) for n in (3, 5)]
    assert abs(out["overestimation"] - (7 - np.mean(achieved))) < 1e-6
    for env, e, n in zip(envs.envs, (0, 2), (3, 5)):
        at_hand = greedy(learner, [[e, t] for t in range(n)])
        assert np.allclose(env.unwrapped.seen[:n], at_hand, atol=1e-5)
    assert learner.critic.training


def test_evaluations_differ_by_the_seed_alone(stack):
    learner, scores = cql.Learner(3, 1, cql.Args(**SMALL), CPU), []
    for seed in (1, 1, 2):
        envs = cql.make_envs("Pendulum-v1", 1, stack)
        scores.append(cql.evaluate(learner, envs, cql.Args(seed=seed))["final_return_mean"])
    assert scores[0] == scores[1] != scores[2]


def test_rows_played_online(stack):
    """Episodes of 3, 4 and 5 steps: ended, cut, ended. Rewards scaled, actions sampled."""
    learner, args = a_learner(reward_scale=2.0, reward_shift=-1.0)
    env, replay, returns = cql.make_envs(args.env_id, 1, stack), cql.Replay(12, 2, 2, CPU), []
    obs, _ = env.reset(seed=0)
    for _ in range(12):
        obs, ended = cql.interact(learner, env, replay, obs)
        returns += ended
    c = {key: x.numpy() for key, x in replay.columns.items()}
    rows = np.array([[e, t] for e, n in enumerate((3, 4, 5)) for t in range(n)], float)
    assert np.array_equal(c["obs"], rows) and np.array_equal(c["next_obs"], rows + [0, 1])
    assert np.array_equal(c["rew"], 2 * (rows[:, 1] + 1) - 1) and returns == [6.0, 10.0, 15.0]
    assert np.flatnonzero(c["done"]).tolist() == [2, 11]
    assert np.flatnonzero(c["cut"]).tolist() == [6]
    played = np.array([-3.0, 0.0]) + (c["act"] + 1) / 2 * 4
    assert np.allclose(env.envs[0].unwrapped.seen, played, atol=1e-5)
    assert np.abs(played - greedy(learner, rows)).max() > 0.5
    batch = replay.sample(500)
    assert set(batch.done.tolist()) == {0.0, 1.0} and len(batch.obs.unique(dim=0)) == 12


def quick(**changes) -> cql.Args:
    path = write_d4rl("x.hdf5", obs_dim=2, act_dim=2, scale=0.9)
    few = dict(dataset=str(path), env_id="Noting-v0", num_updates=20, eval_frequency=0)
    few |= dict(diagnostics_frequency=5, clip_actions=True)
    return cql.Args(**SMALL | few | changes)


@pytest.mark.parametrize("share, parts", [(0.25, (2, 6)), (0.0, (0, 8)), (1.0, (8, 0))])
def test_the_online_phase_mixes_as_it_says(share, parts, monkeypatch):
    """Offline minibatches of 8, then of both; the workflow looks at offline moments alone. Episodes
    of 3, 4 and 5 steps pay 6, 10 and 15."""
    asked, sample = {"data": [], "online": []}, cql.Replay.sample

    def noted(self, n):
        asked["data" if "to_go" in self.columns else "online"].append(n)
        return sample(self, n)

    monkeypatch.setattr(cql.Replay, "sample", noted)
    cql.train(quick(online_steps=13, offline_share=share))
    assert asked == {"data": [8] * 40 + [parts[0]] * 26, "online": [parts[1]] * 26}
    run = only_run(".")
    saved = load(run / "checkpoint.pt")
    assert [h["step"] for h in saved["history"]] == [5, 10, 15, 20] and saved["step"] == 33
    assert saved["replay"]["rows"]["rew"].tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4, 5, 1]
    returns = [(step, float(x)) for step, tag, x in metrics(run) if tag == "charts/online_return"]
    assert returns == [(23, 6.0), (27, 10.0), (32, 15.0)]


@pytest.mark.parametrize(
    "q, selected", [([1, 2, 0, 1.95], 10), ([1, 2, 1.99, 0], 15), (range(4), 20)]
)
def test_the_selected_policy_is_the_last_one_before_q_fell(q, selected, monkeypatch, stack):
    """Of four moments, whose Q is planted: its networks are kept, loaded, evaluated. Less than a
    tenth of the unit of Q is no fall."""
    diagnose, planted = cql.diagnose, iter(q)

    def moment(*words):
        known = {"q_data": float(next(planted)), "td_error": 0.0, "return_std": 1.0}
        return diagnose(*words) | known

    monkeypatch.setattr(cql, "diagnose", moment)
    path = str(write_d4rl("p.hdf5", scale=1.0))
    args = quick(policy_lr=0.05, eval_episodes=2, env_id="Pendulum-v1", dataset=path)
    out, scores = cql.train(args), {}
    for name in ("selected.pt", "checkpoint.pt"):
        learner = cql.Learner(3, 1, args, CPU)
        learner.load_state_dict(load(only_run(".") / name)["networks"])
        envs = cql.make_envs("Pendulum-v1", 2, stack)
        scores[name] = cql.evaluate(learner, envs, args)["final_return_mean"]
    assert out["selected_step"] == selected
    assert out["selected_return_mean"] == scores["selected.pt"]
    assert out["final_return_mean"] == scores["checkpoint.pt"]
    assert (scores["checkpoint.pt"] == scores["selected.pt"]) == (selected == 20)


def test_cloning_ends_where_it_says(monkeypatch):
    """Seven updates; evaluations come at 5, 7, 10, 15, 20 and of the selected policy."""
    flags, scores, real = [], iter(range(1, 9)), cql.Learner.update

    def update(learner, sample, cloning):
        flags.append(cloning)
        return real(learner, sample, cloning)

    monkeypatch.setattr(cql.Learner, "update", update)
    monkeypatch.setattr(
        cql,
        "evaluate",
        lambda *_: {"final_return_mean": float(next(scores)), "overestimation": 0.0},
    )
    cql.train(quick(bc_steps=7, eval_frequency=5, eval_episodes=2))
    out = summary(only_run("."))
    assert flags == [True] * 7 + [False] * 13
    assert [out[f"{k}_return_mean"] for k in ("bc", "final", "selected")] == [2.0, 5.0, 6.0]


# ---------------------------------------------------------------------- the numbers of a moment
def many_episodes(seed=0, n=30) -> str:
    rng, ends = np.random.default_rng(seed), ["terminal", "timeout", "both"]
    lengths = rng.integers(1, 12, n)
    return d4rl()([episode(20 * i, int(k), ends[i % 3]) for i, k in enumerate(lengths)])


WEIGHTS = [({"cql_alpha": 3.0}, 3.0), ({"cql_target_gap": 2.0}, 7.0), ({"cql_variant": "eq1"}, 0.0)]


@pytest.mark.parametrize("changes, weight", WEIGHTS)
def test_the_numbers_of_a_moment_by_loops(changes, weight):
    """One row after the other; the target's policy has no noise here."""
    sizes = dict(gamma=0.8, backup="mean", width=16, holdout=0.2) | changes
    data, args = read(many_episodes(), **sizes), cql.Args(**sizes)
    learner = cql.Learner(3, 1, args, CPU)
    learner.standardise(data.columns["obs"])
    if args.cql_target_gap is not None:
        learner.log_cql_alpha.data.fill_(np.log(7.0))
    for p in learner.critic.parameters():
        p.data += 0.3 * torch.randn_like(p)  # away from the target network
    found, size = cql.diagnose(learner, data, args), int(data.size)

    def q(net, obs, act):
        return net(obs[None], act[None])[:, 0]

    def pi(obs):
        return learner.actor.mode(obs[None])[0]

    expected = {}
    for suffix, rows in (("", range(size)), ("_holdout", range(size, data.capacity))):
        values, targets, lows, known, dots = [], [], [], [], []
        for i in rows:
            b, to_go = {k: x[i] for k, x in data.columns.items()}, data.columns["to_go"][i]
            after = q(learner.target, b["next_obs"], pi(b["next_obs"])).min()
            targets.append(float(b["rew"] + 0.8 * (1 - b["done"]) * after))
            values.append(q(learner.critic, b["obs"], b["act"]).tolist())
            at_pi = q(learner.critic, b["obs"], pi(b["obs"])).min()
            lows.append((min(values[-1]), float(at_pi)))
            if not to_go.isnan():
                known.append((lows[-1][0] - float(to_go), float(to_go)))
            pairs = (b["obs"], b["act"]), (b["next_obs"], pi(b["next_obs"]))
            phi = [learner.critic.features(s[None], a[None])[0][0, 0] for s, a in pairs]
            dots += [float(phi[0] @ phi[1])] * int(b["done"] == 0)
        values, targets = np.array(values), np.array(targets)
        error = ((values - targets[:, None]) ** 2).mean() / targets.var()
        expected["td_error" + suffix] = error
        if len(known) >= 32:
            expected["q_minus_return" + suffix] = np.mean(known, axis=0)[0]
            expected["return_std" + suffix] = np.std(known, axis=0, ddof=1)[1]
        if not suffix:
            expected["q_data"], expected["q_pi"] = np.mean(lows, axis=0)
            expected["feature_dot"] = np.mean(dots)
            rms = ((values - targets[:, None]) ** 2).mean() ** 0.5
    starts = data.columns["obs"][data.columns["start"] > 0]
    expected["v_s0"] = np.mean([float(q(learner.critic, s, pi(s)).min().detach()) for s in starts])
    rew = data.columns["rew"]
    expected |= {"q_bound": float(rew.max()) / 0.2, "q_lift": weight / 2 / 0.2}
    expected["q_range"] = float(rew.max() - rew.min()) / 0.2
    assert "q_minus_return" in expected
    expected["cql_push"] = weight / 2 / rms
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key


def test_the_numbers_of_a_moment_where_q_is_the_action():
    """Over [-1, 1] its mean is 0, its maximum 1, log E exp Q is log sinh 1. Q_1 = a, from features
    max(a, 0) and max(-a, 0); Q_2 = a + 1. 5 and 6 of its 2 x 8 units never fire."""
    data = read(many_episodes(), width=8)
    learner = cql.Learner(3, 1, cql.Args(width=8), CPU)
    for p in learner.critic.parameters():
        p.data.zero_()
    first, second = (layer.weight.data for layer in learner.critic.layers)
    first[:, 3, :3] = torch.tensor([1.0, -1.0, 1.0])
    second[:, 0, 0] = second[:, 1, 1] = torch.tensor([1.0, 0.5])
    learner.critic.head.weight.data[:, :2, 0] = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    learner.critic.head.bias.data[1] = 1
    found, a = cql.diagnose(learner, data, learner.args), data.columns["act"][:, 0].double().numpy()
    assert found["q_data"] == pytest.approx(a.mean(), abs=1e-5) and 0.99 < found["q_max"] <= 1
    assert abs(found["q_rand"]) < 4 / np.sqrt(3 * len(a))
    assert abs(found["cql_gap"] - (np.log(np.sinh(1)) - found["q_data"])) < 0.02
    phi = np.stack([np.maximum(a, 0), np.maximum(-a, 0)], 1)
    largest = np.linalg.norm(phi, 2) / np.sqrt(len(a))
    assert found["sigma_max"] == pytest.approx(largest, rel=1e-5)
    assert found["feature_norm"] == pytest.approx(np.abs(a).mean(), rel=1e-5)
    assert found["srank"] == found["rank_pca"] == 2
    assert found["dormant"] == pytest.approx(11 / 16)


@pytest.mark.parametrize(
    "high, ended, soft, bound",
    [
        (2.0, 1, 0, 10.0),
        (-0.5, 0, 0, -2.5),
        (-0.5, 1, 0, -0.5),
        (-0.5, 1, 1, -0.5),
        (2.0, 1, 1, 10.0),
    ],
)
def test_the_most_that_rewards_allow(high, ended, soft, bound):
    """At gamma 0.8, of rewards from -3; where all cost, to end at once is best. A soft backup adds
    the entropy of a uniform policy, at each step that is left."""
    rewards = np.linspace(-3, high, 200, dtype=np.float32)
    columns = {} if ended else {"terminals": np.zeros(200, bool)}
    path = write_d4rl("d.hdf5", n=200, length=20, scale=1.0, rewards=rewards, **columns)
    changes = dict(gamma=0.8, width=8, backup_entropy=bool(soft), alpha=0.3)
    data, learner = read(path, **changes), cql.Learner(3, 1, cql.Args(**changes), CPU)
    found, entropy = cql.diagnose(learner, data, learner.args), soft * 0.8 * 0.3 * np.log(2)
    horizon = 1 if bound == high else 5
    assert found["q_bound"] == pytest.approx(bound + horizon * entropy, rel=1e-5)
    assert found["q_range"] == pytest.approx(5 * (high + 3 + entropy), rel=1e-5)
