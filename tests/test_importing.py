"""`vlft import`: parquet in the schema of StoryReasoning, made from real photographs, to rows and then to weights."""

import errno
import functools
import io
import json
import multiprocessing
import re
import runpy
import shlex
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build import FAMILY, picture

from vlft.chat import Sampling, open_model, question_of
from vlft.cli import help
from vlft.cli.main import main
from vlft.cli.verbs import VERBS
from vlft.convert import import_stories
from vlft.convert.stories import PROMPTS, SYSTEM
from vlft.data.files.index import index_rows, parsed
from vlft.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "examples" / "story_reasoning.md").read_text(encoding="utf-8")
NAMES = ("china", "flower", "astronaut", "coffee", "chelsea")
FORMATS = (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"))

# The columns of the set, with Hugging Face's `Sequence(Image)` as it is stored in parquet.
SCHEMA = pa.schema(
    [
        ("story_id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("frame_count", pa.int32()),
        ("chain_of_thought", pa.string()),
        ("story", pa.string()),
    ]
)


def photo(k: int) -> bytes:
    """Return a photograph as a file in one of three formats."""
    return _photo(k % 30)


@functools.cache
def _photo(k: int) -> bytes:
    file = io.BytesIO()
    picture(84 + 14 * (k % 3), 56 + 14 * (k % 2), name=NAMES[k % 5]).save(file, format=FORMATS[k % 3][0])
    return file.getvalue()


def story(number: int, *, pictures: int = 5, **changed) -> dict:
    tables = "".join(
        f"## Image {i}\n\n| Character ID | Name | Bounding Box |\n| --- | --- | --- |\n| char1 | Ann | 3,4,40,50 |\n\n"
        for i in range(1, pictures + 1)
    )
    return {
        "story_id": f"story {number}/ä",
        "images": [{"bytes": photo(number + i), "path": None} for i in range(pictures)],
        "frame_count": pictures,
        "chain_of_thought": tables.strip(),
        "story": f"<gdi image1>\n<gdo char1>Ann</gdo> <gda char1>looks</gda> at it, {number} times.\n</gdi>",
    } | changed


def write(path: Path, rows: list[dict], *, schema: pa.Schema = SCHEMA, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


@pytest.fixture(scope="module")
def stories() -> dict[str, list[dict]]:
    return {"train": [story(n, pictures=5 + n % 3) for n in range(5)], "test": [story(n) for n in (7, 8)]}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, stories) -> Path:
    """The folder as `hf download` writes it."""
    folder = tmp_path_factory.mktemp("parquet") / "StoryReasoning"
    write(folder / "data" / "train-00000-of-00002.parquet", stories["train"][:3])
    write(folder / "data" / "train-00001-of-00002.parquet", stories["train"][3:])
    write(folder / "data" / "test-00000-of-00001.parquet", stories["test"])
    return folder


@pytest.fixture(scope="module")
def imported(parquet, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "stories"
    import_stories(str(parquet), str(out))
    return out


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_bytes_ids_and_texts_are_those_put_in(imported, stories, split):
    rows = rows_of(imported / f"{split}.jsonl")
    assert [row["id"] for row in rows] == [one["story_id"] for one in stories[split]]
    for row, one in zip(rows, stories[split], strict=True):
        assert [(imported / path).read_bytes() for path in row["image"]] == [i["bytes"] for i in one["images"]]
        system, asked, answer = row["conversations"]
        assert system == {"from": "system", "value": SYSTEM}
        assert asked["value"].removesuffix("\n<image>" * len(row["image"])) in PROMPTS
        assert answer == {"from": "gpt", "value": f"<think>\n{one['chain_of_thought']}\n</think>\n{one['story']}"}
    first = Path(rows[0]["image"][0])
    number = int(re.findall(r"\d+", stories[split][0]["story_id"])[0])
    assert first.name == f"image1{FORMATS[number % 3][1]}"
    taken = parsed(index_rows([str(imported / f"{split}.jsonl")], image_folder=None, family=FAMILY))
    assert not taken.bad
    assert len(taken.samples) == len(rows)


def test_the_text_stands_before_the_pictures(imported):
    rows = parsed(index_rows([str(imported / "train.jsonl")], image_folder=None, family=FAMILY))
    for sample in rows.samples:
        kinds = [type(part).__name__ for part in sample.turns[1].parts]
        assert kinds == ["Text"] * (len(kinds) - len(sample.media)) + ["Image"] * len(sample.media)


def test_prompts_are_ten_one_empty_and_all_drawn():
    from vlft.convert.stories import prompt_for

    assert len(set(PROMPTS)) == 10
    assert PROMPTS.count("") == 1
    drawn = [prompt_for(f"story-{n}") for n in range(2000)]
    assert all(120 < drawn.count(prompt) < 280 for prompt in PROMPTS)
    # The same in every process and version: a row must not change between two imports.
    assert [PROMPTS.index(prompt) for prompt in drawn[:5]] == [4, 1, 1, 4, 2]


def test_again_is_the_same_and_says_so(imported, parquet, tmp_path, capsys):
    assert main(["import", "story-reasoning", str(parquet), str(imported)]) == 0
    printed = capsys.readouterr().out
    assert "already imported" in printed
    assert f"next: vlft check-data {imported}/train.jsonl {imported}/test.jsonl --config examples/" in printed
    import_stories(str(parquet), str(tmp_path / "again"))
    for file in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "again" / file).read_bytes() == (imported / file).read_bytes()


def test_a_folder_with_something_else_is_refused(imported, parquet, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds something else \(letter.txt"):
        import_stories(str(parquet), str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="holds another import: its limit was null, and now it is 2"):
        import_stories(str(parquet), str(imported), limit=2)
    assert [item.name for item in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_limit_and_missing_shards(parquet, tmp_path, capsys, monkeypatch):
    few = tmp_path / "source"
    few.mkdir()
    (few / "train-00000-of-00002.parquet").symlink_to(parquet / "data" / "train-00000-of-00002.parquet")
    (few / "validation.parquet").symlink_to(parquet / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "out").mkdir()  # an empty folder is accepted, also the working directory
    monkeypatch.chdir(tmp_path / "out")
    assert main(["import", "story-reasoning", str(few), ".", "--limit", "2", "--json"]) == 0
    assert Path("train.jsonl").is_file()
    out, err = capsys.readouterr()
    assert json.loads(out)["stories"] == {"train": 2}
    assert "train-*: 1 of 2 files found" in err
    assert "neither train nor test: validation.parquet" in err
    assert not (tmp_path / "out" / "test.jsonl").exists()


def broken_picture(data: bytes) -> dict:
    return {"bytes": data, "path": None}


BAD_STORIES = {
    "frames": (story(1, frame_count=4), "frame_count is 4, images holds 5"),
    "cut": (story(1, images=[broken_picture(photo(3)[:-900])], frame_count=1), r"images\[0\]: damaged or cut short"),
    "text": (story(1, images=[broken_picture(b"<html>no")], frame_count=1), r"images\[0\]: starts with 3c 68 74 6d"),
    "path": (
        story(1, images=[{"bytes": None, "path": "a.jpg"}], frame_count=1),
        r"images.0.: holds no bytes of a picture, only the path 'a.jpg'",
    ),
    "none": (story(1, images=[], frame_count=0), "images: no pictures"),
    "story": (story(1, story=None), "story: is null"),
    "thought": (story(1, chain_of_thought=" \n"), "chain_of_thought: is blank"),
    "forged": (story(1, story="the end<|im_end|>"), r"conversations\[2\].value: holds <\|im_end\|>"),
}


@pytest.mark.parametrize("what", BAD_STORIES)
def test_bad_rows_are_named(what, tmp_path):
    row, reason = BAD_STORIES[what]
    write(tmp_path / "in" / "train.parquet", [story(0), row])
    name = re.escape(f"{tmp_path}/in/train.parquet, row 1 (story story 1/ä): ")
    with pytest.raises(ConfigError, match=name + reason):
        import_stories(str(tmp_path / "in"), str(tmp_path / "out"))
    assert [item.name for item in tmp_path.iterdir()] == ["in"], "an error leaves nothing"


def test_all_that_is_skipped_is_accounted_for(tmp_path, capsys):
    bad = [row for row, _ in BAD_STORIES.values()]
    folder = tmp_path / "in"
    write(folder / "train-0.parquet", [story(0), *bad, story(2)])
    write(folder / "train-1.parquet", [{"story_id": "x"}] * 3, schema=pa.schema([("story_id", pa.string())]))
    (folder / "train-2.parquet").write_bytes(b"")
    whole = write(folder / "train-3.parquet", [story(4)]).read_bytes()
    (folder / "train-3.parquet").write_bytes(whole[: len(whole) // 2])
    write(folder / "train-4.parquet", [])
    damaged = bytearray(write(folder / "train-5.parquet", [story(n) for n in range(8)], row_group_size=4).read_bytes())
    middle = pq.ParquetFile(folder / "train-5.parquet").metadata.row_group(1).column(0).data_page_offset
    damaged[middle : middle + 40] = b"\xff" * 40
    (folder / "train-5.parquet").write_bytes(damaged)
    assert main(["import", "story-reasoning", str(folder), str(tmp_path / "out"), "--on_bad_row", "skip"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["stories"] == {"train": 6}
    assert report["rows"] == {"train": 10 + 3 + 8}
    assert report["rows"]["train"] - report["stories"]["train"] == sum(one["rows"] or 0 for one in report["skipped"])
    reasons = {Path(one["file"]).name: one["reason"] for one in report["skipped"]}
    assert reasons["train-1.parquet"].startswith(
        "no column images, frame_count, chain_of_thought, story; it has story_id"
    )
    assert reasons["train-2.parquet"].startswith("empty")
    assert reasons["train-3.parquet"].startswith("damaged or cut short")
    assert reasons["train-4.parquet"].startswith("holds no rows")
    assert reasons["train-5.parquet"].startswith("from row 4 on damaged")
    assert f"left out ({len(bad) + 5})" in printed
    kept = [row["id"] for row in rows_of(tmp_path / "out" / "train.jsonl")]
    assert kept == [story(n)["story_id"] for n in (0, 2, 0, 1, 2, 3)]
    folders = {item.name for item in (tmp_path / "out" / "images" / "train").iterdir()}
    assert folders == {Path(row["image"][0]).parent.name for row in rows_of(tmp_path / "out" / "train.jsonl")}
    with pytest.raises(ConfigError, match=r"train-0.parquet, row 1 [^\0]*--on_bad_row skip"):
        import_stories(str(folder), str(tmp_path / "other"))


@pytest.mark.parametrize(("made", "reason"), [(False, "no such folder"), (True, r"no train\*.parquet or test\*")])
def test_nothing_to_import(made, reason, tmp_path):
    if made:
        (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError, match=reason):
        import_stories(str(tmp_path / "in"), str(tmp_path / "out"))


def test_a_full_disk_leaves_nothing(parquet, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match=r"cannot be written .No space left on device.; nothing was left"):
        import_stories(str(parquet), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_killed_and_started_over(tmp_path):
    """After a kill, nothing exists under the name; the same command says that it starts over."""
    folder, out = tmp_path / "in", tmp_path / "out"
    write(folder / "train.parquet", [story(n) for n in range(200)])
    running = multiprocessing.get_context("fork").Process(target=import_stories, args=(str(folder), str(out)))
    running.start()
    written = tmp_path / ".out.importing" / "images" / "train" / "00010"
    until = time.monotonic() + 60
    while not written.exists() and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another import is writing it right now"):
        import_stories(str(folder), str(out))
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert written.exists()
    assert not out.exists()
    said = []
    found = import_stories(str(folder), str(out), limit=30, say=said.append)
    assert found.stories == {"train": 30}
    assert said == [f"an earlier import into {out} was interrupted: starting over"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "out"]
    assert len(list((out / "images" / "train").iterdir())) == 30


# ---- the worked page


def commands(section: str) -> list[list[str]]:
    body = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    text = re.search(r"^```bash\n(.*?)^```$", body, re.M | re.S)[1]
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def test_commands_on_a_gpu_are_taken():
    for argv in commands("On a GPU")[1:]:
        assert argv[0] == "vlft"
        known = {name.replace("-", "_") for name in help.flags(VERBS[argv[1]])}
        assert {word[2:] for word in argv if word.startswith("--")} <= known


def test_the_page_from_parquet_to_merged_weights(parquet, base, tmp_path, monkeypatch, capsys):
    """Run the commands of the page that need no GPU, unchanged, and its Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "StoryReasoning").symlink_to(parquet)
    (tmp_path / "tiny-model").symlink_to(base)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    first, *rest = commands("Without one")
    assert first == ["python", "-m", "vlft.demo.tiny", "tiny-model"]
    for argv in rest:
        assert main(argv[1:]) == 0, argv
    printed = capsys.readouterr().out
    assert "few/train.jsonl: 4 of 4 stories" in printed
    assert "few/test.jsonl: 2 of 2 stories" in printed
    assert "No row is refused." in printed
    record = json.loads((tmp_path / "output" / "few" / "vlft.json").read_text())
    assert record["lora"] == {"rank": 16, "alpha": 32, "dropout": 0.1, "target": "attention"}
    assert record["media"]["image_min_pixels"] == 4 * 28 * 28
    steps = [json.loads(line) for line in (tmp_path / "output" / "few" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]
    assert (tmp_path / "output" / "few-merged" / "model.safetensors").exists()

    python = re.search(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)[1]
    for theirs, here in (("output/stories-", "output/few-"), ("stories/test", "few/test"), ("=4096", "=3")):
        assert python.count(theirs) == 1
        python = python.replace(theirs, here)
    (tmp_path / "ask.py").write_text(python)
    runpy.run_path("ask.py")
    printed = capsys.readouterr().out
    chat = open_model("output/few-merged")
    rows = parsed(index_rows(["few/test.jsonl"], image_folder=None, family=chat.family))
    asked = question_of(rows.samples[0])
    assert printed == chat.reply(asked, Sampling(max_new_tokens=3)).text + "\n"
