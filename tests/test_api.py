"""The public functions: their names and signatures, the cost of `import vlft`, and a loop that trains exactly as
`vlft train` does. Types are in tests/typed.py, which mypy reads."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build import row, write_image, write_json

import vlft
from vlft import api
from vlft.api.keywords import TAKES
from vlft.cli.main import main
from vlft.config import table
from vlft.errors import CheckpointError, ConfigError, DataError, UsageError, VlftError

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "examples" / "guides" / "python.md").read_text(encoding="utf-8")
#: The public names, frozen: a change here breaks users' scripts.
PUBLIC = {
    "open_base": "(model_id, *, model_revision=None, **flags)",
    "load_rows": "(base, data_path=None, *, image_folder=None, **flags)",
    "data_loader": "(base, rows, *, global_batch=None, shuffle=True, **flags)",
    "load_model": "(base, *, vision='frozen', merger='frozen', language='lora', **flags)",
    "parameter_groups": "(base, model, *, learning_rate=None, **flags)",
    "preview_row": "(base, rows, index)",
    "save_model": "(base, model, folder)",
    "evaluate": "(model, data_path=None, *, held_out=False, metrics=None, labels=None, compare=(), image_folder=None, "
    "columns=None, missing_tags='error', box_format=None, on_bad_row='error', allow_outside_folder=False, "
    "allow_remote_media=False, "
    "batch=8, max_new_tokens=None, limit=None, out=None, thinking='auto', base_model=None, device=None)",
    "Base": "(*, opened, flags)",
    "Rows": "(*, measured, base, flags)",
    "Loader": "(rows, batches, *, on_bad_row)",
}
MOST = 256 * 28 * 28
LIGHT = {"use_cpu": True, "image_max_pixels": MOST, "pack_tokens": 400}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'numpy', 'peft', 'PIL', 'yaml', 'vlft.api'}"
    assert python(
        f"import sys, vlft; print(sorted({heavy} & set(sys.modules)), set(vlft.__all__) <= set(dir(vlft)))"
    ) == ("[] True\n")


def test_names_and_signatures():
    assert set(vlft.__all__) == {*PUBLIC, "__version__"}
    for name, wanted in PUBLIC.items():
        signature = inspect.signature(getattr(vlft, name))
        bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == wanted, name
        assert getattr(vlft, name) is getattr(api, name)
        assert getattr(vlft, name).__doc__
    with pytest.raises(AttributeError, match="'vlft' has no attribute 'open_bases'"):
        _ = vlft.open_bases
    assert (ROOT / "vlft" / "py.typed").is_file()


def test_defaults_are_those_of_the_flags():
    from vlft.config.flags import ModelFlags

    for name, parameter in inspect.signature(vlft.load_model).parameters.items():
        if name in table.MODEL:
            assert parameter.default == getattr(ModelFlags, name)


def test_every_flag_of_data_and_model_has_its_function():
    of = {name: [function for function, takes in TAKES.items() if name in takes] for name in table.OF_TRAIN}
    assert [name for name in table.DATA | table.MODEL if not of[name] and name not in ("eval_path", "eval_split")] == []
    assert set().union(*TAKES.values()) <= set(table.OF_TRAIN)
    shared = {name for name, functions in of.items() if len(functions) > 1}
    assert shared == {"seed", "dataloader_num_workers"}


@pytest.fixture(scope="module")
def opened(base) -> vlft.Base:
    return vlft.open_base(base, **LIGHT)


@pytest.fixture(scope="module")
def demo(opened) -> vlft.Rows:
    media = ROOT / "data" / "media"
    return vlft.load_rows(opened, ROOT / "data" / "demo.json", image_folder=media, dataloader_num_workers=0)


@pytest.mark.parametrize(
    "choices",
    [
        {"vision": "lora", "merger": "lora", "language": "lora", "lora_dropout": 0},
        {"merger": "full", "lora_dropout": 0, "bf16": True},
    ],
    ids=["lora", "lora-and-full-bf16"],
)
def test_a_loop_trains_what_vlft_train_trains(choices, base, opened, demo, tmp_path, capsys):
    """The loss is the same at each step, and the adapters at the end are equal byte for byte."""
    loader = vlft.data_loader(opened, demo, global_batch=4, dataloader_num_workers=0)
    assert (loader.steps, loader.accumulation, len(loader)) == (4, 2, 8)
    model = vlft.load_model(opened, **choices)
    assert model.training
    optimizer = torch.optim.AdamW(
        vlft.parameter_groups(opened, model, learning_rate=1e-3, weight_decay=0.1), fused=True
    )
    losses: list[float] = []
    for place, batch in enumerate(loader, 1):
        loss = model(**batch).loss
        loss.backward()
        if (place - 1) % loader.accumulation == 0:
            losses.append(0.0)
        losses[-1] += loss.item()
        if place % loader.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    vlft.save_model(opened, model, tmp_path / "mine")

    flags = {
        **{"model_id": base, "data_path": ROOT / "data/demo.json", "image_folder": ROOT / "data/media"},
        **{"output_dir": tmp_path / "run", "global_batch": 4, "learning_rate": 1e-3, "weight_decay": 0.1},
        **{"lr_scheduler_type": "constant", "num_train_epochs": 1, "save_strategy": "no", "dataloader_num_workers": 0},
        **LIGHT,
        **choices,
    }
    words = [str(word).lower() if isinstance(word, bool) else str(word) for word in flags.values()]
    assert (
        main(["train", *(part for name, word in zip(flags, words, strict=True) for part in (f"--{name}", word))]) == 0
    )
    logged = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(logged, rel=1e-6)
    for name in ("adapter_model.safetensors", "chat_template.jinja", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    assert not (tmp_path / "mine" / "README.md").exists()


def test_a_rate_of_a_frozen_tower_is_refused(opened):
    with pytest.raises(ConfigError, match=r"^parameter_groups\(\): vision_lr 0\.1 has no effect: vision is frozen"):
        vlft.parameter_groups(opened, vlft.load_model(opened), vision_lr=0.1)


def test_an_adapter_is_merged_and_read_by_plain_peft(base, opened, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = vlft.load_model(opened)
    vlft.save_model(opened, model, tmp_path / "mine")
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "mine")
    ours = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    theirs = plain.state_dict()
    assert len(ours) > 10
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_whole_model_is_read_by_plain_transformers(base, opened, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = vlft.load_model(opened, vision="full", merger="full", language="full")
    vlft.save_model(opened, model, tmp_path / "mine")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "mine", dtype="auto").state_dict()
    stored = AutoModelForImageTextToText.from_pretrained(base, dtype="auto").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in stored.items())


def test_evaluation_takes_each_row_once_in_its_place(opened, demo):
    loader = vlft.data_loader(opened, demo, shuffle=False, dataloader_num_workers=0)
    rows = [index for batch in loader for _, index in batch["rows"]]
    assert sorted(rows) == list(range(13))
    assert rows == [index for batch in loader for _, index in batch["rows"]]
    training = vlft.data_loader(opened, demo, seed=1, dataloader_num_workers=0)
    first, second = ([index for batch in training for _, index in batch["rows"]] for _ in range(2))
    assert first != second, "a pass is the next epoch"
    training.set_epoch(0)
    assert first == [index for batch in training for _, index in batch["rows"]]


def test_other_calls_go_to_the_stock_model(opened):
    model = vlft.load_model(opened).eval()
    asked = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = opened.processor.apply_chat_template(asked, **options)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_rows_that_are_refused(opened, tmp_path, caplog):
    write_image(tmp_path / "a.jpg")
    rows = [row("<image>What?", "A temple.", image="a.jpg"), row("<image>What?", "No.", image="b.jpg")]
    file = write_json(tmp_path / "two.json", rows)
    with pytest.raises(ConfigError, match=r"1 of 2 rows cannot be trained:\n.*two\.json\[1\]\.image"):
        vlft.load_rows(opened, file, dataloader_num_workers=0)
    some = vlft.load_rows(opened, [str(file)], on_bad_row="skip", dataloader_num_workers=0)
    assert "1 of 2 rows are skipped, the first is" in caplog.text
    assert (len(some), [one.index for one in some.skipped], some[0].index) == (1, [1], 0)
    assert "⟦A temple.<|im_end|>⟧" in vlft.preview_row(opened, some, 0)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_row_that_breaks_after_it_was_measured(policy, opened, tmp_path, caplog):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.jpg")
    rows = [row("<image>What?", "A temple.", image=f"{name}.jpg") for name in ("a", "b")]
    measured = vlft.load_rows(opened, write_json(tmp_path / "two.json", rows), on_bad_row=policy)
    loader = vlft.data_loader(opened, measured, dataloader_num_workers=0, shuffle=False)
    write_image(tmp_path / "b.jpg", 300, 300)  # a different number of tokens than measured
    if policy == "error":
        with pytest.raises(DataError, match=r"two\.json\[1\]\.image.*changed since it was measured"):
            list(loader)
    else:
        [batch] = list(loader)
        assert batch["num_items_in_batch"] == batch["counts"]["supervised_tokens"] > 0
        assert [one.index for one in loader.skipped] == [1]
        assert "skipped " in caplog.text


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda base, rows: vlft.open_base(""), ConfigError, "model_id is empty"),
        (lambda base, rows: vlft.open_base("./nowhere"), ConfigError, "nowhere: no such model folder"),
        (
            lambda base, rows: vlft.open_base("x", image_max_pixles=1),
            UsageError,
            r"open_base\(\): unknown flag image_max_pixles; did you mean image_max_pixels\?",
        ),
        (
            lambda base, rows: vlft.open_base("x", max_pixels=3),
            UsageError,
            r"open_base\(\): max_pixels is image_max_pixels=3 here$",
        ),
        (lambda base, rows: vlft.open_base("x", fps=-1), ConfigError, "fps is -1, must be more than 0"),
        (lambda base, rows: vlft.open_base("x", nframes=5), ConfigError, "nframes is 5, must be even"),
        (lambda base, rows: vlft.open_base("x", fps={}), UsageError, r"open_base\(\): fps is \{\}, must be a text"),
        (lambda base, rows: vlft.open_base("x", fps=1, nframes=2), ConfigError, r"fps 1(\.0)? and nframes 2 both"),
        (
            lambda base, rows: vlft.open_base("x", vision="lora"),
            UsageError,
            r"open_base\(\): vision belongs to load_model\(\)$",
        ),
        (
            lambda base, rows: vlft.open_base("x", save_steps=5),
            UsageError,
            "save_steps has no effect in your own loop",
        ),
        (lambda base, rows: vlft.load_rows(base), ConfigError, "data_path is missing"),
        (lambda base, rows: vlft.load_rows(base, "no.json"), ConfigError, "data_path no.json: no such file"),
        (lambda base, rows: vlft.load_model(base, vision="lorra"), UsageError, "vision is lorra, must be one of"),
        (
            lambda base, rows: vlft.load_model(base, vision="frozen", language="frozen"),
            ConfigError,
            "nothing would be trained",
        ),
        (
            lambda base, rows: vlft.load_model(base, language="full", lora_rank=4),
            ConfigError,
            "lora_rank is given, but no tower is lora",
        ),
        (lambda base, rows: vlft.load_model(base, attn="flash_attn"), VlftError, "flash_attn"),
        (
            lambda base, rows: vlft.data_loader(base, rows, per_device_train_batch_size=2),
            ConfigError,
            "has no effect: with packing a micro-batch is one pack",
        ),
        (
            lambda base, rows: vlft.data_loader(base, rows, global_batch=4, gradient_accumulation_steps=2),
            ConfigError,
            "both set how large a step is",
        ),
        (
            lambda base, rows: vlft.data_loader(base, rows, shuffle=False, global_batch=4),
            ConfigError,
            r"data_loader\(\): global_batch has no effect with shuffle=False",
        ),
        (
            lambda base, rows: vlft.data_loader(base, rows, per_device_eval_batch_size=1),
            ConfigError,
            "per_device_eval_batch_size has no effect with shuffle=True",
        ),
        (lambda base, rows: vlft.open_base(ROOT), CheckpointError, "config.json"),
        (lambda base, rows: vlft.open_base("x", config="a.yaml"), UsageError, r"open_base\(\): unknown flag config$"),
        (lambda base, rows: vlft.load_rows(base, "x", help=True), UsageError, r"load_rows\(\): unknown flag help$"),
        (
            lambda base, rows: vlft.load_model(base, no_bf16=True),
            UsageError,
            r"load_model\(\): unknown flag no_bf16$",
        ),
        (
            lambda base, rows: vlft.open_base("x", min_pixels=4, save_steps=5, fpss=1),
            UsageError,
            r"image_min_pixels=4 here; save_steps has no effect in .* loop; unknown flag fpss; did you mean fps\?",
        ),
        (lambda base, rows: vlft.data_loader(base, rows, shuffle=1), UsageError, "shuffle is 1, must be True or False"),
        (lambda base, rows: vlft.data_loader(base, rows[:0]), ConfigError, "rows is empty"),
    ],
)
def test_what_is_refused(call, error, says, opened, demo):
    with pytest.raises(error, match=says) as caught:
        call(opened, demo)
    text = str(caught.value)
    assert re.match(r"(open_base|load_rows|data_loader|load_model)\(\)", text)
    assert not re.search(r"--[a-z]|vlft (preview|train)", text)


@pytest.fixture(scope="module")
def adapted(opened):
    return vlft.load_model(opened, lora_rank=1)


def test_arguments_of_the_wrong_type(opened, demo, adapted):
    base, rows, model, plain = opened, demo, adapted, torch.nn.Linear(1, 1)
    from_base, from_rows, from_model = (
        f"pass what {name}() returns" for name in ("open_base", "load_rows", "load_model")
    )
    calls = [
        (lambda: vlft.load_rows("train.json"), [f"load_rows(): base is 'train.json' (a str), {from_base}"]),
        (lambda: vlft.load_model("x"), [f"load_model(): base is 'x' (a str), {from_base}"]),
        (lambda: vlft.load_model(rows), [f"base is a Rows, {from_base}"]),
        (lambda: vlft.load_model(None), [f"base is None, {from_base}"]),
        (lambda: vlft.data_loader(base, "train.json"), [f"rows is 'train.json' (a str), {from_rows}"]),
        (lambda: vlft.data_loader(base, [1]), [f"rows is [1] (a list), {from_rows}"]),
        (lambda: vlft.data_loader(rows, base), [f"base is a Rows, {from_base}; rows is a Base, {from_rows}"]),
        (lambda: vlft.preview_row(rows, base, 0), [f"preview_row(): base is a Rows, {from_base}", from_rows]),
        (lambda: vlft.parameter_groups(model, base), ["parameter_groups(): base is a Peft", from_base, from_model]),
        (lambda: vlft.parameter_groups(base, plain), [f"model is a Linear, {from_model}"]),
        (lambda: vlft.save_model(model, base, "x"), ["save_model(): base is a Peft", f"model is a Base, {from_model}"]),
        (lambda: vlft.save_model(base, torch.nn.Sequential(model), "x"), [f"{from_model} (its .0)"]),
    ]
    for call, says in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert all(part in str(caught.value) for part in says), str(caught.value)


def test_rows_and_models_stay_with_their_base(base, opened, demo, adapted, tmp_path):
    other = vlft.open_base(base, **LIGHT | {"image_max_pixels": 16 * 28 * 28})
    for call in (lambda: vlft.data_loader(other, demo), lambda: vlft.preview_row(other, demo, 0)):
        with pytest.raises(UsageError, match=r"^(data_loader|preview_row)\(\): the rows were loaded with another base"):
            call()
    assert len(vlft.data_loader(vlft.open_base(base, **LIGHT), demo, dataloader_num_workers=0)) > 0
    (tmp_path / "copy").mkdir()
    for file in base.iterdir():
        (tmp_path / "copy" / file.name).symlink_to(file)
    copy = vlft.open_base(tmp_path / "copy", **LIGHT)
    with pytest.raises(UsageError, match="the model was loaded from another base"):
        vlft.save_model(copy, adapted, tmp_path / "mine")


def test_rows_are_cut_and_counted(opened, demo):
    some = demo[3:12:4]
    assert isinstance(some, vlft.Rows)
    assert [one.index for one in some] == [demo[place].index for place in (3, 7, 11)]
    loader = vlft.data_loader(opened, some, shuffle=False, dataloader_num_workers=0)
    assert sorted(row for batch in loader for row in batch["rows"]) == sorted((one.file, one.index) for one in some)
    assert loader.skipped == []
    for call in (lambda: demo[99], lambda: demo[-14], lambda: vlft.preview_row(opened, demo, 99)):
        with pytest.raises(IndexError, match="there are 13 rows"):
            call()
    for call in (lambda: demo["0"], lambda: demo[None], lambda: demo[1.0], lambda: vlft.preview_row(opened, demo, "0")):
        with pytest.raises(TypeError, match="must be a whole number"):
            call()
    loader = vlft.data_loader(opened, some, dataloader_num_workers=0)
    for epoch in (-1, 1.5, "2", None, True):
        with pytest.raises(UsageError, match=r"set_epoch\(\): epoch is .*, must be a whole number of at least 0"):
            loader.set_epoch(epoch)


def test_a_batch_is_passed_as_keywords(opened, demo, adapted):
    batch = next(iter(vlft.data_loader(opened, demo, dataloader_num_workers=0)))
    for call in (lambda: adapted(batch), lambda: adapted()):
        with pytest.raises(TypeError, match=r"call model\(\*\*batch\) with a batch of data_loader\(\)"):
            call()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_save_model_spoils_no_other_model(base, opened, adapted, tmp_path):
    whole = vlft.load_model(opened, language="full")
    for name, model in (("adapter", adapted), ("whole", whole)):
        for _ in range(2):  # saving again is allowed
            vlft.save_model(opened, model, tmp_path / name)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vlft.json").write_text("{}")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "file").write_text("mine")
    for model, folder, says in [
        (whole, base, "is the folder of the base model"),
        (adapted, tmp_path / "link", "is the folder of the base model"),
        (whole, tmp_path / "adapter", "holds an adapter of .*, and a whole model of .* would be saved into it"),
        (adapted, tmp_path / "whole", "holds a whole model of .*, and an adapter of .* would be saved into it"),
        (adapted, tmp_path / "foreign", r"holds a model that save_model\(\) did not write \(adapter_config.json\)"),
        (adapted, tmp_path / "run", "holds a run"),
        (adapted, tmp_path / "file", "file: is a file. Choose a new or empty folder"),
        (adapted, tmp_path / "file" / "in", r"in: cannot be written \(Not a directory\). Choose a folder"),
        (adapted, "", "folder is '', must be the path of a folder"),
        (adapted, None, "folder is None, must be"),
        (adapted, 3, "folder is 3, must be"),
    ]:
        there = contents(tmp_path) | contents(base)
        with pytest.raises(ConfigError, match=rf"^save_model\(\): .*{says}"):
            vlft.save_model(opened, model, folder)
        assert there == contents(tmp_path) | contents(base)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "README.md").write_text("notes of my own")
    vlft.save_model(opened, adapted, tmp_path / "loop")
    assert (tmp_path / "loop" / "README.md").read_text() == "notes of my own"


# ---- the guide


@pytest.fixture
def here(tmp_path, monkeypatch, base) -> Path:
    """A folder with the files that the guide names."""
    monkeypatch.chdir(tmp_path)
    Path("Qwen").mkdir()
    Path("Qwen/Qwen2-VL-2B-Instruct").symlink_to(base)
    for name in ("train", "val"):
        write_image(Path("images") / f"{name}.jpg", 120, 90)
        rows = [row("<image>What?", "A temple.", image=f"{name}.jpg"), row("Hi.", "Hello.")]
        write_json(Path(f"{name}.json"), rows)
    return tmp_path


def test_the_code_of_the_guide_runs(here, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.M | re.S)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "examples/guides/python.md", "exec"), names)
    loop = next(block for block in blocks if ".backward()" in block)
    assert len([line for line in loop.splitlines() if line.strip() and "import" not in line]) <= 15
    assert Path("output/mine/adapter_model.safetensors").is_file()
    assert "⟦A temple." in capsys.readouterr().out
    assert main(["merge", "output/mine", "output/mine-merged"]) == 0


def test_the_guide_names_every_function_and_its_flags():
    """For flags of data and model the guide links to the page that lists them, so a new flag needs no line in it."""
    listed = {"open_base": set(table.DATA) | {"load_rows"}, "load_model": set(table.MODEL)}
    listed["load_model"] -= {"model_id", "model_revision"}
    lines = re.findall(r"^\| `(\w+)` \|.*?\|(.*)\|$", GUIDE, re.M)
    shown = {name: set(re.findall(r"`(\w+)`", flags)) for name, flags in lines}
    functions = [name for name in vlft.__all__ if inspect.isfunction(getattr(vlft, name))]
    assert set(shown) == set(functions)
    for name in functions:
        wanted = TAKES.get(name, frozenset()) - listed.get(name, set())
        assert shown[name] - listed.get(name, set()) == wanted, name
