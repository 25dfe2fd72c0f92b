"""README.md, the guides and CONTRIBUTING.md: commands exist, links work, tables agree with the code, examples parse,
and the first run of the README runs. tests/test_commands.py runs the other commands, tests/test_api.py the Python."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from build import FAMILY
from transformers import TrainingArguments

from vlft.cli import flags_page, help
from vlft.cli.main import main
from vlft.cli.verbs import VERBS
from vlft.config.flags import DataFlags, ModelFlags, RunFlags
from vlft.config.kits.common import REPLACED
from vlft.config.kits.two_u1 import KIT
from vlft.config.parse import FlagParser
from vlft.config.row_flags import RowFlags
from vlft.config.said import read_yaml
from vlft.config.training import TrainFlags
from vlft.data.rows.records import parse_record
from vlft.demo.run import GOAL, Lesson, Score, train_arguments
from vlft.demo.run import table as table_of_scores
from vlft.demo.score import shares
from vlft.demo.story import chance, stories

ROOT = Path(__file__).parent.parent
COLUMNS = ("before", "blind", "chance", "after")
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (
        *(ROOT / name for name in ("README.md", "data/README.md", ".github/CONTRIBUTING.md")),
        *sorted((ROOT / "examples").rglob("*.md")),
    )
}
README, CONTRIBUTING = PAGES["README.md"], PAGES[".github/CONTRIBUTING.md"]
GUIDES = {Path(page).stem: text for page, text in PAGES.items() if page.startswith("examples/guides/")}
FENCES = [
    (page, *match.groups())
    for page, text in PAGES.items()
    if page != "data/README.md"  # its rows: tests/test_records.py, its commands: tests/test_commands.py
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
]
FIELDS = {
    field.name: field
    for cls in (DataFlags, ModelFlags, TrainFlags)
    for field in dataclasses.fields(cls)
    if field.name not in {one.name for one in dataclasses.fields(TrainingArguments)} - set(RunFlags.__annotations__)
    and field.init
    and field.name not in REPLACED
}


def blocks(language: str) -> list[str]:
    return [text for _, word, text in FENCES if word == language]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a bash block, without the variables in front of it."""
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


def table(page: str, header: str) -> list[list[str]]:
    """The cells of each row of a table, which is found by the start of its first line."""
    assert f"| {header} |" in page, header
    lines = page.partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def headings(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def flags_in(text: str) -> list[str]:
    return [name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", text)]


def parser() -> FlagParser:
    return FlagParser("train")


# ---- commands, paths and links exist


def test_verbs_and_scripts_exist():
    assert {"vlft", "bash", "python"} <= {command[0] for command in COMMANDS}
    assert not {command[1] for command in COMMANDS if command[0] == "vlft"} - set(VERBS)
    everything = "\n".join(PAGES.values())
    assert set(VERBS) <= set(re.findall(r"vlft ([\w-]+)", everything)), "a verb is on no page"
    for name in re.findall(r"\b((?:scripts|examples)/[\w./]+\w)", everything):
        assert (ROOT / name).exists(), name
    for script in (ROOT / "scripts").glob("finetune*.sh"):
        assert f"`{script.name}`" in README


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in headings(found.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_every_guide_is_in_the_index_and_in_the_readme():
    names = {file.name for file in (ROOT / "examples" / "guides").glob("*.md")} - {"README.md"}
    assert names <= set(re.findall(r"\]\((\w+\.md)\)", GUIDES["README"]))
    assert names <= set(re.findall(r"\]\(examples/guides/(\w+\.md)\)", README))
    assert len(README.splitlines()) <= 250, "a fact that a newcomer can do without belongs in a guide"


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
    found = re.findall(r"`(?:torchrun|deepspeed) [^`]*? vlft train ([^`]*)`", GUIDES["gpus"])
    inline = [shlex.split(text) for text in found]
    assert inline
    return rest + inline


def test_values_of_commands_are_taken():
    found = finetune_commands()
    assert len(found) >= 4
    for flags in found:
        parser().parse_args(flags)  # raises UsageError with the flag's name


@pytest.mark.parametrize("page", ["README.md", *(f"examples/guides/{name}.md" for name in GUIDES)])
def test_flags_in_prose_are_known(page):
    known = {option[2:] for action in parser()._actions for option in action.option_strings}
    known |= {name.replace("-", "_") for verb in VERBS.values() for name in help.flags(verb)}
    prose = PAGES[page]
    if page.endswith("serving.md"):  # flags of its clients
        prose = "\n".join(line for line in prose.splitlines() if line.startswith("vlft "))
    for other in ("## Qwen2-VL-Finetune", "## Serve over HTTP"):  # flags of others
        before, _, rest = prose.partition(other)
        prose = before + rest.partition("\n## ")[2]
    of_others = {"nproc_per_node", "num_gpus", "module", "bits", "disable_flash_attn2", "version", "score"}
    assert not {flag for flag in flags_in(prose) if flag not in known | of_others}


# ---- tables


def test_the_flags_are_those_of_the_code():
    """If a change was intended, run: python -m vlft.cli.flags_page examples/guides/flags.md"""
    assert flags_page.with_tables(GUIDES["flags"]) == GUIDES["flags"]


def test_every_flag_is_in_the_tables_with_its_default():
    shown = {}
    generated = GUIDES["flags"].partition(flags_page.BEGIN)[2].partition(flags_page.END)[0]
    for line in generated.splitlines():
        if line.startswith("| `--"):
            flag, takes, default, text = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
            [name] = flags_in(flag)
            assert name not in shown, f"--{name} is there twice"
            assert takes
            assert text
            assert "(default" not in text
            shown[name] = default.strip("`")
    assert set(shown) == set(FIELDS)
    for name in ("lora_rank", "over_length", "stall_timeout", "packing", "seed", "learning_rate"):
        default = FIELDS[name].default
        said = yaml.safe_load(shown[name])
        assert (float(said) if isinstance(default, float) else said) == default, name
    assert shown["fps"] == "the base processor's, else 2"
    assert shown["model_id"] == shown["data_path"] == "needed"


def test_defaults_of_training_arguments():
    stock = {field.name: field.default for field in dataclasses.fields(TrainFlags)}
    example = yaml.safe_load((ROOT / "examples" / "lora_vision.yaml").read_text())
    for name, default, preset in table(GUIDES["flags"], "flag | default of `vlft train` | scripts and examples"):
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
    for name, script, file, towers, rate, _ in table(
        README, "preset | script | example | vision / merger / language | learning rate | tokens per picture"
    ):
        example = yaml.safe_load((ROOT / "examples" / file.strip("`")).read_text())
        assert towers == " / ".join(example[tower] for tower in ("vision", "merger", "language")), name
        assert (ROOT / "scripts" / script.strip("`")).is_file()
        assert float(rate.partition(",")[0]) == float(example["learning_rate"])


def test_every_renamed_flag_is_named():
    rows = table(GUIDES["coming_from"], "there | here")
    assert sorted(flag for there, _ in rows for flag in flags_in(there)) == sorted(KIT.names)
    known = {option[2:] for action in parser()._actions for option in action.option_strings}
    assert {flag for _, here in rows for flag in flags_in(here)} <= known


# ---- examples


def test_rows_parse():
    assert blocks("json")
    for block in blocks("json"):
        for index, raw in enumerate(json.loads(block)):
            sample = parse_record(
                raw, file="README", index=index, image_folder=None, family=FAMILY, flags=RowFlags(pairs="chosen" in raw)
            )
            assert not sample.warnings


def test_yaml_parses(tmp_path):
    assert blocks("yaml")
    for block in blocks("yaml"):
        (tmp_path / "my.yaml").write_text(block)
        flags = read_yaml(str(tmp_path / "my.yaml"))
        parsed = parser().parse_args([word for name, words in flags for word in (f"--{name}", *words)])
        assert parsed.model_id


def test_python_compiles():
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        compile(block, "a page", "exec")


# ---- the commands by hand


def by_hand() -> list[list[str]]:
    [block] = [block for block in blocks("bash") if "vlft.demo.score" in block]
    return commands(block)


def test_the_commands_by_hand_are_those_of_the_demo():
    typed = next(command for command in by_hand() if command[:2] == ["vlft", "train"])[2:]
    demo = train_arguments(Path("demo-out/base"), Path("demo-out/data/train.json"), Path("output/lesson"), Lesson())
    assert sorted(zip(typed[::2], typed[1::2], strict=True)) == sorted(zip(demo[::2], demo[1::2], strict=True))


def test_the_commands_by_hand_do_what_the_demo_does(quick_demo, tmp_path, monkeypatch, capsys):
    """With a few steps: the same adapter, the same merged weights, an answer, the same scores."""
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
    """The figures come from a real run (see its date in the history). Their form is that of the code today."""
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
