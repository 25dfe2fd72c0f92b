"""Measures the speed of a machine before training: `python -m vlft.bench.probe [--quick]`.

Times the operations that determine the speed of a step and that differ between GPUs and versions: matmul and copy
rates, the patch embedding as a convolution and as a matmul, and attention over flat rows of changing lengths. `--quick`
uses tiny sizes, to check on a CPU that it runs.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vlft.bench.sizes import SHAPES
from vlft.families import Sizes
from vlft.model import attention
from vlft.model.segments import Heads, Kernel, attend_segments, heads_of

PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "liger-kernel", "flash-attn", "deepspeed", "av")
SHAPE = "2b"
GEOMETRIES = 5  # packs of different lengths


def main(words: list[str]) -> None:
    """Run all measurements, and print each line as soon as it is known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = "--quick" in words
    for part in (_machine(device), _rates(device, quick), _patch_embedding(device, quick), _attention(device, quick)):
        for line in part:
            print(line, flush=True)


def _machine(device: torch.device) -> Iterator[str]:
    yield f"python {sys.version.split()[0]}; " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield f"cuda {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        yield f"{found.name}: {found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}"
    yield f"/dev/shm: {shutil.disk_usage('/dev/shm').free / 1e9:.1f} GB free"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _rates(device: torch.device, quick: bool) -> Iterator[str]:
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _seconds(lambda: a @ b, device)
    yield f"matmul {size}, bf16: {2 * size**3 / seconds / 1e12:.1f} TFLOP/s"
    seconds = _seconds(lambda: a.clone(), device)
    yield f"copy of {a.nbytes / 1e6:.0f} MB: {2 * a.nbytes / seconds / 1e9:.0f} GB/s read and written"


def _patch_embedding(device: torch.device, quick: bool) -> Iterator[str]:
    """Time the patch embedding as a convolution, as in transformers, and as a matmul: bf16 convolutions can be slow."""
    vision = _sizes().vision
    patches, width = (64, 32) if quick else (20_000, vision.width)
    shape = (vision.channels, vision.temporal, vision.patch, vision.patch)
    x = torch.randn(patches, vision.pixels, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, *shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "convolution": lambda: F.conv3d(x.view(-1, *shape), weight, stride=shape[1:]).flatten(1),
        "matmul": lambda: F.linear(x, weight.flatten(1)),
    }
    for name, way in ways.items():
        forward = _seconds(lambda way=way: way().detach(), device)  # type: ignore[misc]
        both = _seconds(lambda way=way: torch.autograd.grad(way().sum(), weight), device)  # type: ignore[misc]
        yield f"patch embedding of {patches:,}, {name}: {1e3 * forward:.2f} ms, with backward {1e3 * both:.2f} ms"


def _sizes() -> Sizes:
    family, shape = SHAPES[SHAPE]
    return family.sizes_of_shape(shape)


def _attention(device: torch.device, quick: bool) -> Iterator[str]:
    for backend, kernel in _kernels(device):
        for name, tower in heads_of(_sizes()).items():
            times = []
            for number in range(1 if quick else GEOMETRIES):
                lengths = _lengths(512 if quick else 16384, seed=number)
                first, again = (_attention_seconds(kernel, tower, lengths, device) for _ in range(2))
                times.append(f"{1e3 * first:.1f}/{1e3 * again:.1f}")
            yield f"attention of {name}, {backend}, forward and backward, first/second call: {', '.join(times)} ms"


def _kernels(device: torch.device) -> Iterator[tuple[str, Kernel]]:
    if device.type == "cpu":
        yield "sdpa", _sdpa
        return
    for backend in attention.BACKENDS[:-1]:
        try:
            yield backend, attention._load_kernel(backend)
        except ImportError:
            continue
    from torch.nn.attention.varlen import varlen_attn

    def any_backend(q, k, v, cu, longest, *, scale, causal):
        """Use the backend that torch chooses, which is cuDNN on some GPUs."""
        gqa: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and torch.__version__ >= "2.12" else {}
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=window, **gqa)

    yield "varlen by torch's choice", any_backend


def _sdpa(q, k, v, cu, longest, *, scale, causal):
    q_1HTD, k_1GTD, v_1GTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend_segments(q_1HTD, k_1GTD, v_1GTD, cu.diff().tolist(), scale=scale, causal=causal)[0]


def _attention_seconds(kernel: Kernel, tower: Heads, lengths: list[int], device: torch.device) -> float:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    q, k, v = (
        torch.randn(sum(lengths), n, tower.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (tower.heads, tower.kv_heads, tower.kv_heads)
    )
    return _seconds(
        lambda: kernel(q, k, v, cu, max(lengths), scale=tower.scale, causal=tower.causal).sum().backward(),
        device,
        times=1,
        warm=0,
    )


def _lengths(total: int, *, seed: int) -> list[int]:
    """Draw lengths of samples that fill a row; each is about a seventh of the row."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(total // 28, total // 4, (), generator=generator))))
    return lengths


def _seconds(work: Callable[[], object], device: torch.device, *, times: int = 10, warm: int = 2) -> float:
    """Measure the seconds of one call, including the work of the device."""
    for _ in range(warm):
        work()
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - began) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
