"""`vlft train`: fine-tune a base on your rows."""

from __future__ import annotations

from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Parse the flags, train, say where the weights are."""
    from vlft.cli.quiet import quiet

    quiet()
    from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
    from vlft.config.parse import FlagParser

    parser = FlagParser(
        "train",
        (DataFlags, ModelFlags, TrainFlags),
        description="Fine-tune Qwen2-VL on LLaVA-style rows of text, pictures and videos.",
        epilog="example: vlft train --model_id Qwen/Qwen2-VL-2B-Instruct --data_path train.json --image_folder images "
        "--output_dir runs/first --vision lora --merger lora --language lora",
    )
    parsed = parser.parse(argv)
    from vlft.train.run import train

    train(parsed)
    return 0
