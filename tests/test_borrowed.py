"""What vlft takes from other packages beyond their documented surface: it is there, and takes what we hand over.

One line for each name. Where a line fails on a new version, the file named in it has to follow.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import pytest

# (module, attribute path, arguments it must take or (), where vlft uses it)
BORROWED = [
    ("transformers", "Trainer.get_train_dataloader", (), "train/trainer"),
    ("transformers", "Trainer.get_batch_samples", ("epoch_iterator", "num_batches", "device"), "train/trainer"),
    ("transformers", "Trainer._get_num_items_in_batch", ("batch_samples", "device"), "train/trainer"),
    ("transformers", "Trainer.compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch"), "trainer"),
    ("transformers", "Trainer.create_optimizer", (), "train/trainer"),
    ("transformers", "Trainer.get_optimizer_cls_and_kwargs", ("args", "model"), "train/trainer"),
    ("transformers", "Trainer.training_step", ("model", "inputs", "num_items_in_batch"), "train/trainer"),
    ("transformers", "Trainer._get_grad_norm", (), "train/trainer"),
    ("transformers", "Trainer.floating_point_ops", ("inputs",), "train/trainer"),
    ("transformers", "Trainer._prepare_inputs", ("inputs",), "train/trainer"),
    ("transformers", "Trainer.evaluate", ("metric_key_prefix",), "train/trainer"),
    ("transformers", "Trainer._evaluate", ("trial", "ignore_keys_for_eval"), "train/trainer"),
    ("transformers", "Trainer._determine_best_metric", ("metrics", "trial"), "train/trainer"),
    ("transformers", "Trainer.log", ("logs", "start_time"), "train/trainer"),
    ("transformers", "Trainer._get_output_dir", ("trial",), "train/trainer"),
    ("transformers", "Trainer._save_checkpoint", ("model", "trial"), "train/trainer"),
    ("transformers", "Trainer._save", ("output_dir", "state_dict"), "train/trainer, train/zero"),
    ("transformers", "Trainer.save_model", ("output_dir", "_internal_call"), "train/zero"),
    ("transformers", "Trainer._load_from_checkpoint", ("resume_from_checkpoint", "model"), "train/trainer"),
    ("transformers", "Trainer._load_optimizer_and_scheduler", ("checkpoint",), "train/trainer, train/zero"),
    ("transformers", "Trainer._load_best_model", (), "train/trainer"),
    ("transformers", "Trainer._get_train_sampler", (), "bench/baseline"),
    ("transformers", "HfArgumentParser._add_dataclass_arguments", ("dtype",), "config/parse"),
    ("transformers", "AttentionInterface.register", ("key", "value"), "model/attention"),
    ("transformers", "AttentionMaskInterface.register", ("key", "value"), "model/attention"),
    ("transformers.masking_utils", "sdpa_mask", (), "model/attention"),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward", ("scaling", "is_causal"), "model/attention"),
    ("transformers.integrations.deepspeed", "set_hf_deepspeed_config", ("hf_deepspeed_config_obj",), "train/zero"),
    ("transformers.integrations.deepspeed", "unset_hf_deepspeed_config", (), "train/zero"),
    ("transformers.models.qwen2_vl.image_processing_qwen2_vl", "smart_resize", ("height", "width"), "data/media"),
    ("transformers", "Qwen2VLConfig._attn_implementation_internal", None, "model/adapt"),
    ("transformers", "Qwen2VLPreTrainedModel._set_gradient_checkpointing", ("enable",), "model/adapt"),
    (
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
        "Qwen3VLTextModel._deepstack_process",
        ("hidden_states", "visual_pos_masks", "visual_embeds"),
        "model/adapt",
    ),
    ("peft.utils.other", "get_pattern_key", ("pattern_keys", "key_to_match"), "merge/plan"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode", ("allow_non_fake_inputs",), "model"),
    ("torch.distributed.distributed_c10d", "_get_default_store", (), "train/watchdog"),
    ("torch.autograd.function", "once_differentiable", ("fn",), "model/loss"),
    ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", (), "config/deepspeed"),
    ("deepspeed", "zero.Init", ("module", "config_dict_or_path"), "train/zero"),
    ("deepspeed.utils", "safe_get_full_fp32_param", ("param",), "train/zero"),
    ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction.forward", ("eps", "offset", "casting_mode"), "model/kernels"),
    ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction.forward", ("a", "b"), "model/kernels"),
]


@pytest.mark.parametrize(("module", "path", "takes", "used"), BORROWED, ids=[f"{m}:{p}" for m, p, _, _ in BORROWED])
def test_what_is_borrowed_is_there(module, path, takes, used):
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    found = importlib.import_module(module)
    if takes is None:
        config = getattr(found, path.partition(".")[0])()
        assert hasattr(config, path.partition(".")[2]), used
        return
    for name in path.split("."):
        found = getattr(found, name)
    parameters = inspect.signature(found).parameters
    missing = [name for name in takes if name not in parameters]
    assert not missing, f"{path} does not take {missing} (vlft/{used})"
