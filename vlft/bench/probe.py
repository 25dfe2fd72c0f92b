"""Measures the speed of a machine before training: `python -m vlft.bench.probe [--quick] [--out FILE.md]`.

Times the operations that determine the speed of a step and that differ between GPUs and versions: matmuls of a model's
layers, copies, attention over flat rows, the start of a kernel, and the patch embedding as a convolution and as a
matmul. What `vlft.model.traffic` and `vlft.model.cards` assume is printed beside each rate. `--out` writes both as a
table. `--quick` uses tiny sizes, to check on a CPU that it runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vlft.bench.fake import STORY
from vlft.bench.sizes import SHAPES
from vlft.families import DEFAULT, Sizes
from vlft.model import attention, tracing, traffic
from vlft.model.build import build_config
from vlft.model.cards import Card
from vlft.model.load import empty_model
from vlft.model.segments import Heads, Kernel, attend_segments, heads_of
from vlft.model.traffic import HOST_SECONDS, MATMUL_SHARE, MEMORY_SHARE
from vlft.model.trial import wait_for
from vlft.setup.typical import card_of

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "triton", "deepspeed"),
    *("liger-kernel", "flash-attn", "av", "qwen-vl-utils", "bitsandbytes"),
)
#: Optional packages -> what a run of scripts/first_contact.sh lacks without them.
OPTIONAL = {
    "liger-kernel": "fused kernels are off",
    "av": "there are no runs with videos",
    "qwen-vl-utils": "the tests that compare videos with it are skipped",
}
SHAPE = "2b"
GEOMETRIES = 5  # packs of different lengths


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A figure beside what the forecast assumes.

    Attributes:
        what: what was measured.
        measured: with its unit.
        assumed: with its unit; "-" if the speed of the card is not known.
    """

    what: str
    measured: str
    assumed: str

    def __str__(self) -> str:
        return f"{self.what}: {self.measured} (the forecast assumes {self.assumed})"


def main(words: Sequence[str]) -> None:
    """Run all measurements, and print each line as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m vlft.bench.probe")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", metavar="FILE", help="a Markdown file for the table")
    flags = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = card_of(None, device=torch.cuda.get_device_name(0) if device.type == "cuda" else None)
    probe = Probe(device=device, quick=flags.quick, card=card)
    table = []
    for line in probe.run():
        print(line, flush=True)
        if isinstance(line, Compared):
            table.append(line)
        if flags.out is not None:  # each time: the process may be stopped
            rows = [f"| {one.what} | {one.measured} | {one.assumed} |" for one in table]
            text = "\n".join(["| what | measured | assumed |", "| --- | --- | --- |", *rows])
            Path(flags.out).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The measurements.

    Attributes:
        device: where they run.
        quick: with tiny sizes.
        card: the GPU, if its speed is known.
    """

    device: torch.device
    quick: bool
    card: Card | None

    def run(self) -> Iterator[str | Compared]:
        """All measurements, in order of importance."""
        yield from _machine(self.device)
        yield from self._matmuls()
        yield from self._memory()
        yield from self._host()
        yield from self._attention_rates()
        yield from _patch_embedding(self.device, self.quick)
        yield from _attention(self.device, self.quick)

    def _share(self, what: str, rate: float, unit: float, words: str, peak: float | None, share: float) -> Compared:
        """A rate beside a share of the data sheet's peak, both in the same unit."""
        beside = f" = {rate / unit / peak:.2f} of {peak:g}" if peak else ""
        assumed = f"{share * peak:.4g} {words} = {share:g} of {peak:g}" if peak else f"{share:g} of the peak"
        return Compared(what=what, measured=f"{rate / unit:.4g} {words}{beside}", assumed=assumed)

    def _matmuls(self) -> Iterator[str | Compared]:
        """The linear layers of both towers on the rows of a pack, forward and towards their inputs."""
        peak = self.card.tflops if self.card else None
        sizes = _sizes()
        towers = {"vision": (STORY.patches, sizes.vision.block), "language": (STORY.tokens, _language(sizes))}
        work = spent = 0.0
        for tower, (rows, linears) in towers.items():
            rows = 64 if self.quick else rows
            for inputs, outputs in dict.fromkeys((one.inputs, one.outputs) for one in linears):
                many = sum((one.inputs, one.outputs) == (inputs, outputs) for one in linears)
                size = [side // 16 if self.quick else side for side in (inputs, outputs)]
                x, weight = self._draw(rows, size[0]), self._draw(size[1], size[0])
                out = F.linear(x, weight)
                seconds = self._seconds(lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
                seconds += self._seconds(lambda out=out, weight=weight: out @ weight)  # type: ignore[misc]
                flops = 4.0 * rows * size[0] * size[1]
                work, spent = work + many * flops, spent + many * seconds
                yield f"matmul of {tower} {rows:,} x {size[0]:,} x {size[1]:,}: {flops / seconds / 1e12:.1f} TFLOP/s"
        yield self._share(f"matmuls of a {SHAPE} block", work / spent, 1e12, "TFLOP/s", peak, MATMUL_SHARE)
        side = 256 if self.quick else 8192
        a, b = self._draw(side, side), self._draw(side, side)
        rate = 2 * side**3 / self._seconds(lambda: a @ b)
        yield self._share(f"matmul {side}", rate, 1e12, "TFLOP/s", peak, MATMUL_SHARE)

    def _memory(self) -> Iterator[Compared]:
        rows = 64 if self.quick else STORY.patches
        x, y = self._draw(rows, 2048), self._draw(rows, 2048)
        peak = self.card.tb_s if self.card else None
        for what, moved, call in (
            ("copy", 2 * x.nbytes, lambda: x.clone()),
            ("sum of two", 3 * x.nbytes, lambda: x + y),
            ("cast to float32", 3 * x.nbytes, lambda: x.float()),
        ):
            rate = moved / self._seconds(call)
            yield self._share(f"{what}, {x.nbytes / 1e6:.0f} MB", rate, 1e12, "TB/s", peak, MEMORY_SHARE)

    def _host(self) -> Iterator[str | Compared]:
        """What the host needs for a kernel: alone, and with the Python code of a model around it."""
        x, many = self._draw(16), 200 if self.quick else 5000
        began = time.perf_counter()
        for _ in range(many):
            x.add_(1)
        called = time.perf_counter() - began
        wait_for(self.device)
        yield f"start of a kernel by torch: {1e6 * called / many:.1f} us on the host"
        wait_for(self.device)
        began = time.perf_counter()
        for _ in range(many):
            x.add_(1)
        wait_for(self.device)
        yield f"kernel of 16 values, one after another: {1e6 * (time.perf_counter() - began) / many:.1f} us"
        model = empty_model(build_config(DEFAULT, DEFAULT.tiny, _Tokens()), DEFAULT).to_empty(device=self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        ids = torch.zeros(1, 16, dtype=torch.long, device=self.device)
        kernels: list[bool] = []
        with tracing.Watch(lambda op: kernels.append(traffic.is_kernel(op))):
            model(input_ids=ids)
        seconds = self._seconds(lambda: model(input_ids=ids))
        yield Compared(
            what="a kernel with a model's Python code",
            measured=f"{1e6 * seconds / sum(kernels):.1f} us",
            assumed=f"{1e6 * HOST_SECONDS:.1f} us",
        )

    def _attention_rates(self) -> Iterator[str | Compared]:
        """Each kernel on a typical pack, forward and backward, in the operations that the forecast counts."""
        peak = self.card.tflops if self.card else None
        for backend, kernel in _kernels(self.device):
            for name, tower in heads_of(_sizes()).items():
                lengths = STORY.vision_lengths if name == "vision" else STORY.lengths
                lengths = tuple(one // 32 for one in lengths) if self.quick else lengths
                try:
                    times = [_attention_seconds(kernel, tower, list(lengths), self.device) for _ in range(4)]
                except Exception as error:  # noqa: BLE001 - kernels refuse by assert, compilers raise their own classes
                    yield f"attention of {name}, {backend}: failed: {type(error).__name__}: {error}".splitlines()[0]
                    continue
                squares = sum(one * one for one in lengths) / (2 if tower.causal else 1)
                rate = 14 * squares * tower.heads * tower.head_dim / min(times[1:])
                flash = self.card.flash if self.card else Card(gb=0).flash
                yield self._share(f"attention of {name}, {backend}", rate, 1e12, "TFLOP/s", peak, flash)

    def _draw(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=torch.bfloat16)

    def _seconds(self, work: Callable[[], object]) -> float:
        return _seconds(work, self.device, times=2 if self.quick else 10, warm=1 if self.quick else 2)


class _Tokens:
    """In place of a tokenizer: a tiny model that is only timed needs no text."""

    def __len__(self) -> int:
        return 256

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


def _language(sizes: Sizes) -> tuple[Any, ...]:
    return sizes.text.linears(sizes.text.layers[0])


def _machine(device: torch.device) -> Iterator[str]:
    yield f"python {sys.version.split()[0]}; " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield f"cuda {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        yield f"{found.name}: {found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}"
    for name, effect in OPTIONAL.items():
        if _version(name) == "-":
            yield f"{name} is not installed: {effect}"
    yield f"/dev/shm: {shutil.disk_usage('/dev/shm').free / 1e9:.1f} GB free"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


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
    """Time the first and second call on packs of ever new lengths: some kernels prepare for each geometry."""
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
            yield backend, attention.load_kernel(backend)
        except ImportError:
            continue
    yield "varlen by torch's choice", attention.torch_varlen()  # cuDNN on some GPUs


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
    wait_for(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    main(sys.argv[1:])
