#!/usr/bin/env bash
# LoRA on a language model whose frozen linear layers are in 4 bits (QLoRA), vision tower and merger frozen. It needs
# bitsandbytes, and vlft train names the pip command if that is missing. The same settings in YAML: examples/qlora.yaml
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --vision frozen --merger frozen --language lora
    --bits 4
    --lora_rank 32 --lora_alpha 64 --lora_dropout 0.05
    --learning_rate 1e-4
)
picture_tokens 256 1280 "$@"
finetune "$@"
