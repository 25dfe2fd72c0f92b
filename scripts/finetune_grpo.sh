#!/usr/bin/env bash
# GRPO with LoRA on vision tower, merger and language model: the model learns from rewards of its own completions. It
# needs pip install 'vlft[grpo]'. DATA holds the rows of the other scripts; their last answers are what rewards compare
# with. GLOBAL_BATCH counts prompts, and each has 8 completions. A reward of your own: --reward rewards.py:function
# The same settings in YAML: examples/grpo.yaml
GLOBAL_BATCH=${GLOBAL_BATCH:-16}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --method grpo
    --num_generations 8 --max_completion_length 256 --temperature 1
    --learning_rate 1e-5
    --vision lora --merger lora --language lora
    --lora_rank 32 --lora_alpha 64
)
given --reward "$@" >/dev/null || preset+=(--reward edit_ratio)
picture_tokens 256 1280 "$@"
finetune "$@"
