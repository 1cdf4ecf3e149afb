"""Film the policy of a run, in the environments that its script makes and evaluates in.

  python tools/play.py runs/THAT_RUN    # writes runs/THAT_RUN/film.mp4
  python tools/play.py runs/THAT_RUN/selected.pt --episodes 3 --out film.gif

RUN is a run folder or a checkpoint of any script here. Each episode is one call of the script's own
evaluate(). Atari cannot render: the film shows what the policy sees, 84 x 84 and grey. MuJoCo on a
machine without a display needs MUJOCO_GL=egl (or osmesa) in front of the command.
"""

import argparse
import importlib
import os
import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def load(run: str):
    """Of a run folder or a checkpoint file: module, arguments, what the file holds, path."""
    path = Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)
    sys.path.insert(0, str(ROOT))
    try:
        script = torch.load(path, "cpu", weights_only=True, mmap=True)["script"]
        (found,) = (x.stem for x in ROOT.glob("*.py") if x.stem == script)
    except Exception as e:
        expected = f"a run folder or a checkpoint of a script here ({type(e).__name__})"
        print(f"error: {path}: expected {expected}", file=sys.stderr)
        raise SystemExit(2) from e
    module = importlib.import_module(found)
    if hasattr(module, "register"):  # an environment of the script's own
        module.register()
    saved = module.load_checkpoint(path.parent, path.name)
    return module, module.Args(**saved["args"]), saved, path


def prepared(module, args, saved, stack: ExitStack):
    """One environment as the script's evaluations have it, and the learner of a checkpoint."""
    if module.SCRIPT == "cql_atari":
        games = [module.Envs(env_id, 1, stack) for env_id in args.env_id]
        envs, sizes = games[0], (games[0].shape, [game.actions for game in games])
    elif module.SCRIPT == "ppo":
        envs = module.make(args, 1, stack, training=False)
    else:
        envs = module.make_envs(args.env_id, 1, stack)
    if module.SCRIPT in ("ppo", "kfac_npg"):
        sizes = envs.single_observation_space, envs.single_action_space
    elif module.SCRIPT != "cql_atari":
        sizes = module.check_boxes(envs, args.env_id)
    learner = module.Learner(*sizes, args, torch.device("cpu"))
    learner.load_state_dict(saved["networks"])
    return envs, learner


class Film(gym.vector.VectorWrapper):
    """Shows the only environment of a vector after its reset and each step but an episode's last,
    where the next one's first frame stands already; frames go to the file as they come."""

    def __init__(self, envs, path: Path):
        super().__init__(envs)
        self.path, self.file, self.envs = path, None, getattr(envs, "envs", [])

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.total = 0.0
        self.show(obs)
        return obs, info

    def step(self, actions):
        obs, rew, *ends, infos = self.env.step(actions)
        self.total += float(rew[0])
        if not np.any(ends):
            self.show(obs)
        return obs, rew, *ends, infos

    def show(self, obs):
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

        if self.envs:
            frame = np.asarray(self.envs[0].render())[..., :3]
        else:  # Atari's: the newest frame of the stack
            frame = np.repeat(obs[0][-1][..., None], 3, axis=-1).repeat(4, 0).repeat(4, 1)
        if self.file is None:
            codec = "gif" if self.path.suffix == ".gif" else "libx264"
            fps = self.env.metadata.get("render_fps", 15)
            self.file = FFMPEG_VideoWriter(str(self.path), frame.shape[1::-1], fps, codec)
        self.file.write_frame(np.ascontiguousarray(frame))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="of the first episode; not given: the run's")
    parser.add_argument("--out", type=Path, help=".mp4 or .gif; not given: film.mp4 beside RUN")
    options = parser.parse_args()
    module, args, saved, path = load(options.run)
    if module.SCRIPT == "dr3_analysis":
        module.fail("dr3_analysis.py has no policy that plays")
    out = options.out or path.parent / "film.mp4"
    first = args.seed if options.seed is None else options.seed
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame: no window
    warnings.filterwarnings("ignore", module="glfw")  # the error below says what it means
    hint = "no film (without a display: MUJOCO_GL=egl python tools/play.py ...)"
    with ExitStack() as stack, module.failing(hint, Exception):
        make = partial(gym.make, render_mode="rgb_array")
        stack.enter_context(mock.patch("gymnasium.make", make))
        envs, learner = prepared(module, args, saved, stack)
        if module.SCRIPT == "cql_atari":
            film = envs.envs = Film(envs.envs, out)
            game = [0]
        else:
            film = envs = Film(envs, out)
            game = []
        for i in range(options.episodes):
            module.evaluate(learner, envs, *game, replace(args, seed=first + i))
            print(f"episode {i + 1}: return {film.total:.1f}")
        film.file.close()
    print(out)


if __name__ == "__main__":
    main()
