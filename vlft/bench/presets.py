"""A few steps of every preset on a tiny float32 base, in one process: `python -m vlft.bench.presets FOLDER`.

Trains in full, with LoRA on the language model, and with LoRA on all towers and rows with videos, each as `vlft train`
does. It shows what only a device can show: that every kernel accepts what the towers hand it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

from vlft.bench.choices import PRESETS, Preset
from vlft.bench.mixes import Mix, write_mix
from vlft.bench.ours import run
from vlft.bench.work import run_module

STEPS, PACK_TOKENS, ROWS = 3, 1024, 12
MIXES: dict[Preset, Mix] = {"full": "story", "lora": "story", "lora_vision": "video"}


def main(out: str) -> int:
    """Train each preset. Returns 1 if one of them failed."""
    work, failed = Path(out), 0
    work.mkdir(parents=True, exist_ok=True)
    base = work / "base"  # stored in float32, so that LoRA computes in mixed dtypes under bf16
    run_module(["vlft.demo.tiny", str(base)], log=work / "base.log", say=print)
    videos = importlib.util.find_spec("av") is not None
    for preset, mix in MIXES.items():
        if mix == "video" and not videos:
            print(f"{preset}: without videos, because PyAV is not installed", flush=True)
            mix = "story"
        rows = write_mix(work / "rows", mix, ROWS, seed=0, scale="tiny", unit="byte", say=print)
        towers = [word for tower, mode in PRESETS[preset].items() for word in (f"--{tower}", mode)]
        folder, began = work / preset, time.perf_counter()
        try:
            run([
                *("--model_id", str(base), "--data_path", str(rows), "--output_dir", str(folder), *towers),
                *("--pack_tokens", str(PACK_TOKENS), "--max_steps", str(STEPS), "--logging_steps", "1"),
                *("--save_strategy", "no", "--report_to", "none", "--resume_from_checkpoint", "none"),
                *("--dataloader_num_workers", "1"),
            ])  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the other presets are still of interest
            failed = 1
            print(f"{preset}: FAILED, {type(error).__name__}: {error}", flush=True)
            continue
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [f"{one['loss']:.4f}" for one in map(json.loads, lines) if "loss" in one]
        print(f"{preset}: ok, {mix} rows, losses {', '.join(losses)}, {time.perf_counter() - began:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
