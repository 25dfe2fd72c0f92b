"""Check a GRPO run before a model is loaded, and build its trainer. TRL is imported last."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vlft.checkpoint import read_json, read_record
from vlft.config.flags import DataFlags
from vlft.config.rewards import COLUMNS, REWARD_FILES, files_of, read_rewards
from vlft.config.training import TrainFlags
from vlft.data.order import RowOrder
from vlft.errors import ConfigError
from vlft.setup import Base, MeasuredRows
from vlft.train.grpo.completions import Completions
from vlft.train.grpo.prompts import Prompts
from vlft.train.grpo.rewards import Rewards
from vlft.train.metrics import Meter, MetricsFile
from vlft.train.progress import Progress

if TYPE_CHECKING:
    from vlft.train.grpo.trainer import GrpoTrainer

PACKAGES = ("trl", "datasets")
TRL = "1.16"  # its release; a test compares it with pyproject.toml
INSTALL = "pip install 'vlft[grpo]'"
TRIED = 16  # rows whose own answers are scored before the run
NEEDY = ("iou",)  # built-in rewards that do not apply to every answer: those of all rows are scored


def check_packages() -> None:
    """Check that TRL and what it needs can be imported.

    Raises:
        ConfigError: a package is not installed, TRL is of another release, or it cannot be imported.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        many = "packages {} are" if len(missing) > 1 else "package {} is"
        raise ConfigError(f"--method grpo: the {many.format(' and '.join(missing))} not installed. Install: {INSTALL}")
    if "trl" not in PACKAGES:
        return
    found = importlib.metadata.version("trl")
    if not f"{found}.".startswith(f"{TRL}."):
        raise ConfigError(f"--method grpo needs TRL {TRL}, and {found} is installed. Install: {INSTALL}")
    try:
        import vlft.train.grpo.trainer  # noqa: F401
    except Exception as error:  # TRL imports other packages, which may raise anything
        raise ConfigError(
            f"--method grpo: TRL {found} cannot be imported: {type(error).__name__}: {error}. Install: {INSTALL}"
        ) from error


class Grpo:
    """What `--method grpo` adds to a run.

    Args:
        args: the training flags.

    Raises:
        ConfigError: a package is not installed, or a reward cannot be used.
    """

    def __init__(self, args: TrainFlags) -> None:
        check_packages()
        self.args = args
        self.rewards = Rewards(read_rewards(args.reward), timeout=args.reward_timeout)

    @classmethod
    def of(cls, data: DataFlags, args: TrainFlags) -> Grpo | None:
        """The object for these flags; None if they ask for another method."""
        return cls(args) if data.method == "grpo" else None

    def check(self, rows: MeasuredRows, base: Base, order: RowOrder) -> str:
        """Score the own answers of some rows, called as in a step of the run.

        Args:
            rows: the rows to train on.
            base: encodes them.
            order: of the rows.

        Returns:
            a line for the user with the mean of each reward.

        Raises:
            ConfigError: a row cannot be trained.
            RunFault: a reward fails.
        """
        prompts = Prompts(rows, base)
        many = min(TRIED, len(prompts))
        tried = [place * len(prompts) // many for place in range(many)]
        means = []
        at_once = max(1, order.rows_per_step // order.world)
        state = {"global_step": 0, "max_steps": self.args.total_steps(order.steps), "epoch": 0.0}
        for place, one in enumerate(self.rewards.rewards):
            if one.kind == "built_in" and one.what in NEEDY:
                for start in range(0, len(prompts), TRIED):
                    self._own_scores(place, prompts, range(start, min(start + TRIED, len(prompts))), state)
            scores: list[float] = []
            for start in range(0, many, at_once):
                scores += self._own_scores(place, prompts, tried[start : start + at_once], state)
            means.append(f"{one.name} {sum(scores) / len(scores):.3g}")
        what = f"the own answers of {many} rows" if many > 1 else "the row's own answer"
        return f"rewards of {what}: {', '.join(means)}"

    def _own_scores(self, place: int, prompts: Prompts, places: Sequence[int], state: Mapping[str, Any]) -> list[float]:
        """What a reward gives for the own answers of some rows, each as the model would write it.

        A function of the user may compare the completions of a prompt, so it gets as many of each as in a step.
        """
        function = self.rewards.rewards[place].kind == "function"
        found = [prompts.columns(row) for row in places for _ in range(self.args.num_generations if function else 1)]
        tokenizer = prompts.base.processor.tokenizer
        asked: dict[str, Any] = {
            "prompts": [one["prompt"] for one in found],
            "completions": [[{"role": "assistant", "content": one["written"]}] for one in found],
            "completion_ids": [tokenizer(one["written"].removeprefix(one["opening"]))["input_ids"] for one in found],
            **{name: [one[name] for one in found] for name in COLUMNS},
        }
        names = [f"{one['file']}[{one['index']}]" for one in found]
        scores: list[float] = self.rewards.score(place, asked, rows=names, state=state, own=True)["scores"]
        return scores

    def trainer(
        self,
        *,
        rows: MeasuredRows,
        base: Base,
        checkpoint: Path | None,
        say: Callable[[str], None],
        args: TrainFlags,
        **more: Any,
    ) -> GrpoTrainer:
        """Build the trainer. Imports TRL.

        Args:
            rows: the rows to train on.
            base: encodes them.
            checkpoint: from which the run resumes, or None.
            say: prints a line for the user.
            args: the training flags, with the run's accumulation.
            more: the other arguments of `GrpoTrainer`.
        """
        from vlft.train.grpo.trainer import GrpoTrainer, statistics_of

        if checkpoint is not None:
            before = read_record(checkpoint).training.get(REWARD_FILES) or {}
            now = files_of(args.reward)
            for file in sorted(name for name in now if name in before and before[name] != now[name]):
                say(f"warning: {file} has changed since the run began, so its rewards may differ from those before.")
        step = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
        metrics = MetricsFile(more["folder"].path, resume_step=step) if args.process_index == 0 else None
        prompts = Prompts(rows, base)
        trainer = GrpoTrainer(
            prompts=prompts,
            rewards=self.rewards,
            completions=Completions.of_run(prompts, args, more["folder"].path, resume_step=step, say=say),
            meter=Meter(lambda batch: 0.0, peak=None, statistics=statistics_of(self.rewards.names)),
            metrics=metrics,
            progress=Progress(say=say, bar=not args.disable_tqdm, steps_per_epoch=more["order"].steps),
            say=say,
            args=args,
            **more,
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        return trainer
