"""Compare flags with each other: flags that contradict another flag, or have no effect because of it.

Works on plain values, so `vlft.config.door` calls it before anything is parsed. `vlft.config.machine` has the checks
that need parsed flags. Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from vlft.config import blocks, evaluation, grpo, preference, quantised, variants
from vlft.config.columns import read_columns
from vlft.config.schedules import scheduler_problems
from vlft.config.values import DEFAULTS, Values
from vlft.errors import ConfigError

TOWERS = ("vision", "merger", "language")
#: Flags that the adapter of `--adapter` decides.
OF_ADAPTER = (*TOWERS, "lora_rank", "lora_alpha", "lora_target", "use_dora", "use_rslora")
SAVING = 4.0  # saving may take this many times --stall_timeout, because network disks can be slow
REPORTING = 300  # seconds that torch.distributed waits beyond --stall_timeout, so that the report is printed first


def contradictions(values: Values, verb: str) -> Iterator[str]:
    """Yield a message for each combination of flags that cannot be carried out.

    Args:
        verb: train and plan need a base and data. For the other verbs only the flags of data and model are compared.
    """
    checks: list[Callable[[Values], Iterator[str]]] = [_pixels, _packs, _columns, _base, _deepspeed]
    checks += [_adapter_in_bench, _method_in_bench] if verb == "bench" else [_towers]
    if verb == "check-data":
        checks.append(_fixes)
    if verb in ("train", "plan"):
        checks += [_needed, _rates, _batches, _steps, evaluation.problems, _loader, _features, scheduler_problems]
        checks += [preference.problems, grpo.problems]
    if verb == "plan":
        checks.append(_out)
    for check in checks:
        yield from check(values)
    for part in (variants, quantised, blocks):
        yield from part.problems(values, verb)


def _method_in_bench(values: Values) -> Iterator[str]:
    if (method := values.of("method")) != "sft":
        yield (
            f"--method {method}: vlft bench train compares with a stock trainer that learns the answers of a row. Drop "
            "it, or use vlft train: metrics.jsonl of a run has tokens per second."
        )


def _out(values: Values) -> Iterator[str]:
    if values.given("out"):
        yield f"--out {values.of('out')} has no effect without --translate OLD"


def _needed(values: Values) -> Iterator[str]:
    if not values.given("model_id"):
        yield "--model_id is missing: the base model, a folder or e.g. Qwen/Qwen2-VL-2B-Instruct"
    if not values.given("data_path") and not values.given("data_mix"):
        yield "--data_path is missing: one or more data files (.json, .jsonl, .csv, .parquet, ...) or folders"


def _base(values: Values) -> Iterator[str]:
    name = str(values.of("model_id") or "")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path and not os.path.exists(os.path.expanduser(name)):
        from vlft.config.places import near_miss

        yield (
            f"{name}: no such model folder (looked for {os.path.abspath(os.path.expanduser(name))}){near_miss(name)}. "
            "Use a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
        )


def _pixels(values: Values) -> Iterator[str]:
    for kind in ("image", "video"):
        low, high = values.of(f"{kind}_min_pixels"), values.of(f"{kind}_max_pixels")
        if low is not None and high is not None and low > high:
            yield f"--{kind}_min_pixels {low} is above --{kind}_max_pixels {high}. Change one of them."
    fps, nframes, most = values.of("fps"), values.of("nframes"), values.of("video_max_frames")
    if fps is not None and nframes is not None:
        yield f"--fps {fps} and --nframes {nframes} both set how many frames a video gets. Keep one."
    if nframes is not None and most is not None and nframes > most:
        yield f"--nframes {nframes} is above --video_max_frames {most}. Change one of them."
    if values.given("data_path") and values.given("data_mix"):
        yield (
            f"--data_path {values.every('data_path')[0]} and --data_mix {values.of('data_mix')}: both name the "
            "training data. Write the file into the mix, or drop one of the two."
        )


def _columns(values: Values) -> Iterator[str]:
    if values.given("columns"):
        try:
            read_columns(values.of("columns"))
        except ConfigError as error:
            yield str(error)


def _fixes(values: Values) -> Iterator[str]:
    for flag in ("dedup", "split"):
        if values.given(flag) and not values.given("fix"):
            yield f"--{flag} has no effect without --fix, which writes the rows. Add --fix OUT.jsonl, or drop it."


def _packs(values: Values) -> Iterator[str]:
    for flag in ("pack_tokens", "pack_patches"):
        if values.given(flag) and not values.of("packing"):
            yield f"--{flag} {values.of(flag)} has no effect: --packing is false. Drop one of the two."


def _mode(values: Values, tower: str) -> str | None:
    """Return how a tower trains; None if the adapter of `--adapter` decides, which is read later."""
    return None if values.given("adapter") and not values.given(tower) else values.of(tower)


def _adapter_in_bench(values: Values) -> Iterator[str]:
    if values.given("adapter"):
        yield (
            f"--adapter {values.of('adapter')} has no effect: a trained adapter is as fast as a new one. Drop it, and "
            "set --vision, --merger, --language and --lora_rank."
        )


def _towers(values: Values) -> Iterator[str]:
    modes = {tower: _mode(values, tower) for tower in TOWERS}
    if values.given("adapter") and modes["language"] == "full":
        yield (
            f"--language full with --adapter {values.of('adapter')} is refused: the run would train LoRA and the "
            f"weights below it. Merge the adapter first (vlft merge {values.of('adapter')} OUT), then use --model_id "
            "OUT without --adapter; or drop --language full."
        )
    if set(modes.values()) == {"frozen"}:
        yield (
            "nothing would be trained: --vision, --merger and --language are all frozen. Set at least one to full or "
            "lora."
        )
    lora = [tower for tower in TOWERS if modes[tower] == "lora"]
    if modes["language"] == "full" and lora:
        yield (
            f"--language full with --{lora[0]} lora is refused: the adapter would contain a second copy of the "
            f"language model. Use --{lora[0]} full, or --language lora."
        )
    if not lora and None not in modes.values():
        shown = ", ".join(f"{tower} {mode}" for tower, mode in modes.items())
        for flag in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"):
            if values.given(flag):
                yield f"--{flag} is given, but no tower is lora ({shown}), so it has no effect. Drop it."


def _rates(values: Values) -> Iterator[str]:
    for tower in ("vision", "merger"):
        flag = f"{tower}_lr"
        if values.given(flag) and _mode(values, tower) == "frozen":
            yield (
                f"--{flag} {values.of(flag)} has no effect: --{tower} is frozen. Drop it, or set --{tower} to full or "
                "lora."
            )


def _batches(values: Values) -> Iterator[str]:
    packing = values.of("packing") and values.of("method") != "grpo"
    for flag in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if packing and values.of(flag) != 1:
            yield (
                f"--{flag} {values.of(flag)} has no effect: with packing a micro-batch is one pack. Set its size "
                "with --pack_tokens and the rows of a step with --global_batch, or set --packing false."
            )
    if values.given("global_batch") and values.given("gradient_accumulation_steps"):
        yield (
            f"--global_batch {values.of('global_batch')} and --gradient_accumulation_steps "
            f"{values.of('gradient_accumulation_steps')} both set how large a step is. Keep one."
        )


def _steps(values: Values) -> Iterator[str]:
    if values.of("logging_nan_inf_filter"):
        yield (
            "--logging_nan_inf_filter true has no effect: no loss is hidden, and a loss that is not finite stops the "
            "run. Drop it. To skip such steps, use --max_nonfinite_steps."
        )
    if values.of("max_nonfinite_steps") and values.given("deepspeed"):
        yield (
            f"--max_nonfinite_steps {values.of('max_nonfinite_steps')} has no effect with --deepspeed: its engine "
            "updates the weights before the gradient can be checked. Drop one of the two."
        )
    if values.of("fp16"):
        yield (
            "--fp16 true is not supported: Qwen's models are trained in bf16, and their activations overflow float16, "
            "whose largest number is 65,504 (QwenLM/Qwen3 issues 670 and 868). Drop it: a GPU with bf16 computes in "
            "bf16, and an older one in float32."
        )
    patience = values.of("stall_timeout")
    if patience and values.given("ddp_timeout") and values.of("ddp_timeout") < patience + REPORTING:
        yield (
            f"--ddp_timeout {values.of('ddp_timeout')} would end processes that wait for another process before "
            f"--stall_timeout {patience:g} can report which one. Set it to at least {patience + REPORTING:g}, drop it, "
            "or lower --stall_timeout."
        )


def _loader(values: Values) -> Iterator[str]:
    workers = values.of("dataloader_num_workers")
    if workers == 0 and values.given("dataloader_prefetch_factor"):
        yield (
            f"--dataloader_prefetch_factor {values.of('dataloader_prefetch_factor')} has no effect without loader "
            "processes: --dataloader_num_workers is 0. Drop one of the two."
        )


def _features(values: Values) -> Iterator[str]:
    if not values.of("cache_vision_features"):
        for flag in ("vision_cache", "vision_cache_gb"):
            if values.given(flag) and values.of(flag) != DEFAULTS.get(flag):
                yield (
                    f"--{flag} {values.of(flag)} has no effect without --cache_vision_features true. Add it, or drop "
                    f"--{flag}."
                )
        return
    modes = {tower: _mode(values, tower) for tower in ("vision", "merger")}
    trained = [f"--{tower} is {mode}" for tower, mode in modes.items() if mode not in (None, "frozen")]
    if trained:
        yield (
            f"--cache_vision_features true: {' and '.join(trained)}, so the features of a picture change with each "
            "step. Drop it, or freeze both."
        )


def _deepspeed(values: Values) -> Iterator[str]:
    if values.given("deepspeed"):
        from vlft.config.deepspeed import check_name

        try:
            check_name(str(values.of("deepspeed")))
        except ConfigError as error:
            yield str(error)
        if values.of("optim") == "adagrad":
            yield (
                "--optim adagrad with --deepspeed: DeepSpeed makes a new Adagrad with one learning rate for all "
                "towers, and no weight decay. Use adamw_torch_fused, or drop --deepspeed."
            )
