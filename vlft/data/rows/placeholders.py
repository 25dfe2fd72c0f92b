"""Find the placeholders of pictures and videos in the text of a row: our own tags, and those of other kits.

Our tags are `<image>` and `<video>`. A word of another kit counts as a tag if the row has as many such words as files
and no other tag. Otherwise, a row with such a word and no picture is refused, because it would be trained without its
picture.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vlft.data.rows.keys import Kind
from vlft.data.rows.turns import Said, Shown
from vlft.data.sample import Role
from vlft.errors import RowRef
from vlft.text import counted, short

_AROUND = r"(?:\r?\n)*"  # newlines next to a tag are dropped with it
OURS = frozenset(("<image>", "<video>"))
TAG = re.compile(rf"{_AROUND}<(image|video)>{_AROUND}")
# <img>a.jpg</img> of Qwen-VL and ms-swift: the text itself names the file.
INLINE: dict[Kind, re.Pattern[str]] = {
    "image": re.compile(rf"{_AROUND}<img>([^<>\r\n]+)</img>{_AROUND}"),
    "video": re.compile(rf"{_AROUND}<video>([^<>\r\n]+)</video>{_AROUND}"),
}

INLINE_END: dict[Kind, str] = {"image": "</img>", "video": "</video>"}

# Words that always stand for media and do not occur in prose. Pattern -> kind, with the kits that use it.
SPECIAL: dict[str, Kind] = {
    r"<IMG_CONTEXT>": "image",  # InternVL
    r"<ImageHere>": "image",  # InternLM-XComposer
    r"<ImageContent>": "image",  # Yi-VL and others
    r"<image_placeholder>": "image",  # DeepSeek-VL
    r"<\|image\|>": "image",  # Llama 3.2, GLM, DeepSeek-VL2
    r"\[IMG\](?![^\[]*\[/IMG\])": "image",  # Pixtral; with an end it is BBCode
    r"<start_of_image>": "image",  # Gemma 3
    r"<image_soft_token>": "image",  # Gemma
    r"<\|begin_of_image\|>": "image",  # GLM-4V
    r"<im_start>": "image",  # LLaVA
    r"<im_patch>": "image",  # LLaVA
    r"<fake_token_around_image>": "image",  # Idefics
    r"<\|video\|>": "video",
    r"<VID_CONTEXT>": "video",
    r"<video_placeholder>": "video",
}
# Words with the number of the file they stand for. MiniCPM counts from 0, Phi-3 and MMMU from 1.
NUMBERED: dict[str, Kind] = {
    r"<\|image_(\d+)\|>": "image",
    r"<[Ii]mage[ _-]?(\d+)>": "image",
    r"<\|video_(\d+)\|>": "video",
    r"<[Vv]ideo[ _-]?(\d+)>": "video",
}
# Words that are also markup: `<img>` is HTML, `<Image>` is React.
MARKUP: dict[str, Kind] = {
    r"<img>": "image",
    r"<Image>": "image",
    r"<IMAGE>": "image",
    r"<images>": "image",
    r"<vid>": "video",
    r"<Video>": "video",
    r"<VIDEO>": "video",
    r"<videos>": "video",
}
# A picture in HTML or Markdown. It is prose, but in a row without media it may be meant as a picture.
_PAGE = re.compile(r"<img\s[^<>]*\bsrc\s*=[^<>]*>|!\[[^\[\]\r\n]*\]\([^()\s]+\)")
SOUND = r"<\|audio_\d+\|>|<\|AUDIO\|>|<AudioHere>|<audio>[^<>\r\n]+\.(?:wav|mp3|flac|m4a|ogg|opus|aac)</audio>"
_WORDS = {**SPECIAL, **NUMBERED, **MARKUP}
_ANY = re.compile("|".join((*_WORDS, SOUND)))
_BRACKETED = re.compile(r"[<\[][^<>\[\]\r\n]{1,40}[>\]]")  # fast first search, for long texts
_KIND_OF = [(re.compile(word), kind) for word, kind in _WORDS.items()]

Pieces = list[str | Shown]
Words = dict[str, tuple[Kind, int | None]]  # word -> what it stands for, and which file of the row from 0


@dataclass(frozen=True, kw_only=True)
class _Word:
    """A word of another kit in a text.

    Attributes:
        word: the word.
        kind: kind of media that it stands for. None: sound.
        number: number of the file that it stands for, if it has one.
        markup: whether it is also markup.
        alone: whether it is where a tag would be: at an end of the text, or on a line of its own.
        role: role of the turn.
        field: the text, for messages.
    """

    word: str
    kind: Kind | None
    number: int | None
    markup: bool
    alone: bool
    role: Role
    field: str


@dataclass(frozen=True, kw_only=True)
class Tags:
    """The placeholders of media in the texts of a row.

    Attributes:
        words: words of other kits that stand for media in human turns.
        inline: kinds whose files may be named in the text itself.
        warnings: (field, remark) for words that may stand for media, but are read as prose.
    """

    words: Words
    inline: tuple[Kind, ...] = ("image", "video")
    warnings: tuple[tuple[str, str], ...] = ()

    def split(self, text: str, role: Role, field: str) -> Pieces:
        """Split a text at its placeholders. Newlines next to a placeholder are dropped."""
        pieces: Pieces = [text] if text else []
        for kind in (kind for kind in self.inline if INLINE_END[kind] in text):
            pieces = _cut(INLINE[kind], pieces, functools.partial(_inline, kind, field))
        if self.words and role == "user":
            pieces = _cut(self._pattern, pieces, lambda found: self._shown(found[1], field))
        if not any(tag in text for tag in OURS):
            return pieces
        return _cut(TAG, pieces, lambda found: Shown(kind=_kind(found[1]), field=field))

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        either = "|".join(re.escape(word) for word in sorted(self.words, key=len, reverse=True))
        return re.compile(rf"{_AROUND}({either}){_AROUND}")

    def _shown(self, word: str, field: str) -> Shown:
        kind, place = self.words[word]
        return Shown(kind=kind, field=field, place=place)


def tags_of(
    row: RowRef,
    said: Sequence[tuple[Role, Said]],
    files: dict[Kind, int],
    named: dict[Kind, tuple[str, ...]],
    *,
    shown: bool,
) -> Tags:
    """Find the placeholders of the media of a row in its texts.

    Args:
        row: the row, for messages.
        said: every piece of text, with the role of its turn.
        files: kind -> how many files the row lists for its tags.
        named: kind -> words that the row itself assigns to its files, in the order of the files.
        shown: whether the row names any picture or video outside its texts.

    Raises:
        DataError: a word of another kit that stands for no file of the row.
    """
    # If the row lists videos, <video> is always a tag, even before </video>.
    inline: tuple[Kind, ...] = ("image",) if files["video"] else ("image", "video")
    words: Words = {tag: (kind, place) for kind, tags in named.items() for place, tag in enumerate(tags)}
    found = [
        word
        for role, piece in said
        if isinstance(piece.text, str) and not OURS.issuperset(_BRACKETED.findall(piece.text))
        for word in _words(role, piece.text, piece.field)
        if word.word not in words
    ]
    if not found:
        return Tags(words=words, inline=inline, warnings=() if shown or any(files.values()) else _pages(said))
    sound = next((word for word in found if word.kind is None), None)
    if sound is not None:
        raise row.bad(sound.field, f"{sound.word} stands for sound, which is not read. Remove it, or drop the row")
    ours = Tags(words=words, inline=inline)
    pieces = [piece for role, one in said if isinstance(one.text, str) for piece in ours.split(one.text, role, "")]
    tags = {kind: sum(isinstance(piece, Shown) and piece.kind == kind for piece in pieces) for kind in files}
    shown = shown or any(tags.values())
    warnings: list[tuple[str, str]] = []
    for kind in files:
        some = [word for word in found if word.kind == kind]
        asked = [word for word in some if word.role == "user"]
        places = _places(asked, files[kind]) if files[kind] and not tags[kind] else None
        if places is not None:
            words = words | {word.word: (kind, places.get(word.word)) for word in asked}
            some = [word for word in some if word.role != "user"]
        elif files[kind] and not tags[kind]:
            _refuse_count(row, asked, kind, files[kind])
        warnings += _check_unmatched(row, some, kind, shown=shown)
    return Tags(words=words, inline=inline, warnings=tuple(warnings))


def _pages(said: Sequence[tuple[Role, Said]]) -> tuple[tuple[str, str], ...]:
    """Warn about the first picture in HTML or Markdown that is where a tag would be in a human turn."""
    for role, piece in said:
        if role == "user" and isinstance(piece.text, str) and ("<img" in piece.text or "![" in piece.text):
            found = next((one for one in _PAGE.finditer(piece.text) if _is_alone(piece.text, one)), None)
            if found:
                what = f"holds {short(found[0])}: if the model should see it, write <image> and name the file"
                return ((piece.field, f'{what} under "image"'),)
    return ()


def _is_alone(text: str, found: re.Match[str]) -> bool:
    """Return whether a word is where a tag would be: at an end of the text, or on a line of its own."""
    before, after = text[: found.start()].rstrip(" \t"), text[found.end() :].lstrip(" \t")
    return not before.strip() or not after.strip() or (before.endswith("\n") and after[:1] in ("\n", "\r"))


def _words(role: Role, text: str, field: str) -> Iterator[_Word]:
    text = INLINE["image"].sub("", text) if INLINE_END["image"] in text else text
    for match in _ANY.finditer(text):
        word = match[0]
        kind = next((kind for pattern, kind in _KIND_OF if pattern.fullmatch(word)), None)
        number = re.search(r"\d+", word)
        yield _Word(
            word=word,
            kind=kind,
            number=int(number[0]) if number and kind else None,
            markup=any(re.fullmatch(pattern, word) for pattern in MARKUP),
            alone=_is_alone(text, match),
            role=role,
            field=field,
        )


def _places(words: Sequence[_Word], files: int) -> dict[str, int] | None:
    """Return word -> index of its file, from 0; empty if no word has a number. None if they do not fit the files."""
    numbers = [word.number for word in words if word.number is not None]
    if not words or (numbers and len(numbers) < len(words)):
        return None
    if not numbers:
        return {} if len(words) == files and len({word.word for word in words}) == 1 else None
    for first in (1, 0):
        if set(numbers) == set(range(first, first + files)):
            return {word.word: word.number - first for word in words if word.number is not None}
    return None


def _refuse_count(row: RowRef, words: Sequence[_Word], kind: Kind, files: int) -> None:
    if words and not all(word.markup and not word.alone for word in words):
        names = ", ".join(sorted({word.word for word in words}))
        raise row.bad(
            words[0].field,
            f"{len(words)} times {names} in the human turns, and {counted(files, f'{kind} file')}. Write "
            f"<{kind}> once for each file, at its place",
        )


def _check_unmatched(row: RowRef, words: Sequence[_Word], kind: Kind, *, shown: bool) -> list[tuple[str, str]]:
    """Refuse words that stand for no file. Returns warnings about words that may be prose."""
    what = "a picture" if kind == "image" else "a video"
    for word in words:
        if word.number is not None and shown:
            continue  # prose that refers to the picture
        if not word.markup or (word.alone and not shown and word.role == "user"):
            raise row.bad(
                word.field,
                f"{word.word} stands for {what} in other kits, but the row has none. Write <{kind}> and name "
                f'the file under "{kind}", or remove the word',
            )
    if shown:
        return []
    some = [word for word in words if word.role == "user"]
    return [(some[0].field, f"holds {some[0].word}: if it stands for {what}, write <{kind}>")] if some else []


def _inline(kind: Kind, field: str, found: re.Match[str]) -> Shown:
    return Shown(kind=kind, field=field, value=found[1].strip())


def _kind(tag: str) -> Kind:
    return "image" if tag == "image" else "video"


def _cut(pattern: re.Pattern[str], pieces: Pieces, made: Callable[[re.Match[str]], Shown]) -> Pieces:
    """Split the texts among the pieces at the matches of a pattern, and replace each match by what `made` returns."""
    cut: Pieces = []
    for piece in pieces:
        if not isinstance(piece, str):
            cut.append(piece)
            continue
        end = 0
        for match in pattern.finditer(piece):
            if match.start() > end:
                cut.append(piece[end : match.start()])
            cut.append(made(match))
            end = match.end()
        if piece[end:]:
            cut.append(piece[end:])
    return cut
