"""Every number of every script's command line: what no run could use is refused in one line, status 2, before
anything starts; so are environments of the wrong kind."""

import dataclasses
import importlib
import math
import typing
from pathlib import Path

import pytest

SCRIPTS = "cql_continuous cql_atari dr3_analysis sac td3 ppo kfac_npg".split()
SIGNED = {
    "target_entropy",
    "reward_shift",
    "log_std_init",
    "v_min",
    "v_max",
    "cql_clip_diff",
    "cql_target_gap",
}


def numbers(script: str) -> list[str]:
    """Fields that hold one number, or none."""
    args = importlib.import_module(script).Args
    hints = typing.get_type_hints(args)
    kinds = {
        f.name: set(typing.get_args(hints[f.name]) or (hints[f.name],))
        for f in dataclasses.fields(args)
    }
    return [
        name
        for name, kind in kinds.items()
        if kind & {int, float} and kind <= {int, float, type(None)}
    ]


def refused(capsys, call) -> bool:
    try:
        call()
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        return True
    return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_slips_through(script, capsys):
    module, passed, names = importlib.import_module(script), [], numbers(script)
    for name in names:
        for value in (math.nan, math.inf, 1e300, *(() if name in SIGNED else (-1,))):
            args = dataclasses.replace(module.Args(), **{name: value})
            if not refused(capsys, lambda args=args: module.check(args)):
                passed.append((name, value))
    assert len(names) > 10 and not passed


@pytest.mark.parametrize("script", [x for x in SCRIPTS if x != "dr3_analysis"])
def test_evaluations_of_a_hundred_million_environments_are_refused(script, capsys):
    module = importlib.import_module(script)
    assert refused(capsys, lambda: module.check(module.Args(eval_episodes=10**8)))


MISFITS = {  # spaces that the script cannot learn from, and ids that do not exist
    "cql_continuous": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "nomodule:Foo-v0"),
    "cql_atari": ("Pendulum-v1", "FrozenLake-v1", "Nope-v0", "ALE/Nope-v5", "ALE/Pong-v4"),
    "dr3_analysis": ("CartPole-v1", "FrozenLake-v1", "Nope-v0"),
    "sac": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "ALE/Pong-v5"),
    "td3": ("CartPole-v1", "FrozenLake-v1", "Nope-v0", "ALE/Pong-v5"),
    "ppo": ("FrozenLake-v1", "Blackjack-v1", "Nope-v0", "ALE/Nope-v5"),
    "kfac_npg": ("FrozenLake-v1", "Blackjack-v1", "Nope-v0", "ALE/Pong-v5"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_environments_of_the_wrong_kind(script, capsys):
    module = importlib.import_module(script)
    for env_id in MISFITS[script]:
        env_id = (env_id,) if script == "cql_atari" else env_id
        assert refused(capsys, lambda env_id=env_id: module.train(module.Args(env_id=env_id))), (
            env_id
        )
    assert not Path("runs").exists()
