"""The model's answers to a few evaluation rows during training, written to `answers.jsonl` for the report.

At each evaluation rank 0 asks its model while the other ranks wait. Training is not affected: the generators of random
numbers keep their state, and the model returns to the mode it was in.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from vlft.answering import answers, question_of, speaker
from vlft.config.training import TrainFlags
from vlft.data.sample import Image, Sample, Text, Video
from vlft.model.generate import Sampling
from vlft.setup import Base, MeasuredRows
from vlft.train.metrics import MetricsFile
from vlft.train.ranks import barrier
from vlft.train.watchdog import Watchdog
from vlft.train.zero import shares_weights

FILE = "answers.jsonl"
FRAMES = 8  # frames that are listed of a video given as a list of frames
LONGER = 2, 16  # an answer may have 2 times the tokens of the row's own answer, plus 16


class Answers:
    """Asks evaluation rows and writes the answers.

    Args:
        rows: the evaluation rows to ask.
        base: encodes the rows.
        most: the largest number of tokens of an answer.
        file: where to write; None on ranks that do not write.
    """

    def __init__(self, rows: Sequence[Sample], base: Base, *, most: int, file: MetricsFile | None) -> None:
        self.rows = rows
        self.base = base
        self.most = most
        self.file = file
        self._rows_written = False

    @classmethod
    def of_run(
        cls,
        evaluated: MeasuredRows,
        base: Base,
        args: TrainFlags,
        folder: Path,
        *,
        resume_step: int,
        evaluation_due: bool,
        say: Callable[[str], None],
    ) -> Answers | None:
        """The `Answers` that the flags ask for; None if they ask for none, or if no process can answer.

        Args:
            evaluated: the evaluation data; the rows to ask are spread evenly over it, each up to its last answer.
            base: encodes the rows.
            args: `--report_rows` and `--report_tokens`.
            folder: the run folder.
            resume_step: step of the checkpoint from which the run resumes, 0 for none. Later answers are cut.
            evaluation_due: whether the evaluation after that step is still to come.
            say: prints a line for the user.
        """
        file = None
        last = [*(evaluated.starts[1:] - 1).tolist(), len(evaluated.costs) - 1]
        count = min(args.report_rows, len(last))
        if args.process_index == 0 and (count or (folder / FILE).exists()):
            file = MetricsFile(folder, resume_step=resume_step, evaluation_due=evaluation_due, name=FILE)
        if not count:
            return None
        if shares_weights(args):
            why = "under ZeRO-3 no process has the weights to answer with; see the finished model with vlft chat"
            say(f"note: no answers in the report: {why}")
            if file is not None:
                file.write({"step": resume_step, "note": why})
            return None
        samples = [evaluated.rows.samples[last[i * len(last) // count]] for i in range(count)]
        rows = [base.encoder.as_trained(sample) for sample in samples]
        return cls(rows, base, most=args.report_tokens, file=file)

    def ask(
        self, model: Any, step: int, watchdog: Watchdog, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> float:
        """Ask the rows. Every rank must call it.

        Args:
            model: the model without the wrapper of DDP or DeepSpeed.
            step: the last optimizer step.
            watchdog: learns where this process is.
            autocast: makes the context in which the model evaluates.

        Returns:
            The seconds it took.
        """
        start = time.perf_counter()
        watchdog.at(f"answers to the rows of the report after step {step}")
        if self.file is not None:
            training = model.training
            model.eval()
            devices = [model.device] if model.device.type == "cuda" else []
            try:
                with torch.random.fork_rng(devices=devices), autocast():
                    self._ask(model, step, self.file)
            except Exception as error:  # noqa: BLE001 - the answers only illustrate the report; the run continues
                self.file = None
                print(f"note: no more answers for the report, because asking failed: {error!r}", file=sys.stderr)
            finally:
                model.train(training)
        barrier()
        return time.perf_counter() - start

    def _ask(self, model: Any, step: int, file: MetricsFile) -> None:
        top = model.get_base_model() if hasattr(model, "get_base_model") else model
        talker = speaker(top, self.base.processor, self.base.family)
        if not self._rows_written:
            written = [self.base.encoder.as_written(row) for row in self.rows]
            file.write({"step": step, "rows": [described(row) for row in written]})
            self._rows_written = True
        encoder = self.base.encoder
        own = (encoder.measure(row).supervised for row in self.rows)
        samplings = [Sampling(max_new_tokens=min(self.most, LONGER[0] * tokens + LONGER[1])) for tokens in own]
        # One at a time, to take the memory of one row only.
        said = answers([question_of(row) for row in self.rows], encoder, talker, samplings, batch=1)
        entries = [
            {"file": row.file, "index": row.index, "answer": answer.text, "cut": answer.cut}
            for row, answer in zip(self.rows, said, strict=True)
        ]
        file.write({"step": step, "answers": entries})


def described(row: Sample) -> dict[str, Any]:
    """Return a row for the report: its last question, the turns before it, its own answer, its pictures and videos."""
    asked = question_of(row)
    turns = [{"role": turn.role, "text": "".join(_text(part) for part in turn.parts)} for turn in asked.turns]
    rest = row.turns[len(asked.turns) :]
    return {
        "file": row.file,
        "index": row.index,
        "id": row.id,
        "turns": turns,
        "right": "".join(_text(part) for turn in rest[:1] for part in turn.parts),
        "media": [
            {"kind": _kind(part), "path": os.path.abspath(path)}
            for part in asked.media
            for _, path in part.files[:FRAMES]
        ],
    }


def _kind(part: Image | Video) -> str:
    return "image" if isinstance(part, Image) else "frame" if part.frames else "video"


def _text(part: Any) -> str:
    if isinstance(part, Text):
        return part.text
    return "<image>" if isinstance(part, Image) else "<video>"
