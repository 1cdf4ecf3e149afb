#!/usr/bin/env bash
# The four kinds of dataset, made by sac.py, and on each of them CQL(H), naive offline SAC and behaviour cloning; then
# naive SAC and CQL on 5,000, 15,000 and all transitions of the replay.
#   bash benchmarks/datasets.sh HalfCheetah-v5 "1 2 3" 40_000 100_000 50_000
#   bash benchmarks/datasets.sh Pendulum-v1 "1 2 3" 3_000 20_000 20_000 \
#     "--batch-size 64 --critic-width 128 --policy-width 128 --tau 0.01 --num-updates 5_000 --eval-frequency 2_500"
# medium is the policy after the first number of steps, expert the one after the second; sets have the third's size.
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1"} medium=${3:-40_000} expert=${4:-100_000} size=${5:-50_000}
flags=${6:-"--batch-size 128 --num-updates 10_000 --eval-frequency 5_000"}
starts=$((${medium//_/} < 5000 ? 1000 : 5000)) updates=${flags#*--num-updates }
export OMP_NUM_THREADS=1
mkdir -p datasets
at=datasets/${env}
sac="python sac.py --env $env --learning-starts $starts --eval-frequency 5_000 --diagnostics-frequency 0"
[ -f ${at}_random.hdf5 ] ||
  python sac.py --env $env --total-timesteps $size --learning-starts $size --exp-name random --save-dataset ${at}_random.hdf5
[ -f ${at}_medium_replay.hdf5 ] ||
  $sac --total-timesteps $medium --exp-name medium --save-dataset ${at}_medium_replay.hdf5
[ -f ${at}_medium.hdf5 ] ||
  python sac.py --resume runs/${env}__medium__1__* --rollout-dataset ${at}_medium.hdf5 --rollout-steps $size
[ -f ${at}_replay_${expert//_/}.hdf5 ] || # the file of offline.sh
  $sac --total-timesteps $expert --exp-name sac --save-dataset ${at}_replay_${expert//_/}.hdf5
[ -f ${at}_expert.hdf5 ] ||
  python sac.py --resume runs/${env}__sac__1__* --rollout-dataset ${at}_expert.hdf5 --rollout-steps $size
run="python cql_continuous.py --env $env --holdout 0 --eval-episodes 20 $flags"
for seed in $seeds; do
  for kind in random medium_replay medium expert; do
    data="--seed $seed --dataset ${at}_$kind.hdf5"
    $run $data --bc-steps 0 --exp-name ${kind}_cql_h
    $run $data --bc-steps 0 --exp-name ${kind}_naive --cql-alpha 0
    $run $data --bc-steps ${updates%% *} --exp-name ${kind}_bc --cql-alpha 0
  done
done
python - ${at}_replay_${expert//_/}.hdf5 ${at}_replay <<'PYTHON'
import sys
import h5py, numpy as np
with h5py.File(sys.argv[1]) as f:  # whole episodes, drawn from the whole run
    ends = np.flatnonzero(f["terminals"][()] | f["timeouts"][()]) + 1
    episodes = np.split(np.arange(ends[-1]), ends[:-1])
    order = np.random.default_rng(0).permutation(len(episodes))
    for n in (5_000, 15_000):
        lengths = np.cumsum([len(episodes[i]) for i in order])
        rows = np.sort(np.concatenate([episodes[i] for i in order[: 1 + np.searchsorted(lengths, n)]]))
        with h5py.File(f"{sys.argv[2]}_{n}.hdf5", "w") as g:
            for key in f:
                g[key] = f[key][()][rows]
PYTHON
for seed in $seeds; do
  for n in 5000 15000; do
    data="--seed $seed --dataset ${at}_replay_$n.hdf5 --bc-steps 0"
    $run $data --exp-name replay_${n}_naive --cql-alpha 0
    $run $data --exp-name replay_${n}_cql_h
  done
done
