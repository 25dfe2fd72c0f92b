"""`vlft plan --translate`: public examples of the kits, shell scripts, mixed files; one round to a running plan."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlft.cli.main import main
from vlft.config import door, table
from vlft.config.migrate import documents, launchers, settle, written
from vlft.config.named_base import counted_like
from vlft.config.names import unknown
from vlft.config.preference import PreferenceFlags
from vlft.config.shell.walk import follow
from vlft.config.translate import translate
from vlft.config.values import DEFAULTS
from vlft.errors import ConfigError
from vlft.families import FAMILIES

ROOT = Path(__file__).parent.parent
KNOWN = {*table.kinds("train"), *(f"no_{name}" for name in table.OF_TRAIN)}
PREFERENCES = set(PreferenceFlags.__dataclass_fields__)
FILLED = {"data_path": "d.json", "eval_path": "d.json", "image_folder": ".", "model_id": "Qwen/x"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with one data file, on a machine where every optional package is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlft.config.kinds._installed", lambda module: True)
    (tmp_path / "d.json").write_text("[]")
    return tmp_path


def settled(text: str, name: str = "old.sh", gpus: int | None = None) -> list[settle.Settled]:
    Path(name).write_text(text)
    return [settle.settle(run, gpus) for run in documents.read(name).runs]


def values(one: settle.Settled) -> dict[str, str]:
    return {name: " ".join(words) for name, words in one.flags.items()}


def rounds(one: settle.Settled) -> int:
    """Return how often flags are refused until the run passes the door, with the named values filled in, plus 1."""
    open_values = {(item.flag, item.value) for item in one.fill_in}
    argv = []
    for name, words in one.flags.items():
        argv += [f"--{name}"]
        for word in words:
            if (name, word) in open_values:
                word = FILLED.get(name) or re.sub(r"<[^<>]+>", "4", word)
            argv.append(word)
    argv += [part for item in one.fill_in if not item.value for part in (f"--{item.flag}", FILLED[item.flag])]
    assert door.check("train", argv, KNOWN).remarks == ""
    return 1


# ---- public examples: the flags and values of each file, in the form that the kit uses

_TWO_U1 = (
    "MODEL_NAME=Qwen/Qwen2.5-VL-3B-Instruct\nGLOBAL_BATCH_SIZE=128\nBATCH_PER_DEVICE=4\nNUM_DEVICES=8\n"
    "GRAD_ACCUM_STEPS=$((GLOBAL_BATCH_SIZE / (BATCH_PER_DEVICE * NUM_DEVICES)))\nexport PYTHONPATH=src:$PYTHONPATH\n"
    "deepspeed src/train/{script}.py --use_liger True {more} --model_id $MODEL_NAME \\\n  --data_path /path/data.json "
    "--image_folder /path/images --remove_unused_columns False --bf16 True --fp16 False --disable_flash_attn2 False "
    "  --output_dir output/x --num_train_epochs 1 --per_device_train_batch_size $BATCH_PER_DEVICE --tf32 True \\\n"
    "  --gradient_accumulation_steps $GRAD_ACCUM_STEPS --weight_decay 0.1 --warmup_ratio 0.03 --logging_steps 1 \\\n"
    '  --lr_scheduler_type "cosine" --gradient_checkpointing True --report_to tensorboard --lazy_preprocess True \\\n'
    '  --save_strategy "steps" --save_steps 200 --save_total_limit 10 --dataloader_num_workers 4'
)
_FULL = "--freeze_vision_tower False --freeze_llm False --freeze_merger False --learning_rate 1e-5 --merger_lr 1e-5 "
_FULL += "--vision_lr 2e-6 --deepspeed scripts/zero3_offload.json "
_LORA = "--lora_enable True --use_dora False --lora_namespan_exclude \"['lm_head', 'embed_tokens']\" --lora_rank 64 "
_LORA += "--lora_alpha 64 --lora_dropout 0.05 --num_lora_modules -1 --freeze_llm True --image_min_pixels "
_LORA += "$((256 * 28 * 28)) --image_max_pixels $((1280 * 28 * 28)) "
_LF = (
    "model_name_or_path: Qwen/Qwen3-VL-4B-Instruct, trust_remote_code: true, stage: sft, do_train: true, "
    "cutoff_len: 2048, max_samples: 1000, preprocessing_num_workers: 16, dataloader_num_workers: 4, output_dir: saves, "
    "logging_steps: 10, save_steps: 500, plot_loss: true, overwrite_output_dir: true, save_only_model: false, "
    "report_to: none, num_train_epochs: 3.0, lr_scheduler_type: cosine, warmup_ratio: 0.1, bf16: true, "
    "ddp_timeout: 180000000, resume_from_checkpoint: null, per_device_train_batch_size: 1, "
)
_LF_VL = (
    "image_max_pixels: 262144, video_max_pixels: 16384, template: qwen3_vl_nothink, dataset: 'mllm_demo,identity', "
)
_SWIFT = (
    "swift sft --model {model} --load_from_cache_file true --split_dataset_ratio 0.01 --torch_dtype bfloat16 \\\n"
    "  --num_train_epochs 1 --per_device_train_batch_size {rows} --per_device_eval_batch_size {rows} \\\n"
    "  --eval_steps 100 --save_steps 100 --save_total_limit 2 --logging_steps 5 --output_dir output \\\n"
    "  --warmup_ratio 0.05 --dataloader_num_workers 4 {more}"
)
_SWIFT_LORA = "--tuner_type lora --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules all-linear "
_SWIFT_LORA += "--freeze_vit true --freeze_aligner true --max_length 2048 "
_AXOLOTL = (
    "base_model: Qwen/Qwen2-VL-7B-Instruct, processor_type: AutoProcessor, skip_prepare_dataset: true, "
    "remove_unused_columns: false, sample_packing: false, chat_template: qwen2_vl, datasets: [{path: "
    "HuggingFaceH4/llava-instruct-mix-vsft, type: chat_template, split: 'train[:1%]'}], val_set_size: 0.0, "
    "dataset_prepared_path: last_run_prepared, output_dir: ./outputs/out, pad_to_sequence_len: false, "
    "wandb_project: null, gradient_accumulation_steps: 4, micro_batch_size: 1, num_epochs: 1, optimizer: "
    "adamw_bnb_8bit, lr_scheduler: cosine, learning_rate: 0.0002, tf32: true, gradient_checkpointing: true, "
    "logging_steps: 1, attn_implementation: flash_attention_2, warmup_ratio: 0.1, evals_per_epoch: 1, "
    "saves_per_epoch: 1, weight_decay: 0.0, "
)
_LAYERS = r"'model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj'"


def _of_2u1(script="train_sft", more=""):
    return _TWO_U1.replace("{script}", script).replace("{more}", more)


def _of_swift(more, model="Qwen/Qwen2.5-VL-7B-Instruct", rows=1):
    return _SWIFT.replace("{model}", model).replace("{rows}", str(rows)).replace("{more}", more)


def _towers(vision, merger, language):
    return {"vision": vision, "merger": merger, "language": language}


_FROZEN_LORA = _towers("frozen", "frozen", "lora")
_DEMO = {"data_path": "<mllm_demo> <identity>", "image_max_pixels": "262144", "video_max_pixels": str(16384 * 128)}
#: (source, its text, flags that it must become, parts of what has no counterpart)
EXAMPLES = [
    ("2U1 scripts/finetune.sh", _of_2u1(more=_FULL),
     _towers("full", "full", "full") | {"global_batch": "128", "deepspeed": "zero3_offload", "vision_lr": "2e-6",
     "warmup_steps": "0.03", "use_liger_kernel": "auto", "model_id": "Qwen/Qwen2.5-VL-3B-Instruct"}, []),
    ("2U1 scripts/finetune_lora.sh", _of_2u1(more=f"{_LORA} --freeze_vision_tower False --freeze_merger False "
     "--learning_rate 1e-4 --merger_lr 1e-5 --vision_lr 2e-6 --deepspeed scripts/zero3_offload.json"),
     _towers("full", "full", "lora") | {"lora_rank": "64", "image_max_pixels": "1003520", "global_batch": "128"}, []),
    ("2U1 scripts/finetune_lora_vision.sh", _of_2u1(more=f"{_LORA} --vision_lora True --freeze_vision_tower True "
     "--freeze_merger True --learning_rate 2e-4 --deepspeed scripts/zero3.json"),
     _towers("lora", "lora", "lora") | {"deepspeed": "zero3", "image_min_pixels": "200704"}, []),
    ("2U1 scripts/finetune_video.sh", _of_2u1(more=f"{_FULL} --video_max_pixels $((360 * 420)) --fps 1.0"),
     _towers("full", "full", "full") | {"video_max_pixels": "151200", "fps": "1.0"}, []),
    ("2U1 scripts/finetune_dpo.sh", _of_2u1("train_dpo", f"{_FULL} --dpo_loss sigmoid --beta 0.1 "
     "--precompute_ref_log_probs False"), {"language": "full", "method": "dpo", "dpo_loss": "sigmoid", "beta": "0.1",
     "learning_rate": "1e-5"}, []),
    ("LLaMA-Factory train_full/qwen3vl_full_sft.yaml", _LF + _LF_VL + "finetuning_type: full, freeze_vision_tower: "
     "true, freeze_multi_modal_projector: true, freeze_language_model: false, deepspeed: "
     "examples/deepspeed/ds_z3_config.json, gradient_accumulation_steps: 2, learning_rate: 1.0e-5",
     _towers("frozen", "frozen", "full") | _DEMO | {"deepspeed": "zero3", "global_batch": "2",
     "learning_rate": "1e-05"}, ["--max_samples", "--overwrite_output_dir"]),
    ("LLaMA-Factory train_lora/qwen3vl_lora_sft.yaml", _LF + _LF_VL + "finetuning_type: lora, lora_rank: 8, "
     "lora_target: all, gradient_accumulation_steps: 8, learning_rate: 1.0e-4",
     _FROZEN_LORA | _DEMO | {"lora_rank": "8", "lora_alpha": "16", "lora_dropout": "0.0", "lora_target": "all",
     "video_max_frames": "128", "global_batch": "8", "warmup_steps": "0.1"}, ["--max_samples"]),
    ("LLaMA-Factory train_lora/qwen3vl_lora_dpo.yaml", _LF.replace("stage: sft", "stage: dpo") + _LF_VL +
     "finetuning_type: lora, lora_rank: 8, pref_beta: 0.1, pref_loss: sigmoid, learning_rate: 5.0e-6",
     _FROZEN_LORA | {"method": "dpo", "dpo_loss": "sigmoid", "beta": "0.1", "learning_rate": "5e-06"}, []),
    ("LLaMA-Factory train_lora/llama3_lora_kto.yaml", _LF.replace("stage: sft", "stage: kto") + _LF_VL +
     "finetuning_type: lora, lora_rank: 8, pref_beta: 0.1, learning_rate: 5.0e-6", {"method": "sft"}, ["--stage kto"]),
    ("ms-swift multimodal/rlhf/dpo/full.sh", _of_swift("--rlhf_type dpo --dataset 'a/b#20000' --train_type full "
     "--learning_rate 1e-5 --freeze_vit true --deepspeed zero3 --loss_type sigmoid sft --loss_weights 1.0 0.2 "
     "--dataset_num_proc 4").replace("swift sft", "swift rlhf"),
     {"method": "dpo", "dpo_loss": "sigmoid", "rpo_alpha": "0.2", "language": "full"}, []),
    ("TRL examples/scripts/dpo_vlm.py", "accelerate launch examples/scripts/dpo_vlm.py --dataset_name "
     "HuggingFaceH4/rlaif-v_formatted --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --per_device_train_batch_size 2 "
     "--gradient_accumulation_steps 32 --dataset_num_proc 32 --output_dir out --dtype bfloat16 "
     "--gradient_checkpointing --use_peft --lora_target_modules all-linear",
     {"method": "dpo", "learning_rate": "1e-6", "language": "lora", "global_batch": "64", "num_train_epochs": "3"},
     []),
    ("axolotl examples/llama-3/qlora-dpo", _AXOLOTL + "rl: dpo, rl_beta: 0.2, adapter: lora, lora_r: 32, lora_alpha: "
     "64, lora_dropout: 0.05, sequence_len: 2048",
     {"method": "dpo", "beta": "0.2", "lora_rank": "32", "num_train_epochs": "1"}, []),
    ("LLaMA-Factory extras/oft/qwen2_5vl_oft_sft.yaml", _LF + _LF_VL + "finetuning_type: oft, oft_block_size: 32, "
     "oft_target: all, overwrite_cache: true, learning_rate: 1.0e-4", {}, ["--finetuning_type oft", "--oft_target"]),
    ("LLaMA-Factory megatron/qwen2_vl_full.yaml", _LF + "finetuning_type: full, dataset: llava_1k_en, template: "
     "qwen2_vl, tensor_model_parallel_size: 4, sequence_parallel: true, pipeline_model_parallel_size: 2, "
     "bias_activation_fusion: true, use_distributed_optimizer: true, learning_rate: 2e-5",
     _towers("frozen", "frozen", "full") | {"image_max_pixels": "589824"}, ["--tensor_model_parallel_size"]),
    ("LLaMA-Factory train_qlora/qwen3_lora_sft_otfq.yaml", _LF + "quantization_bit: 4, quantization_method: bnb, "
     "finetuning_type: lora, lora_rank: 8, dataset: identity, template: qwen3_nothink", _FROZEN_LORA | {"bits": "4"},
     []),
    ("LLaMA-Factory train_lora/qwen3_lora_sft.sh", "MODEL_PATH=Qwen/Qwen3-4B\nllamafactory-cli train "
     "--model_name_or_path ${MODEL_PATH} --trust_remote_code --stage sft --do_train --finetuning_type lora --lora_rank "
     "8 --lora_target all --dataset identity,alpaca --template qwen3_nothink --cutoff_len 2048 --plot_loss "
     "--overwrite_output_dir --save_only_model false --per_device_train_batch_size 1 --gradient_accumulation_steps 8 "
     "--learning_rate 1e-4 --bf16 --ddp_timeout 180000000 --warmup_ratio 0.1 --output_dir saves",
     _FROZEN_LORA | {"bf16": "true", "model_id": "Qwen/Qwen3-4B", "data_path": "<identity> <alpaca>"}, []),
    ("LLaMA-Factory v1/train_lora/train_lora_sft.yaml", "model: Qwen/Qwen3-4B, model_class: llm, peft_config: {name: "
     "lora, r: 16, lora_alpha: 32, lora_dropout: 0.05, target_modules: all}, kernel_config: {name: auto}, dist_config: "
     "{name: fsdp2, dcp_path: null}, train_dataset: data/v1_sft_demo.yaml, output_dir: ./outputs, micro_batch_size: 1, "
     "cutoff_len: 2048, learning_rate: 1.0e-4, max_steps: 10, sample_backend: hf, max_new_tokens: 128",
     _FROZEN_LORA | {"lora_rank": "16", "lora_alpha": "32", "max_steps": "10"}, ["--dist_config"]),
    ("ms-swift multimodal/caption.sh", "CUDA_VISIBLE_DEVICES=0 \\\nMAX_PIXELS=1003520 \\\n" + _of_swift(_SWIFT_LORA +
     "--dataset 'modelscope/coco_2014_caption:validation#20000' --gradient_accumulation_steps 16"),
     _FROZEN_LORA | {"image_max_pixels": "1003520", "global_batch": "16", "adam_beta2": "0.95", "weight_decay": "0.1",
     "lr_scheduler_type": "cosine", "eval_strategy": "steps", "eval_steps": "100", "bf16": "true",
     "data_path": "<modelscope/coco_2014_caption:validation>"}, []),
    ("ms-swift multimodal/video.sh", "nproc_per_node=2\nCUDA_VISIBLE_DEVICES=0,1 \\\nNPROC_PER_NODE=$nproc_per_node "
     "\\\nVIDEO_MAX_PIXELS=50176 \\\nFPS_MAX_FRAMES=12 \\\n" + _of_swift(_SWIFT_LORA + "--dataset "
     "swift/VideoChatGPT:all --gradient_accumulation_steps $(expr 16 / $nproc_per_node) --deepspeed zero2"),
     {"video_max_pixels": "50176", "video_max_frames": "12", "global_batch": "16", "deepspeed": "zero2"}, []),
    ("ms-swift multimodal/vit_gradient_checkpointing.sh", "NPROC_PER_NODE=4 \\\n" + _of_swift("--dataset "
     "swift/VideoChatGPT:all --tuner_type full --learning_rate 1e-5 --freeze_vit false --freeze_aligner false "
     "--gradient_accumulation_steps 1 --gradient_checkpointing true --vit_gradient_checkpointing true "
     "--use_liger_kernel true --attn_impl "
     "flash_attn --padding_free true --save_only_model true --deepspeed zero3", rows=4),
     _towers("full", "full", "full") | {"global_batch": "16", "gradient_checkpointing": "true"}, []),
    ("ms-swift multimodal/lora_llm_full_vit/sft.sh", "NPROC_PER_NODE=4 MAX_PIXELS=1003520 " + _of_swift("--dataset "
     "'AI-ModelScope/coco#20000' --tuner_type lora_llm --learning_rate 1e-4 --vit_lr 1e-5 --aligner_lr 1e-5 "
     "--lora_rank 16 --lora_alpha 32 --gradient_accumulation_steps 4 --dataset_num_proc 4 --deepspeed zero2"),
     _towers("full", "full", "lora") | {"vision_lr": "1e-5", "merger_lr": "1e-5", "global_batch": "16"}, []),
    ("ms-swift models/qwen3_vl/mixed.sh", "IMAGE_MAX_TOKEN_NUM=1024 VIDEO_MAX_TOKEN_NUM=128 FPS_MAX_FRAMES=16 "
     "NPROC_PER_NODE=2 " + _of_swift(_SWIFT_LORA + "--dataset 'a/b#10000' \\\n 'c/d:e#5000' --attn_impl flash_attn "
     "--padding_free true --packing true --vit_gradient_checkpointing false --gradient_accumulation_steps 2",
     model="Qwen/Qwen3-VL-4B-Instruct"),
     {"image_max_pixels": "1048576", "video_max_pixels": str(131072 * 16), "packing": "true", "global_batch": "4",
     "data_path": "<a/b> <c/d:e>"}, []),
    ("ms-swift models/qwen3_vl/zero3.sh", "IMAGE_MAX_TOKEN_NUM=1024 NPROC_PER_NODE=2 " + _of_swift(_SWIFT_LORA +
     "--dataset 'a/b#2' --router_aux_loss_coef 1e-3 --experts_impl grouped_mm --gradient_accumulation_steps 1 "
     "--deepspeed zero3", rows=16), {"global_batch": "32", "deepspeed": "zero3"}, ["--router_aux_loss_coef"]),
    ("ms-swift train/packing/qwen2_5_vl.sh", "NPROC_PER_NODE=4 MAX_PIXELS=1003520 " + _of_swift("--tuner_type lora "
     "--dataset 'AI-ModelScope/LaTeX_OCR#20000' --packing true --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 "
     "--target_modules all-linear --gradient_accumulation_steps 1 --max_length 8192 --dataset_num_proc 8"),
     _FROZEN_LORA | {"packing": "true", "global_batch": "4", "max_length": "8192"}, []),
    ("ms-swift multi-node/torchrun/train_node1.sh", "nnodes=2\nnproc_per_node=4\ntorchrun --master_port 29500 "
     "--nproc_per_node=$nproc_per_node \\\n --nnodes=$nnodes --node_rank=0 --master_addr=127.0.0.1 swift/cli/sft.py "
     "--model Qwen/Qwen2.5-7B-Instruct --tuner_type full --dataset 'a/b#1' --split_dataset_ratio 0.01 "
     "--per_device_train_batch_size 1 --gradient_accumulation_steps $(expr 32 / $nproc_per_node / $nnodes) --system "
     "'You are a helpful assistant.' --learning_rate 1e-5 --deepspeed zero2",
     _towers("frozen", "frozen", "full") | {"global_batch": "32"}, ["--system"]),
    ("ms-swift yaml/deepspeed/sft.yaml", "model: Qwen/Qwen2.5-7B-Instruct, torch_dtype: bfloat16, tuner_type: lora, "
     "lora_rank: 8, lora_alpha: 32, target_modules: all-linear, dataset: ['a/b#500', 'c/d#500'], split_dataset_ratio: "
     "0.0, max_length: 2048, system: Hi, model_author: swift, model_name: swift-bot, per_device_train_batch_size: 1, "
     "gradient_accumulation_steps: 8, eval_steps: 50, warmup_ratio: 0.05, dataset_num_proc: 4, deepspeed: zero2",
     _FROZEN_LORA | {"global_batch": "8", "data_path": "<a/b> <c/d>"}, ["--system", "--model_author", "--model_name"]),
    ("axolotl examples/qwen2-vl/lora-7b.yaml", _AXOLOTL + "adapter: lora, lora_model_dir: null, sequence_len: 8192, "
     f"lora_r: 32, lora_alpha: 16, lora_dropout: 0.05, lora_target_modules: {_LAYERS}, bf16: true, fp16: null",
     _FROZEN_LORA | {"lora_rank": "32", "lora_alpha": "16", "max_length": "8192", "global_batch": "4",
     "optim": "adamw_bnb_8bit", "save_strategy": "epoch", "warmup_steps": "0.1"}, []),
    ("axolotl examples/qwen3.5/9b-fft-vision.yaml", _AXOLOTL + "sequence_len: 4096, bf16: auto, special_tokens: null, "
     "gradient_checkpointing_kwargs: {use_reentrant: false}, resume_from_checkpoint: null",
     _towers("full", "full", "full") | {"max_length": "4096", "num_train_epochs": "1"}, []),
    ("axolotl examples/qwen3.5/9b-lora-vision.yaml", _AXOLOTL + "adapter: lora, sequence_len: 8192, lora_r: 32, "
     "lora_alpha: 16, lora_dropout: 0.05, lora_target_modules: [q_proj, k_proj, v_proj, o_proj, down_proj, up_proj]",
     _FROZEN_LORA | {"lora_target": "all"}, []),
    ("axolotl examples/qwen3.5/27b-qlora.yaml", _AXOLOTL.replace("sample_packing: false", "sample_packing: true") +
     "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin], strict: false, load_in_4bit: true, "
     "adapter: qlora, lora_r: 16, lora_alpha: 32, lora_target_modules: [q_proj, k_proj, v_proj, o_proj], sequence_len: "
     "2048", _FROZEN_LORA | {"packing": "true", "lora_rank": "16", "bits": "4"}, ["--plugins"]),
    ("TRL examples/scripts/sft_vlm.py", "accelerate launch --config_file=examples/accelerate_configs/zero3.yaml \\\n "
     "examples/scripts/sft_vlm.py --dataset_name HuggingFaceH4/llava-instruct-mix-vsft --model_name_or_path "
     "llava-hf/llava-1.5-7b-hf --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --output_dir out --bf16 "
     "--torch_dtype bfloat16 --gradient_checkpointing",
     _towers("full", "full", "full") | {"global_batch": "64", "learning_rate": "2e-5",
     "gradient_checkpointing": "true"}, []),
    ("TRL trl sft", "trl sft --model_name_or_path Qwen/Qwen2-VL-2B-Instruct --dataset_name d.json --use_peft --lora_r "
     "32 --lora_alpha 16 --lora_target_modules q_proj k_proj v_proj o_proj --num_processes 4 --max_length 4096 "
     "--dataset_num_proc 4 --assistant_only_loss --learning_rate 2e-4",
     {"language": "lora", "lora_rank": "32", "lora_target": "attention", "data_path": "d.json", "global_batch": "32"},
     []),
]  # fmt: skip


@pytest.mark.parametrize(("source", "text", "becomes", "lacks"), EXAMPLES, ids=[one[0] for one in EXAMPLES])
def test_a_public_example_needs_one_round(source, text, becomes, lacks):
    script = "\n" in text or " --" in text
    (one,) = settled(text if script else f"{{{text}}}", "old.sh" if script else "old.yaml")
    kit = {"2U1": "Qwen2-VL-Finetune"}.get(source.split()[0], source.split()[0])
    assert one.kit == kit
    found = {name: str(value) for name, value in DEFAULTS.items()} | values(one)
    assert {name: found.get(name) for name in becomes} == becomes
    assert [part for part in lacks if not any(before.startswith(part) for before, _ in one.left_out)] == []
    assert rounds(one) == 1
    again = dict(yaml.safe_load(written.as_yaml(one)))
    assert list(again) == list(one.flags)


_TRAINED = {"TRL": "--model_name_or_path Qwen/x --dataset_name d.json --output_dir o --use_peft",
            "ms-swift": "--model Qwen/x --dataset d.json --output_dir o --train_type lora",
            "LLaMA-Factory": "model_name_or_path: Qwen/x, dataset: d.json, output_dir: o, finetuning_type: lora",
            "axolotl": "base_model: Qwen/x, datasets: [{path: d.json}], output_dir: o, adapter: lora"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        (f"trl dpo {_TRAINED['TRL']} --loss_type ipo --beta 0.3 --max_prompt_length 64", "dpo beta=0.3 dpo_loss=ipo"),
        (f"trl dpo {_TRAINED['TRL']} --loss_type sigmoid,sft --label_smoothing 0.1 --precompute_ref_log_probs",
         "dpo dpo_loss=sigmoid label_smoothing=0.1 rpo_alpha=1"),
        (f"trl dpo {_TRAINED['TRL']} --rpo_alpha 0.5 --lora_dropout 0.05 --reference_free", "dpo reference=none "
         "rpo_alpha=0.5"),
        (f"trl orpo {_TRAINED['TRL']} --beta 0.2", "orpo orpo_lambda=0.2"),
        (f"trl kto {_TRAINED['TRL']} --beta 0.2", "sft"),
        (f"trl sft {_TRAINED['TRL']} --loss_type nll", "sft"),
        (f"trl dpo {_TRAINED['TRL']} --loss_type apo_zero", "sft"),
        (f"swift rlhf {_TRAINED['ms-swift']}", "dpo"),
        (f"swift rlhf {_TRAINED['ms-swift']} --rlhf_type simpo --beta 2.5 --simpo_gamma 0.8 --cpo_alpha 0",
         "simpo beta=2.5 simpo_gamma=0.8"),
        (f"swift rlhf {_TRAINED['ms-swift']} --rlhf_type orpo --beta 0.2", "orpo orpo_lambda=0.2"),
        (f"swift rlhf {_TRAINED['ms-swift']} --rlhf_type kto --beta 0.04", "sft"),
        (f"{{{_TRAINED['LLaMA-Factory']}, stage: dpo, pref_loss: orpo, pref_beta: 0.2}}", "orpo orpo_lambda=0.2"),
        (f"{{{_TRAINED['LLaMA-Factory']}, stage: dpo, pref_loss: simpo, simpo_gamma: 0.7}}",
         "simpo beta=0.1 simpo_gamma=0.7"),
        (f"{{{_TRAINED['LLaMA-Factory']}, stage: dpo, pref_loss: hinge, pref_ftx: 0.3, dpo_label_smoothing: 0.0}}",
         "dpo dpo_loss=hinge label_smoothing=0.0 rpo_alpha=0.3"),
        (f"{{{_TRAINED['LLaMA-Factory']}, stage: dpo, pref_loss: kto_pair}}", "sft"),
        (f"{{{_TRAINED['LLaMA-Factory']}, stage: rm}}", "sft"),
        (f"{{{_TRAINED['axolotl']}, rl: ipo}}", "dpo dpo_loss=ipo"),
        (f"{{{_TRAINED['axolotl']}, rl: orpo, orpo_alpha: 0.2}}", "orpo orpo_lambda=0.2"),
        (f"{{{_TRAINED['axolotl']}, rl: simpo, simpo_gamma: 0.9}}", "simpo beta=0.1 simpo_gamma=0.9"),
        (f"{{{_TRAINED['axolotl']}, rl: kto, rl_beta: 0.3}}", "sft"),
        (f"{{{_TRAINED['axolotl']}, rl: null}}", "sft"),
    ],
)  # fmt: skip
def test_preferences(text, becomes):
    """What the kit's own flags ask for; other methods are left out, and a note says so."""
    (one,) = settled(text, "old.yaml" if text.startswith("{") else "old.sh")
    found = values(one)
    method, *weights = becomes.split()
    assert found.get("method", "sft") == method
    assert {name: value for name, value in found.items() if name in PREFERENCES} == dict(
        weight.split("=") for weight in weights
    )
    assert not any("still to settle" in note for note in one.notes)
    if method == "sft" and not any(word in text for word in ("nll", "null")):
        assert any("not supported" in why for why in (*one.notes, *(why for _, why in one.left_out)))
    assert "lora_dropout" not in found or method == "sft"


@pytest.mark.parametrize(
    ("text", "becomes", "left_out"),
    [
        (
            f"trl grpo {_TRAINED['TRL']} --reward_funcs think_format_reward my.rewards.short --num_generations 4 "
            "--max_completion_length 300 --temperature 0.8 --top_p 0.9 --beta 0.02 --top_k 5 --loss_type grpo "
            "--epsilon 0.2 --use_vllm --vllm_mode colocate --per_device_train_batch_size 4 --lora_dropout 0.05",
            {
                "reward": "format:<think>(?!.*<think>).*?</think>.* my/rewards.py:short", "num_generations": "4",
                "max_completion_length": "300", "temperature": "0.8", "top_p": "0.9", "beta": "0.02",
                "per_device_train_batch_size": "4", "learning_rate": "1e-6",
            },
            ["top_k", "loss_type", "use_vllm", "vllm_mode"],
        ),
        (
            f"trl grpo {_TRAINED['TRL']} --reward_funcs accuracy_reward --reward_weights 1 --reward_model m",
            {"reward": "exact_match", "max_completion_length": "512"},
            ["reward_model"],
        ),
        (
            f"swift rlhf {_TRAINED['ms-swift']} --rlhf_type grpo --reward_funcs accuracy format cosine "
            "--temperature 0.7 --num_generations 8 --beta 0.04 --external_plugins plugin.py --reward_weights 1 2 1",
            {
                "reward": r"exact_match format:<think>.*?</think>\s*<answer>.*?</answer>", "temperature": "0.7",
                "beta": "0.04", "per_device_train_batch_size": "1", "gradient_accumulation_steps": "16",
            },
            ["external_plugins", "reward_weights"],
        ),
        (
            "deepspeed src/train/train_grpo.py --deepspeed scripts/zero3.json --model_id Qwen/x --data_path d.json "
            "--freeze_vision_tower False --freeze_llm True --lora_enable True --output_dir o --num_generations 4 "
            "--per_device_train_batch_size 4 --max_prompt_length 512 --eval_path d.json --eval_strategy steps",
            {
                "reward": "src/train/reward_funcs.py:accuracy_reward,format_reward", "beta": "0.04",
                "temperature": "0.9", "learning_rate": "1e-6", "vision": "full", "num_generations": "4",
            },
            ["max_prompt_length"],
        ),
    ],
)  # fmt: skip
def test_rewards(text, becomes, left_out, folder):
    (one,) = settled(text)
    found = values(one)
    assert found["method"] == "grpo"
    assert {name: found.get(name) for name in becomes} == becomes
    assert [what.split()[0].removeprefix("--") for what, _ in one.left_out] == left_out
    assert not {"deepspeed", "eval_path", "lora_dropout", "global_batch"} & set(found)
    assert not any("supervised fine-tuning" in note for note in one.notes)
    assert not any("still to settle" in note and "no file" not in note for note in one.notes)
    assert any("are `answer` here" in note for note in one.notes) is (".py:" in found["reward"])


_GRPO = "--model_name_or_path Qwen/x --dataset_name d.json --output_dir o --reward_funcs think_format_reward"


@pytest.mark.parametrize(
    "command",
    [
        "python -m trl.scripts.grpo",
        "accelerate launch -m trl.scripts.grpo",
        "accelerate launch trl/scripts/grpo.py",
        "python -m trl.cli grpo",
        "python train_grpo.py",
        "python my/own.py --method grpo",
    ],
)
@pytest.mark.parametrize("more", ["", " --use_peft --loss_type grpo --num_generations 4", " --learning_rate 2e-6"])
def test_scripts_of_trl_and_scripts_with_its_flags(command, more, folder):
    (same,) = settled(f"trl grpo {_GRPO}{more}")
    (one,) = settled(f"{command} {_GRPO}{more}")
    assert one.kit == "TRL"
    assert values(one) == values(same)


def test_a_file_of_accelerate_is_named(folder):
    for file in ("--config_file zero3.yaml", "--config_file=zero3.yaml"):
        (one,) = settled(f"accelerate launch {file} -m trl.scripts.sft {_TRAINED['TRL']}")
        (note,) = (note for note in one.notes if "zero3.yaml" in note)
        assert "set them with --gpus and, except for GRPO, --deepspeed" in note
        assert one.processes is None


def test_other_scripts_of_trl(folder):
    for verb in ("sft", "dpo"):
        (same,) = settled(f"trl {verb} {_TRAINED['TRL']}")
        for command in (f"python -m trl.scripts.{verb}", f"python {verb if verb == 'sft' else 'my'}/train_{verb}.py"):
            (one,) = settled(f"{command} {_TRAINED['TRL']}")
            assert values(one) == values(same), command
    (one,) = settled(f"python -m trl.scripts.kto {_TRAINED['TRL']}")
    assert any("not supported" in note for note in one.notes)


def test_flags_of_trls_grpo_at_the_door(folder):
    (folder / "d.json").write_text("[]")
    argv = ["--model_id", "b", "--data_path", "d.json", "--output_dir", "o"]
    for flags, text in (
        ("--reward_funcs accuracy", r"--method grpo --reward exact_match"),
        ("--method grpo --reward_funcs cosine", r"vlft has no such reward: cosine"),
        ("--method grpo --reward iou --reward_model m", r"a reward is a function, not a model"),
        ("--method grpo --reward iou --epsilon 0.3", r"the loss is dapo"),
        ("--method grpo --reward iou --top_k 5", r"with --temperature and --top_p only"),
        ("--method grpo --reward iou --repetition_penalty 1.1", r"with --temperature and --top_p only"),
        ("--method grpo --reward iou --use_vllm true", r"vLLM does not sample completions yet"),
        ("--method grpo --reward iou --vllm_mode colocate", r"vLLM does not sample completions yet"),
    ):
        with pytest.raises(Exception, match=text):
            door.check("train", [*argv, *flags.split()], KNOWN)
    same = "--method grpo --reward iou --top_k 0 --use_vllm false --loss_type dapo --reward_weights 1.0"
    passed = door.check("train", [*argv, *same.split()], KNOWN)
    assert {"top_k", "loss_type"} & set(passed.given) == set()


def test_flags_of_other_kits_beside_those_of_vlft(folder, capsys):
    (folder / "d.json").write_text("[]")
    argv = ["train", "--model_id", "b", "--data_path", "d.json", "--output_dir", "o", "--stage", "dpo", "--pref_beta",
            "0.2"]  # fmt: skip
    with pytest.raises(Exception, match=r"--stage dpo --pref_beta 0\.2.*--method dpo --beta 0\.2"):
        door.check("train", argv[1:], KNOWN)


def test_a_yaml_that_is_written_is_taken_by_the_door(folder, capsys):
    Path("old.yaml").write_text(f"{{{_LF + _LF_VL} dataset_dir: ., finetuning_type: lora, lora_rank: 8}}")
    Path("dataset_info.json").write_text('{"mllm_demo": {"file_name": "d.json"}, "identity": {"file_name": "d.json"}}')
    assert main(["plan", "--translate", "old.yaml", "--out", "new.yaml", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "# old.yaml: for LLaMA-Factory\ntorchrun --nproc_per_node 8 -m vlft train --config new.yaml\n"
    )
    for verb in ("plan", "train"):
        passed = door.check(verb, ["--config", "new.yaml"], {*table.kinds(verb)})
        assert passed.argv[passed.argv.index("--global_batch") + 1] == "8"
    assert main(["plan", "--translate", "old.yaml", "--out", "new.yaml"]) == 1
    assert "new.yaml already exists" in capsys.readouterr().err
    assert main(["plan", "--translate", "new.yaml", "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["runs"]
    assert (again["kit"], again["changes"], again["defaults"], again["fill_in"]) == ("vlft", [], {}, [])
    assert again["flags"]["lora_alpha"] == 16


def test_answers_without_torch_and_without_running_the_script(folder):
    (folder / "old.sh").write_text("touch ran\n$(touch ran)\nswift sft --model m --dataset `touch ran`d.json\n")
    script = (
        "import sys, time; from vlft.cli.main import main; start = time.process_time()\n"
        "print(main(['plan', '--translate', 'old.sh']), time.process_time() - start)\n"
        "print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    *_, status, modules = done.stdout.splitlines()
    assert status.split()[0] == "0"
    assert float(status.split()[1]) < 1
    assert not set(modules.split()) & {"torch", "transformers", "numpy", "PIL"}
    assert not (folder / "ran").exists()
    assert "fill in:\n  --data_path <touch_ran>d.json: line 3: the output of `touch ran`" in done.stdout


# ---- shell scripts


def commands(text: str) -> list[str]:
    return [" ".join(word.text for word in command.words) for command in follow(text).commands]


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("A=1 B='x y'\nrun $A \"$B\" $B", ["run 1 x y x y"]),
        ("run ${A:-d} ${A-e} ${A:=f} $A ${B:+no} ${A:+g}", ["run d e f f g"]),
        ("A=dir/name.tar.gz; run ${A##*/} ${A%.*} ${A%%.*} ${A/dir/x} ${#A}", ["run name.tar.gz dir/name.tar "
         "dir/name x/name.tar.gz 15"]),
        ("N=8; run $((256 * 28 * 28)) $((128 / (4*N))) $((7 / 2 - -3 % 2)) $(expr 16 / $N) `basename a/b.c .c`",
         ["run 200704 4 4 2 b"]),
        ("A=(--x 1 # why\n  --y '2 3'\n)\nA+=(--z)\nrun \"${A[@]}\" ${#A[@]} ${A[0]}", ["run --x 1 --y 2 3 --z 5 --x"]),
        ("run --a \\\r\n  --b 'c' \\  \n --d # no --e\n", ["run --a --b c --d"]),
        ("for i in {1..3}; do run $i; done; for j in $(seq 2); do run $j$i; done",
         ["run 1", "run 2", "run 3", "run 13", "run 23"]),
        ("for a in x y; do for b in 1 2; do if [ $b -gt 1 ]; then run $a$b; fi; done; done", ["run x2", "run y2"]),
        ("M=a; if [[ $M == a* && -n $M ]]; then run yes; else run no; fi; [ -z \"$M\" ] && run empty", ["run yes"]),
        ("case b in a) run 1;; b|c) run 2;; *) run 3;; esac", ["run 2"]),
        ("f() { local x=$1; run $x \"$@\"; }\nf 1 '2 3'; function g { run g; }; g", ["run 1 1 2 3", "run g"]),
        ("export X=1\nY=2 run | tee log && (cd d; run2) || run3", ["run", "tee log", "cd d", "run2"]),
        ("bash -c 'run a'; eval run b; exec run c; nohup run d > log 2>&1 &", ["run a", "run b", "run c",
         "nohup run d"]),
        ("i=5; if (( i > 4 )); then run $i; fi; i=$((i+1)); run $i", ["run 5", "run 6"]),
        ("cat > f.yaml <<EOF\na: $A\nEOF\nrun f.yaml <<'E'\n'\nE\n", ["cat", "run f.yaml"]),
        ("if [ $# -lt 1 ]; then echo usage; exit 1; fi\nrun\nexit 0\nrun no", ["echo usage", "run"]),
        ("run '{\"a\": 1}' \"it's $A\" --k=\"v w\" ~x a#b", ['run {"a": 1} it\'s <A> --k=v w ~x a#b']),
    ],
)  # fmt: skip
def test_a_script_is_followed(text, runs):
    assert commands(text) == runs


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("run $MODEL", "line 1: $MODEL is not set in the script"),
        ("\nrun x/$1", "line 2: $1 is an argument of the script"),
        ("A=$(date +%F)\nrun $A", "line 1: the output of `date +%F`"),
        ("if [ $B = 1 ]; then A=x; else A=y; fi\nrun $A", "line 1: $A depends on a condition that is not known"),
        ("while read A; do run $A; done < f", "line 1: $A is read as input"),
        ("run $((N * 2))", "line 1: $N is not set in the script"),
        ("i=1; (( i++ )); run $i", "line 1: $i is changed by (( i++ ))"),
        ("A=main; run ${A:0:3}", "line 1: the operation :0:3 cannot be resolved"),
        ("A=${B:?needed}; run $A", "line 1: $B is not set in the script"),
        ("for a in \"$@\"; do run $a; done", "line 1: $a is set by a loop over arguments"),
    ],
)  # fmt: skip
def test_what_a_script_does_not_contain_is_named_and_never_guessed(text, why):
    (command,) = follow(text).commands
    assert [reason for word in command.words for _, reason in word.missing] == [why]
    assert re.fullmatch(r"(x/)?<[^<> ]+>", command.words[1].text)


def test_words_under_a_condition_are_left_out_and_named():
    script = follow('A=(--x 1)\nif [ $DEBUG = 1 ]; then A+=(--steps 5); fi\nrun "${A[@]}"')
    assert [word.text for word in script.commands[0].words] == ["run", "--x", "1"]
    assert "line 2: $A also gets --steps 5 if a condition holds" in script.remarks[0]


@pytest.mark.parametrize(
    "text",
    [
        "run 'x",
        'run "x',
        "run $(x",
        "if true; then run",
        "for i in 1; do run",
        "case a in b) run",
        "run <<E\nx",
        "fi",
        "{ x",
    ],
)
def test_no_script_is_no_traceback(text):
    with pytest.raises(ConfigError, match="line"):
        follow(text)


def test_a_script_that_grows_without_end_is_refused():
    nine = "for x in 1 2 3 4 5 6 7 8 9; do "
    with pytest.raises(ConfigError, match=r"more than 5,000 commands"):
        follow(f"{nine * 6} run $x; {'done; ' * 6}")
    with pytest.raises(ConfigError, match="grows to more than"):
        follow("A=xx; for i in {1..99}; do A=$A$A; done")
    assert len(commands("f() { f; }; f; run " + "{a,b}" * 40)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lf.yaml", "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: d.json\n"
                    "adapter_name_or_path: saves/sft\n"),
        ("swift.sh", "swift sft --model m --dataset d.json --adapters saves/sft"),
        ("axolotl.yaml", "base_model: m\nmicro_batch_size: 1\nsequence_len: 8192\nadapter: lora\n"
                         "lora_model_dir: saves/sft\ndatasets: [{path: d.json}]\n"),
    ],
)  # fmt: skip
def test_an_adapter_to_start_from_decides_what_the_defaults_of_the_kit_would(name, text):
    (one,) = settled(text, name=name)
    assert values(one)["adapter"] == "saves/sft"
    assert not {"lora_rank", "lora_alpha"} & set(one.flags)


@pytest.mark.parametrize(
    ("line", "processes"),
    [
        ("torchrun --nproc_per_node=4 --nnodes 2 src/train/train_sft.py", 8),
        ("python -m torch.distributed.run --standalone --nproc-per-node 2 src/train/train_sft.py", 2),
        ("torchrun --nproc_per_node gpu src/train/train_sft.py", None),
        ("deepspeed --include localhost:0,2,3 src/train/train_sft.py", 3),
        ("deepspeed --num_gpus=4 --master_port 1 src/train/train_sft.py", 4),
        ("CUDA_VISIBLE_DEVICES=0,1 deepspeed src/train/train_sft.py", 2),
        ("deepspeed src/train/train_sft.py", None),
        ("N_GPUS=8\ndeepspeed src/train/train_sft.py", 8),
        ("accelerate launch --multi_gpu --num_processes 6 -m axolotl.cli.train", 6),
        ("axolotl train old.yml --launcher torchrun -- --nproc_per_node=8", 8),
        ("uv run python src/train/train_sft.py", 1),
        ("NNODES=2 NPROC_PER_NODE=8 swift sft", 16),
        ("swift sft", 1),
        ("srun python -m vlft train", None),
        ("nohup env A=1 trl sft --num_processes 3", 3),
    ],
)
def test_the_number_of_processes(line, processes):
    (run,) = documents.read(Path("x.sh").write_text(f"{line} --model_id m --learning_rate 1e-4") and "x.sh").runs
    assert run.processes == processes


def test_the_runs_of_a_loop(capsys):
    Path("sweep.sh").write_text(
        "for lr in 1e-4 5e-5; do\n  for r in 8 16; do\n swift sft --model m --dataset d.json --train_type lora \\\n"
        '   --learning_rate $lr --lora_rank $r --output_dir out/$lr-$r "$@"\n  done\ndone\n'
        "swift export --adapters out\n# swift sft --model no\n"
    )
    assert main(["plan", "--translate", "sweep.sh", "--out", "new.yaml"]) == 0
    out = capsys.readouterr().out
    assert "# 4 runs in this file" in out
    assert "line 7: export of ms-swift does not train. Use: vlft merge RUN OUT" in out
    assert out.count("--dataset d.json") == 1, "what holds for several runs is said once"
    found = [yaml.safe_load(Path(f"new-{number}.yaml").read_text()) for number in (1, 2, 3, 4)]
    assert [(one["learning_rate"], one["lora_rank"]) for one in found] == [
        ("1e-4", 8), ("1e-4", 16), ("5e-5", 8), ("5e-5", 16)
    ]  # fmt: skip
    assert found[2]["output_dir"] == "out/5e-5-8"


def test_a_script_that_writes_the_yaml_and_overrides_it():
    (one,) = settled(
        "OUT=saves/run\ncat > cfg.yaml <<EOF\nmodel_name_or_path: m\nstage: sft\nfinetuning_type: full\n"
        "dataset: d.json\noutput_dir: $OUT\nlearning_rate: 1e-5\nEOF\n"
        "NNODES=2 NPROC_PER_NODE=4 llamafactory-cli train cfg.yaml "
        "learning_rate=2e-5 logging_steps=1\n"
    )
    assert values(one) | {"learning_rate": "2e-5", "output_dir": "saves/run", "global_batch": "64"} == values(one)
    assert written.command(one).startswith("torchrun --nnodes 2 --nproc_per_node 4 -m vlft train ")


def test_a_long_loop_is_read_once(monkeypatch):
    """Each command was read again for every run."""
    read, seen = launchers.read, []
    monkeypatch.setattr(launchers, "read", lambda command: seen.append(command) or read(command))
    assert len(settled("for i in {1..50}; do swift sft --model m --dataset d.json --seed $i; done")) == 50
    assert len(seen) == 50


def test_a_script_inside_of_a_script():
    """srun with bash -c, a launcher in a variable, nodes that only SLURM knows: the number of processes is unknown."""
    (one,) = settled(
        'GPUS_PER_NODE=8\nNNODES=$SLURM_NNODES\nL="torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES"\n'
        'srun --label bash -c "$L src/train.py --stage sft --model_name_or_path $BASE --finetuning_type full \\\n'
        '  --freeze_vision_tower false --dataset d.json --cutoff_len 9"\n'
    )
    assert (one.kit, one.mixed, one.processes) == ("LLaMA-Factory", {}, None)
    assert values(one) | _towers("full", "frozen", "full") | {"model_id": "<BASE>"} == values(one)
    assert [(item.value, item.why) for item in one.fill_in] == [("<BASE>", "line 4: $BASE is not set in the script")]


def test_a_notebook_cell_and_wrong_values_in_it():
    (one,) = settled(
        "%%bash\n!MAX_PIXELS=602112 swift sft --model m --dataset d.json --train_type lora --lora_rank "
        "--learnin_rate 1 "
        "--optim muon --report_to wandb tensorboard --per_device_train_batch_size many --deepspeed ds.json\n"
    )
    found = values(one)
    assert (found["image_max_pixels"], found["report_to"]) == ("602112", "wandb")
    left_out = dict(one.left_out)
    assert left_out["--lora_rank"] == "its value is missing"
    assert "If --learning_rate is meant" in left_out["--learnin_rate 1"]
    assert "needs a second optimizer" in left_out["--optim muon"]
    assert [item.flag for item in one.fill_in] == ["global_batch", "deepspeed"]


# ---- files


def test_scripts_and_yaml_of_vlft_become_themselves():
    for name in ("finetune.sh", "finetune_lora.sh", "finetune_lora_vision.sh", "finetune_video.sh"):
        (run,) = documents.read(str(ROOT / "scripts" / name)).runs
        one = settle.settle(run, None)
        assert (one.kit, one.told.changes, one.left_out, one.idle) == ("vlft", (), (), ())
        assert {item.value for item in one.fill_in} == {"<MODEL>", "<DATA>", "<OUTPUT>"}
        assert rounds(one) == 1
    assert values(one)["video_max_pixels"] == "151200"
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        (run,) = documents.read(str(path)).runs
        given = settle.settle(run, None).flags
        assert given == {flag.name: flag.words for flag in run.flags}, path


def test_a_script_of_vlft_counts_the_pixels_of_its_base(tmp_path):
    (tmp_path / "common.sh").write_text((ROOT / "scripts" / "common.sh").read_text())
    for name, limits in (("finetune_lora.sh", ("262144", "1310720", None)), ("finetune_video.sh", (None, None, None))):
        script = tmp_path / name
        script.write_text("MODEL=Qwen/Qwen3-VL-4B-Instruct\n" + (ROOT / "scripts" / name).read_text())
        (run,) = documents.read(str(script)).runs
        found = values(settle.settle(run, None))
        assert found["model_id"] == "Qwen/Qwen3-VL-4B-Instruct"
        names = ("image_min_pixels", "image_max_pixels", "video_max_pixels")
        assert tuple(found.get(one) for one in names) == limits
    text = script.read_text().replace("frame_pixels", 'picture_tokens "$LEAST" 1280 "$@"\nframe_pixels')
    script.write_text(text)
    (run,) = documents.read(str(script)).runs
    assert "<IMAGE_MIN_PIXELS>" in {item.value for item in settle.settle(run, None).fill_in}


def test_a_yaml_of_two_kits():
    (one,) = settled(
        "base: &b {learning_rate: 1.0e-5}\n<<: *b\nmodel_name_or_path: m\nstage: sft\nfinetuning_type: lora\n"
        "template: qwen2_vl\ndataset: d.json\ncutoff_len: 4096\nfreeze_vit: false\ntuner_type: full\nlr: 2e-4\n",
        "mixed.yaml",
    )
    assert one.kit == "LLaMA-Factory"
    assert one.mixed == {"LLaMA-Factory": ("model_name_or_path", "stage", "finetuning_type", "template", "dataset",
                         "cutoff_len"), "ms-swift": ("freeze_vit", "tuner_type")}  # fmt: skip
    assert values(one) | _towers("lora", "frozen", "lora") | {"max_length": "4096"} == values(one)
    assert ("--tuner_type full", "--finetuning_type lora says otherwise, and is used") in one.left_out
    assert any(
        "--lr 2e-4 is overridden: another flag of the file sets --learning_rate 1e-05" in note for note in one.notes
    )
    assert "# flags of several kits are mixed." in written.as_text(one)


def test_nested_data_sets_of_axolotl():
    (one,) = settled(
        "base_model: m\nadapter: lora\nlora_r: 4\nnum_epochs: 3\nsaves_per_epoch: 2\nval_set_size: 0.1\n"
        "evals_per_epoch: 4\n"
        "d: &d {type: chat_template}\ndatasets:\n  - <<: *d\n    path: json\n    data_files: [d.json, b.json]\n"
        "  - {path: c/d, split: 'train[:9]'}\n",
        "ax.yml",
    )
    found = values(one)
    assert found["data_path"] == "d.json b.json <c/d>"
    assert (found["save_steps"], found["eval_steps"], found["eval_strategy"]) == ("0.166667", "0.0833333", "steps")
    assert any("train[:9] takes a part of the rows" in note for _, _, note in settle.changes(one))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("cell.ipynb", "{}", "is a notebook"),
        ("cell.py", "x", "is a Python file"),
        ("cell.txt", 'import subprocess\nsubprocess.run(["swift", "sft", "--model", "m"])', "is Python"),
        ("ds.json", '{"zero_optimization": {"stage": 3}}', "settings of DeepSpeed"),
        ("acc.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "settings of accelerate"),
        ("data.json", '[{"image": "a.png"}]', "Is it a data file?"),
        ("bad.yaml", "a: [1\nb: 2", "not valid YAML"),
        ("empty.sh", "\n \n", "is empty"),
        ("other.sh", "python eval.py --model m\nls -l\n", "found no command that starts a training"),
        ("infer.sh", "swift infer --model m", "infer of ms-swift does not train. Use: vlft chat"),
        ("gone.sh", "llamafactory-cli train gone.yaml", "gone.yaml is not there"),
    ],
)
def test_what_is_no_training_is_told(capsys, name, text, says):
    Path(name).write_text(text)
    assert main(["plan", "--translate", name]) == 1
    assert says in capsys.readouterr().err


def test_wrong_words_beside_translate(capsys, monkeypatch):
    Path("a.txt").write_text("swift sft --model m --dataset d.json --train_type lora")
    for argv, status, says in (
        (
            ["--translate", "a.txt", "--model_id", "m", "--lora_rank", "3"],
            2,
            "--model_id --lora_rank cannot be combined",
        ),
        (["--translate", "nope.sh"], 1, "no such file"),
        (["--translate", "."], 1, "is a folder"),
        (["--translate"], 2, "expected one argument"),
        (["--translate", "a.txt", "--gpus", "0"], 2, "must be at least 1"),
        (["--translate", "a.txt", "--out", "no/where.yaml"], 1, "no is no folder"),
        (["--out", "x.yaml", "--model_id", "m"], 1, "--out x.yaml has no effect without --translate"),
    ):
        assert main(["plan", *argv]) == status, argv
        assert says in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(Path("a.txt").read_text()))
    assert main(["plan", "--translate", "-", "--json", "--gpus", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["flags"]["global_batch"] == 16
    assert main(["plan", "--translate", Path("a.txt").read_text()]) == 0


def test_placeholders_are_refused_until_they_are_filled_in():
    with pytest.raises(ConfigError) as caught:
        door.check("train", ["--model_id", "<MODEL>", "--data_path", "<x/y>", "--learning_rate", "<LR>"], KNOWN)
    for word in ("<MODEL>", "<x/y>", "<LR>"):
        assert f"{word}: replace {word} by a value" in str(caught.value)


@pytest.mark.parametrize(
    ("kit", "becomes"),
    [
        ("base_model: m\nadapter: lora\nval_set_size: 0.25\nearly_stopping_patience: 3\n", ("0.25", "3")),
        (
            "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\nval_size: 100\nearly_stopping_steps: 2\n",
            ("100", "2"),
        ),
        ("model: m\ntrain_type: lora\nsplit_dataset_ratio: 0.01\nearly_stop_interval: 4\n", ("0.01", "4")),
    ],
)
def test_rows_that_a_kit_holds_out_are_held_out(folder, kit, becomes):
    data = "dataset: d.json\n" if "base_model" not in kit else "datasets: [{path: d.json}]\n"
    (one,) = settled(kit + data, "old.yml")
    found = values(one)
    assert (found["eval_split"], found["early_stopping_patience"]) == becomes
    assert (found["eval_strategy"], found["metric_for_best_model"]) == ("epoch", "eval_loss")
    assert not [note for note in one.notes if "still to settle" in note]


def test_a_function_shifts_its_arguments():
    text = (
        'go() { local lr=$1; shift; swift sft --model m --dataset d.json --learning_rate $lr "$@"; }\ngo 1e-5 --seed 7'
    )
    (one,) = settled(text)
    assert (values(one)["learning_rate"], values(one)["seed"]) == ("1e-5", "7")
    assert not one.left_out


@pytest.mark.parametrize(
    "argv", [["train", "run.sh"], ["train", "--config", "run.sh"], ["run.sh"], ["llamafactory-cli", "train", "a.yaml"]]
)
def test_a_script_given_to_train_names_the_translation(folder, capsys, argv):
    Path("run.sh").write_text("swift sft \\\n    --model m\n")
    assert main(argv) in (1, 2)
    assert "vlft plan --translate " in capsys.readouterr().err


def test_the_refusal_of_a_yaml_names_the_translation(folder):
    (folder / "old.yaml").write_text(f"{{{_LF} finetuning_type: lora, dataset: d.json}}")
    with pytest.raises(Exception, match=r"as a YAML, with .*: vlft plan --translate old\.yaml --out NEW\.yaml"):
        door.check("train", ["--config", "old.yaml"], KNOWN)


# ---- hints

#: Flags of the kits' argument classes that look like flags of vlft, and are not.
_LIKE_OURS = (
    "galore_rank apollo_rank vera_rank oft_target galore_target apollo_target ppo_target ld_alpha "
    "boft_dropout vera_dropout adalora_beta1 adalora_target_r adam_beta3 adam_epsilon2 "
    "save_epochs dist_timeout fp8_backend profiler_output_dir profiler_warmup_steps kt_config merge_lora "
    "output_file eval_output_dir init_strategy dion_lr stopping_strategy lora_ga_max_length "
    "ref_model_revision teacher_model_revision weight_dtype pad_token eot_tokens format length "
    "mlflow_run_name dpo_use_liger_kernel max_prompt_length max_new_tokens truncation_mode val_size "
    "stage template colour_depth image_size"
)


def test_no_flag_of_a_kit_gets_a_hint_by_spelling():
    assert [name for name in _LIKE_OURS.split() if "did you mean" in unknown(name, KNOWN)] == []
    for typed, meant in {"learnin_rate": "learning_rate", "lora_renk": "lora_rank", "max_lenght": "max_length",
                         "imagefolder": "image_folder", "sed": "seed", "data-path": "data_path"}.items():  # fmt: skip
        assert unknown(typed.replace("-", "_") + ("s" if typed == "data-path" else ""), KNOWN).endswith(f"--{meant}?")


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "val_size 0.1": "eval_split 0.1",
        "early_stopping_steps 3": "early_stopping_patience 3",
        "orpo_alpha 0.2": "orpo_lambda 0.2",
        "pref_beta 0.2": "beta 0.2",
        "pref_loss ipo": "method dpo",
        "rlhf_type simpo": "method simpo",
        "lr 1e-4": "learning_rate 1e-4",
        "epochs 2": "num_train_epochs 2",
        "batch_size 8": "global_batch 8",
        "freeze_vit false": "vision lora",
        "dataset d.json": "data_path d.json",
        "cutoff_len 99": "max_length 99",
        "finetuning_type full": "language full",
        "train_type lora": "language lora",
        "tuner_type full": "language full",
        "lora_target_modules q_proj": "lora_target attention",
        "stage sft": "",
        "template qwen2_vl": "",
        "per_device_batch_size 4": "global_batch 4",
        "revision main": "model_revision main",
    }.items(),
)
def test_hints_by_meaning(typed, meant):
    name, *words = typed.split()
    from vlft.config.said import Said

    told = translate({name: Said(name=name, words=tuple(words))}, table.kinds("train"))
    assert told.unknown == ()
    assert meant in [*(f"{flag} {' '.join(value)}" for flag, value in told.flags.items()), *told.flags, ""]
    assert bool(told.changes) == bool(meant)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("webui", "vlft chat"), ("api", "serve OUT"), ("infer", "vlft chat"),
     ("deploy", "serve OUT"), ("sft", "vlft train"), ("pt", "vlft train"), ("rlhf", "--method dpo"),
     ("translate", "vlft plan --translate"), ("vllm-serve", "serve OUT"), ("kto", "not supported"),
     ("orpo", "vlft train --method orpo")],
)  # fmt: skip
def test_verbs_of_other_kits(capsys, typed, meant):
    assert main([typed]) == 2
    assert meant in capsys.readouterr().err.partition("Use: ")[2]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda one: one.label)
def test_a_base_of_this_machine_counts_pixels_by_its_config(tmp_path, family):
    """Its folder may have the name of another model; a base that is not here is known by its name alone."""
    folder = tmp_path / "Qwen3-VL-4B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family.model_type}))
    for found in (counted_like(str(folder)), counted_like(f"Qwen/{family.label}-9B-Instruct")):
        assert (found.factor, found.video_rule) == (family.factor, family.video_rule)


# ---- quantised bases, variants of LoRA, chosen blocks

_RUN = {
    "2U1": "deepspeed src/train/train_sft.py --model_id Qwen/x --data_path d.json --image_folder . --output_dir o "
    "--freeze_vision_tower True --freeze_merger True --freeze_llm True ",
    "TRL": "trl sft --model_name_or_path Qwen/x --dataset_name d.json --output_dir o --use_peft ",
    "ms-swift": "swift sft --model Qwen/x --dataset d.json --output_dir o ",
    "LLaMA-Factory": "llamafactory-cli train --model_name_or_path Qwen/x --dataset d.json --output_dir o --stage sft ",
}
_AX = "base_model: Qwen/x, datasets: [{path: d.json}], output_dir: o, "
_LORA_LLM = "language=lora"


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        (_RUN["2U1"] + "--lora_enable True --bits 4 --double_quant True --quant_type nf4", f"bits=4 {_LORA_LLM}"),
        (_RUN["2U1"] + "--lora_enable True --bits 4 --double_quant False --quant_type fp4 --deepspeed "
         "scripts/zero3_offload.json", f"bits=4 quant_type=fp4 double_quant=false deepspeed=zero2_offload {_LORA_LLM}"),
        (_RUN["2U1"] + "--lora_enable True --bits 8 --double_quant True --quant_type nf4", f"bits=8 {_LORA_LLM}"),
        (_RUN["2U1"] + "--bits 16 --double_quant True --quant_type nf4 --lora_enable True", _LORA_LLM),
        (_RUN["2U1"] + "--lora_enable True --use_dora True --lora_dropout 0.05",
         f"use_dora=true lora_dropout=0 {_LORA_LLM}"),
        (_RUN["2U1"] + "--unfreeze_topk_llm 8 --unfreeze_topk_vision 4 --lora_enable False",
         "language=full language_blocks=last:8 vision=full vision_blocks=last:4"),
        (_RUN["2U1"] + "--unfreeze_topk_llm 0 --unfreeze_topk_vision 4",
         "language=frozen vision=full vision_blocks=last:4"),
        (_RUN["2U1"] + "--unfreeze_topk_llm 8 --lora_enable True", _LORA_LLM),
        (_RUN["2U1"].replace("llm True", "llm False") + "--unfreeze_topk_llm 8", "language=full"),
        (_RUN["2U1"] + "--lora_enable True --lora_weight_path .", f"adapter=. {_LORA_LLM}"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type lora --quantization_bit 4 --quantization_type fp4 "
         "--double_quantization false --use_rslora true --loraplus_lr_ratio 16.0",
         f"bits=4 quant_type=fp4 double_quant=false use_rslora=true loraplus_ratio=16.0 {_LORA_LLM}"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type freeze --freeze_trainable_layers 8",
         "language=full language_blocks=last:8"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type freeze --freeze_trainable_layers -3",
         "language=full language_blocks=0-2"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type freeze", "language=full language_blocks=last:2"),
        (_RUN["ms-swift"] + "--tuner_type lora --quant_method bnb --quant_bits 4 --bnb_4bit_compute_dtype bfloat16 "
         "--bnb_4bit_quant_type nf4 --bnb_4bit_use_double_quant true --lorap_lr_ratio 10 --use_rslora true "
         "--init_weights true", f"bits=4 use_rslora=true loraplus_ratio=10 {_LORA_LLM}"),
        (_RUN["ms-swift"] + "--tuner_type lora --use_dora true --deepspeed zero3",
         f"use_dora=true deepspeed=zero2 lora_dropout=0 {_LORA_LLM}"),
        (_RUN["TRL"] + "--load_in_4bit --bnb_4bit_quant_type nf4", f"bits=4 double_quant=false {_LORA_LLM}"),
        (_RUN["TRL"] + "--load_in_4bit --use_bnb_nested_quant --use_dora", f"bits=4 use_dora=true lora_dropout=0 "
         f"{_LORA_LLM}"),
        (_RUN["TRL"] + "--load_in_8bit true --use_rslora", f"bits=8 use_rslora=true {_LORA_LLM}"),
        (f"{{{_AX}adapter: qlora, load_in_4bit: true, loraplus_lr_ratio: 16, peft_use_rslora: true}}",
         "bits=4 use_rslora=true loraplus_ratio=16 vision=lora merger=lora language=lora"),
        (f"{{{_AX}adapter: lora, load_in_8bit: true, peft_use_dora: true}}",
         "bits=8 use_dora=true lora_dropout=0 vision=lora merger=lora language=lora"),
        (f"{{{_AX}adapter: qlora, load_in_4bit: true, bnb_config_kwargs: {{bnb_4bit_quant_type: fp4, "
         "bnb_4bit_use_double_quant: false}}", "bits=4 quant_type=fp4 double_quant=false vision=lora merger=lora "
         "language=lora"),
    ],
)  # fmt: skip
def test_quantised_bases_variants_and_blocks(text, becomes):
    """What is asked for, in a command that the door accepts."""
    (one,) = settled(text, "old.yaml" if text.startswith("{") else "old.sh")
    found = values(one)
    names = ("bits", "quant_type", "double_quant", "use_dora", "use_rslora", "loraplus_ratio", "adapter",
             "language_blocks", "vision_blocks", "language")  # fmt: skip
    wanted = dict(part.split("=", 1) for part in becomes.split())
    chosen = {name: str(found[name]) for name in {*names, *wanted} if name in found}
    chosen |= {"lora_dropout": "0"} if float(chosen.get("lora_dropout", 1)) == 0 else {}
    assert {"language": "lora"} | chosen == wanted
    assert not any("still to settle" in note for note in one.notes)
    assert rounds(one) == 1


@pytest.mark.parametrize(
    ("text", "flag", "why"),
    [
        (_RUN["ms-swift"] + "--tuner_type lora --quant_method hqq --quant_bits 4", "--quant_", "hqq is not supported"),
        (_RUN["ms-swift"] + "--tuner_type lora --init_weights pissa_niter_16", "--init_weights", "PiSSA and OLoRA"),
        (_RUN["ms-swift"] + "--tuner_type full --freeze_parameters_ratio 0.5", "--freeze_parameters_ratio", "counts"),
        (_RUN["ms-swift"] + "--tuner_type full --trainable_parameters model.layers.3", "--trainable_", "Whole blocks"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type lora --pissa_init true", "--pissa_init", "PiSSA"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type lora --quantization_bit 3", "--quantization_bit", "4 or 8 bits"),
        (_RUN["LLaMA-Factory"] + "--finetuning_type freeze --freeze_trainable_modules self_attn", "--finetuning_type",
         "whole blocks train"),
        (f"{{{_AX}unfrozen_parameters: [model.layers.2]}}", "--unfrozen_parameters", "Whole blocks"),
    ],
)  # fmt: skip
def test_values_without_a_counterpart_say_why(text, flag, why):
    (one,) = settled(text, "old.yaml" if text.startswith("{") else "old.sh")
    assert [said for before, said in one.left_out if before.startswith(flag) and why in said] != []


def test_the_note_of_a_quantised_base_says_what_keeps_its_dtype(folder, capsys):
    (folder / "old.sh").write_text(_RUN["2U1"] + "--lora_enable True --bits 4")
    assert main(["plan", "--translate", "old.sh"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "vision tower, merger, embedding and head keep their dtype" in said
    assert "also quantises the vision tower" in said
