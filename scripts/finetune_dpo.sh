#!/usr/bin/env bash
# DPO with LoRA on vision tower, merger and language model. DATA holds preference rows: a chosen and a rejected answer to
# each prompt (data/README.md). To start from an adapter: --adapter output/sft, which then decides what trains. The same
# settings in YAML: examples/dpo.yaml
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --method dpo --beta 0.1
    --learning_rate 5e-6
)
# An adapter to start from has its own towers, rank and alpha.
given --adapter "$@" >/dev/null || preset+=(
    --vision lora --merger lora --language lora
    --lora_rank 32 --lora_alpha 64
)
picture_tokens 256 1280 "$@"
finetune "$@"
