"""Film the policy of a run, in the environments that its script makes and evaluates in.

  python tools/play.py runs/THAT_RUN    # writes runs/THAT_RUN/film.mp4
  python tools/play.py runs/THAT_RUN/selected.pt --episodes 3 --out film.gif

RUN is a run folder (its checkpoint.pt) or a checkpoint file of any script here. Each episode is one
call of the script's own evaluate(), without exploration; its return is printed. Atari's native
environments cannot render: the film shows what the policy sees, 84 x 84 and grey. MuJoCo on a
machine without a display renders with MUJOCO_GL=egl (or osmesa) in front of the command.
"""

import argparse
import importlib
import os
import sys
import warnings
import zipfile
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def load(run: str):
    """(the script's module, its arguments, the checkpoint) of a run folder or a checkpoint file."""
    path = Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no such file" if not path.exists() else "not a file of torch.save")
        saved = torch.load(path, "cpu", weights_only=True, mmap=True)  # a replay stays on the disk
        script = saved["script"]
        if not (script.isidentifier() and (ROOT / f"{script}.py").exists()):
            raise ValueError(f"of a script {script}, which is not here")
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        sys.exit(f"error: {path}: expected a run folder or a checkpoint ({reason[:200]})")
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    if saved["format"] != module.FORMAT:
        sys.exit(f"error: {path}: of format {saved['format']}, {script}.py has {module.FORMAT}")
    known = {f.name: saved["args"][f.name] for f in fields(module.Args) if f.name in saved["args"]}
    return module, module.Args(**known), saved


def restored(module, args, saved, envs):
    """The script's learner with the networks of a checkpoint."""
    device = torch.device("cpu")
    if hasattr(module, "check_boxes"):
        sizes = module.check_boxes(envs, args.env_id)
    else:
        sizes = envs.single_observation_space, envs.single_action_space
    learner = module.Learner(*sizes, args, device)
    learner.load_state_dict(saved["networks"])
    return learner


class Film(gym.vector.VectorWrapper):
    """Shows the only environment of a vector after its reset and each step but an episode's last,
    where the next one's first frame stands already; frames go to the file as they come."""

    def __init__(self, envs, path: Path):
        super().__init__(envs)
        self.path, self.file = path, None

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.show(obs)
        return obs, info

    def step(self, actions):
        obs, rew, terminated, truncated, infos = self.env.step(actions)
        if not (terminated | truncated).any():
            self.show(obs)
        return obs, rew, terminated, truncated, infos

    def show(self, obs):
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

        if hasattr(self.env, "envs"):
            frame = np.asarray(self.env.envs[0].render())[..., :3]
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
    module, args, saved = load(options.run)
    beside = Path(options.run) if Path(options.run).is_dir() else Path(options.run).parent
    out = options.out or beside / "film.mp4"
    first = args.seed if options.seed is None else options.seed
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame asks for no display
    warnings.filterwarnings("ignore", module="glfw")  # the error below says what it means
    rendering = partial(gym.make, render_mode="rgb_array")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gym, "make", rendering))
        envs = module.make_envs(args.env_id, 1, stack)
        learner = restored(module, args, saved, envs)
        try:
            film = Film(envs, out)
            for i in range(options.episodes):
                returns, _ = module.evaluate(learner, film, replace(args, seed=first + i))
                print(f"episode {i + 1}: return {returns[0]:.1f}")
            film.file.close()
        except Exception as e:
            hint = "on a machine without a display: MUJOCO_GL=egl python tools/play.py ..."
            sys.exit(f"error: {args.env_id} could not be filmed ({type(e).__name__} {e}); {hint}")
    print(out)


if __name__ == "__main__":
    main()
