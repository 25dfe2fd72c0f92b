"""config.json of published forms: read without transformers, the sizes are those that transformers reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlft.families import FAMILIES, Family
from vlft.model.load import load_config

LABELS = {family.label: family for family in FAMILIES.values()}
IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
#: Entries of published files that no size depends on.
ABOUT = {"transformers_version": "4.57.0", "architectures": ["X"], "torch_dtype": "bfloat16", "quantization": None}


def published(family: Family, **changes: Any) -> dict[str, Any]:
    """A config.json in the form that the family is published in. A change of None removes a key.

    Args:
        family: of the model.
        changes: values to change, at the root or as `text__KEY` and `vision__KEY`.
    """
    shape = next(iter(family.shapes.values()))
    text = {**shape.text, "hidden_act": "silu", "rms_norm_eps": 1e-6, "mtp_num_hidden_layers": 1, "mtp_use_it": False}
    vision = {**shape.vision, "hidden_act": "gelu_pytorch_tanh", "in_chans": 3}
    if "recurrent" in family.features:
        vision["deepstack_visual_indexes"] = []
        text |= {"full_attention_interval": 4, "mamba_ssm_dtype": "float32"}
    whole: dict[str, Any] = {**IDS, **ABOUT, "model_type": family.model_type, "tie_word_embeddings": shape.tied}
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        {"text": text, "vision": vision, "": whole}[part][key] = value
    kept = {key: value for key, value in text.items() if value is not None}
    if family.published:  # their files are flat
        rope = kept.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        whole |= {**kept, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    else:
        whole["text_config"] = kept
    whole["vision_config"] = {key: value for key, value in vision.items() if value is not None}
    return {key: value for key, value in whole.items() if value is not None}


def read_both(family: Family, found: dict[str, Any], folder) -> tuple[Any, Any]:
    """Our config, or None, and transformers'."""
    (folder / "config.json").write_text(json.dumps(found))
    return family.plain_config(found, where=str(folder)), load_config(folder)[0]


KINDS = {
    "as published": {},
    "a long list of kinds that is left out": {"text__layer_types": None},
    "another interval": {"text__layer_types": None, "text__full_attention_interval": 3},
    "the default interval": {"text__layer_types": None, "text__full_attention_interval": None},
    "no list of dense layers": {"text__mlp_only_layers": None},
    "some dense layers": {"text__mlp_only_layers": [0, 3]},
    "an untied head": {"tie_word_embeddings": False},
    "a tied head": {"tie_word_embeddings": True},
    "colours": {"vision__in_channels": 3},
}


@pytest.mark.parametrize("label", LABELS)
def test_published_forms_are_read_without_transformers(label, tmp_path):
    family = LABELS[label]
    for kind, changes in KINDS.items():
        ours, theirs = read_both(family, published(family, **changes), tmp_path)
        assert ours is not None, kind
        assert family.sizes(ours) == family.sizes(theirs), kind
        assert all(getattr(ours, name) == getattr(theirs, name) for name in IDS), kind
        theirs.text_config.tie_word_embeddings = theirs.tie_word_embeddings  # else transformers decides: see LEFT
        theirs.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        again = family.plain_config(saved, where="saved")
        assert again is not None, kind
        assert family.sizes(again) == family.sizes(theirs), kind


#: For these the two may differ, so transformers decides.
LEFT = {
    "no head_dim": {"text__head_dim": None},
    "no number of key heads": {"text__num_key_value_heads": None},
    "no token id": {"image_token_id": None},
    "tied in one place": {"tie_word_embeddings": False, "text__tie_word_embeddings": True},
    "tied in the text alone": {"tie_word_embeddings": None, "text__tie_word_embeddings": True},
    "no depth": {"vision__depth": None},
}


@pytest.mark.parametrize("label", LABELS)
def test_what_is_left_out_is_never_guessed_wrongly(label, tmp_path):
    family = LABELS[label]
    read = set()
    for kind, changes in LEFT.items():
        ours, theirs = read_both(family, published(family, **changes), tmp_path)
        if ours is not None:
            read.add(kind)
            assert family.sizes(ours) == family.sizes(theirs), kind
    # Families whose heads follow from their width have no such key, and flat files have one place for both.
    assert read <= {"no head_dim", *(["tied in one place", "tied in the text alone"] if family.published else [])}
