#!/usr/bin/env bash
# qt_opt.py: from scratch on Pendulum; on Reacher and Hopper offline and then online, beside online from scratch; on
# narrow data, those of one trained policy, with CQL's term and without, beside a clone; with one, two and five
# iterations of CEM online, in two dimensions (Reacher) and in six (HalfCheetah); and with two and five offline in six
# dimensions, on the replay of offline.sh.
#   bash benchmarks/runs/qt_opt.sh "scratch pair hopper narrow iterations" "1 2 3"
#   bash benchmarks/runs/qt_opt.sh cheetah "1"
#   python tools/report.py runs/*__qt_* --csv benchmarks/raw/qt_opt.csv --curves benchmarks/raw/qt_opt_curves.csv
#   python benchmarks/figures.py qt_opt
# Each run takes one thread: start one part, or other seeds, beside another.
set -euo pipefail
parts=${1:-"scratch pair hopper narrow iterations cheetah"} seeds=${2-"1 2 3"}
export OMP_NUM_THREADS=1
online="--collect-steps 1_000 --num-updates 0 --offline-share 0.1"
file=datasets/Pendulum-v1_narrow.hdf5
for part in $parts; do for seed in $seeds; do
  run="python qt_opt.py --seed $seed"
  if [ $part = scratch ]; then
    $run $online --online-steps 5_000 --exp-name qt_scratch
  elif [ $part = pair ]; then
    run="$run --env Reacher-v5 --eval-frequency 1_000 --eval-episodes 50"
    $run --collect-steps 4_000 --num-updates 8_000 --online-steps 8_000 --exp-name qt_pair
    $run $online --online-steps 11_000 --exp-name qt_scratch
  elif [ $part = hopper ]; then
    run="$run --env Hopper-v5 --cem-iterations 3 --eval-frequency 1_000"
    $run --collect-steps 10_000 --num-updates 10_000 --online-steps 10_000 --exp-name qt_pair
    $run $online --online-steps 19_000 --exp-name qt_scratch
  elif [ $part = iterations ]; then
    for k in 1 2 5; do
      run="python qt_opt.py --seed $seed $online --eval-episodes 20 --cem-iterations $k --exp-name qt_online$k"
      $run --env Reacher-v5 --online-steps 5_000
      $run --env HalfCheetah-v5 --online-steps 9_000 --eval-frequency 3_000
    done
  elif [ $part = cheetah ]; then
    run="$run --env HalfCheetah-v5 --dataset datasets/HalfCheetah-v5_replay_100000.hdf5 --holdout 0"
    run="$run --num-updates 6_000 --width 256 --eval-frequency 2_000 --diagnostics-frequency 1_000"
    for k in 2 5; do $run --cem-iterations $k --exp-name qt_cem$k; done
  else
    [ -f $file ] || python sac.py --total-timesteps 8_000 --exp-name narrow_source
    [ -f $file ] || python tools/rollouts.py runs/Pendulum-v1__narrow_source__* --out $file --steps 4_000
    data="--dataset $file --num-updates 6_000 --online-steps 0"
    $run $data --exp-name qt_narrow
    $run $data --exp-name qt_narrow_cql --cql-alpha 5
    $run $data --exp-name qt_narrow_cql50 --cql-alpha 50
    python cql_continuous.py --seed $seed --cql-alpha 0 --dataset $file --num-updates 6_000 --exp-name qt_narrow_sac
    cloning="--num-updates 3_000 --behaviour-steps 3_000"
    python policy_constraints.py --seed $seed --dataset $file $cloning --exp-name qt_narrow_bc
  fi
done; done
