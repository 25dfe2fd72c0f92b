"""How many held-out answers a model gets exactly right: every character, and the end of the answer.

One forward over question and right answer tells it: greedy decoding gives exactly that answer if, and only if, at each
of its tokens (the one that ends it too) the likeliest next token is the right one. A test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vlft.checkpoint import find_adapter_or_model
from vlft.config.flags import DataFlags, ModelFlags
from vlft.data.collate import Collator
from vlft.data.encode import UNTRAINED
from vlft.data.sample import Sample
from vlft.errors import DataError
from vlft.inputs import Base, open_base, open_rows
from vlft.model import attention, forward
from vlft.model.load import load_base


def exact_answers(model: str | Path, file: str | Path, *, batch: int = 32) -> list[bool]:
    """Whether greedy decoding would give each row's answer, token for token.

    Args:
        model: base or merged model folder, or the folder of a LoRA run beside its base.
        file: rows with one answer each.
        batch: rows at a time; changes nothing but memory and speed.

    Returns:
        one a row, in file order.

    Raises:
        as `open_scored`.
    """
    base, net, samples, collate = open_scored(model, file)
    right: list[bool] = []
    for start in range(0, len(samples), batch):
        encoded = [base.encoder.encode(sample) for sample in samples[start : start + batch]]
        flat = collate(encoded)
        inputs = {key: value for key, value in flat.items() if key in forward.FORWARD_KEYS}
        with torch.no_grad():
            logits_KV = net(**inputs, return_logits=True).logits
        hits_K = logits_KV.argmax(-1) == flat["targets"]
        counts = [int((row.labels_T != UNTRAINED).sum()) for row in encoded]
        right += [bool(part.all()) for part in hits_K.split(counts)]
    return right


def open_scored(model: str | Path, file: str | Path) -> tuple[Base, torch.nn.Module, tuple[Sample, ...], Collator]:
    """A model ready for flat rows, and the rows.

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: a row is refused.
    """
    found = find_adapter_or_model(model)
    folder = str(found.base_model if found.kind == "adapter" else found.folder)
    base = open_base(DataFlags(data_path=[str(file)]), ModelFlags(model_id=folder), given=frozenset())
    rows = open_rows([str(file)], DataFlags(), base.family)
    if rows.bad:
        raise DataError(rows.bad[0])
    net = load_base(base.folder, base.family, dtype=torch.float32)
    attention.install(net, "sdpa", dtype=torch.float32)
    forward.bind(net, forward.PixelScale.of(base.processor))
    if found.kind == "adapter":
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(found.folder))  # type: ignore[assignment, arg-type]
    vision = base.config.vision_config
    collate = Collator(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, filler_token=0)
    net.eval()
    return base, net, rows.samples, collate
