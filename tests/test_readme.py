"""README.md: its commands exist, its tables agree with the code, its examples parse, and its first run does run."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from build import FAMILY

from vlft.cli import help
from vlft.cli.main import main
from vlft.cli.verbs import VERBS
from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.kits.common import REPLACED
from vlft.config.kits.two_u1 import KIT
from vlft.config.parse import FlagParser, read_yaml
from vlft.data.rows.records import parse_record
from vlft.demo.run import GOAL, Lesson, Score, train_arguments
from vlft.demo.run import table as table_of_scores
from vlft.demo.score import shares
from vlft.demo.story import chance, stories

ROOT = Path(__file__).parent.parent
COLUMNS = ("before", "blind", "chance", "after")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = [match.groups() for match in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)]
FIELDS = {
    field.name: field
    for cls in (DataFlags, ModelFlags, TrainFlags)
    for field in dataclasses.fields(cls)
    if field.name in cls.__dict__["__annotations__"] and field.name not in REPLACED
}


def blocks(language: str) -> list[str]:
    return [text for word, text in FENCES if word == language]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a bash block, without the variables before it."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                found.append(command)
                command = []
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)
    return [command for command in found if command]


COMMANDS = [command for block in blocks("bash") for command in commands(block)]


def table(section: str, header: str) -> list[list[str]]:
    """Cells of the rows of a table, by the section it is in and the start of its first line."""
    body = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = body.partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def flags_in(text: str) -> list[str]:
    return [name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", text)]


def parser() -> FlagParser:
    return FlagParser("train", (DataFlags, ModelFlags, TrainFlags))


# ---- what is named is there


def test_verbs_and_scripts_exist():
    assert {"vlft", "bash", "python"} <= {command[0] for command in COMMANDS}
    assert not {command[1] for command in COMMANDS if command[0] == "vlft"} - set(VERBS)
    assert set(VERBS) <= set(re.findall(r"vlft ([\w-]+)", README)), "a verb is not in the README"
    for name in re.findall(r"\b((?:scripts|examples)/[\w.]+)", README):
        assert (ROOT / name).exists(), name
    for script in (ROOT / "scripts").glob("finetune*.sh"):
        assert f"`{script.name}`" in README
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / name).exists(), f"the README links to {name}"
    headings = {line.removeprefix("## ").lower().replace(" ", "-") for line in README.splitlines() if line[:3] == "## "}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


@pytest.mark.parametrize("verb", VERBS)
def test_flags_of_commands_are_known(verb):
    known = {name.replace("-", "_") for name in help.flags(VERBS[verb])}
    used = [command for command in COMMANDS if command[:2] == ["vlft", verb]]
    assert used
    for command in used:
        assert set(flags_in(" ".join(command))) <= known, command


def finetune_commands() -> list[list[str]]:
    """The flags of every command that trains: after a script, `vlft train` or a launcher."""
    rest = [command[2:] for command in COMMANDS if re.search(r"vlft train|scripts/finetune", " ".join(command[:2]))]
    inline = [shlex.split(text) for text in re.findall(r"`(?:torchrun|deepspeed) [^`]*? vlft train ([^`]*)`", README)]
    return rest + inline


def test_values_of_commands_are_taken():
    found = finetune_commands()
    assert len(found) >= 4
    for flags in found:
        parser().parse_args(flags)  # raises UsageError with the flag's name


def test_flags_in_prose_are_known():
    known = {option[2:] for action in parser()._actions for option in action.option_strings}
    known |= {name.replace("-", "_") for verb in VERBS.values() for name in help.flags(verb)}
    serving, moving = (README.partition(f"\n## {name}")[2].partition("\n## ")[0] for name in ("Serving", "Coming from"))
    prose = README.replace(serving, "").replace(moving, "")
    of_launchers = {"nproc_per_node", "num_gpus", "module"}
    assert not {flag for flag in flags_in(prose) if flag not in known | of_launchers}


# ---- tables


def default_in_help(field: dataclasses.Field[Any]) -> str | None:
    """The words of the flag's own help, where the default is no plain value."""
    words = re.search(r"\(default: (.*)\)", field.metadata["help"])
    return words[1] if words else None


def test_every_flag_is_in_the_table_with_its_default():
    shown = {}
    for names, default, _ in table("Flags", "flag | default"):
        for name in flags_in(names):
            assert name not in shown, f"--{name} is there twice"
            shown[name] = default
    assert set(shown) == set(FIELDS)
    for name, cell in shown.items():
        field, said = FIELDS[name], cell.replace("`", "")
        if field.default is None or field.default is dataclasses.MISSING:
            words = default_in_help(field)
            assert said == words if words else said in ("needed", "none"), name
        elif isinstance(field.default, bool):
            assert said == str(field.default).lower(), name
        elif isinstance(field.default, int | float):
            assert float(said) == field.default, name
        else:
            assert said == field.default, name


def test_defaults_of_training_arguments():
    stock = {field.name: field.default for field in dataclasses.fields(TrainFlags)}
    example = yaml.safe_load((ROOT / "examples" / "lora_vision.yaml").read_text())
    for name, default, preset in table("Flags", "flag | default of `vlft train`"):
        [name] = flags_in(name)
        value = stock[name]
        said = default.strip("`")
        assert (float(said) if isinstance(value, int | float) else said) == ("none" if value is None else value), name
        if name == "gradient_accumulation_steps":
            assert f"{example[name]} rows" in preset
        else:
            ours = re.match(r"`([^`]*)`", preset)
            assert (yaml.safe_load(ours[1]) if ours else None) == example.get(name), name


def test_presets():
    for name, script, file, towers, rate, _ in table("What trains", "preset | script"):
        example = yaml.safe_load((ROOT / "examples" / file.strip("`")).read_text())
        assert towers == " / ".join(example[tower] for tower in ("vision", "merger", "language")), name
        assert (ROOT / "scripts" / script.strip("`")).is_file()
        assert float(rate.partition(",")[0]) == float(example["learning_rate"])


def test_every_renamed_flag_is_named():
    rows = table("Coming from Qwen2-VL-Finetune", "there | here")
    assert sorted(flag for there, _ in rows for flag in flags_in(there)) == sorted(KIT.names)
    known = {option[2:] for action in parser()._actions for option in action.option_strings}
    assert {flag for _, here in rows for flag in flags_in(here)} <= known


# ---- examples


def test_rows_parse():
    for block in blocks("json"):
        for index, raw in enumerate(json.loads(block)):
            sample = parse_record(raw, file="README", index=index, image_folder=None, family=FAMILY)
            assert not sample.warnings


def test_yaml_parses(tmp_path):
    for block in blocks("yaml"):
        (tmp_path / "my.yaml").write_text(block)
        parsed = parser().parse_args(read_yaml(str(tmp_path / "my.yaml")))
        assert parsed.model_id


def test_python_compiles():
    for block in blocks("python"):
        compile(block, "README", "exec")


# ---- the commands by hand


def by_hand() -> list[list[str]]:
    [block] = [block for block in blocks("bash") if "vlft.demo.score" in block]
    return commands(block)


def test_the_commands_by_hand_are_those_of_the_demo():
    typed = next(command for command in by_hand() if command[:2] == ["vlft", "train"])[2:]
    demo = train_arguments(Path("demo-out/base"), Path("demo-out/data/train.json"), Path("output/lesson"), Lesson())
    assert sorted(zip(typed[::2], typed[1::2], strict=True)) == sorted(zip(demo[::2], demo[1::2], strict=True))


def test_the_commands_by_hand_do_what_the_demo_does(quick_demo, tmp_path, monkeypatch, capsys):
    """In a few steps: the same adapter, the same merged weights, an answer, the same scores."""
    out, _ = quick_demo
    (tmp_path / "demo-out").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    few = {"640": "6", "80": "1"}  # steps and logged steps of --quick
    for command in by_hand()[1:]:
        argv = [few.get(word, word) for word in command]
        if argv[0] == "vlft":
            assert main(argv[1:]) == 0
        else:
            assert argv[:3] == ["python", "-m", "vlft.demo.score"]
            scores = shares(*argv[3:])
    for file, theirs in {
        "output/lesson/adapter_model.safetensors": "run/adapter_model.safetensors",
        "output/lesson-merged/model.safetensors": "merged/model.safetensors",
    }.items():
        assert Path(file).read_bytes() == (out / theirs).read_bytes(), file
    told = json.loads((out / "scores.json").read_text())["scores"]
    assert list(scores.values()) == [(score["rows"], score["after"]) for score in told]


def test_shown_scores_are_a_table_of_the_demo():
    """The figures are of a real run (see its date in the history); the form is that of this code."""
    shown = next(text for text in blocks("text") if "exact match, held out" in text)
    rows = re.findall(r"^(\w[\w ]+?) \((\d+)\) +" + " +".join([r"([\d.]+)%"] * 4) + "$", shown, re.M)
    scores = [
        Score(kind=kind, rows=int(count), **{n: float(v) / 100 for n, v in zip(COLUMNS, shares, strict=True)})
        for kind, count, *shares in rows
    ]
    assert table_of_scores(scores) == shown.rstrip("\n")
    held_out = list(stories("lesson", "held_out", Lesson().held_out, seed=Lesson().seed))
    videos = sum(row.is_video for row in held_out)
    assert [score.rows for score in scores] == [len(held_out) - videos, videos]
    assert scores[1].chance == pytest.approx(chance([row for row in held_out if row.is_video]), abs=5e-4)
    assert all(score.after >= GOAL for score in scores)
