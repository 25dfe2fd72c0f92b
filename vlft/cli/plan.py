"""`vlft plan`: show what a run would train, at which learning rates, in how many steps."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from vlft.cli.command import Write, add_json, command
from vlft.cli.early import check_run
from vlft.config.deepspeed import PRESETS
from vlft.config.device import may_have_cuda
from vlft.config.flags import DataFlags, ModelFlags, PlanFlags
from vlft.config.parse import FlagParser, Parsed, train_types

#: Flags that only torch, DeepSpeed or a kernel can check, with the values that need no check on a machine without GPU.
NEED_TORCH = {
    "attn": ("auto", "sdpa"),
    "linear_attn": ("auto", "torch"),
    "use_liger_kernel": ("auto", "false"),
    "deepspeed": tuple(PRESETS),
}
EXAMPLES = """\
examples:
  vlft plan --config examples/lora.yaml --model_id Qwen/Qwen2-VL-2B-Instruct --data_path train.json \\
      --image_folder images --gpus 8
  vlft plan --config examples/full.yaml --model_id Qwen/Qwen2-VL-7B-Instruct --data_path train.json \\
      --image_folder images --gpus 4 --gpu a100-80 --tokens_per_s 20000
  vlft plan --config output/run/config.yaml --json
  vlft plan --translate old.sh --out new.yaml         a script or YAML of another kit becomes a YAML for vlft
"""


def _types(values: Mapping[str, Any], extra: Namespace) -> tuple[type, ...]:
    """Return the flags of a run: without torch if no memory is estimated."""
    memory = extra.gpu is not None or extra.measure or may_have_cuda()
    check_run({name: value for name, value in values.items() if name != "output_dir"})
    if memory or any(name in values and values[name] not in sound for name, sound in NEED_TORCH.items()):
        return train_types(values, extra)
    return DataFlags, ModelFlags, PlanFlags


def parser() -> FlagParser:
    """Build the command line of `vlft plan`."""
    parser = FlagParser(
        "plan",
        _types,
        description="Show what vlft train would do with the same flags: what trains at which learning rate, on how "
        "many rows, in how many steps, and with how much memory. Loads no weights (except with --measure), writes "
        "nothing, needs no GPU.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="processes the run will have (default: 1)")
    parser.add_argument(
        "--gpu", metavar="CARD", help="GPU to estimate memory for, e.g. h100, a100-40, 4090, or GB (default: this one)"
    )
    parser.add_argument(
        "--tokens_per_s", type=float, metavar="R", help="tokens a second of the whole run, to estimate its duration"
    )
    parser.add_argument(
        "--translate",
        metavar="OLD",
        help="translate a script, a command line or a YAML of another kit into flags of vlft, and show what has no "
        "counterpart; -: standard input. Alone or with --out, --gpus and --json",
    )
    parser.add_argument("--out", metavar="NEW.yaml", help="with --translate: also write the flags as a YAML")
    parser.add_argument(
        "--measure", action="store_true", help="train one step on the largest micro-batch here, and compare the memory"
    )
    add_json(parser)
    return parser


@command(parser)
def run(parsed: Parsed, write: Write) -> int:
    """Plan a run and print the plan."""
    from vlft.plan import Asked, plan

    extra = parsed.extra
    asked = Asked(gpus=extra.gpus, gpu=extra.gpu, measure=extra.measure, tokens_per_s=extra.tokens_per_s)
    planned = plan(parsed, asked)
    if parsed.flags[2].process_index:
        return 0  # under torchrun only rank 0 prints
    if extra.json:
        write(planned.as_json())
    else:
        print(planned.as_text())
    return 0
