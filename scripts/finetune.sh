#!/usr/bin/env bash
# Full fine-tuning: vision tower, merger and language model. The same settings in YAML: examples/full.yaml
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --vision full --merger full --language full
    --learning_rate 1e-5
)
picture_tokens 512 1280 "$@"
tower_rate vision 2e-6 "$@" # lower, because the vision tower was trained far longer than the layers on top of it
tower_rate merger 1e-5 "$@"
finetune "$@"
