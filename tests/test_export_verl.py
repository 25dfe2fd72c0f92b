"""verl's own dataset reads an export: the prompt that a rollout gets is the prompt that vlft trains."""

from __future__ import annotations

import pytest
from build import row, write_image, write_json
from transformers import AutoProcessor

from vlft.cli.main import main
from vlft.config.flags import DataFlags, ModelFlags
from vlft.families import FAMILIES
from vlft.preview import preview_rows

LIMIT = 40_000


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_verls_dataset_makes_the_prompts_of_training(model_type, base_of, tmp_path, capsys):
    """verl 0.9.1: RLHFDataset reads the file, and `build_multimodal_processor_inputs` makes what a rollout gets."""
    pytest.importorskip("qwen_vl_utils")
    reason = "pip install --no-deps verl==0.9.1 tensordict ray omegaconf antlr4-python3-runtime==4.9.3 pyvers"
    dataset = pytest.importorskip("verl.utils.dataset.rl_dataset", reason=reason)
    from omegaconf import OmegaConf
    from verl.utils.tokenizer import build_multimodal_processor_inputs

    base = base_of(FAMILIES[model_type])
    write_image(tmp_path / "a.jpg", 300, 200)
    write_image(tmp_path / "b.png", 90, 140)
    rows = [
        row("<image>\nWhat is this?", "A roof.", image="a.jpg", id="one"),
        row("Compare <image> with <image>, please.", "The first is larger.", image=["a.jpg", "b.png"]),
        row("Hi.", "Hello there."),
    ]
    rows[2]["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Goodbye."}]
    data = write_json(tmp_path / "rows.json", rows)
    common = ["--model_id", str(base), "--image_max_pixels", str(LIMIT)]
    assert main(["export", "verl", str(data), str(tmp_path / "out"), *common]) == 0
    printed = [word for line in capsys.readouterr().out.splitlines() for word in line.split() if "data." in word]
    settings = OmegaConf.from_dotlist([word.lstrip("+") for word in printed]).data
    processor = AutoProcessor.from_pretrained(base)
    config = OmegaConf.merge(settings, {"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": True})
    read = dataset.RLHFDataset(settings.train_files, processor.tokenizer, config, processor)

    flags = DataFlags(image_max_pixels=LIMIT)
    given = frozenset({"model_id", "image_max_pixels"})
    wanted = [
        one.as_json() for one in preview_rows(str(data), range(3), flags, ModelFlags(model_id=str(base)), given=given)
    ]
    wanted = [sample for one in wanted for sample in one.get("samples", [one])]
    assert len(read) == 4  # none is over the printed length
    prompts = []
    for one in (read[place] for place in range(len(read))):
        images, videos, audios = read._process_multi_modal_info(one["raw_prompt"], read.image_patch_size, config)
        text = processor.apply_chat_template(
            one["raw_prompt"], add_generation_prompt=True, tokenize=False, **read.apply_chat_template_kwargs
        )
        made = build_multimodal_processor_inputs(processor, text=[text], images=images, videos=videos, audio=audios)
        prompts.append((made["input_ids"][0].tolist(), made["image_grid_thw"].tolist() if images else []))
    for place, (ids, grids) in enumerate(prompts):
        trained = wanted[min(place, len(wanted) - 1)]
        assert trained["input_ids"][: len(ids)] == ids, place
        assert trained["image_grid_thw"] == grids
        assert trained["labels"][len(ids) - 1] == -100 != trained["labels"][len(ids)]  # the answer begins there
