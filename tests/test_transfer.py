"""A micro-batch on its way to a GPU: few copies, from pinned memory, with equal contents."""

from __future__ import annotations

import torch

from vlft.data import ipc
from vlft.model import tracing
from vlft.model.tracing import Load

LOAD = Load(lengths=(4000, 8000, 4384), vision_lengths=(2000,) * 26 + (1600,), supervised=2360)


def test_packed_tensors_arrive_as_they_are(monkeypatch):
    monkeypatch.setattr(ipc, "_pinned_memory", lambda shape, dtype: torch.full(shape, 7, dtype=dtype))
    tensors = [
        torch.arange(12).view(3, 4),
        torch.tensor([0, 3, 5], dtype=torch.int32),
        torch.zeros(0, 3, 2, 14, 14, dtype=torch.uint8),
        torch.rand(5, 2),
        torch.tensor([True, False, True]),
        torch.arange(24, dtype=torch.uint8).view(2, 3, 4).permute(2, 0, 1),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(10)[::3],
        torch.rand(0),
        torch.randint(0, 256, (ipc.PACKED + 1,), dtype=torch.uint8),
        torch.ones(3, dtype=torch.bfloat16),
    ]
    arrived = ipc._sent_to_gpu(tensors, torch.device("cpu"))
    for found, wanted in zip(arrived, tensors, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        assert found.storage_offset() * found.element_size() % ipc.ALIGNMENT == 0
    assert len({one.untyped_storage()._cdata for one in arrived if one.numel()}) == 2
    tensors[0].fill_(-1)
    assert arrived[0][0, 1] == 1  # the batch on the host may change


def test_a_batch_keeps_what_is_no_tensor():
    batch = {"ids": torch.arange(3), "meta": {"lengths": (1, 2), "index": torch.ones(2)}, "rows": (("a.json", 0),)}
    found = ipc.moved(batch, torch.device("cpu"))
    assert list(found) == list(batch)
    assert (found["meta"]["lengths"], found["rows"]) == ((1, 2), (("a.json", 0),))
    assert found["meta"]["index"] is batch["meta"]["index"]
    assert ipc.moved(batch["ids"], torch.device("cpu")) is batch["ids"]


def copies_of(batch, device) -> list[int]:
    """Bytes of each copy to a GPU. A copy that makes the host wait raises."""
    sent = []

    def watch(op):
        if op.name == "aten._to_copy" and {t.device.type for t in (*op.inputs, *op.outputs)} == {"cpu", "cuda"}:
            sent.append(op.outputs[0].nbytes)

    with tracing.Watch(tracing.refuse_waits, watch):
        arrived = ipc.moved(batch, device)
    assert {t.device.type for t in ipc._tensors(arrived)} == {"cuda"}
    return sent


def test_a_pack_takes_two_copies_pinned_by_its_loader_or_not():
    from vlft.demo.tiny import tiny_config, tiny_processor
    from vlft.families import FAMILIES

    for family in FAMILIES.values():
        sizes = family.sizes(tiny_config(tiny_processor(family), family))
        with tracing.without_contents():
            batch = tracing.batch_of(sizes.vision, LOAD)
            rest, pixels = copies_of(batch, torch.device("cuda", 0))
            assert pixels == batch["still_pixels"].nbytes > ipc.PACKED
            small = sum(t.nbytes for t in ipc._tensors(batch)) - pixels
            assert small <= rest < small + 20 * ipc.ALIGNMENT
