"""The demo's base: a tiny Qwen2-VL that names colours and shapes of one to three pictures, in order.

It ships with the package (`STORED`). `rebuild` trains it from random weights with `vlft train`.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlft.config.parse import FlagParser
from vlft.demo.score import answers, right
from vlft.demo.story import WORDS, chance, stories, write_rows
from vlft.demo.tiny import build_tiny
from vlft.errors import CheckpointError, ConfigError
from vlft.families import DEFAULT
from vlft.files import put_in_place, workshop

STORED = Path(__file__).parent / "base"
#: Files of a model folder that are shipped, without the records of the run folder.
SHIPPED = (
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip

SHAPE = DEFAULT.tiny.but(
    text={
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    vision={"embed_dim": 64, "hidden_size": 96},
    std=0.05,
)  # fmt: skip
ENOUGH = 0.95  # least share of held-out rows answered exactly; below it the base is too weak for the lesson
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """How much is drawn and trained, with 32 rows per step.

    Attributes:
        rows: to train on.
        steps: of the training.
        held_out: rows to score.
    """

    rows: int = 12000
    steps: int = 1800
    held_out: int = 300


REBUILD = Rebuild()
QUICK_REBUILD = Rebuild(rows=64, steps=4, held_out=24)


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """The result of a rebuild.

    Attributes:
        model: the folder.
        exact: share of held-out rows answered exactly.
        chance: the share expected from guessing without the pictures.
        rows: number of held-out rows.
    """

    model: Path
    exact: float
    chance: float
    rows: int


def run_train(argv: list[str]) -> Path:
    """Run `vlft train ARGV` in this process.

    Returns:
        The run folder.
    """
    from vlft.train.run import train

    return train(FlagParser("train").parse(argv))


def rebuild(out: Path, *, plan: Rebuild = REBUILD, say: Callable[[str], None] = print) -> Rebuilt:
    """Train the base from random weights.

    Args:
        out: folder to work in; a second call in it resumes.
        plan: how much is drawn and trained.
        say: prints a line.

    Raises:
        VlftError: a step failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = out / "random"
    if not (start / "config.json").exists():
        build_tiny(start, seed=SEED, shape=SHAPE, words=WORDS)
    held_out = list(stories("base", "held_out", plan.held_out, seed=SEED))
    train = list(stories("base", "train", plan.rows, seed=SEED))
    train_file, held_out_file = (
        write_rows(rows, out / "data", name=name, seed=SEED)
        for name, rows in (("train", train), ("held_out", held_out))
    )
    say(f"drawn: {len(train):,} rows to train on, {len(held_out):,} held out")
    argv = train_arguments(start, train_file, out / "run", steps=plan.steps)
    say(f"$ {shlex.join(['vlft', 'train', *argv])}")
    model = run_train(argv)
    hits = right(held_out, answers(model, held_out_file))
    return Rebuilt(model=model, exact=sum(hits) / len(hits), chance=chance(held_out), rows=len(hits))


def train_arguments(start: Path, data: Path, run: Path, *, steps: int) -> list[str]:
    """The command line that trains the base."""
    flags = {
        "model_id": start, "data_path": data, "output_dir": run, "vision": "full", "merger": "full", "language": "full",
        "learning_rate": "2e-3", "adam_beta2": 0.98, "weight_decay": 0.01, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05, "packing": "false", "per_device_train_batch_size": 32, "max_steps": steps,
        "logging_steps": 100, "save_steps": 500, "save_total_limit": 1, "use_cpu": "true",
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def store(rebuilt: Rebuilt, target: Path = STORED) -> None:
    """Copy a rebuilt base to the folder from which the demo loads it.

    Raises:
        CheckpointError: it scores too low.
        ConfigError: the package's folder cannot be written.
    """
    if rebuilt.exact < ENOUGH:
        raise CheckpointError(
            f"{rebuilt.model}: answers {rebuilt.exact:.1%} of {rebuilt.rows} held-out rows exactly, but {ENOUGH:.0%} "
            f"are required. It is not stored; {target} is unchanged."
        )
    try:
        with workshop(target.with_name(f".{target.name}.new")) as spare:
            for name in SHIPPED:
                shutil.copyfile(rebuilt.model / name, spare / name)
            if target.exists():
                shutil.rmtree(target)
            put_in_place(spare, target, last="config.json")
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written ({error.strerror}). The rebuilt base is in {rebuilt.model}. Install the "
            "package from a folder that you can write: git clone, pip install -e ."
        ) from error
