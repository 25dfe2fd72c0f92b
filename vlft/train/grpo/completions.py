"""The completions of a GRPO run: `completions.jsonl` for the report, and a table in the terminal (`--log_completions`).

The file holds a sample, so that its size does not depend on the number of steps: at most about `KEPT_STEPS` logged
steps, spread over the run, and of each a few prompts with all their completions. Where there is a choice, the same rows
are kept at each step, so that several epochs show how the completions of a row change. What is kept depends on the step
and the rows only: equal runs and resumed runs write equal files.

Letters in shapes: B completions of a process and step, C tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlft.config.training import TrainFlags
from vlft.data.boxes import has_boxes
from vlft.errors import RunFault
from vlft.pages.completions import ranked
from vlft.text import counted, printable, short, table
from vlft.train.answers import described
from vlft.train.grpo.prompts import Prompts, begun
from vlft.train.metrics import MetricsFile
from vlft.train.ranks import gather

FILE = "completions.jsonl"
KEPT_STEPS = 200
KEPT = 32  # completions of a step: as many whole prompts as fit, at least one
MOST_PROMPTS = 4  # of a step
MOST_TEXT = 10_000  # characters of a completion, a question or an answer
DIGITS = 7  # those of float32, in which TRL computes rewards
SHOWN_TEXT = 200  # characters of a text in the terminal


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What TRL's logs do not hold of a completion.

    Attributes:
        place: of its row.
        tokens: its length.
        cut: whether it reached `--max_completion_length` before it ended.
        extra: what rewards logged with `log_extra`.
    """

    place: int
    tokens: int
    cut: bool
    extra: Mapping[str, str] = field(default_factory=dict)

    def with_extra(self, column: str, value: str) -> Facts:
        """The same with one more column."""
        return replace(self, extra={**self.extra, column: value})


class Completions:
    """Keeps completions and shows them.

    Args:
        prompts: the rows.
        group: completions of a prompt.
        file: where to write; None on ranks that do not write.
        shown: most completions of a step to print; 0: none.
        say: prints a line for the user.
    """

    def __init__(
        self, prompts: Prompts, *, group: int, file: MetricsFile | None, shown: int, say: Callable[[str], None]
    ) -> None:
        self.prompts = prompts
        self.group = group
        self.file = file
        self.shown = shown
        self.say = say
        self._batch: tuple[list[Facts], Mapping[str, Any]] | None = None  # of the last step, over all processes
        self._kept = file.last_step if file is not None else None

    @classmethod
    def of_run(
        cls, prompts: Prompts, args: TrainFlags, folder: Path, *, resume_step: int, say: Callable[[str], None]
    ) -> Completions | None:
        """The `Completions` that the flags ask for; None with `--log_completions false`.

        Args:
            prompts: the rows.
            args: `--log_completions`, `--num_completions_to_print` and `--num_generations`.
            folder: the run folder.
            resume_step: step of the checkpoint from which the run resumes, 0 for none. Later completions are cut.
            say: prints a line for the user.
        """
        asked, file = args.log_completions != "false", None
        if args.process_index == 0 and (asked or (folder / FILE).exists()):
            file = MetricsFile(folder, resume_step=resume_step, name=FILE)
        if not asked:
            return None
        shown = args.num_completions_to_print if args.log_completions == "true" else 0
        return cls(prompts, group=args.num_generations, file=file, shown=shown, say=say)

    def sampled(
        self,
        places: Sequence[int],
        output: Mapping[str, torch.Tensor],
        ends: Sequence[int],
        *,
        logs: Mapping[str, Any],
        extra: Mapping[str, list[str]],
    ) -> None:
        """Take the completions of a step. Every rank must call it.

        Args:
            places: of the row of each completion of this process.
            output: of TRL, with completion_ids and completion_mask, int64 [B, C].
            ends: ids of the tokens that end a completion.
            logs: TRL's `_logs`, which has the completions of all processes.
            extra: columns of this process that rewards logged.
        """
        ids_BC, lengths = output["completion_ids"].cpu(), output["completion_mask"].sum(dim=1).tolist()
        cuts = [int(ids_C[length - 1]) not in ends for ids_C, length in zip(ids_BC, lengths, strict=True)]
        own = [Facts(place=a, tokens=b, cut=c) for a, b, c in zip(places, lengths, cuts, strict=True)]
        for column, values in extra.items():
            own = [one.with_extra(column, value) for one, value in zip(own, values, strict=True)]
        self._batch = [one for rank in gather(own) for one in rank], logs

    def logged(self, step: int, steps: int) -> None:
        """Write and show the completions of a logged step.

        Args:
            step: the step.
            steps: optimizer steps of the run.
        """
        batch, self._batch = self._batch, None
        if batch is None or self.file is None:
            return
        every = -(-steps // KEPT_STEPS)
        due = self._kept is None or step // every > self._kept // every or step >= steps
        if not due and not self.shown:
            return
        facts, logs = batch
        lines = [self._line(step, facts, logs, start) for start in self._chosen(facts)]
        if due:
            self._kept = step
            for line in lines:
                self.file.write(line)
        if self.shown:
            self.say(as_text(lines, self.shown, of=len(facts)))

    def _chosen(self, facts: Sequence[Facts]) -> list[int]:
        """The first completion of each prompt that is kept."""
        starts = {facts[start].place: start for start in range(0, len(facts), self.group)}
        most = max(1, min(MOST_PROMPTS, KEPT // self.group))
        return [starts[place] for place in sorted(starts, key=_rank)[:most]]

    def _line(self, step: int, facts: Sequence[Facts], logs: Mapping[str, Any], start: int) -> dict[str, Any]:
        place, encoder = facts[start].place, self.prompts.base.encoder
        sample = self.prompts.rows.rows.samples[place]
        if has_boxes(sample, encoder.recipe.box_format):
            sample = encoder.as_written(sample)
        row, opening = described(sample), self.prompts.columns(place)["opening"]
        said = []
        for one in range(start, start + self.group):
            rewards = {name: _rounded(values[one]) for name, values in logs["rewards"].items()}
            said.append(
                {
                    "completion": _bounded(begun(logs["completion"][one], opening)[0]["content"]),
                    "reward": _rounded(sum(rewards.values())),
                    "rewards": rewards,
                    "advantage": _rounded(logs["advantages"][one]),
                    "tokens": facts[one].tokens,
                    "cut": facts[one].cut,
                    "extra": {name: _bounded(value) for name, value in facts[one].extra.items()},
                }
            )
        turns = [{**turn, "text": _bounded(turn["text"])} for turn in row["turns"]]
        return {"step": step, **row, "turns": turns, "right": _bounded(row["right"]), "completions": said}


def column_of(
    reward: str, column: str, values: list[str], *, want: int, there: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return a column that a reward logged, by its name; by that of the reward too, if another has the name already.

    Raises:
        RunFault: it does not have one value for each completion.
    """
    if len(values) != want:
        raise RunFault(
            f"reward {reward}: log_extra({column!r}) got {counted(len(values), 'value')} for "
            f"{counted(want, 'completion')}. Give it one value for each."
        )
    return {f"{reward}/{column}" if column in there else column: values}


def as_text(lines: Sequence[Mapping[str, Any]], most: int, *, of: int) -> str:
    """Return completions of a step for the terminal, those of a prompt by their rewards, equal ones once.

    Args:
        lines: of `completions.jsonl`.
        most: different completions that are shown. If a prompt has more, they are spread from its best to its worst.
        of: completions of the step.
    """
    left, shown, parts = most, 0, []
    for line in lines:
        some = ranked(line, left)["said"]
        left, shown = left - len(some), shown + sum(one["times"] for one in some)
        names = list(some[0]["rewards"]) if len(some[0]["rewards"]) > 1 else []
        heads = ["reward", *names, "advantage", "completion"]
        rows = [
            [one["reward"], *(one["rewards"][name] for name in names), one["advantage"], _described(one)]
            for one in some
        ]
        question = next((turn["text"] for turn in reversed(line["turns"]) if turn["role"] == "user"), "")
        title = f"step {line['step']:,}: {line['file']}[{line['index']}]: {printable(_one_line(question))}"
        parts += [title, table(heads, rows, indent=2, last="left")]
        if left <= 0:
            break
    return "\n".join(parts) + (f"\n  and {of - shown:,} more of this step" if of > shown else "")


def _described(one: Mapping[str, Any]) -> str:
    notes = ["cut"] if one["cut"] else []
    notes += [f"{one['times']:,} times"] if one["times"] > 1 else []
    return _one_line(one["text"]) + (f" ({', '.join(notes)})" if notes else "")


def _one_line(text: str) -> str:
    return short(" ".join(text.split()), SHOWN_TEXT)


def _bounded(text: str) -> str:
    more = len(text) - MOST_TEXT
    return text if more <= 0 else f"{text[:MOST_TEXT]} ... and {more:,} more characters"


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _rank(place: int) -> int:
    """The order in which rows are preferred: neighbours in a file are far from each other (Knuth's hash)."""
    return place * 2654435761 % 2**32
