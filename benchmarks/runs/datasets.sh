#!/usr/bin/env bash
# The four kinds of dataset, made by sac.py, and on each of them CQL(H), naive offline SAC and behaviour cloning; then
# naive SAC and CQL on 5,000, 15,000 and all transitions of the last one's replay, a twentieth of the episodes held out.
#   bash benchmarks/runs/datasets.sh HalfCheetah-v5 "1 2 3" 40_000 100_000 50_000
#   bash benchmarks/runs/datasets.sh Pendulum-v1 "1 2 3" 3_000 20_000 20_000 \
#     "--batch-size 64 --width 128 --tau 0.01 --num-updates 5_000 --eval-frequency 2_500"
#   python tools/report.py runs/Pendulum-v1__data_* --csv benchmarks/raw/datasets.csv
#   python benchmarks/figures.py datasets
# medium is the policy after the first number of steps, expert the one after the second; sets have the third's size.
# The first call makes the files: start others, seed by seed, after it.
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1"} medium=${3:-40_000} expert=${4:-100_000} size=${5:-50_000}
flags=${6:-"--batch-size 128 --num-updates 10_000 --eval-frequency 5_000"}
starts=$((${medium//_/} < 5000 ? 1000 : 5000)) updates=${flags#*--num-updates }
export OMP_NUM_THREADS=1
mkdir -p datasets
at=datasets/${env} all=${expert//_/}
newest() { ls -td runs/${env}__$1__1__* | head -n 1; }
sac="python sac.py --env $env --learning-starts $starts --eval-frequency 5_000"
[ -f ${at}_random.hdf5 ] ||
  python sac.py --env $env --total-timesteps $size --learning-starts $size --exp-name random --save-dataset ${at}_random.hdf5
[ -f ${at}_medium_replay.hdf5 ] ||
  $sac --total-timesteps $medium --exp-name medium --save-dataset ${at}_medium_replay.hdf5
[ -f ${at}_medium.hdf5 ] ||
  python tools/rollouts.py $(newest medium) --out ${at}_medium.hdf5 --steps $size
[ -f ${at}_replay_$all.hdf5 ] || # the file of offline.sh
  $sac --total-timesteps $expert --exp-name sac --save-dataset ${at}_replay_$all.hdf5
[ -f ${at}_expert.hdf5 ] ||
  python tools/rollouts.py $(newest sac) --out ${at}_expert.hdf5 --steps $size
[ -f ${at}_replay_15000.hdf5 ] || python - ${at}_replay_$all.hdf5 ${at}_replay <<'PYTHON'
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
  run="python cql_continuous.py --env $env --seed $seed --eval-episodes 20 $flags"
  for kind in random medium_replay medium expert; do
    data="--dataset ${at}_$kind.hdf5 --holdout 0 --exp-name data_$kind"
    $run ${data}_cql_h --bc-steps 0
    $run ${data}_naive --bc-steps 0 --cql-alpha 0
    $run ${data}_bc --bc-steps ${updates%% *} --cql-alpha 0
  done
  for n in 5000 15000 $all; do
    data="--dataset ${at}_replay_$n.hdf5 --bc-steps 0 --exp-name data_replay_$n"
    $run ${data}_naive --cql-alpha 0
    $run ${data}_cql_h
  done
done
