"""Check one row: its cost, its media, and warnings about it. Runs in loader processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlft.check.pairs import PairFacts, pair_facts
from vlft.data.boxes import remarks
from vlft.data.costs.cache import Costing
from vlft.data.dataset import MediaProbe
from vlft.data.encode import Encoder
from vlft.data.equal_files import head_digest
from vlft.data.identity import PathDigest, content_digest, files_of, question_digest, turns_digest
from vlft.data.media import decode as decoder
from vlft.data.media import read as media_io
from vlft.data.media.limits import FEW_TOKENS
from vlft.data.media.read import MediaError
from vlft.data.prompts import PromptEncoder
from vlft.data.sample import Cost, Image, Sample, Video
from vlft.errors import BadRow, DataError
from vlft.families import Family
from vlft.text import counted

HUGE = 50_000_000  # pixels; decoding takes a second or more, and the resize drops most of them
SHRUNK = 4.0  # factor by which a side becomes shorter
SHRUNK_FRAME = 2.0  # the same of a frame that gets few tokens
SUPERVISED = 0.002  # share of a row's tokens
ALONE = 500  # tokens; in a shorter row the share of trained tokens means little
HASHES = 100_000  # digests of files that a process remembers
#: Start of the remark on a list of frames whose rate is not given. One is reported for all rows of a file.
NO_RATE = "a list of frames, and neither --frames_fps nor the row (fps) says how many frames per second it has"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFacts:
    """The result of checking a row.

    Attributes:
        cost: cost of the row; without a base its tokens are 0.
        pictures: of each still, width and height as displayed, then width and height that the model gets.
        videos: number of videos.
        turns: digest of the turns without the files, in hexadecimal (`vlft.data.identity.turns_digest`).
        asked: of a row without media, digest of its human turns; else "".
        files: digests of the row's files, in hexadecimal, without separators: of their content if it is read anyway,
            else of their resolved paths.
        alike: of each file, a digest of its size and its first bytes. It is the same for equal files.
        warnings: (field, remark) for each possible problem.
        answers: of a preference row, facts about its answers.
    """

    cost: Cost
    pictures: tuple[tuple[int, int, int, int], ...]
    videos: int
    turns: str
    asked: str
    files: str
    alike: str
    warnings: tuple[tuple[str, str], ...]
    answers: PairFacts = PairFacts()


class RowCheck:
    """Check a row.

    Args:
        encoder: encoder of the base, or a `MediaProbe` if no base is named.
        family: family whose boxes the rows hold.
        decode: decode every picture and frame; if False, read headers only.
        rate_given: whether the user set `--frames_fps`.
    """

    def __init__(
        self, encoder: Encoder | MediaProbe, *, family: Family, decode: bool, rate_given: bool = False
    ) -> None:
        self.encoder = encoder
        self.family = family
        self.decode = decode
        self._asks_rate = encoder.recipe.video_time != "index" and not rate_given
        self._digest = content_digest if decode else PathDigest()
        self._digests: dict[str, tuple[bytes, bytes]] = {}

    @property
    def name(self) -> str:
        """Name under which results are cached."""
        asked = ", rates of lists" if self._asks_rate else ""
        sizes = ", sizes of frames" if self.encoder.recipe.video_rule == "processor" else ""
        return f"looked at and compared, {'decoded' if self.decode else 'by headers'}{asked}{sizes}"

    def __call__(self, sample: Sample) -> RowFacts:
        """Check one row.

        Raises:
            DataError: the row is refused.
            ConfigError: the row cannot be encoded with these flags.
        """
        warnings = list(sample.warnings)
        if isinstance(self.encoder, Encoder) and self.encoder.recipe.fit is not None:
            parts = [self.encoder.as_trained(part) for part in self.encoder.samples(sample)]
            if parts[0].answer is None:
                (sample,) = parts
            # Each adds a warning that says what was changed.
            warnings = list(dict.fromkeys(remark for part in parts for remark in part.warnings))
        cost = self._measured(sample)
        pictures: list[tuple[int, int, int, int]] = []
        videos = 0
        for part in sample.media:
            if isinstance(part, Video):
                videos += 1
                if part.path is None and self.decode:
                    warnings += self._inspect(sample, part)[1]
                if part.path is None and self._asks_rate and part.overrides.fps is None:
                    rate = f"{self.encoder.recipe.frames_fps:g} are assumed, and decide the times that the model sees"
                    warnings.append((part.field, f"{NO_RATE}. {rate}"))
                if not sample.changed and (remark := self._on_frames(sample, part)):
                    warnings.append((part.field, remark))
                continue
            (width, height, new_width, new_height), remarks_on_it = self._inspect(sample, part)
            warnings += remarks_on_it
            pictures.append((width, height, new_width, new_height))
            if remark := _remark((width, height), (new_width, new_height), tiny=self.encoder.recipe.factor):
                warnings.append((part.field, remark))
        warnings += self._on_boxes(sample)
        prompt = isinstance(self.encoder, PromptEncoder)  # no token of it is trained
        if cost.tokens >= ALONE and cost.supervised < SUPERVISED * cost.tokens and not prompt:
            share = f"{cost.supervised:,} of {cost.tokens:,} tokens are trained ({cost.supervised / cost.tokens:.2%})"
            warnings.append(("conversations", f"{share}: a step learns little from so long a row"))
        digests = [self._of_file(path) for path in files_of(sample)]
        files = b"".join(whole for whole, _ in digests)
        return RowFacts(
            cost=cost,
            pictures=tuple(pictures),
            videos=videos,
            turns=turns_digest(sample).hex(),
            asked="" if digests else question_digest(sample).hex(),
            files=files.hex(),
            alike=b"".join(head for _, head in digests).hex(),
            warnings=tuple(warnings),
            answers=pair_facts(sample, files),
        )

    def _on_boxes(self, sample: Sample) -> tuple[tuple[str, str], ...]:
        try:
            return tuple(remarks(sample, family=self.family, box_format=self.encoder.recipe.box_format))
        except MediaError as error:
            raise _refused(sample, error) from error

    def _measured(self, sample: Sample) -> Cost:
        if not isinstance(self.encoder, Encoder):
            return self.encoder.cost(sample, decode=self.decode)
        try:
            for part in sample.media if self.decode else ():
                decoder.check(part, self.encoder.recipe, exact=True)
        except MediaError as error:
            raise _refused(sample, error) from error
        return self.encoder.measure(sample)

    def _inspect(
        self, sample: Sample, medium: Image | Video
    ) -> tuple[tuple[int, int, int, int], list[tuple[str, str]]]:
        """Return width and height as displayed and as the model gets them, and remarks on the pixel values."""
        try:
            seen = media_io.read_headers(medium)
            grid = media_io.grid_of(medium, seen, self.encoder.recipe)
            remarks_on_it = media_io.depth_remarks(medium, seen) if self.decode else []
        except MediaError as error:
            raise _refused(sample, error) from error
        height, width = seen.sizes[0]
        side = self.encoder.recipe.patch_size
        return (width, height, grid.w * side, grid.h * side), remarks_on_it

    def _on_frames(self, sample: Sample, video: Video) -> str | None:
        """Return a warning about frames that get hardly any pixels because a limit is shared among them, or None."""
        try:
            recipe = media_io.recipe_for(video, self.encoder.recipe)
            most = len(video.frames) if video.path is None else recipe.nframes or recipe.video_max_frames
            limit = recipe.video_max_pixels
            if recipe.video_rule != "processor" or limit >= FEW_TOKENS * recipe.factor**2 * most:
                return None  # without opening the file again
            seen = media_io.read_headers(video)
            grid = media_io.grid_of(video, seen, self.encoder.recipe)
        except MediaError as error:
            raise _refused(sample, error) from error
        height, width = seen.sizes[0] if seen.clip is None else (seen.clip.height, seen.clip.width)
        new_height, new_width = grid.h * recipe.patch_size, grid.w * recipe.patch_size
        tokens = grid.tokens(recipe.merge_size) // grid.t
        if tokens >= FEW_TOKENS or max(width / new_width, height / new_height) <= SHRUNK_FRAME:
            return None
        name = "--video_max_pixels" if video.overrides.max_pixels is None else "max_pixels"
        small = f"{new_width}x{new_height} ({counted(tokens, 'token')} for two frames)"
        return (
            f"{width}x{height} pixels: each frame is reduced to {small}, because {name} {limit} is for "
            "all frames of the video together. Raise it, or take fewer frames"
        )

    def _of_file(self, path: str) -> tuple[bytes, bytes]:
        """Return what `RowFacts` holds in `files` and `alike` for a file."""
        if path not in self._digests:
            if len(self._digests) >= HASHES:
                self._digests.clear()
            with open(path, "rb") as file:
                head = head_digest(file)
            self._digests[path] = (self._digest(path), head)
        return self._digests[path]

    def dump(self, seen: RowFacts) -> list[Any]:
        """Return a value that JSON can hold, for `vlft.data.costs.cache.scan_kept`."""
        digests = [seen.turns, seen.asked, seen.files, seen.alike]
        answers = [[*seen.answers.characters], seen.answers.digests] if seen.answers.characters else []
        return [Costing.dump(seen.cost), seen.pictures, seen.videos, digests, seen.warnings, *answers]

    def load(self, value: Any) -> RowFacts:
        """Return the facts that `dump` wrote.

        Raises:
            TypeError, ValueError: `dump` did not write this value.
        """
        cost, pictures, videos, digests, warnings, *answers = value
        characters, pairs = answers or ((), "")
        turns, asked, files, alike = map(str, digests)
        return RowFacts(
            cost=Costing.load(cost),
            pictures=tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in pictures),
            videos=int(videos),
            turns=turns,
            asked=asked,
            files=files,
            alike=alike,
            warnings=tuple((str(field), str(remark)) for field, remark in warnings),
            answers=PairFacts(characters=tuple(map(int, characters)), digests=str(pairs)),
        )


def _refused(sample: Sample, error: MediaError) -> DataError:
    return DataError(BadRow(file=sample.file, index=sample.index, id=sample.id, field=error.field, reason=error.reason))


def _remark(size: tuple[int, int], small: tuple[int, int], *, tiny: int) -> str | None:
    """Return a warning about the size of a picture, or None.

    Args:
        size: width and height as displayed.
        small: width and height that the model gets.
        tiny: pixels of a side that one token covers.
    """
    (width, height), (new_width, new_height) = size, small
    what = f"{width}x{height} pixels"
    if min(size) < tiny:
        return f"{what}: tiny, it is enlarged to {new_width}x{new_height}"
    if width * height > HUGE:
        return f"{what}: huge, decoding it slows the loader, and the model gets {new_width}x{new_height}"
    if max(width / new_width, height / new_height) > SHRUNK:
        return f"{what}: reduced a lot, to {new_width}x{new_height}: small print is lost. See --image_max_pixels"
    return None
