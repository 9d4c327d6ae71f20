#!/usr/bin/env bash
# RLAD (TRRD) on verl 0.9.1, one machine with 8 GPUs: 6 for the student, 2 for the teacher's server.
#
# verl pins other versions of transformers, torch and vLLM than this project, so it needs a separate environment:
#   pip install 'verl[vllm]==0.9.1' 'math-verify>=0.9,<0.10' && pip install --no-deps .
# Then
#   STUDENT=Qwen/Qwen3-1.7B TEACHER=Qwen/Qwen3-8B training/rtap_training/recipes/verl/rlad.sh [further verl settings]
# Student and teacher must share token ids; `rtap train rlad` checks that, verl does not.
#
# Checked: both functions register in verl 0.9.1, and its own distillation_ppo_loss gives rtap_training.losses.trrd_loss on a
# batch with teacher scores (CPU); verl composes these settings. Not tested: training, for lack of a GPU.
# Differences from `rtap train rlad`: one cycle a response; verl divides advantages by the sample deviation plus 1e-6,
# the paper by the population's.
set -euo pipefail

: "${STUDENT:?a checkpoint or model name}" "${TEACHER:?a checkpoint or model name}"
DATA=${DATA:-runs/verl}
QUESTIONS=${QUESTIONS:-countdown}
PYTHON=${PYTHON:-python}

# Every process of verl imports this and finds the loss registered. With several machines, export it before `ray start`.
export VERL_USE_EXTERNAL_MODULES=rtap_training.recipes.verl.trrd

[ -f "$DATA/train.parquet" ] ||
  "$PYTHON" -m rtap_training.recipes.verl.dataset_and_reward --questions "$QUESTIONS" --output "$DATA"

settings=(
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/val.parquet"
  data.train_batch_size=36
  data.max_prompt_length=512
  data.max_response_length=2048
  reward.custom_reward_function.path=pkg://rtap_training.recipes.verl.dataset_and_reward
  reward.custom_reward_function.name=compute_score
  algorithm.adv_estimator=grpo
  actor_rollout_ref.model.path="$STUDENT"
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.ppo_mini_batch_size=36
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
  actor_rollout_ref.actor.clip_ratio_low=0.2
  actor_rollout_ref.actor.clip_ratio_high=0.28
  actor_rollout_ref.actor.use_kl_loss=false
  actor_rollout_ref.actor.policy_loss.loss_mode=trrd
  distillation.enabled=true
  distillation.nnodes=1
  distillation.n_gpus_per_node=2
  distillation.teacher_models.teacher_model.key=teacher
  distillation.teacher_models.teacher_model.model_path="$TEACHER"
  distillation.teacher_models.teacher_model.num_replicas=1
  distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=2
  distillation.distillation_loss.loss_mode=trrd
  distillation.distillation_loss.use_task_rewards=true
  distillation.distillation_loss.use_policy_gradient=false
  distillation.distillation_loss.distillation_loss_coef=0.5 # 1 - alpha
  distillation.distillation_loss.loss_max_clamp=1.0         # bound of the teacher's log-ratio in nats
  trainer.nnodes=1
  trainer.n_gpus_per_node=6
  trainer.logger='["console","tensorboard"]'
  trainer.total_training_steps=1000
  trainer.save_freq=100
  trainer.project_name=rtap
  trainer.experiment_name=rlad
)
exec "$PYTHON" -m verl.trainer.main_ppo "${settings[@]}" "$@"
