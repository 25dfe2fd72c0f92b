"""Pixels that are resized into their place are those of torchvision, which the stock processors resize with."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from build import photograph, write_image
from stills_and_clips import SETTINGS
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vlft.data.media import resize as ours
from vlft.data.media.resize import direct_resize, resize_into

SIZES = [(28, 28), (28, 1400), (84, 56), (427, 640), (224, 644), (854, 1288), (29, 31)]


def stock(pixels_F3HW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return resize(pixels_F3HW, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def layouts(pixels_HW3: np.ndarray) -> dict[str, torch.Tensor]:
    """A picture as decoders and EXIF's turns leave it: [3, H, W]."""
    mixed = torch.from_numpy(np.array(pixels_HW3)).permute(2, 0, 1)
    planes = mixed.contiguous()
    return {
        "mixed": mixed,
        "planes": planes,
        "grey": planes[:1].expand(3, -1, -1),
        "turned": mixed.transpose(1, 2).flip(2),
        "mirrored": planes.flip(2),
        "cut out": mixed[:, 3:-5, 7:-2],
    }


@pytest.mark.parametrize("layout", layouts(np.zeros((20, 20, 3), np.uint8)))
@pytest.mark.parametrize("name", ["china", "chelsea"])
def test_a_picture_in_its_place(name, layout):
    given = layouts(photograph(name))[layout]
    for size in SIZES:
        room = torch.full((3 * size[0] * size[1] + 200,), 77, dtype=torch.uint8)
        made_1HW3 = room[100:-100].view(1, *size, 3)
        resize_into(made_1HW3, given[None])
        assert torch.equal(made_1HW3.permute(0, 3, 1, 2)[0], stock(given, size)), size
        assert (room[:100] == 77).all()
        assert (room[-100:] == 77).all()


def test_frames_in_their_places():
    frames = np.stack([photograph("china")[i : i + 90, 10 * i : 10 * i + 130] for i in range(5)])
    given = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for size in SIZES:
        made_FHW3 = torch.zeros(7, *size, 3, dtype=torch.uint8)
        resize_into(made_FHW3[1:6], given)
        assert torch.equal(made_FHW3[1:6].permute(0, 3, 1, 2), stock(given, size)), size
        assert not made_FHW3[0].any()
        assert not made_FHW3[6].any()


def test_a_picture_of_this_size_is_copied():
    given = torch.from_numpy(np.array(photograph("china"))).permute(2, 0, 1)
    made_1HW3 = torch.empty(1, *given.shape[1:], 3, dtype=torch.uint8)
    resize_into(made_1HW3, given[None])
    assert torch.equal(made_1HW3[0].permute(2, 0, 1), given)


@pytest.mark.skipif("AVX2" not in torch.backends.cpu.get_cpu_capability(), reason="torchvision resizes in float here")
def test_this_processor_resizes_into_its_place():
    assert direct_resize() is not None


def test_a_default_device_makes_no_difference():
    """In a loop of the user's own, `torch.set_default_device` may have been called before the loader is made."""
    with torch.device("meta"):
        assert (ours._direct.__wrapped__(tested=True) is None) == (direct_resize() is None)


@pytest.mark.parametrize("why", ["missing", "fails", "rounds in another way"])
def test_without_that_function_torchvision_resizes(monkeypatch, why):
    class Aten:
        class _upsample_bicubic2d_aa:
            @staticmethod
            def out(pixels, size, *args, out):
                if why == "fails":
                    raise RuntimeError("not here")
                floats = torch.nn.functional.interpolate(pixels.double(), size, mode="bicubic", antialias=True)
                return out.copy_((floats + 0.45).clamp(0, 255))

    aten = object() if why == "missing" else Aten
    monkeypatch.setattr(torch, "ops", type("Ops", (), {"aten": aten}))
    monkeypatch.setattr(ours, "_direct", ours._direct.__wrapped__)
    try:
        assert direct_resize() is None
        given = torch.from_numpy(np.array(photograph("china"))).permute(2, 0, 1)
        made_1HW3 = torch.empty(1, 56, 84, 3, dtype=torch.uint8)
        resize_into(made_1HW3, given[None])
    finally:
        monkeypatch.undo()
    assert torch.equal(made_1HW3[0].permute(2, 0, 1), stock(given, (56, 84)))


ALONE = """
import sys
import torch
from vlft.config.recipe import Recipe
from vlft.data.media import jpeg, resize
from vlft.data.media.decode import decode
from vlft.data.sample import Image

recipe = Recipe(**RECIPE)
found = [decode(Image(path=PATH, field="image"), recipe).pixels for _ in range(jpeg.FEW // 2)]
assert "torchvision" not in sys.modules, "a preview of few pictures does not need it"
alone = resize.direct_resize()
found += [decode(Image(path=PATH, field="image"), recipe).pixels for _ in range(jpeg.FEW)]
assert "torchvision" in sys.modules, "for many pictures it is worth its import"
assert (resize.direct_resize() is None) == (alone is None), "the rule without torchvision is the test with it"
found.append(decode(Image(path=PATH, field="image"), recipe).pixels)
assert all(torch.equal(one, found[0]) for one in found)
"""


def test_few_pictures_are_decoded_without_torchvision_and_equal_those_of_many(tmp_path):
    """A preview shows a page a second or two sooner."""
    path = write_image(tmp_path / "a.jpg", 340, 190)
    recipe = {field.name: getattr(SETTINGS, field.name) for field in dataclasses.fields(SETTINGS)}
    script = f"PATH, RECIPE = {str(path)!r}, {recipe!r}\n{ALONE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
