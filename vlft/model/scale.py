"""Scale pixels as the stock processor does. torch is imported where used."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.errors import ConfigError

if TYPE_CHECKING:
    import torch


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

    def patches(self, still_patches: torch.Tensor, video_patches: torch.Tensor) -> torch.Tensor:
        """uint8 patches -> the ViT's input, on the patches' device.

        Args:
            still_patches: uint8 [P_still, C, h, w]; the frame is stored once and repeated here.
            video_patches: uint8 [P_video, C, 2, h, w].

        Returns:
            pixels: float32 [P_still + P_video, C * 2 * h * w], equal to the stock processor's `pixel_values`.
        """
        import torch

        mean, std = constants(self, still_patches.device)
        stills = ((still_patches.float() - mean) / std).unsqueeze(2).expand(-1, -1, 2, -1, -1)
        videos = (video_patches.float() - mean.unsqueeze(1)) / std.unsqueeze(1)
        return torch.cat([stills.flatten(1), videos.flatten(1)])


@functools.cache
def constants(scale: PixelScale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation on a device, [C, 1, 1] each; cached, since the copy makes the host wait."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (scale.mean, scale.std))
    return mean, std
