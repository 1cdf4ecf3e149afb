"""Every number of every script's command line: what no run could use is refused in one line, status
2, before anything starts; so are environments of the wrong kind."""

import dataclasses
import importlib
import math
import typing
from pathlib import Path

import pytest
from conftest import refused

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
def test_the_defaults_pass(script):
    """So that each refusal above is of the number, not of whatever else."""
    module = importlib.import_module(script)
    module.check(module.Args())


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
