"""Run a saved policy of sac.py or td3.py and keep what it did as a dataset in D4RL's layout.

  python tools/rollouts.py runs/MEDIUM --steps 100_000 --out medium.hdf5
  python tools/rollouts.py runs/EXPERT --steps 100_000 --out expert.hdf5 --greedy

RUN is a run folder or a checkpoint. The policy explores as in training (SAC samples, TD3 adds its
noise) unless --greedy is given. Environment and exploration have seeds of their own, which neither
training nor evaluation uses; the same command writes the same numbers. The last episode is cut
where the steps end.
"""

import argparse
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from play import load, prepared


def roll_out(module, args, saved, options, made_by: dict) -> list[float]:
    """Writes the dataset; the returns of its whole episodes."""
    torch.set_num_threads(1)
    steps, returns = options.steps, []
    seed = args.seed if options.seed is None else options.seed
    with ExitStack() as stack:
        envs, learner = prepared(module, args, saved, stack)
        learner.eval()
        torch.manual_seed(seed)
        # [seed, 0] and [seed, 1] are the streams of training and evaluation
        stream = np.random.SeedSequence([seed, 2])
        obs, _ = envs.reset(seed=stream.generate_state(1, np.uint64).tolist())
        replay = module.Replay(steps, *module.check_boxes(envs, args.env_id), learner.device)
        while replay.added < steps:
            act = learner.act(obs, explore=not options.greedy)
            next_obs, rew, terminated, truncated, infos = envs.step(module.to_env(act, envs))
            over, last_obs = terminated | truncated, next_obs.copy()
            if over.any():  # there next_obs is the next episode's first
                last_obs[over] = np.stack(infos["final_obs"][over])
                returns.append(float(infos["final_info"]["return"][0]))
            replay.add(obs, act, rew, last_obs, terminated, truncated & ~terminated)
            obs = next_obs
            if module.every(max(steps // 10, 1), replay.added - 1, replay.added):
                recent = np.mean(returns[-10:]) if returns else math.nan
                print(f"{replay.added:,}/{steps:,}, return {recent:.1f}", flush=True)
        if returns:
            made_by["collector_return_mean"] = np.mean(returns)
        replay.write(options.out, envs, **made_by)
    return returns


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True, help="HDF5 file, which must not exist")
    parser.add_argument("--greedy", action="store_true", help="without exploration")
    parser.add_argument("--seed", type=int, help="not given: the run's")
    options = parser.parse_args()
    module, args, saved, path = load(options.run)
    if not hasattr(args, "save_dataset"):
        module.fail(f"{path} is of {module.SCRIPT}.py, expected sac.py or td3.py, or a copy")
    if options.out.exists() or not options.out.parent.is_dir():
        module.fail(f"--out {options.out} exists already, or its folder does not")
    if options.steps < 1:
        module.fail(f"--steps {options.steps}: expected at least 1")
    if options.seed is not None and options.seed < 0:
        module.fail(f"--seed {options.seed}: expected at least 0")
    made_by = {"policy": str(path), "policy_step": saved["step"], "env_id": args.env_id}
    try:
        returns = roll_out(module, args, saved, options, made_by)
    except KeyboardInterrupt:
        module.fail("stopped: nothing is kept, the same command starts again")
    if returns:
        print(f"{len(returns)} whole episodes, mean return {np.mean(returns):.1f}")


if __name__ == "__main__":
    main()
