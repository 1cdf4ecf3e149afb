"""README.md, docs/ and benchmarks/: commands, line counts, links, sizes. `python tests/test_docs.py
--fix` writes the scripts' line counts into README.md, and those of pieces into docs/copying.md."""

import ast
import builtins
import contextlib
import dataclasses
import dis
import importlib
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import write_d4rl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README, COPYING = ROOT / "README.md", ROOT / "docs" / "copying.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
SCRIPTS = sorted(x.stem for x in ROOT.glob("*.py") if "\nclass Args" in x.read_text())
ROW = re.compile(r"(\| \[(\w+\.py)\]\((?:\.\./)?\w+\.py\)([^|]*)\| )([\d,]+) \|")


def pieces(script: str, names: list[str]) -> list:
    """Syntax trees of these functions and classes of a script."""
    body = ast.parse((ROOT / script).read_text()).body
    return [x for x in body if getattr(x, "name", None) in names]


def counted(text: str) -> str:
    """A page with the right counts in its rows `| [script](script) `names of pieces` | lines |`."""

    def row(match):
        found = pieces(match[2], re.findall(r"`(\w+)`", match[3]))
        n = sum(x.end_lineno - x.lineno + 1 for x in found)
        return f"{match[1]}{n or (ROOT / match[2]).read_text().count(chr(10)):,} |"

    return ROW.sub(row, text)


def free_names(code) -> set[str]:
    """Names that code and the functions in it look up outside."""
    steps = list(dis.get_instructions(code))
    names = {x.argval for x in steps if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = names.union(*(free_names(x) for x in code.co_consts if hasattr(x, "co_code")))
    return names - {x.argval for x in steps if x.opname == "STORE_NAME"} - {*dir(builtins)}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(text: str) -> list[list[str]]:
    """The words of each `python script.py ...` in a page, a docstring or a log of commands."""
    text = re.sub(r"\\+\n\s*", "", text)
    found = re.findall(r"python ((?:\w+/)*\w+\.py)([^`\n|#;&()]*)", text)
    return [[script, *shlex.split(words)] for script, words in found if not {*"'$"} & {*words}]


def understood(words: list[str]):
    """Read and check a command as the script itself would; of another program, know its flags."""
    if words[0].removesuffix(".py") not in SCRIPTS:
        text = (ROOT / words[0]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), words
        return
    script = importlib.import_module(words[0].removesuffix(".py"))
    try:
        args = tyro.cli(script.Args, args=words[1:])
        if not args.resume:
            script.check(args)
    except SystemExit as e:
        raise AssertionError(f"refused: {shlex.join(words)}") from e


def columns(text: str):
    """(script, cells of its column, the cells to their right) of each row of each table that names
    scripts in a head, `| [sac.py](../sac.py), [td3.py](../td3.py) |`: once for each script."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = (re.split(r" *\| *", row.strip())[1:-1] for row in table.splitlines())
        for i, cell in enumerate(head):
            for script in re.findall(r"\[(\w+)\.py\]", cell):
                yield from ((script, row[i], row[i + 1], head[i + 1]) for row in rows)


def test_flags_and_defaults_of_the_pages_on_moving():
    """In a script's column its flags, and to its right their default, if anything. Elsewhere flags
    of any script: those of other projects are written there without dashes."""
    defaults = {}
    for name in SCRIPTS:
        args = importlib.import_module(name).Args()
        defaults[name] = {"--" + k.replace("_", "-"): v for k, v in vars(args).items()}
        defaults[name]["--env"] = args.env_id
    every = {flag for flags in defaults.values() for flag in flags}
    words = {"on": True, "off": False, "not given": None}
    for name in ("from_cleanrl", "from_d3rlpy"):
        text, compared = (ROOT / "docs" / f"{name}.md").read_text(), 0
        for script, cell, value, head in columns(text):
            flags = re.findall(r"--[a-z0-9-]+", cell)
            assert {*flags} <= {*defaults[script]}, f"{name}.md: {cell} is not all in {script}.py"
            if value and flags:
                assert head == "default"
                value = words[value] if value in words else value
                with contextlib.suppress(ValueError, TypeError):
                    value = float(value)
                for flag in flags:
                    assert defaults[script][flag] == value, f"{name}.md: {script}.py {flag}"
                compared += 1
        assert compared > 9
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text):
            assert flag.replace("--no-", "--") in every, f"{name}.md: {flag}"


def test_the_two_commands_of_the_readme():
    install = "pip install -r requirements.txt && "
    for line in ("python cql_continuous.py", "python -m pytest"):
        assert f"```bash\n{install}{line}\n```" in README.read_text()


def test_line_counts():
    assert {match[1] for match in ROW.findall(README.read_text())} == {s + ".py" for s in SCRIPTS}
    for page in (README, COPYING):
        assert counted(page.read_text()) == page.read_text(), f"{page.name}: test_docs.py --fix"


def test_pieces_run_alone_with_the_names_that_the_page_lists():
    rows = [x for x in COPYING.read_text().splitlines() if ROW.match(x)]
    assert len(rows) > 9
    for row in rows:
        script, names = ROW.match(row)[2], re.findall(r"`(\w+)`", ROW.match(row)[3])
        found = pieces(script, names)
        assert len(found) == len(names), row
        imports = [x for x in ast.parse((ROOT / script).read_text()).body if "names" in x._fields]
        code = compile(ast.Module([*imports, *found], []), script, "exec")
        needed = set(re.findall(r"`(\w+)`", row.split("|")[4]))
        assert free_names(code) == needed, row
        exec(code, dict.fromkeys(needed, object))


def changed(script: str, tmp_path):
    """The script's copy with the page's change of it, imported."""
    diff = re.search(rf"```diff {script}\.py\n(.*?)```", COPYING.read_text(), re.S)[1]
    text = (ROOT / f"{script}.py").read_text()
    for place in diff.split("@@\n"):
        lines = place.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] != mark) for mark in "+-")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / f"changed_{script}.py").write_text(text)
    sys.path.insert(0, str(tmp_path))
    return importlib.import_module(f"changed_{script}")


def test_the_change_to_n_steps(tmp_path, monkeypatch):
    """Two environments in a ring of ten rows, whose third row is the newest: sums by hand. Episodes
    end at row 6 of the one, by a terminal, and at row 1 of the other, by time."""
    monkeypatch.chdir(tmp_path)
    script = changed("sac", tmp_path)
    args = script.Args(n_step=3, num_envs=2, gamma=0.5, batch_size=500)
    replay = script.Replay(10, 1, 1, torch.device("cpu"))
    ends = {6: "done", 5: "cut"}
    for t in range(6):  # rows 10 and 11 overwrite 0 and 1
        obs, end = np.array([[t], [100.0 + t]]), [ends.get(2 * t + i) for i in range(2)]
        done, cut = (np.array([float(e == kind) for e in end]) for kind in ("done", "cut"))
        after = obs + 1.0 + 0.25 * (done + cut)[:, None]  # the next row is another episode's
        replay.add(obs, np.zeros((2, 1)), np.array([t, 10.0 + t]), after, done, cut)
    batch = script.n_step_batch(replay, args)
    expected = {  # by first observation: reward, next observation, 1 - gamma^(m - 1)
        1: (1 + 2 / 2 + 3 / 4, 4.25, 1.0), 2: (2 + 3 / 2, 4.25, 1.0), 3: (3, 4.25, 1.0),
        4: (4 + 5 / 2, 6, 0.5), 5: (5, 6, 0), 101: (11 + 12 / 2, 103.25, 0.5),
        102: (12, 103.25, 0), 103: (13 + 14 / 2 + 15 / 4, 106, 0.75), 104: (14 + 15 / 2, 106, 0.5),
        105: (15, 106, 0),
    }  # fmt: skip
    found = {}
    for i, obs in enumerate(batch.obs[:, 0].tolist()):
        found[obs] = (float(batch.rew[i]), float(batch.next_obs[i, 0]), float(batch.done[i]))
    assert found == expected
    words = {"total_timesteps": 150, "learning_starts": 50, "width": 8, "eval_episodes": 1}
    assert script.train(script.Args(**words))["updates"] == 100


def test_the_change_to_iql(tmp_path, monkeypatch):
    """V of a state is the expectile of Q over its actions; the policy gets better than its data."""
    import test_cql_continuous_runs as runs

    monkeypatch.chdir(tmp_path)
    script = changed("cql_continuous", tmp_path)
    flags = "--cql-alpha 0 --bc-steps 0 --num-updates 600 --expectile 0.8"
    words = f"{runs.FAST} {flags} --dataset {runs.point_data('point.hdf5')}"
    out = script.train(tyro.cli(script.Args, args=words.split()))
    assert out["final_return_mean"] > -5 > out["dataset_return_mean"]


def test_the_change_of_the_optimiser(tmp_path, monkeypatch):
    """A stop half-way changes nothing."""
    monkeypatch.chdir(tmp_path)
    script = changed("ppo", tmp_path)
    few = {"total_timesteps": 1024, "width": 8, "eval_episodes": 1, "run_dir": "whole"}
    whole = script.train(script.Args(**few))
    script.train(script.Args(**few | {"total_timesteps": 512, "run_dir": "half"}))
    (folder,) = (tmp_path / "half").iterdir()
    script.train(script.Args(**few | {"resume": str(folder)}))
    one, two = (script.load_checkpoint(x) for x in (next(Path("whole").iterdir()), folder))
    assert whole["global_step"] == two["step"] and "RMSprop" in Path(script.__file__).read_text()
    assert all(torch.equal(x, two["networks"][name]) for name, x in one["networks"].items())


def test_every_link_and_path_exists():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}"
        for path in re.findall(r"\b((?:benchmarks|tools|docs|tests)/[\w/.-]*\w)", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"`(?:\w+/)*([\w-]+\.csv)`", text):
            known = name == "metrics.csv" or (ROOT / "benchmarks" / "raw" / name).exists()
            assert known, f"{page.name}: {name}"


def test_sizes():
    assert len(README.read_text().split()) <= 900
    assert len(PAGES[-1].read_text().split()) <= 2700
    for page in PAGES:
        cells = [c for x in page.read_text().splitlines() if x[:1] == "|" for c in x.split("|")]
        assert max(map(len, cells), default=0) <= 200, f"{page.name}: {max(cells, key=len)}"


def test_commands_of_pages_and_docstrings_are_understood():
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    texts = [page.read_text() for page in PAGES]
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in programs]
    found = [words for text in texts for words in commands(text)]
    assert len(found) > 60
    for words in found:
        understood(words)


FEW = {"width": 8, "eval_episodes": 1}
SHORT = {  # what a run is cut to
    "sac": FEW | {"total_timesteps": 300, "learning_starts": 200, "batch_size": 16},
    "cql_continuous": FEW | {"num_updates": 20, "bc_steps": 2, "diagnostics_frequency": 5},
    "policy_constraints": FEW | {"num_updates": 20, "behaviour_steps": 2, "collect_steps": 1_005},
}


def carry_out(block: str, monkeypatch):
    """The commands that a block of shell makes of its loops and tests; each then runs here, cut."""
    Path("python").write_text('#!/bin/sh\necho "$@" >> log\n')
    Path("srun").write_text('#!/bin/sh\nexec "$@"\n')
    for file in ("python", "srun"):
        Path(file).chmod(0o755)
    Path("log").write_text("")
    env = os.environ | {"PATH": f"{Path.cwd()}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    subprocess.run(["bash", "-c", block], env=env, check=True)
    found = [shlex.split(line) for line in Path("log").read_text().splitlines()]
    for file, *words in found:
        understood([file, *words])
        script = importlib.import_module(Path(file).stem)
        if file.startswith("tools/"):
            monkeypatch.setattr(sys, "argv", [file, *words])
            script.main()
        elif "--resume" not in words:
            args = tyro.cli(script.Args, args=words)
            script.train(dataclasses.replace(args, **SHORT[Path(file).stem]))
    return found


def plant_recordings():
    """What docs/data.md converts: a replay buffer, episodes, arrays, D4RL's layout."""
    rows, box = np.zeros((4, 1, 1), np.float32), SimpleNamespace(low=-2.0, high=2.0)
    columns = {x: rows + 1 for x in ("observations", "next_observations", "actions")}
    columns |= {x: rows[..., 0] for x in ("rewards", "dones", "timeouts")}
    ring = {"buffer_size": 4, "pos": 3, "full": False, "n_envs": 1, "action_space": box}
    episode = {"obs": np.zeros((4, 1)), "acts": np.ones((3, 1)), "rews": np.ones(3)}
    for name, x in (
        ("replay_buffer", SimpleNamespace(**columns, **ring)),
        ("demonstrations", [episode]),
    ):
        Path(f"{name}.pkl").write_bytes(pickle.dumps(x))
    np.savez("recording.npz", dones=[0, 0, 1], **{k: x[:3] for k, x in episode.items()})
    write_d4rl("replay.hdf5", n=200, length=50)


@pytest.mark.parametrize("page", ["comparing", "from_d3rlpy", "data"])
def test_the_commands_of_a_page_run_in_its_order(page, monkeypatch, capsys):
    """The online scripts' commands in other pages are run by test_online.py and test_ppo.py."""
    for name in ("dump.h5", "medium.hdf5"):
        write_d4rl(name, n=200, obs_dim=11, act_dim=3, length=50, scale=0.9)
    if page == "data":
        plant_recordings()
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("minari").absolute()))
    text = (ROOT / "docs" / f"{page}.md").read_text()
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    found = [carry_out(block, monkeypatch) for block in blocks]
    assert blocks and all(found)
    if page != "comparing":
        return
    out = capsys.readouterr().out

    def first_cells(text: str) -> list:
        return [line.split("|")[:3] for line in text.splitlines() if line.startswith("|")]

    for shown in re.findall(r"```text\n(.*?)```", text, re.S):  # outputs: the same heads and rows
        assert len(first_cells(shown)) > 3
        assert all(row in first_cells(out) for row in first_cells(shown)), shown
    assert "cql" in Path("report.html").read_text()
    (run,) = Path("sweep/3").iterdir()
    assert carry_out(blocks[-1], monkeypatch) == [["sac.py", "--resume", f"sweep/3/{run.name}/"]]


def test_how_far_an_interval_reaches():
    """docs/comparing.md's row, by report.py's own rule: values of deviation 1."""
    sys.path.insert(0, str(ROOT / "tools"))
    report = importlib.import_module("report")
    text = (ROOT / "docs" / "comparing.md").read_text()
    numbers = re.search(r"^\| n \|(.*)\|$", text, re.M)[1].split("|")
    halves = re.search(r"^\| half of the interval \|(.*)\|$", text, re.M)[1].split("|")
    for n, half in zip(numbers, halves, strict=True):
        values = np.arange(int(n)) / np.std(np.arange(int(n)), ddof=1)
        assert f"{report.half_width(list(values)):.1f} s" == half.strip()


def test_an_environment_of_ones_own(tmp_path, monkeypatch):
    """It passes gymnasium's checks, SAC learns there (untrained: -150; a cart that is left alone:
    -33), and the wrapped one is registered."""
    from gymnasium.utils.env_checker import check_env

    text = COPYING.read_text()
    (tmp_path / "my_env.py").write_text(
        re.search(r"```python\n(# my_env.py\n.*?)```", text, re.S)[1]
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = (x for x in commands(text) if "my_env:MyEnv-v0" in x)
    script = importlib.import_module("sac")
    few = {"total_timesteps": 1_200, "learning_starts": 300, "width": 32, "batch_size": 64}
    few |= {"gamma": 0.9, "q_lr": 3e-3, "policy_lr": 3e-3, "tau": 0.05, "eval_episodes": 5}
    args = dataclasses.replace(tyro.cli(script.Args, args=command[1:]), **few)
    assert script.train(args)["final_return_mean"] > -20
    check_env(importlib.import_module("my_env").MyEnv())
    wrapping = re.search(r"```python\n(def make.*?)```", text, re.S)[1]
    exec(wrapping, {"gym": gym})
    env = gym.make("MyPendulum-v0")
    env.reset(seed=0)
    assert -1.1 < env.step(env.action_space.sample())[1] < 0


def test_what_is_done_from_python(tmp_path):
    """The page's own lines: a job of a pool, going on with a run, a policy that is loaded."""
    text = COPYING.read_text()
    (block,) = re.findall(r"```python\n(from multiprocessing.*?)```", text, re.S)
    mine = {"__name__": "mine"}
    exec(block.replace("20_000", "200"), mine)
    assert mine["job"](1) < 0
    with pytest.raises(RuntimeError, match="seed -1 ended with status 2"):
        mine["job"](-1)
    (run,) = Path("runs").iterdir()
    (going_on,) = re.findall(r"`(sac\.Args\(\*\*.*?)`", text)
    args = eval(going_on, mine | {"FOLDER": str(run)})
    assert args.total_timesteps == 200 and args.resume == str(run)
    assert mine["sac"].train(dataclasses.replace(args, total_timesteps=201))["global_step"] == 201
    (block,) = re.findall(r"```python\n(from contextlib.*?)```", text, re.S)
    exec(block.replace("runs/THAT_RUN", str(run), 1), mine)
    assert mine["action"].shape == (1, 1) and abs(mine["action"]).max() <= 2


def test_commands_of_the_benchmarks_are_understood(tmp_path):
    """Each shell script runs with a stand-in for python that only notes its arguments."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = - ] || echo "python $*" >> log\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "datasets" / "ALE_SpaceInvaders-v5_random_40000_0.95_seed1").mkdir(parents=True)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    scripts = sorted((ROOT / "benchmarks" / "runs").glob("*.sh"))
    for script in scripts:
        subprocess.run(["bash", script], cwd=tmp_path, env=env, check=True, capture_output=True)
    found = {re.sub(r"--seed \d", "", line) for line in (tmp_path / "log").read_text().splitlines()}
    assert len(scripts) > 9 and len(found) > 80
    for words in (words for line in found for words in commands(line)):
        understood(words)


if __name__ == "__main__" and "--fix" in sys.argv:
    for path in (README, COPYING):
        path.write_text(counted(path.read_text()))
