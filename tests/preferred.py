"""The same preference rows and weights for vlft and TRL, and what the path of a run gives: rows -> loss and gradients.

`trl_preference.py` computes TRL's side and compares; `test_preference_trl.py` compares with its stored figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from build import write_image, write_json

from vlft.config.parse import FlagParser
from vlft.config.preference import PreferenceFlags
from vlft.objectives import Loss
from vlft.objectives.preference import Preference
from vlft.setup import Base, open_base, training_rows
from vlft.setup.objective import objective_of
from vlft.train.model_setup import prepare_model

#: PNG at sizes that need no resizing, so that pixels are the same on all machines.
PICTURES = {"astronaut.png": (112, 84), "coffee.png": (56, 140), "chelsea.png": (224, 112), "rocket.png": (64, 96)}


def pair(question: str, chosen: str, rejected: str, *pictures: str) -> dict[str, Any]:
    """A row of TRL's own form, which vlft reads too."""
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    answers = {"chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}
    return {"images": list(pictures), "prompt": turn("user", question), **answers}


#: One picture, several, none; the longer answer is the chosen one, and the rejected one.
PAIRS = [
    pair("Who is it?", "An astronaut in an orange suit.", "A cat.", "astronaut.png"),
    pair("Compare them.", "Coffee and a cat.", "Both show the same rocket at night, I think.",
         "coffee.png", "chelsea.png"),
    pair("2 + 2?", "4", "The answer to this question is 5."),
    pair("And these three?", "A rocket, coffee, a person.", "No.", "rocket.png", "coffee.png", "astronaut.png"),
    pair("Name a colour.", "Blue, as the sky.", "Wet."),
]  # fmt: skip

#: Preset -> the flags of its towers.
TOWERS = {
    "lora": ("--vision", "lora", "--merger", "lora", "--language", "lora", "--lora_rank", "4", "--lora_alpha", "8"),
    "full": ("--vision", "full", "--merger", "full", "--language", "full"),
}
#: Loss -> the flags that differ from the defaults.
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"dpo_loss": "ipo"},
    "hinge": {"dpo_loss": "hinge"},
    "sigmoid, smoothed": {"label_smoothing": 0.2},
    "sigmoid + sft": {"rpo_alpha": 0.7},
    "ipo + sft": {"dpo_loss": "ipo", "rpo_alpha": 0.7},
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run up to its first step.

    Attributes:
        base: the opened base.
        objective: of the run, `--method dpo` with the default settings.
        model: prepared, at the start of the run: LoRA's B is 0.
        rows: parsed.
        samples: encoded, without reference values.
        batch: all of them in one micro-batch.
    """

    base: Base
    objective: Preference
    model: torch.nn.Module
    rows: tuple[Any, ...]
    samples: tuple[Any, ...]
    batch: dict[str, Any]

    def with_loss(self, name: str, *, reference: str = "cached") -> Preference:
        """The objective with another loss of `LOSSES`."""
        return self.other("dpo", reference=reference, **LOSSES[name])

    def other(self, method: str, **flags: Any) -> Preference:
        """The objective of another method or with other settings."""
        made = objective_of(self.base, method, PreferenceFlags(**flags))
        assert isinstance(made, Preference)
        return made


def written(folder: Path, pairs: Sequence[dict[str, Any]] = PAIRS) -> Path:
    """The rows as a file, beside their pictures."""
    for name, (width, height) in PICTURES.items():
        write_image(folder / name, width, height, name=name.removesuffix(".png"))
    return write_json(folder / "pairs.json", list(pairs))


def arguments(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run on the rows."""
    return [
        *("train", "--method", "dpo", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(out)),
        *("--dataloader_num_workers", "0", "--save_strategy", "no", "--use_cpu", "true", *more),
    ]


def prepared(base: Path, folder: Path, preset: str) -> Setup:
    """What `vlft train` has before its first step.

    Args:
        base: folder of the base.
        folder: of `written`.
        preset: of `TOWERS`.
    """
    argv = arguments(base, folder / "pairs.json", folder / "out", *TOWERS[preset])
    parsed = FlagParser("train", description="").parse(argv[1:])
    data, flags, args = parsed.flags
    opened = open_base(data, flags, given=parsed.given)
    rows = training_rows(data, opened, workers=0)
    objective = objective_of(opened, data.method, args)
    assert isinstance(objective, Preference)
    torch.manual_seed(0)
    model, _ = prepare_model(opened, args, choice=flags.attn, say=lambda line: None, branches=data.pairs)
    parsed_rows = tuple(rows.rows.samples)
    samples = tuple(map(objective.encode, parsed_rows))
    batch = dict(objective.collate(samples))
    return Setup(base=opened, objective=objective, model=model.train(), rows=parsed_rows, samples=samples, batch=batch)


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The trained parameters in the order of their names."""
    return iter(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad))


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Give a model weights that are not those of the reference: the same in every model with these names."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trained(model):
        drawn = torch.randn(parameter.shape, generator=generator)
        if ".lora_" in name:
            parameter.copy_(drawn * (0.05 if ".lora_B." in name else 0.1))
        else:
            parameter.add_(drawn * 0.02)


@torch.no_grad()
def references(setup: Setup) -> torch.Tensor:
    """The reference of all answers, from the model as it is, float32 [A]."""
    sums_A, _ = setup.objective.sums(setup.model, setup.batch)
    assert sums_A is not None
    return sums_A


def with_reference(batch: dict[str, Any], reference_A: torch.Tensor) -> dict[str, Any]:
    """The batch with the values that a cached reference has there."""
    return {**batch, "answers": {**batch["answers"], "reference": reference_A}}


def stepped(model: torch.nn.Module, loss: Callable[[], Loss]) -> tuple[Loss, dict[str, torch.Tensor]]:
    """A loss, and the gradients of its mean over rows."""
    model.zero_grad()
    found = loss()
    (found.sum / found.weight).backward()
    return found, {name: p.grad.clone() for name, p in trained(model) if p.grad is not None}


def figures(loss: float, statistics: dict[str, float], gradients: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A step in numbers that can be stored: of the gradients, norm and one random projection of each tower."""
    generator, towers = torch.Generator().manual_seed(11), {}
    for name in sorted(gradients):
        tower = "merger" if ".merger." in name else "vision" if ".visual." in name else "language"
        gradient = gradients[name].double()
        along = torch.randn(gradient.shape, generator=generator).double()
        norm, projection = towers.get(tower, (0.0, 0.0))
        towers[tower] = (norm + float(gradient.square().sum()), projection + float((gradient * along).sum()))
    return {
        "loss": loss,
        **statistics,
        "gradients": {tower: [norm**0.5, projection] for tower, (norm, projection) in sorted(towers.items())},
    }


def ours(setup: Setup, name: str, reference_A: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The figures and gradients of a step on all rows, with cached reference values."""
    objective, batch = setup.with_loss(name), with_reference(setup.batch, reference_A)
    loss, gradients = stepped(setup.model, lambda: objective.loss(setup.model, batch))
    statistics = {key: float(mean.sum / mean.weight) for key, mean in loss.statistics.items()}
    return figures(float(loss.sum.detach() / loss.weight), statistics, gradients), gradients


def swapped(samples: Sequence[Any]) -> list[Any]:
    """The encoded rows with their two answers the other way round."""
    return [_swapped(sample) for sample in samples]


def _swapped(sample: Any) -> Any:
    prompt, chosen, rejected = sample.branches
    order = torch.cat([torch.arange(prompt), torch.arange(prompt + chosen, prompt + chosen + rejected),
                       torch.arange(prompt, prompt + chosen)])  # fmt: skip
    taken = {name: getattr(sample, name)[..., order] for name in ("input_ids_T", "labels_T", "kinds_T", "positions_3T")}
    return replace(sample, **taken, branches=(prompt, rejected, chosen), reference=sample.reference[::-1])
