"""`vlft plan`: show what a run would train, at which learning rates, in how many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.cli.command import Write, add_json, command, train_parser

if TYPE_CHECKING:
    from vlft.config.parse import FlagParser, Parsed

EXAMPLES = """\
examples:
  vlft plan --config examples/lora.yaml --model_id Qwen/Qwen2-VL-2B-Instruct --data_path train.json \\
      --image_folder images --gpus 8
  vlft plan --config examples/full.yaml --model_id Qwen/Qwen2-VL-7B-Instruct --data_path train.json \\
      --image_folder images --gpus 4 --gpu a100-80 --tokens_per_s 20000
  vlft plan --config output/run/config.yaml --json
  vlft plan --translate old.sh --out new.yaml         a script or YAML of another kit becomes a YAML for vlft
"""


def parser() -> FlagParser:
    """Build the command line of `vlft plan`."""
    parser = train_parser(
        "plan",
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
    from vlft.plan import plan

    extra = parsed.extra
    planned = plan(parsed, gpus=extra.gpus, gpu=extra.gpu, measure=extra.measure, tokens_per_s=extra.tokens_per_s)
    if parsed.flags[2].process_index:
        return 0  # under torchrun only rank 0 prints
    if extra.json:
        write(planned.as_json())
    else:
        print(planned.as_text())
    return 0
