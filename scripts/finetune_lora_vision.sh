#!/usr/bin/env bash
# LoRA on vision tower, merger and language model. The same settings in YAML: examples/lora_vision.yaml
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --vision lora --merger lora --language lora
    --lora_rank 32 --lora_alpha 64 --lora_dropout 0.05
    --learning_rate 2e-4
)
picture_tokens 256 1280 "$@"
finetune "$@"
