#!/usr/bin/env bash
# Merge a LoRA run into its base model: RUN (a run folder, a checkpoint-N or an adapter) -> OUTPUT (new or empty).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z ${RUN:-} || -z ${OUTPUT:-} ]]; then
    cat >&2 <<TEXT
${0##*/}: RUN and OUTPUT are needed
  RUN=output/run OUTPUT=output/merged bash scripts/${0##*/} [--dtype bf16] [--base_model MODEL] [--json]
TEXT
    exit 2
fi
exec "$python" -m vlft merge "$RUN" "$OUTPUT" "$@"
