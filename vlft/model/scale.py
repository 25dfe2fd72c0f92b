"""Scale pixels as the stock processor does. torch is imported where used."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Values that are scaled at once: 16 MiB in float32, which a GPU's cache holds.
CHUNK_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """Mean and deviation of the processor, in units of 0..255.

    `rescale_factor` is folded in, as in transformers' own processors.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(processor: Any) -> PixelScale:
        """The scale a stock processor uses for pictures and videos.

        Raises:
            ConfigError: pictures and videos are scaled differently, which one vision call does not support.
        """
        scales = []
        for part in (processor.image_processor, processor.video_processor):
            unit = 1.0 / part.rescale_factor if part.do_rescale else 1.0
            mean = tuple(m * unit for m in part.image_mean) if part.do_normalize else (0.0, 0.0, 0.0)
            std = tuple(s * unit for s in part.image_std) if part.do_normalize else (unit, unit, unit)
            scales.append(PixelScale(mean=mean, std=std))
        if scales[0] != scales[1]:
            raise ConfigError(
                f"the base processor scales pictures by {scales[0]} and videos by {scales[1]}; vlft needs them equal. "
                "Make image_mean, image_std and rescale_factor agree in the base's processor files."
            )
        return scales[0]

    def patches(
        self, still_patches: torch.Tensor, video_patches: torch.Tensor, *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """uint8 patches -> the ViT's input, on the patches' device.

        Args:
            still_patches: uint8 [P_still, C, h, w]; the frame is stored once and repeated here.
            video_patches: uint8 [P_video, C, 2, h, w].
            dtype: of the result; None: float32. Values are computed in float32 and rounded once.

        Returns:
            pixels: [P_still + P_video, C * 2 * h * w], equal to the stock processor's `pixel_values`.
        """
        import torch

        mean, std = constants(self, still_patches.device)
        stills, videos = len(still_patches), len(video_patches)
        shape = (stills + videos, *video_patches.shape[1:])
        pixels = torch.empty(shape, dtype=dtype or torch.float32, device=still_patches.device)
        # In chunks, so that float32 values of the whole batch, four times its bytes, never exist at once.
        rows = max(1, CHUNK_VALUES // pixels[0].numel()) if len(pixels) else 1
        for start in range(0, stills, rows):
            part = still_patches[start : start + rows] - mean
            torch.div(
                part[:, :, None].expand(-1, -1, shape[2], -1, -1), std[:, None], out=pixels[start : start + len(part)]
            )
        for start in range(0, videos, rows):
            part = video_patches[start : start + rows] - mean[:, None]
            first = stills + start
            torch.div(part, std[:, None], out=pixels[first : first + len(part)])
        return pixels.flatten(1)


@functools.cache
def constants(scale: PixelScale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation on a device, [C, 1, 1] each; cached, since the copy makes the host wait."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (scale.mean, scale.std))
    return mean, std
