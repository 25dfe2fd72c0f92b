"""Compare vlft with TRL's DPOTrainer on the same rows and weights, by hand. Needs trl and datasets, which CI lacks.

    python tests/trl_preference.py            losses, rewards and gradients, printed
    python tests/trl_preference.py --double   the same in float64, where rounding does not hide a difference
    python tests/trl_preference.py --double --write    also stores TRL's figures in trl_preference.json
    python tests/trl_preference.py --time     an epoch of both, alternating
    python tests/trl_preference.py --flops    operations of a pair: by vlft.model.flops at 2B and 7B, by torch if tiny

TRL also trains the line break that the chat template writes after `<|im_end|>`. vlft does not, so that token is taken
out of TRL's `completion_mask`; it stays in `input_ids`. TRL's "sigmoid" has no label smoothing: its "aot" with one pair
in a micro-batch is that loss. Its "sft" is the mean over the tokens of a micro-batch, ours that of each row. So losses
with one of the two are computed in micro-batches of one pair, and averaged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
from preferred import (  # noqa: E402
    LOSSES,
    PAIRS,
    TOWERS,
    Setup,
    arguments,
    figures,
    ours,
    perturb,
    prepared,
    references,
    trained,
    written,
)

from vlft.demo.tiny import build_tiny, tiny_processor  # noqa: E402
from vlft.families import FAMILIES  # noqa: E402

STORED = Path(__file__).with_name("trl_preference.json")
FAMILIES_TRIED = ("qwen2_vl", "qwen3_vl")
STATISTICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
              "logps/rejected")  # fmt: skip
#: Loss of `LOSSES` -> TRL's loss types, their weights, its label smoothing.
TRL_LOSSES: dict[str, tuple[list[str], list[float], float]] = {
    "sigmoid": (["sigmoid"], [1.0], 0.0),
    "ipo": (["ipo"], [1.0], 0.0),
    "hinge": (["hinge"], [1.0], 0.0),
    "sigmoid, smoothed": (["aot"], [1.0], 0.2),
    "sigmoid + sft": (["sigmoid", "sft"], [1.0, 0.7], 0.0),
    "ipo + sft": (["ipo", "sft"], [1.0, 0.7], 0.0),
}


def dataset(folder: Path, pairs: list[dict[str, Any]] = PAIRS) -> Any:
    """The rows as TRL takes them."""
    from datasets import Dataset, Image, List

    rows = [{**one, "images": [str(folder / name) for name in one["images"]]} for one in pairs]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def trl_trainer(base: Path, folder: Path, model_type: str, lora: dict[str, Any] | None, **more: Any) -> Any:
    """TRL's trainer on the base. With LoRA the reference is the base, in full a second model.

    Args:
        lora: `target_modules`, rank and alpha; None: full.
    """
    import transformers
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    load = getattr(transformers, FAMILIES[model_type].model_class).from_pretrained
    given = {
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "beta": 0.1,
        "max_length": None, "gradient_checkpointing": False, "dataloader_num_workers": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    return DPOTrainer(
        model=load(base, dtype=torch.float32, attn_implementation="sdpa"),
        args=DPOConfig(str(folder / "trl"), **given | more),
        train_dataset=dataset(folder, json.loads((folder / "pairs.json").read_text())),
        processing_class=transformers.AutoProcessor.from_pretrained(base),
        peft_config=None if lora is None else LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **lora),
    )


def without_line_break(batch: dict[str, Any], end: int) -> dict[str, Any]:
    """The batch without the tokens after the end of a turn in `completion_mask`."""
    mask, ids = batch["completion_mask"].clone(), batch["input_ids"]
    for row in range(len(ids)):
        last = int(((ids[row] == end) & mask[row].bool()).nonzero()[-1])
        assert int(mask[row, last + 1 :].sum()) == 1  # the line break
        mask[row, last + 1 :] = 0
    return {**batch, "completion_mask": mask}


def theirs(trainer: Any, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """TRL's figures and gradients of a step on all rows."""
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = TRL_LOSSES[name]
    rows = [dict(row) for row in trainer.train_dataset]
    single = name not in ("sigmoid", "ipo", "hinge")
    parts = [[row] for row in rows] if single else [rows]
    end = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model, total = trainer.model.train(), 0.0
    model.zero_grad()
    trainer._metrics["train"].clear()
    for part in parts:
        batch = without_line_break(dict(trainer.data_collator([dict(row) for row in part])), end)
        loss = trainer._compute_loss(model, batch, False) / len(parts)
        loss.backward()
        total += float(loss.detach())
    logged = trainer._metrics["train"]
    statistics = {key: sum(logged[key]) / len(logged[key]) for key in STATISTICS}
    gradients = {name: p.grad.clone() for name, p in trained(model) if p.grad is not None}
    return figures(total, statistics, gradients), gradients


def lora_of(setup: Setup) -> dict[str, Any]:
    """The settings of the adapter of a prepared model, for a plain `LoraConfig`."""
    config = setup.model.peft_config["default"]
    names = [name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
             for name, _ in setup.model.named_modules() if name.endswith(".lora_A.default")]  # fmt: skip
    return {"target_modules": names, "r": config.r, "lora_alpha": config.lora_alpha}


def compare(model_type: str, preset: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Print and return the figures of both for all losses, computed in a dtype.

    Returns:
        loss -> TRL's figures, with "difference": that of ours.
    """
    base = build_tiny(folder / "base", FAMILIES[model_type])
    written(folder)
    setup = prepared(base, folder, preset)
    setup.model.to(dtype)
    reference_A = references(setup)
    perturb(setup.model)
    trainer = trl_trainer(base, folder, model_type, lora_of(setup) if preset == "lora" else None)
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.to(dtype)
    perturb(trainer.model)
    found = {}
    for name in LOSSES:
        (mine, my_gradients), (wanted, gradients) = ours(setup, name, reference_A), theirs(trainer, name)
        assert set(my_gradients) == set(gradients)
        largest = max(float(g.abs().max()) for g in gradients.values())
        shares = {
            # A gradient that is 0 but for rounding (a bias that softmax removes) is compared with the largest one.
            key: float((my_gradients[key] - g).abs().max() / max(float(g.abs().max()), 1e-5 * largest))
            for key, g in gradients.items()
        }
        worst = max(shares, key=shares.__getitem__)
        difference = abs(mine["loss"] - wanted["loss"]) / abs(wanted["loss"])
        print(
            f"{model_type} {preset} {name}: TRL {wanted['loss']:.8f} vlft {mine['loss']:.8f}, relative "
            f"{difference:.1e}; {len(shares)} gradients, worst {shares[worst]:.1e} ({worst})",
            flush=True,
        )
        apart = max(abs(mine[key] - wanted[key]) / max(1.0, abs(wanted[key])) for key in STATISTICS)
        found[name] = {**wanted, "difference": {"loss": difference, "gradient": shares[worst], "logged": apart}}
    return found


#: Sizes of a base whose time is that of its matmuls, and not that of starting them.
LARGER = {
    "text": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]}},
    "vision": {"embed_dim": 256, "depth": 6, "num_heads": 4, "hidden_size": 512},
}  # fmt: skip


def time_epochs(folder: Path, *, larger: bool, repeat: int, rows: int, epochs: int, batch: int = 4) -> None:
    """Print the seconds of training with both, in turn, on the same rows and base. Loading the model is not in them."""
    from vlft.cli.main import main
    from vlft.train.trainer import VlftTrainer

    family = FAMILIES["qwen2_vl"]
    base = build_tiny(folder / "base", family, shape=family.tiny.but(**LARGER) if larger else None)
    numbered = [(i, PAIRS[i % len(PAIRS)]) for i in range(rows)]
    written(folder, [
        {**one, "prompt": [{"role": "user", "content": f"{i}. {one['prompt'][0]['content']}"}]} for i, one in numbered
    ])  # fmt: skip
    seconds: dict[str, list[float]] = {"trl": [], "vlft": []}

    def timed(which: str, train: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = train()
        seconds[which].append(time.perf_counter() - start)
        return result

    stock = VlftTrainer.train
    lora = lora_of(prepared(base, folder, "lora"))
    settings = {"num_train_epochs": epochs, "per_device_train_batch_size": batch, "learning_rate": 1e-3}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    try:
        VlftTrainer.train = lambda *args, **kwargs: timed("vlft", lambda: stock(*args, **kwargs))  # type: ignore
        for turn in range(repeat):
            timed("trl", trl_trainer(base, folder, "qwen2_vl", lora, logging_steps=1, **settings).train)
            more = (*TOWERS["lora"], *flags, "--gradient_accumulation_steps", "1", "--packing", "false")
            assert main(arguments(base, folder / "pairs.json", folder / f"vlft-{turn}", *more)) == 0
    finally:
        VlftTrainer.train = stock  # type: ignore[method-assign]
    least = {name: min(values) for name, values in seconds.items()}
    turns = {name: [round(value, 2) for value in values] for name, values in seconds.items()}
    print(
        f"{'larger' if larger else 'tiny'} base, {rows} pairs, {batch} a step, {epochs} epochs, seconds of each turn "
        f"{turns}; vlft with its pass for the reference. Ratio of the least: {least['trl'] / least['vlft']:.2f}",
        flush=True,
    )


#: Text tokens of the prompt, of the chosen and of the rejected answer, and patches of each picture.
SHAPES = {"one picture of 1,280 tokens": (60, 150, 150, [5120]), "five of 600": (100, 300, 300, [2400] * 5),
          "one of 256": (40, 80, 80, [1024])}  # fmt: skip


def print_flops() -> None:
    """Print the operations of a pair under LoRA, without the padding of TRL's batches."""
    from vlft.families import sizes_of
    from vlft.model.build import build_config
    from vlft.model.flops import required_flops, total
    from vlft.model.towers import Towers

    family = FAMILIES["qwen2_vl"]
    settings = {"language": Towers(), "all towers": Towers(vision="lora", merger="lora", language="lora")}
    for model in ("qwen2-vl-2b", "qwen2-vl-7b"):
        sizes = sizes_of(build_config(family, family.shapes[model], tiny_processor(family).tokenizer))
        for (what, (text, chosen, rejected, pictures)), (trained_towers, towers) in itertools.product(
            SHAPES.items(), settings.items()
        ):
            prompt, answers = text + sum(pictures) // 4, {"supervised": chosen + rejected}
            plain = [prompt + chosen, prompt + rejected]
            twice = required_flops(sizes, towers, lengths=plain, vision_lengths=pictures * 2, **answers)
            branch = required_flops(sizes, towers, lengths=[prompt + chosen, rejected], key_lengths=plain,
                                    vision_lengths=pictures, **answers)  # fmt: skip
            of_trl = total(twice) + sum(part.forward for part in twice.values())
            reference = sum(part.forward for part in branch.values())
            whole = total(branch) + reference
            print(
                f"{model}, {what}, LoRA on {trained_towers}: TRL {of_trl / 1e12:.1f} TF, vlft "
                f"{total(branch) / 1e12:.1f} ({of_trl / total(branch):.2f}x less), with its pass for the reference "
                f"{whole / 1e12:.1f} ({of_trl / whole:.2f}x less)"
            )


def print_counted(folder: Path) -> None:
    """Print what torch counts of a step on all rows, with their padding in TRL."""
    from torch.utils.flop_counter import FlopCounterMode

    base = build_tiny(folder / "base", FAMILIES["qwen2_vl"])
    written(folder)
    setup = prepared(base, folder, "lora")
    trainer = trl_trainer(base, folder, "qwen2_vl", lora_of(setup))
    with FlopCounterMode(display=False) as in_pass:
        reference_A = references(setup)
    counted = []
    for step in (lambda: theirs(trainer, "sigmoid"), lambda: ours(setup, "sigmoid", reference_A)):
        with FlopCounterMode(display=False) as counter:
            step()
        counted.append(counter.get_total_flops())
    by_trl, by_vlft = counted
    with_pass = by_vlft + in_pass.get_total_flops()
    print(f"tiny base, {len(PAIRS)} rows, LoRA on all towers, counted by torch: TRL {by_trl / 1e9:.3f} GF, vlft "
          f"{by_vlft / 1e9:.3f} ({by_trl / by_vlft:.2f}x less), with its pass for the reference {with_pass / 1e9:.3f} "
          f"({by_trl / with_pass:.2f}x less)")  # fmt: skip


def run() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--flops", action="store_true")
    parser.add_argument("--double", action="store_true")
    chosen = parser.parse_args()
    dtype = torch.float64 if chosen.double else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        if chosen.flops:
            print_flops()
            print_counted(Path(folder) / "counted")
        if chosen.time:
            time_epochs(Path(folder) / "tiny", larger=False, repeat=4, rows=48, epochs=1)
            for epochs in (1, 3):
                time_epochs(Path(folder) / f"larger-{epochs}", larger=True, repeat=2, rows=20, epochs=epochs)
        if chosen.time or chosen.flops:
            return
        found = {
            f"{model_type} {preset}": compare(model_type, preset, Path(folder) / f"{model_type}-{preset}", dtype)
            for model_type in FAMILIES_TRIED
            for preset in ("lora", "full")
        }
    if chosen.write:
        import trl

        STORED.write_text(json.dumps({"trl": trl.__version__, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    run()
