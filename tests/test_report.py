"""tools/report.py on planted runs; benchmarks/figures.py's statistics; that what benchmarks/ takes
from the scripts is there; benchmarks/runs/gpu.py."""

import ast
import csv
import html.parser
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import dr3_analysis
import numpy as np
import pytest
from conftest import ROOT, run_script

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import figures  # noqa: E402
import report  # noqa: E402


@pytest.fixture
def plant(tmp_path):
    """A run's folder from its curves, tag -> [(step, value)]."""

    def plant(name, seed, curves, script="cql_continuous", summary=None, **args):
        folder = tmp_path / f"{name}_{seed}"
        folder.mkdir()
        rows = [f"{step},{tag},{x!r}\n" for tag, points in curves.items() for step, x in points]
        (folder / "metrics.csv").write_text("step,tag,value\n" + "".join(rows))
        args = {"env_id": "E", "exp_name": name, "seed": seed} | args
        header = {"script": script, "args": args, "command": f"{script}.py --seed {seed}"}
        header |= {"device": "cpu", "versions": {"torch": "2.13.0"}}
        (folder / "args.json").write_text(json.dumps(header))
        found = {"final_return_mean": 10.0 * seed, "verdict": "fine"} | (summary or {})
        (folder / "summary.json").write_text(json.dumps(found))
        return folder

    return plant


@pytest.fixture
def run(monkeypatch, capsys):
    """What the command prints, or its error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        try:
            report.main()
        except SystemExit as stop:
            done = capsys.readouterr()
            assert stop.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
            return done.out + done.err
        return capsys.readouterr().out

    return run


def curves(td=0.01, gap=0.0, late=7.0):
    found = {"td_error": td, "cql_gap": gap, "overestimation": late, "q_minus_return": 0.0}
    found = {f"diagnostics/{k}": [(100, 1.0), (200, x)] for k, x in found.items()}
    return found | {"eval/episodic_return": [(100, 3.0), (200, 4.0)]}


def test_intervals_are_the_scripts():
    assert report.interval([5.0]) == "5" and report.interval([]) == ""
    for n in (1, 2, 5, 10, 11, 40):
        values = np.random.default_rng(n).normal(size=n)
        assert abs(report.half_width(values) - dr3_analysis.interval(values)) < 1e-12
    assert report.interval([1.0, 3.0, 5.0]) == "3 [-1.969, 7.969]"  # 3 +- 4.303 * 2 / sqrt(3)


def test_curves_are_cut_at_a_step(plant):
    folder = plant("a", 1, curves())
    for at, expected in ((None, (10.0, 7.0, "fine")), (100, (3.0, 1.0, None))):
        row, found = report.read_run(folder, at)
        assert (row["final_return_mean"], row["overestimation"], row["verdict"]) == expected
        assert all(step <= (at or 200) for points in found.values() for step, _ in points)


def test_a_table_groups_seeds(plant, run):
    folders = [plant("a", s, curves(late=float(s))) for s in (1, 2, 3)] + [plant("b", 1, curves())]
    lines = run(*folders).splitlines()
    assert len(lines) == 4 and "| a | 3 | 20 +- 10 |" in lines[2] and "| b | 1 | 10 |" in lines[3]
    assert "2 [-0.48" in lines[2]
    games = plant("c", 1, curves(), env_id=["ALE/Pong-v5", "ALE/Breakout-v5"])
    assert "| ALE/Pong-v5 ALE/Breakout-v5 | c |" in run(games)


def test_what_is_no_group_of_seeds_is_said(plant, run):
    """Other settings under one name, runs without an end, folders that are none."""
    folders = [plant("cql", s, curves(), width=16, gamma=0.8, run_dir=str(s)) for s in (1, 2)]
    assert "differ" not in run(*folders) and "left out" not in run(*folders)
    folders.append(plant("cql", 3, curves(), width=32, gamma=0.9))
    (folders[2] / "summary.json").unlink()
    said = run(*folders, "typo")
    assert "the runs of E cql differ in --width, --gamma" in said
    assert "| 3 | 15 +- 7.07 (of 2) |" in said
    assert "left out, for there is no metrics.csv or args.json: typo" in said


@pytest.mark.parametrize(
    "points, expected",
    [
        ({0.5: (0.01, -0.1), 5: (0.02, -3.0), 50: (0.5, -9.0)}, "--cql-alpha 5:"),
        ({0.5: (0.01, -0.1), 5: (0.02, -3.0)}, "try still larger"),
        ({1: (0.01, -1), 2: (0.011, -2), 5: (0.012, -3), 20: (0.03, -9)}, "--cql-alpha 5:"),
        ({1: (0.07, -1.0), 2: (0.09, -2.0), 5: (0.11, -3.0)}, "--cql-alpha 2:"),  # a tenth at most
        ({0.5: (0.9, -0.1), 5: (0.8, -0.2)}, "larger model"),
    ],
)
def test_the_rule_for_a_sweep_of_alpha(plant, run, points, expected):
    folders = []
    for i, (alpha, (td, gap)) in enumerate(points.items()):
        folders.append(plant(f"x{i}", 1, curves(td, gap), cql_alpha=alpha, exp_name="x"))
    assert expected in run("--sweep", *folders)
    said = run(*folders)  # not a sweep: the same run twice
    assert "they differ in --cql-alpha: report one" in said and str(folders[0]) in said


def test_files_and_mistakes(plant, run, tmp_path):
    folder, out = plant("a", 1, curves()), [tmp_path / "rows.csv", tmp_path / "figure.png"]
    assert "| E | a | 1 |" in run(folder, "--csv", out[0], "--figure", out[1])
    assert out[0].read_text().count("\n") == 2 and out[1].stat().st_size > 10_000
    assert "none of these folders" in run(tmp_path / "nothing")


@pytest.mark.parametrize("flag", ["--csv", "--figure", "--curves", "--html"])
def test_an_output_makes_its_folder_or_is_refused_in_one_line(plant, run, tmp_path, flag):
    folder = plant("a", 1, curves())
    target = tmp_path / "new" / "folder" / "a.png"
    assert "error:" not in run(folder, flag, target) and target.stat().st_size > 20
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file" / "a.png", "a.odd" if flag == "--figure" else tmp_path / "new"):
        said = run(folder, flag, bad)
        assert said.count("error: not written: ") == 1 and "Traceback" not in said


def test_a_sweep_of_short_or_blind_runs_says_so(plant, run):
    """What was too short says nothing of the model; without diagnostics there is nothing to say."""
    short = {"verdict": "too short to judge"}
    folders = [plant(f"s{a}", 1, curves(td=3.0), summary=short, cql_alpha=a) for a in (1.0, 5.0)]
    said = run("--sweep", *folders)
    assert "try more --num-updates" in said and "larger model" not in said
    few = {"eval/episodic_return": [(100, 3.0)]}
    blind = plant("b", 1, few, cql_alpha=2.0)
    assert f"{blind} has none" in run("--sweep", *folders, blind)
    assert f"{blind} has none" in run("--sweep", blind, *folders)


class Page(html.parser.HTMLParser):
    """Text by the tag that it stands in, and what the page would load."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.loads, self.tags = [], defaultdict(list), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loads += [x for name, x in attrs if name in ("src", "href")]
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text[self.open[-1] if self.open else ""].append(text)


def test_a_page_shows_all_and_loads_nothing(plant, run, tmp_path):
    verdict = {"verdict": "overfitting", "verdict_text": "Q < 3 & falls"}
    folders = [plant("a", 1, curves(), summary=verdict), plant("b", 2, curves())]
    header = json.loads((folders[1] / "args.json").read_text())
    header["command"] = ["sac.py --width 8", "sac.py --resume runs/b"]
    (folders[1] / "args.json").write_text(json.dumps(header))
    run(*folders, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert not page.open and page.text["h1"] == ["2 experiments"]
    assert page.text["b"] == ["overfitting", "fine"] and " Q < 3 & falls" in page.text["p"]
    assert {"environment", "verdicts"} < set(page.text["th"])
    assert {"E", "a", "b", "10", "20"} < set(page.text["td"])
    assert (
        len(page.text["pre"]) == 2
        and "python cql_continuous.py --seed 1\ncpu, torch 2.13.0" in page.text["pre"][0]
        and "python sac.py --width 8\npython sac.py --resume runs/b\n" in page.text["pre"][1]
    )
    (picture,) = page.loads
    assert picture.startswith("data:image/png;base64,") and len(picture) > 10_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="a browser is no package")
def test_a_browser_shows_the_page(plant, run, tmp_path):
    """What stands in it after rendering, and that the picture is one, without a network."""
    verdict = {"verdict": "overfitting", "verdict_text": "Q < 3 & falls"}
    run(plant("a", 1, curves(), summary=verdict), plant("b", 2, curves()), "--html", "page.html")
    probe = "<script>for (const x of document.images) x.alt += x.naturalWidth</script></body>"
    text = Path("page.html").read_text().replace("</body>", probe)
    Path("probed.html").write_text(text)
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    line += ["--host-resolver-rules=MAP * ~NOTFOUND", f"file://{tmp_path}/probed.html"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert page.text["b"] == ["overfitting", "fine"] and " Q < 3 & falls" in page.text["p"]
    assert {"E", "a", "b", "10", "20"} < set(page.text["td"])
    (width,) = re.findall(r'alt="curves(\d+)"', done.stdout)
    assert int(width) > 600


def test_a_sweep_of_what_has_no_alpha_is_refused(plant, run):
    said = run("--sweep", plant("a", 1, curves()), plant("b", 1, curves(), cql_alpha=1.0))
    assert "some of these runs have none" in said


def test_a_sweep_over_environments_is_refused(plant, run):
    folders = [
        plant(f"{env}{a}", 1, curves(), env_id=env, cql_alpha=a) for env in "EF" for a in (1, 5)
    ]
    assert "several environments" in run(*folders, "--sweep")


def test_runs_that_have_only_begun(plant, run, tmp_path):
    """No number yet, a line that is half written, no args.json."""
    blank, begun, bare = (plant(name, 1, {"losses/x": [(100, 1.0)]}) for name in "abc")
    with open(begun / "metrics.csv", "a") as f:
        f.write("200,losses/x,1.2345\n300,los")
    (bare / "args.json").unlink()
    said = run(blank, begun, bare, "--figure", tmp_path / "x.png", "--html", tmp_path / "x.html")
    assert f"left out, for there is no metrics.csv or args.json: {bare}" in said
    assert report.read_run(begun)[1]["losses/x"] == [(100, 1.0), (200, 1.2345)]
    assert (tmp_path / "x.png").exists() and (tmp_path / "x.html").exists()


def test_panels_are_those_with_numbers(plant):
    few = {"eval/episodic_return": [(100, 3.0), (200, 4.0)]}
    figure = report.draw([report.read_run(plant("few", 1, few))])
    assert [bool(a.lines) for a in figure.axes] == [True, False, False]
    assert [a.axison for a in figure.axes] == [True, False, False]


def test_a_line_is_the_mean_of_one_group(plant):
    """Two environments of one exp_name are two lines; steps that differ are read off between."""
    tag = list(report.PANELS)[1]
    flat = lambda value, steps: {tag: [(s, value) for s in steps], "eval/episodic_return": []}
    folders = [plant("a", 1, flat(10.0, (100, 200, 300)))]
    folders += [plant("a", 2, flat(500.0, (101, 203, 306)))]
    folders += [plant("a", 3, flat(-1000.0, (100, 200, 300)), env_id="F")]
    for order in (folders, folders[::-1]):
        every = report.draw([report.read_run(f) for f in order]).axes[0].get_lines()
        lines = {line.get_label(): line for line in every if line.get_label()[0] != "_"}
        assert set(lines) == {"E a", "F a"} and len(every) == 5
        assert lines["E a"].get_xdata().tolist() == [101, 200, 203, 300]  # as far as both go
        assert set(lines["E a"].get_ydata()) == {255.0}
        assert set(lines["F a"].get_ydata()) == {-1000.0}
        assert sorted(line.get_xdata()[-1] for line in every) == [300, 300, 300, 300, 306]


# ------------------------------------------------------------------------- runs of dr3_analysis.py
BASE = {"srank": 240, "feature_dot": 100, "q_mean": -10, "q_error": 1.0}
RISING = (150, 250, 300)
NAMES = {  # one letter for each claim
    "R": "with bootstrapping on unseen actions the rank falls",
    "D": "with bootstrapping on unseen actions the dot products rise",
    "S": "the dot products rise while Q has settled",
    "E": "the lower rank comes with a larger error",
    "M": "with mc targets the rank does not fall",
    "O": "with oracle targets the rank does not fall",
    "V": "a moving target alone does not lower the rank",
    "L": "dr3:1 on td lowers the dot products and leaves Q alone",
    "U": "dr3:1 on td rescues the rank",
    "H": "dr3:1 on td lowers the error",
}


def planted(error="q_error", unjudged=(), **targets):
    """Steps and results of flat curves at BASE; metric=(quarter, half, final), one number or None
    changes one; dr3 stands for the cure dr3:1 on td."""
    results = {}
    for name, changes in targets.items():
        found = {k: v for k, v in (BASE | changes).items() if v is not None}
        arrays = {k: np.array(np.broadcast_to(v, 3), float)[:, None] for k, v in found.items()}
        arrays[error] = arrays.pop("q_error", None)
        if arrays[error] is None or name in unjudged:
            del arrays[error]
        target, cure = ("td", "dr3:1") if name == "dr3" else (name, "none")
        results.setdefault(target, {})[cure] = arrays
    return [1, 2, 4], results


def outcome(lines: list[str]) -> str:
    """`R1 D0`: the claims that hold, and those that do not, in one seed."""
    words = {"supported (1 of 1 seeds)": "1", "not supported (0 of 1 seeds)": "0"}
    found = dict(re.match(r"- (.*): ((?:not )?supported \(.*?\))", x).groups() for x in lines)
    letters = {name: letter for letter, name in NAMES.items()}
    return " ".join(letters[name] + words[word] for name, word in found.items())


td = lambda **changes: planted(sarsa={}, td=changes)  # beside sarsa
cured = lambda changes, **was: planted(td=was, dr3=changes)
both = lambda changes, **was: planted(sarsa={}, td=was, dr3=changes)
PLANTED = [
    # flat curves, however high, are not rising; twice sarsa's, and up by 10 % in the second half
    (td(), "R0 D0 S0 E0"),
    (td(feature_dot=500), "R0 D0 S0 E0"),
    (td(feature_dot=(100, 400, 300)), "R0 D0 S0 E0"),
    (td(feature_dot=RISING), "R0 D1 S1 E0"),
    (td(feature_dot=(150, 160, 198)), "R0 D0 S1 E0"),
    (td(feature_dot=(150, 160, 202)), "R0 D1 S1 E0"),
    (td(feature_dot=(150, 200, 219)), "R0 D0 S0 E0"),
    (td(feature_dot=(150, 200, 221)), "R0 D1 S1 E0"),
    (planted(sarsa={"feature_dot": 160}, td={"feature_dot": RISING}), "R0 D0 S1 E0"),
    # Q has settled within 10 %, in either direction
    (td(feature_dot=RISING, q_mean=(9, 10, 12)), "R0 D1 S0 E0"),
    (td(feature_dot=RISING, q_mean=(0, -10, -10.9)), "R0 D1 S1 E0"),
    (td(feature_dot=RISING, q_mean=(0, -10, -11.1)), "R0 D1 S0 E0"),
    # ranks: 15 %; errors: 10 %, and a fallen rank
    (td(srank=(240, 220, 205)), "R0 D0 S0 E0"),
    (td(srank=(240, 220, 203)), "R1 D0 S0 E0"),
    (td(srank=190, q_error=1.09), "R1 D0 S0 E0"),
    (td(srank=190, q_error=1.11), "R1 D0 S0 E1"),
    (td(srank=230, q_error=1.5), "R0 D0 S0 E0"),
    (planted(sarsa={"q_error": None}, td={"q_error": None}), "R0 D0 S0"),
    # without td, without anything to compare it with; mc stands in for sarsa
    (planted(sarsa={}), ""),
    (planted(td={"feature_dot": RISING}), ""),
    (planted(mc={}, td={"srank": 150}), "R1 D0 S0 E0 M1"),
    (planted(mc={"srank": 100}, sarsa={}, td={"srank": 150}), "R1 D0 S0 E0 M1"),
    # supervised ranks, from a quarter of the way in
    (planted(mc={"srank": (240, 300, 230)}), "M1"),
    (planted(mc={"srank": (240, 240, 225)}), "M0"),
    (planted(oracle={"srank": (200, 240, 240)}, mc={"srank": (200, 150, 150)}), "O1 M0"),
    # a moving target: beside sarsa, whatever td does, within 15 %
    (planted(sarsa={}, td={"srank": 150}, moving={}), "R1 D0 S0 E0 V1"),
    (planted(sarsa={}, td={}, moving={"srank": 203}), "R0 D0 S0 E0 V0"),
    (planted(sarsa={}, td={}, moving={"srank": 205}), "R0 D0 S0 E0 V1"),
    (planted(td={"srank": 150}, moving={}), ""),
    # DR3: dots down to sarsa's, or by a tenth; Q within a tenth; the error down by a tenth
    (cured({"feature_dot": 89}), "L1 H0"),
    (cured({"feature_dot": 91}), "L0 H0"),
    (cured({"feature_dot": 40, "q_mean": -8.9}), "L0 H0"),
    (cured({"feature_dot": 40, "q_mean": -9.1}), "L1 H0"),
    (cured({"feature_dot": 40, "q_mean": 10}), "L0 H0"),
    (cured({"feature_dot": 40}, q_mean=0.0), "L0 H0"),
    (cured({"q_error": 0.91}), "L0 H0"),
    (cured({"q_error": 0.89}), "L0 H1"),
    (both({}), "R0 D0 S0 E0 L0 U0 H0"),
    (both({"feature_dot": 120}, feature_dot=300), "R0 D0 S0 E0 L0 U0 H0"),
    (both({"feature_dot": 99}, feature_dot=300), "R0 D0 S0 E0 L1 U0 H0"),
    # the rank: up by 5 %, and to 85 % of sarsa's
    (both({"srank": 209}, srank=200), "R1 D0 S0 E0 L0 U0 H0"),
    (both({"srank": 211}, srank=200), "R1 D0 S0 E0 L0 U1 H0"),
    (both({"srank": 203}, srank=150), "R1 D0 S0 E0 L0 U0 H0"),
    (both({"srank": 205}, srank=150), "R1 D0 S0 E0 L0 U1 H0"),
]


@pytest.mark.parametrize("results, expected", PLANTED)
def test_claims_on_planted_curves(results, expected):
    assert outcome(report.claims(*results)) == expected


def test_errors_are_compared_on_held_out_episodes_where_both_are_known():
    held = dict(error="return_error_holdout")
    worse = dict(sarsa={}, td={"srank": 150, "q_error": 2.0}, dr3={"q_error": 1.5})
    lines = report.claims(*planted(**held, unjudged=["mc"], mc={}, **worse))
    assert outcome(lines) == "R1 D0 S0 E1 M1 L0 U1 H1"
    assert "return_error_holdout is 2.00 times that of sarsa" in lines[3]
    for names in (("td", "mc"), ("mc", "td"), ("sarsa", "td")):
        unknown = planted(**held, unjudged=names[:1], **{name: {} for name in names})
        assert "E" not in outcome(report.claims(*unknown))


def test_claims_are_decided_seed_by_seed_and_name_their_numbers():
    """Paired: srank 100, 150, 300 against 200; the means alone would say that nothing fell."""
    steps, results = planted(sarsa={}, td=dict(feature_dot=RISING, q_mean=-11, q_error=2.0))
    for metrics in (results["sarsa"]["none"], results["td"]["none"]):
        metrics.update({k: np.repeat(v, 3, 1) for k, v in metrics.items()})
    results["sarsa"]["none"]["srank"][-1] = 200
    results["td"]["none"]["srank"][-1] = [100, 150, 300]
    lines = report.claims(steps, results)
    assert lines[0].endswith("undecided (2 of 3 seeds). srank ends at 183 for td and 200 for sarsa")
    assert "+20%" in lines[1] and "3.0 times that of sarsa" in lines[1] and "+0%" in lines[1]
    steps, results = both({"feature_dot": 40, "q_mean": -8, "srank": 99}, feature_dot=300)
    lines = report.claims(steps, results)
    assert lines[4].endswith("dot product 300 -> 40, mean Q changes by +20%")
    assert lines[5].endswith("srank 240 -> 99, 240 for sarsa")


def test_the_networks_of_one_run(plant, run, tmp_path):
    """Table, claims, curves and figure of two targets and a cure, two seeds, three measurements."""
    tags, kinds = {"charts/SPS": [(100, 3.0)]}, [("sarsa", "none"), ("td", "none"), ("td", "unit")]
    panels = [k for k in report.FEATURE_PANELS if k != "q_error"]
    for k, (target, cure) in enumerate(kinds):
        for seed, metric in [(s, m) for s in (1, 2) for m in [*panels, "truth"]]:
            points = [(step, step * 10.0 + 2 * k + seed) for step in (1, 2, 3)]
            tags[f"diagnostics/{target}/{cure}/{seed}/{metric}"] = points
    folder, csv, png = plant("a", 1, tags, "dr3_analysis"), tmp_path / "x.csv", tmp_path / "x.png"
    out = run(folder, "--curves", csv, "--figure", png).splitlines()
    assert out[0].split()[:4] == ["target", "cure", "feature_dot", "feature_cos"]
    assert out[2].split()[:6] == "td none 33.5 +- 6.4 33.5".split()
    assert out[4].startswith("- with bootstrapping") and "0 of 2 seeds" in out[4]
    assert "E,td unit,2,3,diagnostics/srank,36" in csv.read_text().split("\n")
    assert png.stat().st_size > 20_000
    other = plant("b", 1, curves())
    assert "by itself" in run(folder, other, "--figure", png)
    for folders, pictures in ([folder], 1), ([folder, other], 2):
        run(*folders, "--html", tmp_path / "page.html")
        page = Page((tmp_path / "page.html").read_text())
        assert not page.open and len(page.loads) == pictures and len(page.text["pre"]) > pictures
        assert ("td" in page.tags) == (len(folders) == 2)
        said = "".join(page.text["p"]), "".join(page.text["pre"])
        assert out[4] in said[0] and "td none" in said[1]
    half = {tag: points[: 3 if "sarsa" in tag else 2] for tag, points in tags.items()}
    steps, results = report.measured(half)  # it ended between the networks of one measurement
    assert steps == [1, 2] and results["sarsa"]["none"]["srank"].shape == (2, 2)
    steps, results = report.measured(report.read_run(folder)[1])
    axes = report.draw_networks(steps, results).axes
    assert [a.get_title() for a in axes if a.axison] == [report.FEATURE_PANELS[k] for k in panels]
    for axis, metric in zip(axes, panels):
        lines = [x for x in axis.get_lines() if len(x.get_xdata()) == 3]
        assert [x.get_label() for x in lines] == ["sarsa", "td", "td unit"]
        assert lines[2].get_ydata().tolist() == [15.5, 25.5, 35.5]
        assert len({(x.get_color(), x.get_linestyle()) for x in lines}) == 3
        assert (len(axis.get_lines()) > 3) == (metric == "q_mean")
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert abs(band.min() - (11.5 - 12.71 / 2)) < 1e-6


# ------------------------------------------------------------------------------------- benchmarks/
def test_the_interquartile_mean_and_its_bootstrap():
    assert figures.iqm([5.0]) == 5.0 and figures.iqm(range(8)) == 3.5
    assert figures.iqm([1.0, 2.0, 6.0]) == pytest.approx((0.25 * 1 + 1.0 * 2 + 0.25 * 6) / 1.5)
    assert figures.bootstrap([[3.0, 3.0, 3.0]]) == (3.0, 3.0)
    low, high = figures.bootstrap([[0.0, 1.0, 2.0, 3.0]])
    assert 0.0 <= low < 1.0 and 2.0 < high <= 3.0
    # each environment is constant, so resampling within it changes nothing; across them it would
    assert figures.bootstrap([[0.0] * 4, [10.0] * 4]) == (5.0, 5.0)


def test_the_statistics_of_several_sets_are_rliables():
    """What rliable 1.2.0 gives for the same numbers: aggregate_iqm, probability_of_improvement, a
    performance profile, and percentile intervals of its StratifiedBootstrap (50,000 and
    20,000 repeats)."""
    x = [[1.0, 2.0, 6.0, 4.0], [10.0, 30.0, 20.0, 25.0]]
    y = [[2.0, 3.0, 0.0, 1.0], [25.0, 5.0, 40.0, 12.0]]
    assert figures.pooled(x) == pytest.approx(10.0)
    assert figures.improvement(x, y) == pytest.approx(0.640625)
    assert figures.improvement(y, x) == pytest.approx(1 - 0.640625)
    assert figures.profile(x, [0.0, 2.0, 15.0]) == pytest.approx([1.0, 0.75, 0.375])
    assert figures.bootstrap(x) == pytest.approx((6.5, 15.5), abs=0.01)
    both = figures.bootstrap(x, y, statistic=figures.improvement)
    assert both == pytest.approx((0.359375, 0.90625), abs=0.04)


def test_curves_reach_the_figures_as_they_were(plant, monkeypatch, tmp_path):
    (tmp_path / "raw").mkdir()
    runs = [report.read_run(plant("a", seed, curves())) for seed in (1, 2)]
    report.write_curves(runs, tmp_path / "raw" / "x.csv")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    rows, seeds = figures.read("x.csv"), ["1", "2"]
    expected = {100: dict.fromkeys(seeds, 3.0), 200: dict.fromkeys(seeds, 4.0)}
    assert figures.curves(rows, "E", "a", figures.RETURN) == expected
    assert figures.table(rows, "E", {"a": "A"}) == "| E | A | 4.0 [4.0, 4.0] | 4, 4 |"


def test_the_best_tenth_of_the_episodes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "runs"))
    best_tenth = importlib.import_module("best_tenth")
    ends = np.array([0, 1, 0, 0, 1, 0, 0, 0])  # lengths 2, 3 and 3, the last one open
    columns = {"terminals": ends * 0, "timeouts": ends, "rewards": np.r_[3, 3, 1, 1, 1, 4, 4, 4]}
    assert best_tenth.best(columns, 0.1).tolist() == [5, 6, 7]
    assert best_tenth.best(columns, 0.7).tolist() == [0, 1, 5, 6, 7]


SCRIPTS = sorted(x.stem for x in ROOT.glob("*.py") if "\nclass Args" in x.read_text())


def taken(tree) -> set:
    """(script, name) of each name that a benchmark's code reads off a script that it imports."""
    found = set()
    for scope in [tree, *(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef))]:
        imports = [x for x in scope.body if isinstance(x, ast.Import | ast.ImportFrom)]
        modules = [a for x in imports if isinstance(x, ast.Import) for a in x.names]
        aliases = {a.asname or a.name: a.name for a in modules}
        for x in ast.walk(scope):
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name):
                found.add((aliases.get(x.value.id), x.attr))
        for x in imports:
            if isinstance(x, ast.ImportFrom):
                found |= {(x.module, a.name) for a in x.names}
    return {(script, name) for script, name in found if script in SCRIPTS}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda p: p.name)
def test_what_benchmarks_take_from_the_scripts_is_there(path, monkeypatch):
    """The comparisons with peers need environments that the tests have not."""
    monkeypatch.syspath_prepend(ROOT)
    names = taken(ast.parse(path.read_text()))
    assert len(names) > 8 or path.name != "same_update.py"
    gone = [f"{s}.{n}" for s, n in sorted(names) if not hasattr(importlib.import_module(s), n)]
    assert not gone, f"{path.name}: {', '.join(gone)}"


def test_gpu_command_runs_on_a_cpu_and_names_its_absence(tmp_path):
    few = ("--cpu", "--updates", 4, "--no-compile", "--out", "gpu.csv")
    run_script("benchmarks/runs/gpu.py", *few, cwd=tmp_path)
    with open(tmp_path / "gpu.csv") as f:
        rows = list(csv.DictReader(f))
    for what in ("rate", "max_difference"):
        assert {r["script"] for r in rows if r["what"] == what} == {*SCRIPTS}
    assert {r["note"] for r in rows if r["what"] == "rate"} == {""}
    assert all(float(r["value"]) > 0 for r in rows if r["what"] == "rate")
    resumed = [(r["variant"], float(r["value"])) for r in rows if r["what"] == "max_difference"]
    assert set(resumed) == {("eager > eager", 0)}  # bitwise
    late = ("--cpu", "--minutes", 0, "--out", "late.csv")
    run_script("benchmarks/runs/gpu.py", *late, cwd=tmp_path)
    with open(tmp_path / "late.csv") as f:
        late = list(csv.DictReader(f))
    assert len(late) > len(rows) and {r["value"] for r in late} == {"nan"}
    assert all(r["note"].startswith("left out") for r in late)


def test_gpu_command_without_a_gpu_is_one_line(tmp_path):
    done = run_script("benchmarks/runs/gpu.py", "--out", "gpu.csv", cwd=tmp_path, check=False)
    assert done.returncode == 2 and not (tmp_path / "gpu.csv").exists()
    assert done.stderr.startswith("error: no GPU") and done.stderr.count("\n") == 1
