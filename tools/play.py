"""Film the policy of a run, in the environments that its script makes and evaluates in; or export
it to TorchScript or ONNX.

  python tools/play.py runs/THAT_RUN    # writes runs/THAT_RUN/film.mp4
  python tools/play.py runs/THAT_RUN/selected.pt --episodes 10 --out film.gif
  python tools/play.py runs/THAT_RUN --export policy.pt    # no film, unless --out is given, too

RUN is a run folder or a checkpoint of any script beside tools/, of a copy under another name, too.
Each episode is one call of the script's own evaluate(); its return is printed. The film's suffix,
.mp4 or .gif, says which it is. Atari cannot render: the film shows what the policy sees, 84 x 84
and grey. MuJoCo without a display draws by EGL or OSMesa, whichever works; MUJOCO_GL=egl (or
osmesa) in front of the command chooses.

--export writes the policy without exploration, as the evaluation plays it: in go observations (B,
...) as the environment gives them, as float32 (frames: uint8), out come actions as it takes them.
Standardising and the scaling to the action box are inside, B is free. Of several games it is the
first one's. A suffix .pt or .ts makes TorchScript, for torch.jit.load on a CPU, without this code;
.onnx makes ONNX, from "obs" to "action" (pip install onnx onnxruntime). The file is compared with
the original on random observations and on the first 256 that were played (--episodes 0: none); with
a difference above 1e-5 of the range of actions (discrete: of their values) nothing is written.
Of a run on data alone, without an environment, it is all that can be done: its actions have the
bounds that the data were read with. Refused are policies that draw random numbers when they act:
qt_opt.py's, --act best-of-n or sample, and those behind a --shield.
"""

import argparse
import importlib
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
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
        expected = f"a run folder or a checkpoint of a script in {ROOT} ({type(e).__name__})"
        print(f"error: {path}: expected {expected}", file=sys.stderr)
        raise SystemExit(2) from e
    module = importlib.import_module(found)
    if hasattr(module, "register"):  # an environment of the script's own
        module.register()
    saved = module.load_checkpoint(path.parent, path.name)
    return module, module.Args(**saved["args"]), saved, path


class Recorded:
    """The spaces of a run on data alone, which had no environment: enough to export its policy."""

    seen = []

    def __init__(self, module, saved):
        if "action_bounds" not in saved["info"]:
            module.fail("an older run, without bounds of actions: --resume it once to add them")
        width, bounds = len(saved["networks"]["actor.net.0.mean"]), saved["info"]["action_bounds"]
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (width,))
        self.single_action_space = gym.spaces.Box(*np.float32(bounds))


def prepared(module, args, saved, stack: ExitStack, to_play: bool = True):
    """One environment as the script's evaluations have it, and the learner of a checkpoint."""
    if hasattr(module, "Envs"):  # cql_atari.py
        games = [module.Envs(env_id, 1, stack) for env_id in args.env_id]
        envs, sizes = games[0], (games[0].shape, [game.actions for game in games])
    elif hasattr(module, "check_spaces") and hasattr(module, "make"):  # ppo.py
        envs = module.make(args, 1, stack, training=False)
    elif hasattr(module, "find_env"):  # which gives none where the run was on data alone
        envs = module.find_env(args, None, stack)
        if envs is None and to_play:
            module.fail(f"a run on data alone, never played in {args.env_id}: only --export")
        envs = envs or Recorded(module, saved)
    else:
        envs = module.make_envs(args.env_id, 1, stack)
    if hasattr(module, "check_spaces"):  # ppo.py, kfac_npg.py
        sizes = envs.single_observation_space, envs.single_action_space
    elif not hasattr(module, "Envs"):
        sizes = module.check_boxes(envs, args.env_id)
    learner = module.Learner(*sizes, args, torch.device("cpu"))
    learner.load_state_dict(saved["networks"])
    return envs, learner


class Film(gym.vector.VectorWrapper):
    """Shows the only environment of a vector after its reset and each step but an episode's last,
    where the next one's first frame stands already; frames go to the file as they come. Without a
    path it only keeps what it would show."""

    def __init__(self, envs, path: Path | None):
        super().__init__(envs)
        self.path, self.file, self.envs = path, None, getattr(envs, "envs", [])
        self.seen = []  # the first observations, (1, ...) each

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
        if len(self.seen) < 256:
            self.seen.append(obs.copy())
        if self.path is None:
            return
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


def choose_gl():
    """Without a display: let MuJoCo draw by the first way that works here. It reads this variable
    when it is imported, so that each way is tried in a process of its own."""
    if sys.platform != "linux":
        return
    if any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")):
        return
    trial = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    for name in ("egl", "osmesa"):
        env = os.environ | {"MUJOCO_GL": name}
        if subprocess.run(trial, env=env, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return


def check_export(module, args, path: Path):
    """Refuse what cannot be exported, before anything is played."""
    if path.suffix not in (".ts", ".pt", ".onnx"):
        module.fail(f"--export {path}: expected .ts or .pt (TorchScript), or .onnx")
    how = "by the cross-entropy method" if hasattr(module, "cem") else ""
    how += f"--act {args.act}" if getattr(args, "act", "mean") != "mean" else ""
    how += "behind its --shield" if getattr(args, "shield", "off") != "off" else ""
    if how:
        module.fail(f"--export: this policy draws random numbers when it acts ({how})")
    missing = [x for x in ("onnx", "onnxruntime") if find_spec(x) is None]
    if path.suffix == ".onnx" and missing:
        module.fail(f"--export {path}: first pip install {' '.join(missing)}")


@torch.no_grad()
def export(module, learner, envs, path: Path, seen: list) -> float:
    """Writes the policy of the evaluation; the largest difference from it of what was written, on
    the observations `seen` and on random ones."""
    learner.eval().requires_grad_(False)  # the file keeps parameters as constants
    space, box = envs.single_observation_space, envs.single_action_space
    discrete = isinstance(box, gym.spaces.Discrete)

    def policy(obs):
        if hasattr(module, "Envs"):  # cql_atari.py's q(), without its chunks: their number is fixed
            net = learner.net
            return net.q(net.heads[0](net.features(obs))).argmax(-1)
        act = learner.act(obs, explore=False)
        if discrete:
            return act + int(box.start)
        low, high = torch.as_tensor(box.low), torch.as_tensor(box.high)
        return torch.minimum(torch.maximum(low + (act + 1) / 2 * (high - low), low), high)

    def difference(obs) -> float:
        """Largest, in units of the range: of actions; of discrete ones, in what they are worth to
        the policy, since rounding may turn a tie."""
        written = run(obs)
        if not discrete:
            original = module.to_env(learner.act(obs, explore=False), envs)
            return float(np.abs((written.numpy() - original) / (box.high - box.low)).max())
        if hasattr(module, "Envs"):
            value = learner.q(obs, 0)
        else:
            value = learner.agent.policy(learner.standardised(obs))
        chosen = value.gather(1, written[:, None] - int(box.start))[:, 0]
        return float((value.amax(1) - chosen).max() / (value.max() - value.min()))

    if space.dtype == np.uint8:
        rows = [torch.randint(256, (256, *space.shape), dtype=torch.uint8)]
    else:
        rows = [torch.randn(256, *space.shape)]
    if seen:
        rows.append(torch.as_tensor(np.concatenate(seen)).to(rows[0]))
    with warnings.catch_warnings(), module.write_beside(path) as temporary:
        warnings.simplefilter("ignore")  # TorchScript is deprecated; it does trace as_tensor()
        few = rows[0][:2]
        traced = torch.jit.trace(policy, few, check_trace=False)
        if path.suffix == ".onnx":
            import onnxruntime

            names = {"input_names": ["obs"], "output_names": ["action"]}
            names |= {"dynamic_axes": {"obs": {0: "B"}, "action": {0: "B"}}}
            # the other exporter, dynamo=True, needs onnxscript as well
            torch.onnx.export(traced, (few,), str(temporary), dynamo=False, **names)
            session = onnxruntime.InferenceSession(str(temporary))

            def run(obs):
                return torch.as_tensor(session.run(None, {"obs": obs.numpy()})[0])
        else:
            traced.save(str(temporary))
            run = torch.jit.load(str(temporary))
        worst = max(map(difference, rows))
        if not worst <= 1e-5:
            module.fail(f"--export {path}: it differs by {worst:.2g} of the range, not written")
    return worst


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="of the first episode; not given: the run's")
    out = {"type": Path, "help": ".mp4 or .gif; not given: film.mp4 beside RUN"}
    parser.add_argument("--out", "--gif", **out)
    parser.add_argument("--export", type=Path, help=".ts or .pt (TorchScript) or .onnx")
    options = parser.parse_args()
    module, args, saved, path = load(options.run)
    if not hasattr(module, "evaluate"):  # dr3_analysis.py
        module.fail(f"{module.SCRIPT}.py has no policy that plays")
    if options.export:
        check_export(module, args, options.export)
    out = options.out or (None if options.export else path.parent / "film.mp4")
    if out and out.suffix not in (".mp4", ".gif"):
        module.fail(f"--out {out}: expected .mp4 or .gif")
    if options.episodes < (1 if out else 0):
        module.fail(f"--episodes {options.episodes}: a film takes one at least")
    first = args.seed if options.seed is None else options.seed
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame: no window
    warnings.filterwarnings("ignore", module="glfw")  # the error below says what it means
    hint = "not played"
    if out:
        choose_gl()
        how = "MUJOCO_GL=egl with libegl1, or osmesa with libosmesa6"
        hint = f"no film (it takes render_mode rgb_array; MuJoCo without a display: {how})"
    with ExitStack() as stack, module.failing(hint, Exception):
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            make = gym.make

            def filmed(*words, **named):
                try:
                    return make(*words, render_mode="rgb_array", **named)
                except TypeError as e:  # of an environment that knows no render_mode
                    module.fail(f"{hint}: {e}")

            stack.enter_context(mock.patch("gymnasium.make", filmed))
        envs, learner = prepared(module, args, saved, stack, to_play=bool(out))
        game, episodes = [], options.episodes
        if isinstance(envs, Recorded):
            film, episodes = envs, 0
        elif hasattr(module, "Envs"):
            film = envs.envs = Film(envs.envs, out)
            game = [0]
        else:
            film = envs = Film(envs, out)
        returns = []
        for i in range(episodes):
            module.evaluate(learner, envs, *game, replace(args, seed=first + i))
            returns.append(film.total)
            print(f"episode {i + 1}: return {film.total:.1f}")
        if len(returns) > 1:
            print(f"mean of {len(returns)}: {np.mean(returns):.1f}")
        if out:
            film.file.close()
            print(out)
    if options.export:
        with module.failing(f"--export {options.export}", Exception):
            worst = export(module, learner, film, options.export, film.seen)
        print(f"{options.export}: differs from the original by {worst:.2g} of the range at most")


if __name__ == "__main__":
    main()
