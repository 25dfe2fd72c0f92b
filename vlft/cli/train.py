"""`vlft train`: fine-tune a base on your rows."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vlft import screen
from vlft.cli.early import checked_types
from vlft.cli.launched import join
from vlft.cli.quiet import quiet
from vlft.config.parse import FlagParser

EXAMPLES = """\
examples:
  vlft train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --output_dir output/run
  vlft train --model_id Qwen/Qwen2-VL-2B-Instruct --data_path a.json b.jsonl --output_dir output/run \\
      --language lora --merger full --merger_lr 1e-5
  vlft train --config output/run/config.yaml --output_dir output/again     (the same run once more)
  torchrun --nproc_per_node 8 -m vlft train --config my.yaml
  deepspeed --num_gpus 8 --module vlft train --config my.yaml --deepspeed zero2
  srun --ntasks-per-node 8 --gpus-per-node 8 python -m vlft train --config my.yaml     (see examples/slurm.sh)
"""


def parser() -> FlagParser:
    """Build the command line of `vlft train`."""
    return FlagParser(
        "train",
        checked_types,
        description="Fine-tune Qwen-VL models on LLaVA-style rows of text, pictures and videos.",
        epilog=EXAMPLES,
    )


def run(argv: Sequence[str]) -> int:
    """Parse the flags and train. Signals are handled from the start, before heavy imports."""
    from vlft.train.signals import Notice

    join(os.environ)
    quiet()
    with Notice(speaks=os.environ.get("RANK", "0") == "0") as notice:
        screen.stage("importing torch and transformers")
        parsed = parser().parse(argv)
        from vlft.cli.threads import share_cores
        from vlft.report import write_report
        from vlft.train.run import train

        if parsed.flags[2].use_cpu:
            share_cores()
        train(parsed, notice, report=write_report)
    return 0
