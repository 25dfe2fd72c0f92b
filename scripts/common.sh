# Shared code of the finetune scripts. They source it, fill the array `preset` with flags and end with: finetune "$@"

set -euo pipefail
scripts_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python
[[ -x $scripts_dir/../.venv/bin/python ]] && python=$scripts_dir/../.venv/bin/python

show_usage() {
    local script=${0##*/} step
    step="rows make an optimizer
  step on any number of GPUs; for a few hundred rows use GLOBAL_BATCH=8 or 16."
    [[ " ${preset[*]:-} " != *" --method grpo "* ]] || step="prompts make an optimizer
  step on any number of GPUs; each prompt has --num_generations completions."
    cat <<TEXT
  MODEL=Qwen/Qwen3-VL-4B-Instruct DATA=train.json IMAGE_FOLDER=images OUTPUT=output/run bash scripts/$script [flags]
  DATA may be several files, separated by spaces. GPUS=4 uses four GPUs. GLOBAL_BATCH (${GLOBAL_BATCH:-128}) $step
  Several nodes: run it on each, with NNODES=2 NODE_RANK=0 (1 on the next node) MASTER_ADDR=first-node GPUS=8.
  A flag takes precedence over these variables; all flags: vlft train --help all
TEXT
}

usage() { # what is wrong
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    show_usage >&2
    exit 2
}

# The value of a flag on the command line: the last one, as in argparse. Exit status 1 if the flag is absent.
given() { # flag, the command line...
    local flag=$1 value="" status=1
    shift
    while (($#)); do
        case $1 in
            "$flag") value=${2:-} status=0 ;;
            "$flag"=*) value=${1#*=} status=0 ;;
        esac
        shift
    done
    printf '%s' "$value"
    return $status
}

# A separate learning rate for one tower, unless the command line freezes it: vlft refuses a flag that has no effect.
tower_rate() { # vision or merger, rate, the command line...
    local tower=$1 rate=$2
    shift 2
    [[ $(given "--$tower" "$@") == frozen ]] || preset+=("--${tower}_lr" "$rate")
}

# How the base counts pixels: `28 frame`, or e.g. `32 clip` for Qwen3-VL. Its config.json decides. If it cannot be read,
# vlft train says why.
base_pixels() { # the command line...
    local model found
    model=$(given --model_id "$@") || model=${MODEL:-}
    found=$("$python" -m vlft.cli.base_pixels "$model" 2>/dev/null) || true
    [[ $found =~ ^[1-9][0-9]*\ (clip|frame)$ ]] || found="28 frame"
    printf '%s' "$found"
}

# The smallest and the largest picture, in tokens. A token is 28 x 28 pixels, or 32 x 32 from Qwen3-VL on.
picture_tokens() { # fewest, most, the command line...
    local least=$1 most=$2 side
    shift 2
    side=$(base_pixels "$@")
    side=${side% *}
    preset+=(--image_min_pixels $((least * side * side)) --image_max_pixels $((most * side * side)))
}

# The largest frame in pixels, for bases that limit each frame. Others limit a whole clip, and keep their own limit.
frame_pixels() { # most, the command line...
    local most=$1
    shift
    [[ $(base_pixels "$@") == *clip ]] || preset+=(--video_max_pixels "$most")
}

whole_number() { # name, value
    [[ $2 =~ ^[1-9][0-9]*$ ]] || usage "$1=$2: a whole number of 1 or more is needed"
}

# Fills the array `launcher`: empty for one process, else torchrun with the environment's numbers of GPUs and nodes.
choose_launcher() {
    local gpus=${GPUS:-1} nodes=${NNODES:-1} rank=${NODE_RANK:-} port=${MASTER_PORT:-29500}
    launcher=()
    whole_number GPUS "$gpus"
    whole_number NNODES "$nodes"
    if ((nodes > 1)); then
        [[ -n $rank ]] || usage "NNODES=$nodes, but NODE_RANK is missing: 0 on the first node, 1 on the next"
        [[ $rank =~ ^(0|[1-9][0-9]*)$ ]] && ((rank < nodes)) || usage "NODE_RANK=$rank: with NNODES=$nodes, 0 to $((nodes - 1))"
        [[ -n ${MASTER_ADDR:-} ]] || usage "NNODES=$nodes, but MASTER_ADDR is missing: the address at which the others reach the first node"
        whole_number MASTER_PORT "$port"
        ((port < 65536)) || usage "MASTER_PORT=$port: a port is below 65536"
        launcher=(--nnodes "$nodes" --node_rank "$rank" --master_addr "$MASTER_ADDR" --master_port "$port")
    else
        # Without the number of nodes each of them would train alone, in the same folder.
        [[ ${rank:-0} == 0 ]] || usage "NODE_RANK=$rank, but NNODES is missing: how many nodes there are"
        ((gpus == 1)) || launcher=(--standalone)
    fi
    ((${#launcher[@]} == 0)) || launcher=(-m torch.distributed.run "${launcher[@]}" --nproc_per_node "$gpus")
}

# Runs vlft train with the environment's flags, the preset and the command line, in this order: the last value wins.
finetune() { # the command line...
    local rows=${GLOBAL_BATCH:-128} files=() from_env=() launcher=()

    if given -h "$@" >/dev/null || given --help "$@" >/dev/null; then
        show_usage
        exit 0
    fi

    # The preset consists of flags, which would silently override the lines of the file.
    ! given --config "$@" >/dev/null || usage "the preset and --config exclude each other: vlft train --config FILE"

    if ! given --model_id "$@" >/dev/null; then
        [[ -n ${MODEL:-} ]] || usage "MODEL or --model_id is missing"
        from_env+=(--model_id "$MODEL")
    fi
    if ! given --data_path "$@" >/dev/null; then
        [[ -n ${DATA:-} ]] || usage "DATA or --data_path is missing"
        if [[ -e $DATA ]]; then files=("$DATA"); else read -r -d '' -a files <<<"$DATA" || true; fi
        from_env+=(--data_path "${files[@]}")
    fi
    if ! given --output_dir "$@" >/dev/null; then
        [[ -n ${OUTPUT:-} ]] || usage "OUTPUT or --output_dir is missing"
        from_env+=(--output_dir "$OUTPUT")
    fi
    [[ -z ${IMAGE_FOLDER:-} ]] || from_env+=(--image_folder "$IMAGE_FOLDER")

    choose_launcher
    whole_number GLOBAL_BATCH "$rows"
    if ! given --gradient_accumulation_steps "$@" >/dev/null; then
        from_env+=(--global_batch "$rows")
    fi

    if ((${#launcher[@]})); then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the launcher's own choice, without its banner
        exec "$python" "${launcher[@]}" -m vlft train "${from_env[@]}" "${preset[@]}" "$@"
    fi
    # GPUS=1 on a machine with several GPUs means one: the first, unless the user chose another.
    [[ -z ${GPUS:-} ]] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
    exec "$python" -m vlft train "${from_env[@]}" "${preset[@]}" "$@"
}

# Flags of all presets. vlft chooses bf16, attention, fused kernels and gradient checkpointing for the machine.
preset=(
    --num_train_epochs 1
    --lr_scheduler_type cosine
    --warmup_steps 0.03 # a value below 1 is a share of all steps (transformers 5)
    --weight_decay 0.1
    --logging_steps 1
    --save_steps 200
    --save_total_limit 10
)
