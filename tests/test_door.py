"""Checks of flags: values of each flag, command lines of other kits, similar names; all before heavy imports."""

import dataclasses
import importlib
import json
import subprocess
import sys
import typing
from enum import Enum
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from vlft.cli import help
from vlft.cli.main import main
from vlft.cli.parse_rows import RowParser
from vlft.cli.verbs import VERBS
from vlft.config import door, table
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.kinds import Bool, Number, Word
from vlft.config.kits.common import REPLACED
from vlft.config.said import read_line
from vlft.config.training import TrainFlags
from vlft.config.translate import translate
from vlft.config.values import DEFAULTS
from vlft.errors import ConfigError, UsageError

FLAGS = (DataFlags, ModelFlags, TrainFlags)
FIELDS = {field.name: field for cls in FLAGS for field in dataclasses.fields(cls) if field.init}
KNOWN = {*table.kinds("train"), *(f"no_{name}" for name in table.OF_TRAIN)}


with_stored_help = pytest.mark.skipif(
    version("transformers") != (help.FOLDER / "transformers.txt").read_text().strip(),
    reason="another transformers has other flags",
)


# ---- the table


@with_stored_help
def test_every_flag_has_its_line_in_the_table():
    assert set(FIELDS) - set(REPLACED) == set(table.OF_TRAIN), "one line in vlft/config/table.py for each flag"


@with_stored_help
def test_the_table_agrees_with_the_parser():
    """Type, words and number of values of each flag are those that transformers reads from the dataclasses."""
    for action in HfArgumentParser(FLAGS)._actions:
        name = action.dest
        if name not in table.OF_TRAIN or action.option_strings[0] != f"--{name}":
            continue
        kind = table.OF_TRAIN[name]
        many = {None: "one", "+": "some", "?": "maybe"}[action.nargs]
        if {"true", "false"} <= set(action.choices or ()):  # vlft adds `auto` to a flag that is a bool in transformers
            many = "maybe"
        assert kind.many == many, name
        if action.choices or (isinstance(action.type, type) and issubclass(action.type, Enum)):
            words = action.choices or [member.value for member in typing.cast(type[Enum], action.type)]
            assert isinstance(kind, Word), name
            assert set(kind.words) == set(words), name
        elif action.type in (int, float):
            assert isinstance(kind, Number), name
            assert kind.whole == (action.type is int), name
        else:
            assert isinstance(kind, Bool) == (action.type is not str), name


@pytest.mark.parametrize("verb", ["plan", "check-data", "preview", "bench", "chat"])
def test_flags_of_single_verbs_have_their_line(verb):
    parser = importlib.import_module(VERBS[verb].module).parser()
    known = {option.lstrip("-").replace("-", "_") for option in parser._option_string_actions} - {"h"} | {"config"}
    assert {name for name in known if not name.startswith("no_")} == {*table.kinds(verb)}


def test_defaults_that_are_compared_are_those_of_the_flags():
    assert {name: FIELDS[name].default for name in DEFAULTS} | {"optim": DEFAULTS["optim"]} == dict(DEFAULTS)


def test_every_default_passes(tmp_path):
    for name, field in FIELDS.items():
        if name in table.OF_TRAIN and field.default not in (None, "", dataclasses.MISSING):
            default = getattr(field.default, "value", field.default)
            assert table.OF_TRAIN[name].problem(str(default)) is None, name


NUMBERS = [name for name, kind in table.OF_TRAIN.items() if isinstance(kind, Number)]


def refused(verb: str, *argv: str) -> str:
    with pytest.raises((UsageError, ConfigError)) as caught:
        door.check(verb, argv, {*table.kinds(verb), *(f"no_{name}" for name in table.OF_TRAIN)})
    return str(caught.value)


@pytest.mark.parametrize("verb", ["train", "plan", "check-data", "preview", "bench"])
def test_no_verb_takes_a_number_that_is_none(verb):
    """One message names every flag."""
    for word in ("nan", "inf", "-1e30", "1e400", "x"):
        said = refused(verb, *(part for name in NUMBERS for part in (f"--{name}", word)))
        assert [name for name in NUMBERS if f"--{name} is {word}, must" not in said] == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--seed", "-1"], "--seed is -1, must not be negative"),
        (["--seed", str(2**32)], "--seed is 4294967296, must be at most 4,294,967,295"),
        (["--adam_beta2", "1.0"], "--adam_beta2 is 1.0, must be below 1"),
        (["--adam_epsilon", "0"], "--adam_epsilon is 0, must be more than 0"),
        (["--learning_rate", "nan"], "--learning_rate is nan, must be a finite number"),
        (["--lora_rank", "1000000000000"], "must be at most 65,536"),
        (["--dataloader_prefetch_factor", "0"], "--dataloader_prefetch_factor is 0, must be at least 1"),
        (["--dataloader_prefetch_factor", "2", "--dataloader_num_workers", "0"], "has no effect without loader"),
        (["--nframes", "5"], "--nframes is 5, must be even"),
        (["--image_min_pixels", "9000", "--image_max_pixels", "8000"], "--image_min_pixels 9000 is above"),
        (["--save_steps", "1.5"], "must be a whole number of steps, or a share below 1"),
        (["--optim", "adamw_torch_xla"], "is for TPUs, and vlft trains on CUDA devices and CPUs"),
        (["--optim", "muon"], "updates matrices only"),
        (["--optim", "grokadamw"], "keeps its moments where a resumed run does not find them"),
        (["--optim", "adagrad", "--deepspeed", "zero2"], "DeepSpeed makes a new Adagrad with one learning rate"),
        (["--optim", "sgd", "--optim_args", "nesterov=true"], "nesterov=true needs momentum above 0"),
        (["--neftune_noise_alpha", "5"], "noise on embeddings is not supported"),
        (["--optim", "galore_adamw"], "builds its own parameter groups"),
        (["--optim", "adamw"], "--optim adamw: is unknown; did you mean adamw_torch or adamw_torch_fused?"),
        (["--optim", "sgd", "--optim_args", "momentun=0.9"], "momentun has no effect"),
        (["--optim_args", "x"], "must be name=value"),
        (["--report_to", "wandbb"], "--report_to wandbb: is unknown; did you mean wandb?"),
        (["--report_to", ""], "--report_to is empty, must be one of none, all"),
        (["--model_id", ""], "--model_id is empty"),
        (["--metric_for_best_model", "bleu"], "--metric_for_best_model bleu: an evaluation has no such metric"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "needs one of min_lr and min_lr_rate"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "needs num_decay_steps"),
        (["--lr_scheduler_type", "polynomial", "--learning_rate", "1e-8"], "must be below --learning_rate 1e-08"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "follows evaluations: it needs --eval_path"),
        (["--lr_scheduler_kwargs", "zzz"], "must be a JSON object"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "power has no effect, --lr_scheduler_type linear does not take it"),
        (["--eval_on_start", "true"], "--eval_on_start true needs --eval_path"),
        (["--gradient_checkpointing", "maybe"], "must be one of auto, true, false"),
        (["--deepspeed", "zero9"], "neither a preset (zero1"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: no such file"),
        (["--output_dir", __file__], "is a file. Use a folder"),
        (["--output_dir", f"{__file__}/run"], "is a file, so it cannot contain a folder"),
        (["--fp16", "true"], "--fp16 true is not supported"),
        (["run.yaml"], "run.yaml belongs to no flag; did you mean --config run.yaml?"),
        (["--report_to", "tensorboard", "wandb"], "--report_to takes one value, not 2: tensorboard wandb"),
        (["--seed"], "--seed: a value is missing"),
        (["--model_id", "./nowhere"], "./nowhere: no such model folder (looked for /"),
    ],
)
def test_one_message_at_the_door(argv, says):
    assert says in refused("train", *argv)


def test_a_package_that_is_missing_is_named_by_every_verb(monkeypatch):
    monkeypatch.setattr("vlft.config.kinds._installed", lambda module: False)
    for verb in ("train", "plan", "check-data"):
        said = refused(verb, "--optim", "adamw_8bit", "--report_to", "wandb")
        assert (
            "--optim adamw_8bit: needs the package bitsandbytes, which is not installed: pip install bitsandb" in said
        )
        assert "--report_to wandb: needs the package wandb" in said
    monkeypatch.setattr("vlft.config.kinds._installed", lambda module: True)
    assert "bitsandbytes" not in refused("train", "--optim", "adamw_8bit")


def test_near_misses_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/Train.json", "data/images/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cases = {
        "data/train.json": "data/Train.json",
        "data/Train.jsonl": "data/Train.json",
        "data/Trian.json": "data/Train.json",
        "data/data/Train.json": "data/Train.json",
        "dta/Train.json": "data/Train.json",
    }
    for typed, meant in cases.items():
        assert f"--data_path {typed}: no such file. Did you mean {meant}?" in refused("plan", "--data_path", typed)
    assert "no such folder. Did you mean data/images?" in refused("check-data", "--image_folder", "data/image")
    assert f"{tmp_path.name}/data: no such folder. Did you mean data?" in refused(
        "train", "--image_folder", f"{tmp_path.name}/data"
    )
    assert "is not a folder" in refused("train", "--image_folder", "data/Train.json")
    assert f"(nowhere does not exist in {tmp_path})" in refused("preview", "nowhere/at/all.json")


# ---- flags of other kits

TWO_U1 = """
    --use_liger True --lora_enable True --vision_lora True --use_dora False --lora_rank 64 --lora_alpha 64
    --lora_dropout 0.05 --num_lora_modules -1 --deepspeed scripts/zero3.json --model_id Qwen/Qwen2-VL-2B-Instruct
    --data_path DATA --image_folder FOLDER --remove_unused_columns False --freeze_vision_tower True --freeze_llm True
    --freeze_merger True --bf16 True --fp16 False --disable_flash_attn2 False --output_dir output/lora --tf32 True
    --num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --image_min_pixels 200704
    --image_max_pixels 1003520 --learning_rate 2e-4 --weight_decay 0.1 --warmup_ratio 0.03 --save_total_limit 10
    --lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing True --report_to none --lazy_preprocess True
    --save_strategy steps --save_steps 200 --dataloader_num_workers 4 --bits 16 --max_seq_length 32768
"""


def said(argv):
    return read_line(argv, table.kinds("train"), others=False).values()


def ours(argv) -> str:
    told = translate(said(argv), table.kinds("train"))
    return " ".join(" ".join([f"--{name}", *words]) for name, words in told.flags.items())


def corrected(message: str) -> list[str]:
    """Return the command line at the end of a message."""
    import shlex

    command = message[message.index("    vlft train") :].partition("\n  All flags")[0].replace("\\\n", " ")
    return shlex.split(command)[2:]


@pytest.fixture
def old_line(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    put = {"DATA": str(tmp_path / "train.json"), "FOLDER": str(tmp_path)}
    words = [put.get(word, word) for word in TWO_U1.split()]
    return [*words, "--lora_namespan_exclude", "['lm_head', 'embed_tokens']"]


def test_a_line_of_qwen2_vl_finetune_is_answered_in_one_message(old_line):
    message = refused("train", *old_line)
    assert "They are flags of Qwen2-VL-Finetune" in message
    for before, after in {
        "--use_liger True": "--use_liger_kernel auto",
        "--deepspeed scripts/zero3.json": "--deepspeed zero3",
        "--warmup_ratio 0.03": "--warmup_steps 0.03",
        "--max_seq_length 32768": "--max_length 32768",
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 4": "--global_batch 16",
    }.items():
        assert [after in line for line in message.splitlines() if line.strip().startswith(before)] == [True], before
    idle = message.partition("no effect here:")[2].partition("the command for vlft")[0]
    for flag in (
        "use_dora False",
        "num_lora_modules -1",
        "bits 16",
        "disable_flash_attn2 False",
        "lazy_preprocess True",
    ):
        assert f"--{flag}" in idle
    argv = corrected(message)
    assert "--vision lora --merger lora --language lora" in " ".join(argv)
    passed = door.check("train", argv, KNOWN)
    assert passed.remarks == ""
    assert len(argv) > 50


def test_values_that_change_nothing_are_taken_with_a_remark(tmp_path, capsys):
    parser = RowParser("check-data")
    idle = ["--lazy_preprocess", "True", "--disable_flash_attn2", "False", "--trust_remote_code", "true"]
    parsed = parser.parse([*idle, "--remove_unused_columns", "False", "--language", "lora", "--lora_enable", "True"])
    assert parsed.given == {"language"}
    note = capsys.readouterr().err
    assert note.startswith("note: these flags have no effect here: --")
    assert "--lora_enable True (--language lora sets it)" in note
    assert note.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "becomes"),
    [
        ("--freeze_vision_tower False --vision_lora True", "--vision lora --merger lora"),
        ("--freeze_llm True --lora_enable True", "--vision full --merger full --language lora"),
        ("--freeze_llm False --lora_enable False --freeze_vision_tower True --freeze_merger False",
         "--vision frozen --merger full --language full"),
        ("--freeze_vision_tower True --freeze_merger True --freeze_llm True --lora_enable True",
         "--vision frozen --merger frozen --language lora"),
        ("--vision_lora True --lora_enable True --freeze_llm True --lora_namespan_exclude ['merger']",
         "--vision lora --merger full --language lora"),
        ("--freeze_llm True", "--language frozen"),
        ("--tune_merger True", "--merger full"),
        ("--disable_flash_attn2 True", "--attn sdpa"),
        ("--use_liger False", "--use_liger_kernel false"),
        ("--bits 4", "--bits 4"),
        ("--load_in_4bit true --bnb_4bit_quant_type fp4", "--bits 4 --quant_type fp4"),
        ("--qlora", "--bits 4 --language lora"),
        ("--unfreeze_topk_llm 8 --freeze_llm True", "--language full --language_blocks last:8"),
        ("--lr 1e-4 --epochs 2 --batch_size 8", "--learning_rate 1e-4 --num_train_epochs 2 --global_batch 8"),
        ("--evaluation_strategy epoch", "--eval_strategy epoch"),
        ("--stage sft --finetuning_type full --template qwen2_vl",
         "--vision frozen --merger frozen --language full"),
        ("--stage sft --finetuning_type lora --template qwen2_vl --freeze_vision_tower false",
         "--vision lora --merger frozen --language lora"),
        ("--stage sft --template qwen2_vl --cutoff_len 100 --lora_target q_proj,k_proj,v_proj,o_proj",
         "--max_length 100 --lora_target attention"),
        ("--train_type lora --freeze_vit false --model m --torch_dtype bfloat16",
         "--vision lora --merger frozen --language lora --model_id m --bf16 true"),
        ("--tuner_type full --vit_lr 1e-6 --aligner_lr 1e-5 --freeze_aligner false",
         "--vision frozen --merger full --language full --vision_lr 1e-6 --merger_lr 1e-5"),
        ("--base_model m --sequence_len 10 --num_epochs 3 --lora_r 8 --adapter lora --lora_target_linear true",
         "--model_id m --max_length 10 --num_train_epochs 3 --lora_rank 8 --vision lora --merger lora --language lora"),
        ("--base_model m --sequence_len 10 --optimizer adamw_torch",
         "--model_id m --vision full --merger full --language full --max_length 10 --optim adamw_torch"),
        ("--model_name_or_path m --dataset_name a.json --use_peft true --lora_r 8",
         "--model_id m --data_path a.json --language lora --lora_rank 8"),
        ("--deepspeed examples/ds_z2_offload_config.json", "--deepspeed zero2_offload"),
    ],
)  # fmt: skip
def test_a_flag_of_another_kit_by_its_value(argv, becomes):
    assert sorted(ours(argv.split()).split(" --")) == sorted(becomes.split(" --"))


def test_yaml_files_of_other_kits(tmp_path, monkeypatch):
    """LLaMA-Factory's data sets are looked up, ms-swift's environment is read, axolotl's nested entries are read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.json").write_text("[]")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}))
    (tmp_path / "lf.yaml").write_text(
        "model_name_or_path: Qwen/Qwen2-VL-2B-Instruct\nstage: sft\ndo_train: true\nfinetuning_type: lora\n"
        "dataset: mine\ndataset_dir: data\ntemplate: qwen2_vl\ncutoff_len: 2048\nresume_from_checkpoint: null\n"
        "quantization_bit: 4\nval_size: 0.1\neval_strategy: steps\noutput_dir: saves\nwarmup_ratio: 0.1\n"
    )
    message = refused("train", "--config", "lf.yaml")
    assert "They are flags of LLaMA-Factory" in message
    assert "--quantization_bit 4" in message.partition("the command for")[0]
    argv = corrected(message)
    assert argv[argv.index("--bits") + 1] == "4"
    assert argv[argv.index("--data_path") + 1] == "data/mine.json"
    assert door.check("train", argv, KNOWN).given >= {"eval_split", "eval_strategy", "max_length"}

    monkeypatch.setenv("MAX_PIXELS", "602112")
    (tmp_path / "swift.yaml").write_text(
        "model: m\ntrain_type: lora\ndataset: ['data/mine.json#50']\nfreeze_vit: true\n"
    )
    message = refused("train", "--config", "swift.yaml")
    assert "--data_path data/mine.json" in message
    assert "#N takes N rows" in message
    assert "--image_max_pixels 602112" in message

    (tmp_path / "ax.yaml").write_text(
        "base_model: m\nsequence_len: 8\nlora_r: 4\nadapter: qlora\nbf16: auto\n"
        "datasets:\n  - path: data/mine.json\n    type: x\n"
    )
    message = refused("train", "--config", "ax.yaml")
    assert "--data_path data/mine.json" in message
    argv = corrected(message)
    assert argv[argv.index("--bits") + 1] == "4"
    assert argv[argv.index("--language") + 1] == "lora"


def test_hints_by_spelling_only_for_slips():
    assert "did you mean --learning_rate?" in refused("train", "--learnin_rate", "1")
    assert "did you mean" not in refused("train", "--colour_depth", "1")
    assert "--eval_steps" not in refused("train", "--val_size", "0.1").partition("the command for")[0]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("sft", "vlft train"), ("webui", "vlft chat"), ("api", "serve OUT"), ("export", "vlft merge RUN OUT"),
     ("infer", "vlft chat"), ("evaluate", "vlft eval"), ("Fine_Tune", "vlft train")],
)  # fmt: skip
def test_commands_of_other_kits(capsys, typed, meant):
    assert main([typed]) == 2
    assert meant in capsys.readouterr().err.partition("\n")[2]


# ---- what it costs


def test_wrong_yaml_and_paths_are_told_at_once_and_load_nothing(tmp_path):
    if not help._holds():
        pytest.skip("the stored flags are those of another transformers; then flags are checked after its import")
    (tmp_path / "bad.yaml").write_text("learning_rate: abc\nsed: 3\nlora_rank: 0\ndata_path: [nope.json]\n")
    (tmp_path / "range.yaml").write_text("learning_rate: .nan\ndata_path: [nope.json]\n")
    script = f"""if True:
        import sys, time
        start = time.process_time()
        from vlft.cli.main import main
        for verb in ("train", "plan", "check-data"):
            for name in ("bad", "range"):
                print(main([verb, "--config", r"{tmp_path}/" + name + ".yaml"]))
        print(time.process_time() - start)
        print(*{{name.split('.')[0] for name in sys.modules}} - set(sys.stdlib_module_names))"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    *statuses, seconds, modules = done.stdout.splitlines()
    assert statuses == ["2", "1"] * 3
    assert float(seconds) < 1, "all six together"
    assert not set(modules.split()) & {"torch", "transformers", "peft", "numpy", "PIL"}
    for says in ("learning_rate (in ", "is abc, must be a number", "yaml); did you mean --seed?"):
        assert done.stderr.count(says) >= 3
    assert done.stderr.count("nope.json: no such file") == 6


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("vision: lora\n  merger: lora\n", ", line 2: 'merger: lora' is not indented as the lines around it"),
        ("  vision: lora\nmerger: lora\n", ", line 1: 'vision: lora' is not indented as the lines around it"),
        ("vision: lora\n\tmerger: lora\n", ", line 2: 'merger: lora' contains a tab. Use spaces"),
        ("seed: 1\nlora_rank:8\nvision: lora\n", ", line 2: 'lora_rank:8' is not `name: value`"),
        ("seed: 1\nlora_rank = 8\nvision: lora\n", ", line 2: 'lora_rank = 8' is not `name: value`"),
        ("run_name: a: b\n", ", line 1: 'run_name: a: b' is not valid YAML (mapping values"),
        ("lora_rank: 8\nseed: 1\nlora-rank: 16\n", ": lora-rank is given twice, in lines 1 and 3: 8 and 16. Keep one"),
        ("seed: # later\n", "--seed (in my.yaml) is empty, must be a whole number"),
        ("sed: 3\n", "unknown flag --sed (in my.yaml); did you mean --seed?"),
        ("training:\n  seed: 1\n", "unknown flag --training (in my.yaml). Flags are not nested"),
        ("vision: no\n", "--vision (in my.yaml) is no, must be one of full, lora, frozen"),
        ("data_path: gone/a.json\n", "gone/a.json: no such file (gone does not exist in {here})"),
        ("data_path: a.json b.json\n", "For several write a list in YAML, [a.json, b.json]"),
        ("data_path: $HOME/a.json\n", "Only a shell replaces variables. Did you mean {here}/a.json?"),
    ],
)
def test_mistakes_in_a_yaml(tmp_path, monkeypatch, yaml, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    Path("my.yaml").write_text(yaml)
    assert says.format(here=tmp_path) in refused("plan", "--config", "my.yaml")


def test_paths_and_words_of_a_yaml(tmp_path, monkeypatch):
    """`~` is the home folder, `no` is a word, `null` is the default, and a path beside the YAML is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "settings"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.json").write_text("[]")
    Path("my.yaml").write_text(
        "model_id: m\ndata_path: ~/home.json\nsave_strategy: no\nseed: null\noutput_dir: ~/run\n"
    )
    passed = door.check("train", ["--config", "my.yaml"], table.kinds("train"))
    words = dict(zip(passed.argv[::2], passed.argv[1::2], strict=True))
    assert words == {
        "--model_id": "m",
        "--data_path": str(tmp_path / "home" / "home.json"),
        "--save_strategy": "no",
        "--output_dir": str(tmp_path / "home" / "run"),
    }
    Path("settings/a.yaml").write_text("data_path: settings.json\n")
    message = refused("plan", "--config", "settings/a.yaml")
    assert (
        "Paths are relative to the working directory, also in a YAML. Did you mean settings/settings.json?" in message
    )


def test_near_misses_of_the_files_that_rows_name(tmp_path, monkeypatch):
    from vlft.data.media.pictures import Unreadable, require_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "Cat.JPG").touch()
    for named in ("images/cat.jpg", "images/Cat.png", "images/images/Cat.JPG"):
        with pytest.raises(Unreadable, match=r"no such file\. Did you mean images/Cat\.JPG\? Put it there, or correct"):
            require_file(named)
    with pytest.raises(Unreadable, match=r"dog\.jpg: no such file\. Put it there"):
        require_file("images/dog.jpg")
