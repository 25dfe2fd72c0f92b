#!/usr/bin/env bash
# Video: full fine-tuning at one frame per second and at most 192 tokens for every two frames, as in 2U1's script of
# this name. The same frames with less memory: --vision frozen --merger frozen --language lora --learning_rate 1e-4.
# The same settings in YAML: examples/video.yaml
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset+=(
    --vision full --merger full --language full
    --learning_rate 1e-5
    --fps 1
)
frame_pixels $((360 * 420)) "$@"
tower_rate vision 2e-6 "$@"
tower_rate merger 1e-5 "$@"
finetune "$@"
