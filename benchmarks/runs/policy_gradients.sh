#!/usr/bin/env bash
# ppo.py, and kfac_npg.py as K-FAC, TRPO and plain gradient, at equal environment steps; SB3's PPO beside it on MuJoCo.
#   bash benchmarks/runs/policy_gradients.sh "CartPole-v1 Pendulum-v1 HalfCheetah-v5 Hopper-v5" "1 2 3" sb3/bin/python
#   bash benchmarks/runs/policy_gradients.sh "CartPole-v1 Pendulum-v1 HalfCheetah-v5 Hopper-v5" 0 sb3/bin/python 20_000
#   python tools/report.py runs/*__{ppo,npg}*__* --curves benchmarks/raw/policy_gradients.csv
#   python benchmarks/figures.py policy_gradients
# Each run takes one thread: start a call a seed side by side, or one array task a seed. The second line, alone on the
# machine, is for the figure's seconds: seed 0 is left out of its returns. The last argument cuts every run's steps.
# On MuJoCo ppo.py has the settings of Tianshou's benchmark, then CleanRL's (ppo_usual) and those without value clipping;
# SB3 its defaults, annealed and normalised.
set -euo pipefail
envs=${1:-"CartPole-v1 Pendulum-v1 HalfCheetah-v5 Hopper-v5"} seeds=${2-"1 2 3"} peer=${3:-} most=${4:-500_000}
export OMP_NUM_THREADS=1
normal="--normalize-obs --normalize-reward"
for env in $envs; do
  episodes=10 usual="" none="--solver none --num-envs 8 --num-steps 16 --learning-rate 1e-3"
  case $env in
    CartPole-v1) steps=200_000 ppo="" npg="" ;;
    Pendulum-v1)
      steps=200_000 episodes=100 npg="--gamma 0.9 --log-std-init -0.7 $normal" none="$none --gamma 0.9 $normal"
      ppo="--num-steps 256 --update-epochs 10 --num-minibatches 16 --learning-rate 1e-3 --gamma 0.9 --ent-coef 0"
      ppo="$ppo --no-clip-vloss --recompute-advantages --log-std-init -1.2" ;;
    *)
      steps=500_000 npg="--num-envs 1 --num-steps 2048 $normal" none="$none $normal"
      ppo="--num-envs 8 --num-steps 256 --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 --ent-coef 0"
      ppo="$ppo --no-clip-vloss --no-norm-adv --recompute-advantages --log-std-init -0.5 $normal"
      usual="--num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 --ent-coef 0 $normal" ;;
  esac
  steps=$((${steps//_/} < ${most//_/} ? ${steps//_/} : ${most//_/}))
  every=$((steps / 20 > 10000 ? steps / 20 : 10000))
  common="--env $env --total-timesteps $steps --eval-frequency $every --eval-episodes $episodes"
  for seed in $seeds; do
    python ppo.py $common --seed $seed --exp-name ppo $ppo
    [ -z "$usual" ] || python ppo.py $common --seed $seed --exp-name ppo_usual $usual
    [ -z "$usual" ] || python ppo.py $common --seed $seed --exp-name ppo_usual_noclip $usual --no-clip-vloss
    python kfac_npg.py $common --seed $seed --exp-name npg_kfac $npg
    python kfac_npg.py $common --seed $seed --exp-name npg_trpo $npg --solver cg --line-search --damping 0.1
    python kfac_npg.py $common --seed $seed --exp-name npg_none $none
    [ -z "$peer" ] || [[ $env == *Pole* || $env == Pendulum* ]] ||
      $peer benchmarks/peers/sb3.py ppo train --env $env --seed $seed --steps $steps --eval-frequency $every --normalize
  done
done
