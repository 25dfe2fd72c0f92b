"""What vlft takes from other packages beyond their documented surface: it is there, and takes what we hand over.

One line for each name. Where a line fails on a new version, the file named in it has to follow.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import modules

# (module, attribute path, arguments it must take or () or, for what is not called in Python, None; where vlft uses it)
BORROWED = [
    ("transformers", "Trainer.get_train_dataloader", (), "train/trainer"),
    ("transformers", "Trainer.get_batch_samples", ("epoch_iterator", "num_batches", "device"), "train/trainer"),
    ("transformers", "Trainer._get_num_items_in_batch", ("batch_samples", "device"), "train/trainer"),
    (
        "transformers",
        "Trainer.compute_loss",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "train/trainer",
    ),
    ("transformers", "Trainer.create_optimizer", (), "train/trainer"),
    ("transformers", "Trainer.get_optimizer_cls_and_kwargs", ("args", "model"), "train/trainer"),
    ("transformers", "Trainer.training_step", ("model", "inputs", "num_items_in_batch"), "train/trainer"),
    ("transformers", "Trainer._get_grad_norm", (), "train/trainer"),
    ("transformers", "Trainer.floating_point_ops", ("inputs",), "train/trainer"),
    ("transformers", "Trainer._prepare_inputs", ("inputs",), "train/trainer"),
    ("transformers", "Trainer.evaluate", ("metric_key_prefix",), "train/evaluating"),
    ("transformers", "Trainer._evaluate", ("trial", "ignore_keys_for_eval"), "train/evaluating"),
    ("transformers", "Trainer._determine_best_metric", ("metrics", "trial"), "train/evaluating"),
    ("transformers", "Trainer._maybe_log_save_evaluate", (), "train/trainer"),
    ("transformers", "Trainer.log", ("logs", "start_time"), "train/trainer"),
    ("transformers", "Trainer._get_output_dir", ("trial",), "train/saving"),
    ("transformers", "Trainer._save_checkpoint", ("model", "trial"), "train/saving"),
    ("transformers", "Trainer._save", ("output_dir", "state_dict"), "train/saving, train/zero"),
    ("transformers", "Trainer.save_model", ("output_dir", "_internal_call"), "train/zero"),
    ("transformers", "Trainer._load_from_checkpoint", ("resume_from_checkpoint", "model"), "train/saving"),
    ("transformers", "Trainer._load_optimizer_and_scheduler", ("checkpoint",), "train/saving, train/zero"),
    ("transformers", "Trainer._load_best_model", (), "train/saving"),
    ("transformers", "Trainer._get_train_sampler", (), "bench/baseline"),
    ("transformers", "HfArgumentParser._add_dataclass_arguments", ("dtype",), "config/parse"),
    ("transformers", "AttentionInterface.register", ("key", "value"), "model/attention"),
    ("transformers", "AttentionMaskInterface.register", ("key", "value"), "model/attention"),
    ("transformers.masking_utils", "sdpa_mask", (), "model/attention"),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward", ("scaling", "is_causal"), "model/attention"),
    ("transformers.integrations.deepspeed", "set_hf_deepspeed_config", ("hf_deepspeed_config_obj",), "train/zero"),
    ("transformers.integrations.deepspeed", "unset_hf_deepspeed_config", (), "train/zero"),
    ("transformers.models.qwen2_vl.image_processing_qwen2_vl", "smart_resize", ("height", "width"), "data/media"),
    ("transformers", "Qwen2VLConfig()._attn_implementation_internal", None, "model/adapt"),
    ("transformers", "Qwen2VLPreTrainedModel._set_gradient_checkpointing", ("enable",), "model/adapt"),
    (
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
        "Qwen3VLTextModel._deepstack_process",
        ("hidden_states", "visual_pos_masks", "visual_embeds"),
        "model/adapt",
    ),
    (
        "transformers.models.qwen3_5.modeling_qwen3_5",
        "Qwen3_5GatedDeltaNet.forward",
        ("hidden_states", "cache_params", "attention_mask"),
        "model/recurrent",
    ),
    (
        "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
        "Qwen3_5MoeGatedDeltaNet.forward",
        ("hidden_states", "cache_params", "attention_mask"),
        "model/recurrent",
    ),
    ("transformers.models.qwen3_5.modeling_qwen3_5", "Qwen3_5RMSNormGated.forward", ("gate",), "model/recurrent"),
    (
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        ("q", "k", "v", "g", "beta", "use_qk_l2norm_in_kernel", "cu_seqlens", "chunk_indices"),
        "model/linear_attention",
    ),
    ("transformers.masking_utils", "flash_attention_mask", ("attention_mask",), "bench/stock_kernels"),
    ("transformers.activations", "QuickGELUActivation.forward", ("input",), "model/adapt"),
    ("tokenizers", "Tokenizer.encode_batch_fast", None, "data/tokenise"),
    ("tokenizers", "Tokenizer.encode_special_tokens", None, "data/tokenise"),
    ("multiprocessing.reduction", "DupFd", ("fd",), "data/pixel_memory"),
    ("peft.tuners.lora.layer", "Linear.forward", ("x",), "model/lora"),
    ("peft.tuners.lora.layer", "Linear.active_adapters", None, "model/lora"),
    ("peft.tuners.lora.layer", "Linear.merged", None, "model/lora"),
    ("peft.tuners.lora.layer", "Linear.disable_adapters", None, "model/lora"),
    ("peft.utils.other", "get_pattern_key", ("pattern_keys", "key_to_match"), "merge/plan"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode", ("allow_non_fake_inputs",), "model"),
    (
        "torch.utils._python_dispatch",
        "TorchDispatchMode.__torch_dispatch__",
        ("func", "types", "args"),
        "model/tracing",
    ),
    ("torch.utils._pytree", "tree_leaves", ("tree",), "model/tracing"),
    ("torch", "_C._current_graph_task_id", None, "model/tracing"),
    ("torch", "_C._FunctionBase._input_metadata", None, "model/tracing"),
    ("torch", "UntypedStorage._cdata", None, "model/activations, model/traffic, plan/measure"),
    ("torch", "_C._autograd._get_sequence_nr", None, "model/traffic"),
    ("torch.autograd.graph", "Node._sequence_nr", None, "model/traffic"),
    ("torch", "ops.aten.add_.Tensor._schema", None, "model/traffic"),
    ("torch", "native_dropout", None, "model/lora"),
    ("torch", "ops.aten._upsample_bicubic2d_aa.out._schema", None, "data/media/resize"),
    ("torch.nn.attention.varlen", "varlen_attn", ("scale", "window_size"), "model/attention"),
    ("torch.distributed.distributed_c10d", "_get_default_store", (), "train/watchdog"),
    ("torch.autograd.function", "once_differentiable", ("fn",), "model/fused, model/lora, model/loss"),
    ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", (), "config/deepspeed"),
    ("deepspeed", "zero.Init", ("module", "config_dict_or_path"), "train/zero"),
    ("deepspeed.utils", "safe_get_full_fp32_param", ("param",), "train/zero"),
    ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction.forward", ("eps", "offset", "casting_mode"), "model/fused"),
    ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction.forward", ("a", "b"), "model/fused"),
]


@pytest.mark.parametrize(("module", "path", "takes", "used"), BORROWED, ids=[f"{m}:{p}" for m, p, _, _ in BORROWED])
def test_what_is_borrowed_is_there(module, path, takes, used):
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    found = importlib.import_module(module)
    for name in path.split("."):
        assert hasattr(found, name.removesuffix("()")), f"{module} has no {path} (vlft/{used})"
        found = getattr(found, name.removesuffix("()"))
        found = found() if name.endswith("()") else found
    if takes is None:
        return
    parameters = inspect.signature(found).parameters
    missing = [name for name in takes if name not in parameters]
    assert not missing, f"{path} does not take {missing} (vlft/{used})"


# ---- the list is complete for the Trainer


def listed() -> dict[str, str]:
    """Members of transformers' Trainer in the list, and where it says they are used."""
    return {path.partition(".")[2]: used for _, path, _, used in BORROWED if path.startswith("Trainer.")}


def overridden() -> Iterator[tuple[type, str]]:
    """Class of ours and member of the stock Trainer that it overrides."""
    from transformers import Trainer

    from vlft.train.trainer import VlftTrainer

    for cls in VlftTrainer.__mro__[: VlftTrainer.__mro__.index(Trainer)]:
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and hasattr(Trainer, name) and not hasattr(object, name):
                yield cls, name


def test_every_override_is_listed_where_it_stands_and_told_in_the_docstring():
    """In the opening docstring of its module (of its class in `zero`, whose module has another story to tell)."""
    found = list(overridden())
    assert len(found) == 21
    for cls, name in found:
        module = importlib.import_module(cls.__module__)
        assert cls.__module__.removeprefix("vlft.").replace(".", "/") in listed()[name], name
        assert f"`{name}`" in module.__doc__ + cls.__doc__, f"{cls.__module__} does not say that it overrides {name}"


def test_an_override_takes_what_the_stock_trainer_hands_over():
    """Every parameter that the stock method has, by place and by name."""
    from transformers import Trainer

    for cls, name in overridden():
        ours, stock = inspect.signature(getattr(cls, name)), inspect.signature(getattr(Trainer, name))
        plain = [p for p in stock.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        others = {p.name: p.name for p in stock.parameters.values() if p.kind is p.KEYWORD_ONLY}
        ours.bind(*(p.name for p in plain), **others)
        ours.bind(plain[0].name, **{p.name: p.name for p in plain[1:]}, **others)


def test_every_private_member_of_the_trainer_that_is_called_is_listed():
    from transformers import Trainer

    called: dict[str, set[str]] = {}
    for module, file in modules().items():
        if module.startswith(("vlft.train.", "vlft.bench.")):
            for node in ast.walk(ast.parse(Path(file).read_text())):
                if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                    called.setdefault(node.attr, set()).add(module)
    used = {name for name in called if hasattr(Trainer, name)}
    assert "_determine_best_metric" in used
    assert used <= set(listed()), {name: called[name] for name in used - set(listed())}
