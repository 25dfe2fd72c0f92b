"""GPUs by name: memory and speed from their data sheets. Needs no torch until a card of this machine is looked up."""

from __future__ import annotations

from dataclasses import dataclass

from vlft.errors import ConfigError

#: Used by CUDA itself, cuBLAS's workspaces and similar, before any tensor; and by NCCL's buffers, with peers.
CONTEXT_BYTES = int(0.7e9)
NCCL_BYTES = int(0.6e9)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    Attributes:
        gb: GB (10^9 bytes) that a process can use, about the total memory that torch reports.
        tflops: dense bf16 tensor peak with fp32 accumulation, in TFLOP/s; None if it has no bf16 or is not listed.
        tb_s: memory bandwidth in TB/s.
        flash: share of the peak that flash attention reaches. FlashAttention 2 reaches less of Hopper's peak, which
            is only reached with instructions that are new there.
    """

    gb: float
    tflops: float | None = None
    tb_s: float | None = None
    flash: float = 0.55

    @property
    def known(self) -> bool:
        """Whether the speed of a step can be predicted."""
        return self.tflops is not None and self.tb_s is not None


#: NVIDIA's data sheets state most peaks with sparsity, which doubles the number. 989.4: H100 and H200 SXM (H100 white
#: paper, table 2); 312: A100 (white paper, table 1); 362: L40S (data sheet: 733 sparse, 362.05 dense); 165.2: RTX 4090
#: (Ada white paper, appendix A); 209.5: RTX 5090 (Blackwell white paper). Half of the number with sparsity in the data
#: sheet: B200 4,500 (DGX B200: 36 PFLOP/s of eight), L4 242. GA102 white paper: A6000 154.8, RTX 3090 71.
CARDS: dict[str, Card] = {
    "b200": Card(gb=191.0, tflops=2250.0, tb_s=8.0, flash=0.4),
    "h200": Card(gb=150.1, tflops=989.4, tb_s=4.8, flash=0.4),
    "h100": Card(gb=84.9, tflops=989.4, tb_s=3.35, flash=0.4),
    "a100-80": Card(gb=84.9, tflops=312.0, tb_s=2.039),
    "a100-40": Card(gb=42.3, tflops=312.0, tb_s=1.555),
    "rtx-pro-6000": Card(gb=101.9),
    "l40s": Card(gb=47.7, tflops=362.0, tb_s=0.864),
    "a6000": Card(gb=50.9, tflops=154.8, tb_s=0.768),
    "5090": Card(gb=33.7, tflops=209.5, tb_s=1.792),
    "4090": Card(gb=25.3, tflops=165.2, tb_s=1.008),
    "3090": Card(gb=25.3, tflops=71.0, tb_s=0.936),
    "a10g": Card(gb=23.6),
    "l4": Card(gb=23.6, tflops=121.0, tb_s=0.3),
    "v100-32": Card(gb=34.0),
    "t4": Card(gb=15.6),
}
#: Cards whose step can be predicted.
PREDICTED = tuple(name for name, card in CARDS.items() if card.known)

#: Part of the name that CUDA reports -> our name, or the dense bf16 peak in TFLOP/s of a variant whose other speeds are
#: not listed. The first match wins. 756: H100 PCIe (H100 white paper, table 2); 835.5: half of the number with sparsity
#: in the data sheets of H100 NVL and H200 NVL; 181.05: L40 (data sheet).
_REPORTED: tuple[tuple[str, str | float], ...] = (
    *(("H100 PCIe", 756.0), ("H100 NVL", 835.5), ("H200 NVL", 835.5)),
    *(("NVIDIA B200", "b200"), ("H200", "h200"), ("H100", "h100")),
    *(("A100-SXM4-80GB", "a100-80"), ("A100-SXM4-40GB", "a100-40"), ("A100", 312.0)),
    *(("L40S", "l40s"), ("NVIDIA L40", 181.05), ("NVIDIA L4", "l4")),
    *(("RTX A6000", "a6000"), ("RTX 5090", "5090"), ("RTX 4090", "4090"), ("RTX 3090", "3090")),
)


def _listed(device: str | None) -> str | float | None:
    return next((listed for part, listed in _REPORTED if device and part in device), None)


def peak_tflops(device: str | None) -> float | None:
    """The dense bf16 peak of a card by its name; None for a card that is not in the table, or without a card."""
    listed = _listed(device)
    return CARDS[listed].tflops if isinstance(listed, str) else listed


def reported(device: str | None) -> str | None:
    """The name in `CARDS` of a card by the name that CUDA reports; None for a card that is not in the table."""
    listed = _listed(device)
    return listed if isinstance(listed, str) else None


def predicted(name: str, *, flag: str) -> Card:
    """The card of a name.

    Args:
        name: a name in `CARDS`.
        flag: for the message.

    Raises:
        ConfigError: it is not in the table, or its speed is not.
    """
    card = CARDS.get(name.lower())
    if card is None or not card.known:
        problem = "unknown card" if card is None else "its peak and bandwidth are not listed"
        raise ConfigError(f"{flag} {name}: {problem}. A step can be predicted for {', '.join(PREDICTED)}.")
    return card


def card_bytes(name: str | None) -> tuple[str, int] | None:
    """The name and bytes of a card.

    Args:
        name: a name in `CARDS`, or a number of GB; None: the card of this machine.

    Returns:
        name and bytes; None if `name` is None and this machine has no card.

    Raises:
        ConfigError: `name` is neither.
    """
    if name is None:
        import torch

        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    word = name.lower()
    if word in CARDS:
        return word, int(CARDS[word].gb * 1e9)
    try:
        size = float(word.removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise ConfigError(f"--gpu {name}: neither a number of GB nor one of {', '.join(CARDS)}")
    return f"{size:g} GB", int(size * 1e9)
