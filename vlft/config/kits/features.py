"""Flags of features that vlft does not have, or has elsewhere, by the beginning of their names.

The argument classes of the kits have hundreds of such flags. `vlft.config.translate` asks here last.
"""

from __future__ import annotations

import functools
import re

from vlft.config.kits.outcome import NEW_TOKENS, Idle, Rule, cannot, flag, idle, off, on, switch
from vlft.config.kits.preferences import COMPUTED_ONCE, OTHERS

_OPTIMIZER = off("belongs to an optimizer that vlft does not have. Use an AdamW variant, Adafactor or SGD")
_ADAPTER = off(
    "belongs to an adapter that vlft does not have. --vision, --merger and --language take full, lora or frozen"
)
_PARALLEL = off("model parallelism is not supported. Use --deepspeed zero3")

#: The rule -> patterns of whole names, separated by blanks.
_FEATURES: tuple[tuple[Rule, str], ...] = (
    (
        _OPTIMIZER,
        r"(q?galore|apollo|badam|lisa|muon|dion|optimi|sinkgd|flash_optim|came|adam_mini)_\w+",
    ),
    (
        _ADAPTER,
        r"(adalora|boft|oft|vera|fourier|reft|llamapro|lora_ga|bone|longlora|peft|loftq|relora|pissa|loraplus)_\w+ "
        r"relora use_(longlora|pissa|relora) adapter_(act|length) layer_replication peft",
    ),
    (
        idle("belongs to answering or sampling, not to this training"),
        r"(vllm|sglang|lmdeploy|infer|sampling|rollout|use_vllm|offload_model)(_\w+)? num_beams top_[kp] min_p "
        r"do_sample (repetition|length)_penalty max_new_tokens stop_words stream n_shot",
    ),
    (
        cannot("no answer is cut. --max_length limits a row, --over_length says what happens to a longer one"),
        r"max_(completion|prompt|target)_length",
    ),
    (COMPUTED_ONCE, r"precompute_ref\w+"),
    (
        off("the reference is the model at the start of the run: --model_id with --adapter"),
        r"(force_use_)?ref_(model|adapter)\w* sync_ref_model model_adapter_name",
    ),
    (switch(true=flag("reference", "none"), false=Idle(why="off")), r"reference_free"),
    (
        on("dropout is always off in preference training"),
        r"disable_dropout",
    ),
    (
        off(f"not supported. {OTHERS}, and --dpo_loss sigmoid, ipo or hinge"),
        r"num_generations reward(_\w+)? epsilon(_\w+)? kl_\w+ "
        r"(teacher|dpo|kto|orpo|simpo|cpo|ppo|grpo|gkd|rpo|trl|bco|ebft|sdpo|ld|pref|rlhf|rl)_\w+ loss_(type|weights) "
        r"(un)?desirable_weight f_(alpha_)?divergence_\w+ use_weighting discopop_tau",
    ),
    (
        idle("--report_to names the service, which reads its settings from the environment"),
        r"(wandb|swanlab|mlflow|comet|trackio|neptune|clearml|otel|tensorboard)_\w+ "
        r"use_(mlflow|comet|trackio|otel_\w+)",
    ),
    (
        idle("vlft merge writes the weights after the run"),
        r"(export|push|merge|quantize|quantization)_\w+ safe_serialization max_shard_size save_safetensors",
    ),
    (
        _PARALLEL,
        r"(tensor|pipeline|expert|context|sequence|virtual_pipeline|decoder_\w+)_(model_)?parallel\w* recompute_\w+ "
        r"cp_size tp_size dp_(shard|replicate)_size (moe|router|megatron|overlap|kt|ulysses|ring_attn|mp)_\w+ "
        r"use_(mca|megatron\w*|distributed_optimizer|hyper_parallel|kt) hyper_parallel_\w+ \w+_fusion experts_impl",
    ),
    (
        off("a base is quantised by bitsandbytes only: --bits 4 or 8"),
        r"(fp8|fp4|nvfp4|mxfp4|qat|ptq|hqq|gptq|awq|eetq)(_\w+)?",
    ),
    (idle("it belongs to a quantised base: --bits 4"), r"bnb_\w+"),
    (off("use vlft bench to measure a run"), r"profiler?(_\w+)? (enable_)?torch_profiler(_\w+)?"),
    (off("use torchrun"), r"(use_)?ray(_\w+)? device_groups"),
    (
        off("use torchrun, and --deepspeed zero2 or zero3"),
        r"(fsdp|torch_compile|torchcompile|dynamo|accelerate|compile)(_\w+)?",
    ),
    (
        idle("the settings of a hub are read from the environment"),
        r"(hf|ms|om|hub|modelscope)_(hub_)?(token|\w+id|strategy) hub_\w+",
    ),
    (off("speech is not supported"), r"\w*(audio|speech|asr)\w*"),
    (
        off("evaluation computes the loss only"),
        r"eval_(limit|dataset_args|generation_config|use_evalscope|metric|num_beams|table_size|max_new_tokens) "
        r"extra_eval_args metrics? eval_causal_lm_metrics do_causal_lm_eval do_bench_eval bench_\w+",
    ),
    (off("use --early_stopping_patience, a number of evaluations"), r"early_stop\w*"),
    (
        off("classification heads are not trained here"),
        r"(focal|class_balanced|mlp_head|num_labels|problem_type)\w*",
    ),
    (
        off("not supported. --data_mix mixes data sets by weight, repeat or cap"),
        r"dataset_(shards|streaming|exact_\w+|download_\w+) download_mode interleave_\w+ stopping_strategy "
        r"data_shared_\w+",
    ),
    (
        off(NEW_TOKENS),
        r"(added?|new|new_special|additional_special)_?(special_)?tokens tokens",
    ),
    (
        off("the base's own tokens are used"),
        r"(special|added?|new_special|init_special|eot|bos|eos|pad|unk)_?(special_)?tokens?\w* tokens tokenizer_\w+",
    ),
    (
        idle("rows are prepared in the workers: --dataloader_num_workers"),
        r"(preprocessing|dataset|packing|map|tokenize|prepare)_\w*(num_proc|workers|batch_size|size|keep_in_memory)",
    ),
)


@functools.cache
def _compiled() -> list[tuple[re.Pattern[str], Rule]]:
    return [(re.compile("|".join(patterns.split())), rule) for rule, patterns in _FEATURES]


def by_feature(name: str) -> Rule | None:
    """Return the rule for a flag that no table lists; None if no pattern has its name."""
    return next((rule for pattern, rule in _compiled() if pattern.fullmatch(name)), None)
