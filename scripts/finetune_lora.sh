#!/usr/bin/env bash
# LoRA on the language model, vision tower and merger frozen. The same settings in YAML: examples/lora.yaml
# (2U1's script of this name also trains tower and merger in full. To do the same here: --vision full --merger full
# --vision_lr 2e-6 --merger_lr 1e-5.)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --vision frozen --merger frozen --language lora
    --lora_rank 32 --lora_alpha 64 --lora_dropout 0.05
    --learning_rate 1e-4
)
picture_tokens 256 1280 "$@"
finetune "$@"
