"""Every number of every script's command line: what no run could use is refused in one line, status
2, before anything starts; so are flags that nothing reads and environments of the wrong kind."""

import csv
import dataclasses
import importlib
import math
import re
import sys
import typing
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused

SCRIPTS = "cql_continuous policy_constraints qt_opt cql_atari dr3_analysis".split()
SCRIPTS += "sac td3 ppo kfac_npg safety_critics".split()
SCRIPTS = [x for x in SCRIPTS if hasattr(importlib.import_module(x), "check_numbers")]
SIGNED = (
    """target_entropy reward_shift log_std_init v_min v_max cql_clip_diff cql_target_gap""".split()
)


def numbers(script: str) -> list[str]:
    """Fields that hold one number, or none."""
    args, names = importlib.import_module(script).Args, []
    hints = typing.get_type_hints(args)
    for field in dataclasses.fields(args):
        kinds = set(typing.get_args(hints[field.name]) or (hints[field.name],))
        if kinds & {int, float} and kinds <= {int, float, type(None)}:
            names.append(field.name)
    assert len(names) > 10
    return names


CASES = [(script, name) for script in SCRIPTS for name in numbers(script)]


@pytest.mark.parametrize("script, name", CASES, ids=map("-".join, CASES))
def test_no_number_slips_through(script, name, capsys):
    """NaN, infinities, what is too large, and negative numbers where they mean nothing."""
    module = importlib.import_module(script)
    for value in (math.nan, math.inf, -math.inf, 1e300, *(() if name in SIGNED else (-1,))):
        args = dataclasses.replace(module.Args(), **{name: value})
        err = refused(capsys, lambda args=args: module.check(args))
        assert f"--{name.replace('_', '-')} {value}" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_choice_that_is_none(script, capsys):
    """tyro refuses it on the command line; in Python it would train another variant."""
    module, found = importlib.import_module(script), 0
    for name, kind in typing.get_type_hints(module.Args).items():
        if "Literal" not in str(kind) or "float" in str(kind):  # a number's word is another test's
            continue
        wrong = ("Mean",) if typing.get_origin(kind) is tuple else "Mean"
        args = dataclasses.replace(module.Args(), **{name: wrong})
        err = refused(capsys, lambda args=args: module.train(args))
        flag, found = f"--{name.replace('_', '-')}", found + 1
        assert flag in err  # here, or by check() before
    assert found or script in ("kfac_npg", "sac", "td3")


@pytest.mark.parametrize("script", ["cql_continuous", "policy_constraints", "qt_opt"])
def test_an_older_run_keeps_what_it_must(script, capsys):
    """A flag without effect that a resumed run may not change is no dead end."""
    module = importlib.import_module(script)
    args = dataclasses.replace(module.Args(), clip_actions=True)
    assert "--clip-actions has no effect" in refused(capsys, lambda: module.check(args))
    module.check(dataclasses.replace(args, resume="runs/older"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_pass(script):
    """So that each refusal above is of the number, not of whatever else. Bare commands have the ten
    diagnostics that a verdict needs."""
    args = importlib.import_module(script).Args()
    importlib.import_module(script).check(args)
    if hasattr(args, "diagnostics_frequency"):
        assert args.num_updates >= 10 * args.diagnostics_frequency


@pytest.mark.parametrize("script", ["cql_continuous", "policy_constraints", "qt_opt"])
def test_nothing_is_collected_beside_a_dataset(script, capsys):
    module = importlib.import_module(script)
    for flag, value in (("collect_steps", 50), ("data_dir", "elsewhere")):
        args = dataclasses.replace(module.Args(dataset="x.hdf5"), **{flag: value})
        said = refused(capsys, lambda args=args: module.check(args))
        assert f"--{flag.replace('_', '-')} has no effect with --dataset" in said


FULL = (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"))
FULL += (RuntimeError("DefaultCPUAllocator: can't allocate memory"),)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_too_little_memory_is_one_line_and_other_errors_are_not(error, monkeypatch, capsys):
    """Where the networks are made; a run's folder is not there yet."""
    sac = importlib.import_module("sac")
    args, other = sac.Args(total_timesteps=10, eval_episodes=0), RuntimeError("something else")

    def raised(error):
        def learner(*_):
            raise error

        return learner

    monkeypatch.setattr(sac, "Learner", raised(error))
    assert "out of memory" in refused(capsys, lambda: sac.train(args))
    assert not Path("runs").exists()
    monkeypatch.setattr(sac, "Learner", raised(other))
    with pytest.raises(RuntimeError, match="something else"):
        sac.train(args)


SHORT = dict(log_frequency=1, checkpoint_frequency=1, eval_frequency=1, eval_episodes=1)
SHORT |= dict(diagnostics_frequency=1, num_updates=2, bc_steps=1, behaviour_steps=1, batch_size=8)
SHORT |= dict(total_timesteps=60, learning_starts=50, num_steps=32, width=8, transitions=60)
SHORT |= dict(seeds=2, collect_steps=40, collect_repeat=0.5)
OF_TRACK = {"wandb_project_name", "wandb_entity"}  # passed on to a service that is not here


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_ignored_and_every_number_is_explained(script, capsys):
    """What a short run with the defaults does not read outside check() is refused, given alone. The
    docs have each loss and diagnostic that it writes."""
    module, read = importlib.import_module(script), set()

    class Watched(module.Args):
        def __getattribute__(self, name):
            caller = sys._getframe(1).f_code
            if caller.co_filename == module.__file__ and "check" not in caller.co_name:
                read.add(name)
            return super().__getattribute__(name)

    fields = {field.name: field for field in dataclasses.fields(module.Args)}
    short = {name: value for name, value in SHORT.items() if name in fields}
    module.train(Watched(**short))
    capsys.readouterr()
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    (rows,) = Path("runs").glob(f"*__{script}__*/metrics.csv")
    for tag in {row["tag"] for row in csv.DictReader(open(rows))}:
        kind, *_, name = tag.split("/")  # dr3_analysis.py has target, cure and seed between
        if kind != "charts" and not name.isdigit():
            of_all = re.sub("_(policy|value|safety)$", "", name)
            words = {f"`{name}`", f"`{of_all}`", f"`{tag}`", f"`{name.removesuffix('_full')}`"}
            assert any(word in pages for word in words), tag
    unread = fields.keys() - read - OF_TRACK
    assert len(unread) < len(fields) / 3
    assert unread or script in ("sac", "td3", "safety_critics")
    for name in unread:
        default, kind = fields[name].default, typing.get_type_hints(module.Args)[name]
        others = [x for x in typing.get_args(kind) if x != default and isinstance(x, str)]
        other = not default if isinstance(default, bool) else others[0] if others else 0.5
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            other = default / 2 or 0.5
        args = module.Args(**short | {name: other})
        err = refused(capsys, lambda args=args: module.train(args))
        assert f"--{name.replace('_', '-')} has no effect" in err


MISFITS = {  # spaces that the script cannot learn from, and ids that do not exist
    "cql_continuous": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "nomodule:Foo-v0"),
    "policy_constraints": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "nomodule:Foo-v0"),
    "qt_opt": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "nomodule:Foo-v0"),
    "cql_atari": ("Pendulum-v1", "Nope-v0", "ALE/Nope-v5", "ALE/Pong-v4"),
    "dr3_analysis": ("CartPole-v1", "FrozenLake-v1", "Nope-v0"),
    "sac": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "ALE/Pong-v5"),
    "td3": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "ALE/Pong-v5"),
    "ppo": ("FrozenLake-v1", "Blackjack-v1", "Nope-v0", "ALE/Nope-v5"),
    "safety_critics": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "ALE/Pong-v5"),
    "kfac_npg": ("FrozenLake-v1", "Blackjack-v1", "Nope-v0", "ALE/Pong-v5"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_environments_of_the_wrong_kind(script, capsys):
    module = importlib.import_module(script)
    for env_id in MISFITS[script]:
        some = (env_id,) if script == "cql_atari" else env_id
        refused(capsys, lambda some=some: module.train(module.Args(env_id=some)))
    assert not list(Path.cwd().glob("runs/*")) and not list(Path.cwd().glob("datasets/*"))
