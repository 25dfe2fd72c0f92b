"""The commands printed in README.md, data/README.md, examples and guides work; and files named without a folder."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from build import picture, row, write_image, write_json

from vlft.cli.main import main
from vlft.families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = (
    *("README.md", "data/README.md"),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "examples").rglob("*.md"))),
)
MODELS = {
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
}


def commands(page: str) -> list[list[str]]:
    """Return the words of each command of vlft in the bash blocks of a page."""
    found = []
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "vlft" in words[:1]:
                found.append(words[1:])
    return found


PRINTED = {page: commands(page) for page in PAGES}
ALL = [(page, words) for page, lines in PRINTED.items() for words in lines]


@pytest.fixture
def here(tmp_path, monkeypatch, base_of) -> Path:
    """An empty working directory with the checkout's `examples` and `data`, and tiny bases under the printed names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "cache"))
    for name in ("examples", "data"):
        Path(name).symlink_to(ROOT / name)
    for name, model_type in MODELS.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(base_of(FAMILIES[model_type]))
    return tmp_path


def own_data() -> None:
    """Write the files that the pages call the user's own: train.json and its pictures."""
    for i, name in enumerate(("shelf", "table")):
        write_image(Path("images") / f"{name}.jpg", 120 + i, 90)
    write_json(Path("val.json"), [row("<image>What?", "A bowl.", image="table.jpg")])
    write_json(
        Path("train.json"),
        [
            row("<image><image>What was moved?", "The bowl.", image=["shelf.jpg", "table.jpg"]),
            *(row(text, "Hello.") for text in ("Hi.", "Good morning.", "Good evening.")),
        ],
    )


def own_tables() -> None:
    """Write the tables that data/README.md reads with --columns."""
    for name in ("left", "right"):
        write_image(Path(f"{name}.jpg"))
    Path("labels.txt").write_text("A bowl.\nA cup.\n")
    Path("vqa.csv").write_text("picture,q,a\nleft.jpg,What?,A temple.\n")
    pair = {"qa": {"text": "Which?", "reply": "Both."}, "left": "left.jpg", "right": "right.jpg"}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    shown = io.BytesIO()
    picture(90, 60).save(shown, "JPEG")
    with tarfile.open("captions.tar", "w") as tar:
        for name, content in (("0.jpg", shown.getvalue()), ("0.txt", b"A temple.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


class Reached(Exception):
    """The parser accepted a command and called the function that does its work."""


DOORS = {
    "train": ("vlft.train.run.train",),
    "merge": ("vlft.merge.merge",),
    "check-data": ("vlft.check.check",),
    "export": ("vlft.convert.export.export",),
    "preview": ("vlft.preview.preview_rows",),
    "plan": ("vlft.plan.plan",),
    "chat": ("vlft.chat.open_model",),
    "eval": ("vlft.evaluation.evaluate.evaluate",),
    "report": ("vlft.report.make_report",),
    "import": ("vlft.convert.import_stories",),
    "demo": ("vlft.demo.run.demo", "vlft.demo.build_base.rebuild"),
    "ui": ("vlft.cli.ui.open_page",),
    "bench": ("vlft.bench.data.bench_data", "vlft.bench.train.bench_train"),
}


def test_every_command_is_parsed(here, monkeypatch):
    """Each command reaches the function that does its work, with the files that it names."""
    own_data()
    own_tables()
    named = (
        "demo-out/data/train.json",
        "pairs/train.json",
        "pairs/held_out.json",
        "rows/train.json",
        "stories/train.jsonl",
        "stories/test.jsonl",
        "few/train.jsonl",
        "few/test.jsonl",
    )
    shown = ("demo-out/data/held_out/00000-0.png", *(f"pairs/held_out/00001-{i}.png" for i in (0, 1)))
    for file in (*named, *shown):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("\n")
    for folder in (
        "StoryReasoning",
        "tiny-model",
        "demo-out/base",
        "vlft/demo/base",
        "output/dpo-merged",
        "output/grpo",
    ):
        Path(folder).mkdir(parents=True)
    Path("finetune_lora.sh").write_text("deepspeed src/train/train_sft.py --model_id Qwen/x --data_path train.json")
    Path("qwen2vl_lora_sft.yaml").write_text(
        "{model_name_or_path: Qwen/x, stage: sft, cutoff_len: 9, dataset: train.json}"
    )

    def stop(*args, **kwargs):
        raise Reached

    for early in ("vlft.cli.early.check_run", "vlft.cli.plan.check_run", "vlft.cli.chat.check_model"):
        monkeypatch.setattr(early, lambda *args, **kwargs: None)  # the folders of bases are empty here
    for door in (door for doors in DOORS.values() for door in doors):
        monkeypatch.setattr(door, stop)
    assert {words[0] for _, words in ALL} == set(DOORS)
    for page, words in ALL:
        try:
            status = main(words)
        except Reached:
            continue
        if "--translate" in words and status == 0:
            continue
        pytest.fail(f"{page}: vlft {shlex.join(words)}: ended with {status}")


def printed(page: str, *verbs: str) -> list[list[str]]:
    """Return the page's commands of these verbs, except the ones on the StoryReasoning data set."""
    return [words for words in PRINTED[page] if words[0] in verbs and "stories" not in " ".join(words)]


def test_your_own_data_in_three_steps(here, capsys):
    """The commands of README.md and its guides run on rows and a base with these names: check, train, merge, chat."""
    own_data()
    wanted = ("check-data", "preview", "plan", "train", "eval", "merge", "chat", "report")
    guides = ("checking", "merging", "running", "memory")
    pages = ("README.md", *(f"examples/guides/{name}.md" for name in guides))
    steps = [words for page in pages for words in printed(page, *wanted) if "lesson" not in " ".join(words)]
    assert [words[0] for words in steps] == [
        *("check-data", "preview", "plan", "train", "eval", "merge", "chat"),  # README.md
        *("check-data", "preview", "chat", "report", "plan", "plan"),  # the guides
    ]
    for words in steps:
        quick = ["--max_new_tokens", "2"] if words[0] in ("chat", "eval") else []
        quick += ["--workers", "0"] if words[0] == "check-data" else []
        quick += ["--dataloader_num_workers", "0"] if words[0] == "train" else []
        assert main([*words, *quick]) == 0, (words, capsys.readouterr().err)
    assert "<html" in Path("row.html").read_text()
    assert Path("output/mine-merged/model.safetensors").is_file()
    assert Path("output/mine/report.html").is_file()


def test_the_commands_of_the_data_format(here, capsys):
    own_tables()
    steps = printed("data/README.md", "check-data", "preview")
    assert len(steps) == 5
    for words in steps:
        quick = ["--workers", "0", "--headers_only"] if words[0] == "check-data" else []
        assert main([*words, *quick]) == 0, (words, capsys.readouterr().err)


def test_files_and_folders_of_bare_names(here, capsys):
    """Each verb that writes runs in the folder it writes to, and writes to that folder itself."""
    own_data()
    model = ["--model_id", "Qwen/Qwen2-VL-2B-Instruct", "--image_folder", "images"]
    look = ["check-data", "train.json", "--workers", "0", "--headers_only", "--image_folder", "images"]
    train = ["--data_path", "train.json", "--lora_rank", "2", "--max_steps", "1", "--dataloader_num_workers", "0"]
    lines = [
        [*look, "--report", "."],
        ["preview", "train.json", *model, "--html", "row.html"],
        ["train", *model, *train, "--output_dir", "run"],
        ["report", "run", "--html", "rep.html"],
        ["merge", "run", "merged"],
        ["merge", "merged", "copy"],
    ]
    for line in lines[:-1]:
        assert main(line) == 0, (line, capsys.readouterr().err)
    for name in ("report.html", "row.html", "rep.html", "run/vlft.json", "merged/model.safetensors"):
        assert Path(name).is_file(), name
    Path("quarantine.jsonl").unlink()
    for name in ("clean.jsonl", "clean.json"):
        assert main([*look, "--fix", name]) == 0
        assert Path(name).is_file()
        Path("quarantine.jsonl").unlink()
    shutil.rmtree("merged")
    Path("empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("empty")
        assert main(["merge", "../run", ".", "--base_model", "../Qwen/Qwen2-VL-2B-Instruct"]) == 0, (
            capsys.readouterr().err
        )
        assert Path("model.safetensors").is_file()
