"""benchmarks/report.py on planted runs; that what benchmarks/ takes from the scripts is there."""

import ast
import importlib
import json
import math
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import figures  # noqa: E402
import report  # noqa: E402


@pytest.fixture
def plant(tmp_path):
    def plant(name, seed, curves, **args):
        folder = tmp_path / f"{name}_{seed}"
        folder.mkdir()
        rows = [
            f"{step},{tag},{value!r}\n" for tag, points in curves.items() for step, value in points
        ]
        (folder / "metrics.csv").write_text("step,tag,value\n" + "".join(rows))
        header = {
            "script": "cql_continuous",
            "args": {"env_id": "E", "exp_name": name, "seed": seed} | args,
        }
        (folder / "args.json").write_text(json.dumps(header))
        (folder / "summary.json").write_text(
            json.dumps({"final_return_mean": 10.0 * seed, "verdict": "fine"})
        )
        return folder

    return plant


def curves(td=0.01, gap=0.0, late=7.0):
    diagnostics = {"td_error": td, "cql_gap": gap, "overestimation": late, "q_minus_return": 0.0}
    out = {f"diagnostics/{k}": [(100, 1.0), (200, v)] for k, v in diagnostics.items()}
    return out | {"eval/episodic_return": [(100, 3.0), (200, 4.0)]}


def test_the_interval_is_students():
    values = [1.0, 2.0, 6.0]
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)
    mean, low, high = (float(x.strip("[],")) for x in report.interval(values).split())
    assert mean == 3.0 and abs(low - (3 - half)) < 0.01 and abs(high - (3 + half)) < 0.01
    assert report.interval([5.0]) == "5" and report.interval([]) == ""


def test_curves_are_cut_at_a_step(plant):
    folder = plant("a", 1, curves(late=7.0))
    row, _ = report.read_run(folder)
    assert (row["final_return_mean"], row["overestimation"], row["verdict"]) == (10.0, 7.0, "fine")
    row, cut = report.read_run(folder, at=100)
    assert (row["final_return_mean"], row["overestimation"], row["verdict"]) == (3.0, 1.0, None)
    assert all(step <= 100 for points in cut.values() for step, _ in points)


def test_a_table_groups_seeds(plant):
    rows = [report.read_run(plant("a", s, curves(late=float(s))))[0] for s in (1, 2, 3)]
    rows.append(report.read_run(plant("b", 1, curves()))[0])
    lines = report.table(rows).splitlines()
    assert len(lines) == 4 and "| a | 3 | 20 +- 10 |" in lines[2] and "| b | 1 | 10 |" in lines[3]
    assert "2 [-0.48" in lines[2]


@pytest.mark.parametrize(
    "points, expected",
    [
        (
            {0.5: (0.01, -0.1), 5: (0.02, -3.0), 50: (0.5, -9.0)},
            "--cql-alpha 5",
        ),  # both in the middle
        ({0.5: (0.01, -0.1), 5: (0.02, -3.0)}, "--cql-alpha 5"),
        ({0.5: (0.01, -0.1), 5: (0.02, -3.0)}, "try still larger"),
        ({1: (0.01, -1.0), 2: (0.011, -2.0), 5: (0.012, -3.0), 20: (0.03, -9.0)}, "--cql-alpha 5:"),
        (
            {1: (0.07, -1.0), 2: (0.09, -2.0), 5: (0.11, -3.0)},
            "--cql-alpha 2:",
        ),  # a tenth is the limit
        ({0.5: (0.9, -0.1), 5: (0.8, -0.2)}, "larger model"),
    ],
)
def test_the_rule_for_a_sweep_of_alpha(plant, points, expected):
    rows = [
        report.read_run(plant(f"alpha{alpha}", 1, curves(td, gap), cql_alpha=alpha))[0]
        for alpha, (td, gap) in points.items()
    ]
    assert expected in report.sweep(rows)


def test_a_seed_that_was_run_twice_is_refused(plant, monkeypatch, capsys):
    folders = [
        plant("a", 1, curves()),
        plant("b", 1, curves(), exp_name="a"),
        plant("c", 2, curves()),
    ]
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, folders)])
    with pytest.raises(SystemExit) as e:
        report.main()
    assert e.value.code == 2 and "E a with one seed ([1, 1])" in capsys.readouterr().err


def test_a_sweep_may_hold_one_name_and_seed_with_several_alphas_but_not_twice_with_one(
    plant, monkeypatch, capsys
):
    alphas = {"a": 1.0, "b": 2.0, "c": 2.0}
    folders = [plant(n, 1, curves(), exp_name="x", cql_alpha=alpha) for n, alpha in alphas.items()]
    monkeypatch.setattr(sys, "argv", ["report.py", "--sweep", *map(str, folders[:2])])
    report.main()
    assert "take --cql-alpha" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report.py", "--sweep", *map(str, folders)])
    with pytest.raises(SystemExit) as e:
        report.main()
    assert e.value.code == 2 and "E x with one seed ([1, 1])" in capsys.readouterr().err


def test_the_command(plant, monkeypatch, capsys, tmp_path):
    folder = plant("a", 1, curves())
    out = [str(tmp_path / "rows.csv"), str(tmp_path / "figure.png")]
    monkeypatch.setattr(
        sys, "argv", ["report.py", str(folder), "--csv", out[0], "--figure", out[1]]
    )
    report.main()
    assert "| E | a | 1 |" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").read_text().count("\n") == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as e:
        report.main()
    assert e.value.code == 2


def test_the_interquartile_mean():
    assert figures.iqm([5.0]) == 5.0
    assert figures.iqm([1.0, 2.0, 6.0]) == pytest.approx((0.25 * 1 + 1.0 * 2 + 0.25 * 6) / 1.5)
    assert figures.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5  # the outer two are cut
    assert figures.iqm(range(8)) == 3.5


def test_the_bootstrap_resamples_within_each_environment():
    assert figures.bootstrap([[3.0, 3.0, 3.0]]) == (3.0, 3.0)
    low, high = figures.bootstrap([[0.0, 1.0, 2.0, 3.0]])
    assert 0.0 <= low < 1.0 and 2.0 < high <= 3.0
    # each environment is constant, so resampling within it changes nothing; across them it would
    assert figures.bootstrap([[0.0] * 4, [10.0] * 4]) == (5.0, 5.0)


def test_curves_reach_the_figures_as_they_were(plant, monkeypatch, tmp_path):
    runs = [report.read_run(plant("a", seed, curves())) for seed in (1, 2)]
    (tmp_path / "raw").mkdir()
    report.write_curves(runs, tmp_path / "raw" / "x.csv")
    (tmp_path / "raw" / "sb3.csv").write_text(
        "peer,algo,env_id,seed,step,return_mean,return_std,seconds\nsb3,sac,E,1,100,7.5,0.1,3.0\n"
    )
    monkeypatch.setattr(figures, "HERE", tmp_path)
    rows = figures.read("x.csv") + figures.read("sb3.csv")
    assert figures.curves(rows, "E", "a", figures.RETURN) == {
        100: {"1": 3.0, "2": 3.0},
        200: {"1": 4.0, "2": 4.0},
    }
    assert figures.curves(rows, "E", "SB3 sac", figures.RETURN) == {100: {"1": 7.5}}
    assert figures.curves(rows, "E", "SB3 sac", "charts/SPS") == {100: {"1": 100 / 3}}
    assert figures.table(rows, "E", {"a": "A"}) == "| E | A | 4.0 [4.0, 4.0] | 4, 4 |"
    small = [
        r | {"value": 0.0042} for r in rows if r["tag"] == figures.RETURN and r["exp_name"] == "a"
    ]
    assert (
        figures.table(small, "E", {"a": "A"})
        == "| E | A | 0.0042 [0.0042, 0.0042] | 0.0042, 0.0042 |"
    )


def test_networks_of_one_run_are_told_apart(plant, tmp_path):
    tags = {"diagnostics/td/dr3:1e-4/2/srank": [(100, 7.0)], "charts/SPS": [(100, 3.0)]}
    folder = plant("a", 1, tags)
    header = json.loads((folder / "args.json").read_text()) | {"script": "dr3_analysis"}
    (folder / "args.json").write_text(json.dumps(header))
    report.write_curves([report.read_run(folder)], tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().split()[1:] == [
        "E,td",
        "dr3:1e-4,2,100,diagnostics/srank,7",
    ]


def test_several_games_have_one_name(plant):
    folder = plant("a", 1, curves(), env_id=["ALE/Pong-v5", "ALE/Breakout-v5"])
    row, _ = report.read_run(folder)
    assert row["env_id"] == "ALE/Pong-v5 ALE/Breakout-v5" and "Breakout" in report.table([row])


def test_a_line_is_the_mean_of_one_group(plant, tmp_path):
    """Two environments of one exp_name are two lines; seeds whose steps differ are read off between them."""
    tag = list(report.PANELS)[1]
    flat = lambda value, steps: {
        tag: [(s, value) for s in steps],
        "eval/episodic_return": [(1, 0.0)],
    }
    folders = [
        plant("a", 1, flat(10.0, (100, 200, 300))),
        plant("a", 2, flat(500.0, (101, 203, 306))),
    ]
    folders.append(plant("a", 3, flat(-1000.0, (100, 200, 300)), env_id="F"))
    report.draw([report.read_run(f) for f in folders], tmp_path / "x.png")
    lines = report.plt.gcf().axes[1].get_lines()
    assert [line.get_label() for line in lines] == ["E a", "F a"]
    assert lines[0].get_xdata().tolist() == [200, 300] and set(lines[0].get_ydata()) == {255.0}
    assert set(lines[1].get_ydata()) == {-1000.0}
    report.plt.close()


def test_the_table_of_datasets(plant, monkeypatch, tmp_path, capsys):
    kinds = [*("random", "medium_replay", "medium", "expert")]
    names = [f"{k}_{m}" for k in kinds for m in ("cql_h", "naive", "bc")]
    names += [f"replay_{n}_{m}" for n in (5000, 200) for m in ("cql_h", "naive")]
    rows = []
    for i, name in enumerate(names):
        for seed in (1, 2):
            tags = {"diagnostics/q_max": [(1, 4.0)], "diagnostics/q_bound": [(1, 2.0)]}
            tags |= {"diagnostics/td_error_holdout": [(1, 0.5)]}
            folder = plant(f"data_{name}", seed, tags)
            result = {"final_return_mean": i + seed / 10, "dataset_return_mean": 7.0}
            (folder / "summary.json").write_text(json.dumps(result))
            rows.append(report.read_run(folder)[0])
    (tmp_path / "raw").mkdir(), (tmp_path / "figures").mkdir()
    report.write_rows(rows, tmp_path / "raw" / "datasets.csv")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    figures.datasets()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| medium_replay | 7 | 3 (3, 3) | 4 (4, 4) | 5 (5, 5) |"
    assert lines[-1] == "| 5,000 | naive SAC | 13.15 | 4 | 0.5 |" and any(
        (tmp_path / "figures").iterdir()
    )


def test_lambda_takes_all_seeds_though_their_steps_differ(monkeypatch, capsys, tmp_path):
    row = lambda seed, step, value: {"env_id": "E", "exp_name": "lambda_1", "seed": str(seed), "step": step,
                                     "tag": figures.RETURN, "value": value}  # fmt: skip
    rows = [row(1, 100_013, 500), row(2, 100_104, 100), row(3, 99_990, 300)]
    monkeypatch.setattr(figures, "read", lambda name: rows)
    monkeypatch.setattr(figures, "save", lambda figure, name: None)
    figures.gae_lambda()
    assert "300.0 [100.0, 500.0] | 500, 100, 300" in capsys.readouterr().out


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def taken(tree) -> set:
    """(script, name) of each name that a benchmark's code reads off a script, where it imports it."""
    found = set()
    for scope in [tree, *(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef))]:
        imports = [x for x in scope.body if isinstance(x, ast.Import | ast.ImportFrom)]
        aliases = {
            a.asname or a.name: a.name
            for x in imports
            if isinstance(x, ast.Import)
            for a in x.names
        }
        for x in ast.walk(scope):
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name):
                found.add((aliases.get(x.value.id), x.attr))
        found |= {
            (x.module, a.name) for x in imports if isinstance(x, ast.ImportFrom) for a in x.names
        }
    return {(script, name) for script, name in found if script in SCRIPTS}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_what_benchmarks_take_from_the_scripts_is_there(path, monkeypatch):
    """The comparisons with peers need environments that the tests have not."""
    monkeypatch.syspath_prepend(ROOT)
    names = taken(ast.parse(path.read_text()))
    if path.name in ("same_update.py", "speed.py"):
        assert len(names) > 8
    gone = [f"{s}.{n}" for s, n in sorted(names) if not hasattr(importlib.import_module(s), n)]
    assert not gone, f"{path.name}: {', '.join(gone)}"
