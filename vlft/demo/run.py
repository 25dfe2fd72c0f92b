"""The demo from top to bottom: draw a lesson -> check it -> train -> train blind -> merge -> score -> page.

Everything between drawing and scoring is what a user would run: the demo prints each command line that it executes.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlft import __version__, text
from vlft.check import check
from vlft.config.flags import DataFlags, ModelFlags
from vlft.demo.build_base import STORED, run_train
from vlft.demo.folder import claimed
from vlft.demo.page import Example, write_demo
from vlft.demo.score import answers, right
from vlft.demo.story import Story, chance, stories, write_rows
from vlft.errors import ConfigError
from vlft.files import put_in_place, workshop, write_json

GOAL = 0.9  # least share of exact answers for each kind of held-out row


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How much is drawn and trained.

    Attributes:
        rows: to train on.
        held_out: rows to score.
        steps: of each of the two trainings, with 16 rows per step.
        seed: of everything that is drawn.
    """

    rows: int = 3200
    held_out: int = 300
    steps: int = 640
    seed: int = 7


QUICK = Lesson(rows=64, held_out=24, steps=6)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of exact answers on one kind of held-out row.

    Attributes:
        kind: of the rows.
        rows: their number.
        before: share of the base.
        blind: share of the model trained on blank pictures.
        chance: share expected from guessing without the pictures.
        after: share of the merged model.
    """

    kind: str
    rows: int
    before: float
    blind: float
    chance: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Told:
    """The result of the demo.

    Attributes:
        scores: of stories of pictures, then of videos.
        seconds: part -> wall time of this call, in order.
        page: the web page.
    """

    scores: tuple[Score, ...]
    seconds: dict[str, float]
    page: Path

    @property
    def learned(self) -> bool:
        """Whether every score after training reaches `GOAL`."""
        return all(score.after >= GOAL for score in self.scores)


@dataclass
class _Clock:
    """Wall time by part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def demo(out: Path, *, lesson: Lesson = Lesson(), say: Callable[[str], None] = print) -> Told:
    """Run the demo, or resume one that was interrupted.

    Args:
        out: folder for all files; new, empty, or of an earlier demo with the same lesson.
        lesson: how much is drawn and trained.
        say: prints a line.

    Raises:
        ConfigError: `out` holds something else, or cannot be written.
        VlftError: a step failed.
    """
    with claimed(out, {"vlft": __version__, **asdict(lesson)}):
        return _run(out, lesson, say)


def _run(out: Path, lesson: Lesson, say: Callable[[str], None]) -> Told:
    clock = _Clock()
    say("A tiny Qwen2-VL (0.6 M parameters) can name colours and shapes. It has never seen a pattern. In a few minutes")
    say("it learns to tell stories in a new wording that name each pattern, and to say what changes in a video.\n")
    base, data = out / "base", out / "data"
    with clock.part("draw pictures"):
        if not (base / "config.json").exists():
            _copy_base(base)
        held_out = list(stories("lesson", "held_out", lesson.held_out, seed=lesson.seed))
        train = list(stories("lesson", "train", lesson.rows, seed=lesson.seed))
        for name, rows, blank in (("train", train, False), ("held_out", held_out, False),
                                  ("train_blank", train, True), ("held_out_blank", held_out, True)):  # fmt: skip
            if not (data / f"{name}.json").exists():
                write_rows(rows, data, name=name, seed=lesson.seed, blank=blank)
    say(f"drawn: {lesson.rows:,} rows to train on, {lesson.held_out} held out. No held-out video and no held-out story")
    say("of several pictures is in the training rows. Held-out single pictures differ in place and size.")

    with clock.part("check-data"):
        _check(data / "train.json", base, say)
    with clock.part("train"):
        run = _train(base, data / "train.json", out / "run", lesson, say)
    with clock.part("train blind"):
        say("\nThe same training again with every picture blank: how much can the model guess from the wording alone?")
        blind = _train(base, data / "train_blank.json", out / "run-blind", lesson, say)
    merged = out / "merged"
    with clock.part("merge"):
        _merge(run, merged, say)
    with clock.part("answer"):
        said = {
            "before": answers(base, data / "held_out.json"),
            "blind": answers(blind, data / "held_out_blank.json"),
            "after": answers(merged, data / "held_out.json"),
        }
    scores = (
        _score("stories of 1 to 3 pictures", held_out, said, is_video=False),
        _score("videos", held_out, said, is_video=True),
    )
    page = out / "demo.html"
    examples = _examples(held_out, data, said)
    commands = _commands(out, lesson, examples[0])
    write_demo(page, scores=[asdict(score) for score in scores], examples=examples, commands=commands)
    told = Told(scores=scores, seconds=clock.seconds, page=page)
    say(f"\n{table(scores)}\n")
    for example in examples:
        say(f"held-out row {example.index}: {example.question}")
        for name in ("before", "blind", "after", "right"):
            say(f"  {name:<7} {getattr(example, name)}")
    say(f"\nAsk the model yourself:\n  {commands[-1]}")
    say("\nseconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in clock.seconds.items()))
    say(f"in total {sum(clock.seconds.values()):.0f} s. Pictures and answers: {page}")
    write_json(out / "scores.json", {"scores": [asdict(score) for score in scores], "seconds": clock.seconds})
    return told


def table(scores: Sequence[Score]) -> str:
    """The scores as a text table for the user."""
    columns = ("before", "blind", "chance", "after")
    rows = [(f"{one.kind} ({one.rows})", *(f"{getattr(one, name):.1%}" for name in columns)) for one in scores]
    return text.table(("exact match, held out", *columns), rows)


def _score(kind: str, rows: Sequence[Story], said: dict[str, list[str]], *, is_video: bool) -> Score:
    places = [i for i, row in enumerate(rows) if row.is_video == is_video]
    mine = [rows[i] for i in places]
    shares = {name: sum(right(mine, [texts[i] for i in places])) / len(places) for name, texts in said.items()}
    return Score(kind=kind, rows=len(places), chance=chance(mine), **shares)


def _copy_base(target: Path) -> None:
    with workshop(target.with_name(f".{target.name}")) as spare:
        shutil.copytree(STORED, spare, dirs_exist_ok=True)
        put_in_place(spare, target, last="config.json")


def _check(file: Path, base: Path, say: Callable[[str], None]) -> None:
    say(f"\n$ {_command('check-data', file, '--model_id', base)}")
    data, model = DataFlags(data_path=[str(file)]), ModelFlags(model_id=str(base))
    found = check([str(file)], data, model, given=frozenset({"model_id"}), headers_only=False, workers=2).found
    say(found.as_text())
    if found.bad:
        raise ConfigError(f"{file}: {len(found.bad)} rows cannot be read. Remove {file.parent.parent} and start again.")


def train_arguments(base: Path, data: Path, run: Path, lesson: Lesson) -> list[str]:
    """The command line of a lesson: LoRA on all three towers, with learning rates for a model of this size."""
    flags = {
        "model_id": base, "data_path": data, "output_dir": run, "vision": "lora", "merger": "lora", "language": "lora",
        "lora_dropout": 0, "learning_rate": "3e-3", "adam_beta2": 0.98, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05, "global_batch": 16, "max_steps": lesson.steps,
        "logging_steps": max(1, lesson.steps // 8), "save_strategy": "no", "use_cpu": "true",
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _train(base: Path, data: Path, run: Path, lesson: Lesson, say: Callable[[str], None]) -> Path:
    argv = train_arguments(base, data, run, lesson)
    say(f"\n$ {_command('train', *argv)}")
    return run_train(argv)


def _merge(run: Path, merged: Path, say: Callable[[str], None]) -> None:
    from vlft.merge import merge

    say(f"\n$ {_command('merge', run, merged)}")
    if (merged / "config.json").exists():
        say(f"{merged}: already exists")
        return
    report = merge(run, merged)
    say(f"logits of merged and of base + adapter differ by at most {report.max_logit_diff:.3g}; out: {report.out}")


def _commands(out: Path, lesson: Lesson, example: Example) -> list[str]:
    """The commands that a user types for the same result."""
    base, data, run, merged = out / "base", out / "data" / "train.json", out / "run", out / "merged"
    shown = [word for picture in example.pictures for word in ("--image", str(picture))]
    return [
        _command("check-data", data, "--model_id", base),
        _command("train", *train_arguments(base, data, run, lesson)),
        _command("merge", run, merged),
        _command("chat", merged, *shown, example.question),
    ]


def _command(*words: object) -> str:
    return shlex.join(["vlft", *map(str, words)])


def _examples(rows: Sequence[Story], data: Path, said: dict[str, list[str]]) -> list[Example]:
    """The first held-out row of three pictures, of two, and of a video, whatever their answers are."""
    kinds = [(row.is_video, len(row.looks)) for row in rows]
    places = [kinds.index(kind) for kind in ((False, 3), (False, 2), (True, 2)) if kind in kinds]
    records = json.loads((data / "held_out.json").read_text(encoding="utf-8"))
    return [
        Example(
            index=place,
            pictures=tuple(data / path for path in _paths(records[place])),
            is_video=rows[place].is_video,
            question=rows[place].question,
            right=rows[place].answer,
            **{name: texts[place] for name, texts in said.items()},
        )
        for place in places
    ]


def _paths(record: dict) -> list[str]:
    return record["video"][0] if "video" in record else record["image"]
