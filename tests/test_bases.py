"""A base that cannot be used is refused by every verb, by name and with one message."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build import FAMILY, row, write_image, write_json
from published import rewrite_as_published
from runs import arguments

from vlft.cli.main import main
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.encode import Encoder
from vlft.data.sample import Sample, Text, Turn
from vlft.errors import CheckpointError, DataError
from vlft.model.load import load_processor
from vlft.model_files import slots_in

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def published(base, tmp_path_factory) -> Path:
    return rewrite_as_published(base, tmp_path_factory.mktemp("published") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A data file of one row with a picture beside it."""
    folder = tmp_path_factory.mktemp("rows")
    write_image(folder / "a.png")
    return write_json(folder / "rows.json", [row("<image>\nWhat?", "That.", image="a.png")])


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A language adapter of plain peft on the tiny base."""
    from adapters import LANGUAGE, save_adapter

    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=LANGUAGE)


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def holding(name: str, content: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def halved(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((whole := (folder / name).read_bytes())[: len(whole) // 2])


def setting(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        for key, value in values.items():
            outer, _, inner = key.partition("__")
            if inner:
                raw[outer][inner] = value
            else:
                raw[outer] = value
        (folder / name).write_text(json.dumps(raw))

    return change


def linked_to_nothing(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/0a1b")

    return change


def other_ids(folder: Path) -> None:
    """The tokenizer of a model in which the tokens of picture and video are swapped."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    of = {added["content"]: added for added in raw["added_tokens"]}
    one, two = of["<|image_pad|>"], of["<|video_pad|>"]
    one["id"], two["id"] = two["id"], one["id"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def lossy(folder: Path) -> None:
    """A tokenizer that has no token for the first byte of most accented letters."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    del raw["model"]["vocab"]["Ã"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4400000000\n"
QUANTISED = r"weights are quantised: config\.json has a quantization_config \({}\).*Use the unquantised model"

TINY: dict[str, tuple[Change, str]] = {
    "no tokenizer": (without("tokenizer.json"), r"tokenizer\.json, vocab\.json, merges\.txt missing"),
    "half a tokenizer": (halved("tokenizer.json"), r"tokenizer\.json: not JSON"),
    "pointer to a tokenizer": (holding("tokenizer.json", POINTER), r"tokenizer\.json: is a Git LFS pointer.*git lfs"),
    "link to no tokenizer": (linked_to_nothing("tokenizer.json"), r"tokenizer\.json is a link to \.\./\.\./blobs/0a1b"),
    "other ids": (other_ids, r"<\|image_pad\|> as token 269, image_token_id in config\.json is 268"),
    "lossy tokenizer": (lossy, r"its tokenizer loses text: .*Zürich.*comes back as .*Z"),
    "small embedding": (setting("config.json", text_config__vocab_size=256), r"270 tokens, .* 256 rows \(vocab_size"),
    "no processor": (without("processor_config.json"), r"neither preprocessor_config\.json nor processor_config\.json"),
    "no template": (without("chat_template.jinja"), "no chat template"),
    "half a template": (halved("chat_template.jinja"), r"template in chat_template\.jinja cannot be.*TemplateSyntax"),
    "a template that raises": (
        holding("chat_template.jinja", "{{ raise_exception('no pictures here') }}"),
        "cannot be rendered.*no pictures here",
    ),
    "a template without pictures": (
        holding("chat_template.jinja", "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"),
        r"leaves .* out of a conversation",
    ),
    "AWQ": (setting("config.json", quantization_config={"quant_method": "awq", "bits": 4}), QUANTISED.format("awq")),
    "FP8": (setting("config.json", quantization_config={"quant_method": "fp8"}), QUANTISED.format("fp8")),
    "old bitsandbytes": (
        setting("config.json", quantization_config={"load_in_4bit": True}, _name_or_path="me/Qwen2-VL-2B-bnb-4bit"),
        QUANTISED.format("bitsandbytes, 4 bits") + r", probably me/Qwen2-VL-2B\.",
    ),
    "quantised language model": (
        setting("config.json", text_config__quantization_config={"quant_method": "gptq"}),
        QUANTISED.format("gptq"),
    ),
    "GGUF": (lambda folder: (folder / "model.safetensors").rename(folder / "q4.gguf"), r"q4\.gguf: weights of llama"),
    "half the weights": (halved("model.safetensors"), r"has [\d,]+ bytes, its header promises [\d,]+"),
    "pointer to weights": (holding("model.safetensors", POINTER), r"model\.safetensors: is a Git LFS pointer"),
    "a page for weights": (holding("model.safetensors", "<!DOCTYPE html><p>Sign in"), "is a web page"),
    "no weights at all": (holding("model.safetensors", b""), r"model\.safetensors: is empty"),
    "link to no weights": (linked_to_nothing("model.safetensors"), r"a link to \.\./\.\./blobs/0a1b, which does"),
    "half a config": (halved("config.json"), r"config\.json: not JSON"),
    "a list for a config": (holding("config.json", "[]"), r"config\.json: holds a list"),
    "Latin-1": (holding("config.json", b'{"model_type": "\xe9"}'), r"config\.json: not JSON"),
    "no model type": (setting("config.json", model_type=None), r"model_type is None, not a Qwen-VL"),
    "several model types": (setting("config.json", model_type=["qwen2_vl"]), r"is \['qwen2_vl'\], not a Qwen-VL"),
    "a word for a size": (setting("config.json", text_config__hidden_size="64"), r"json: transformers does not"),
    "half a generation config": (halved("generation_config.json"), r"generation_config\.json: not JSON"),
    "an odd generation config": (
        setting("generation_config.json", max_new_tokens=-1),
        r"generation_config\.json: transformers does not accept it",
    ),
}  # fmt: skip
PUBLISHED: dict[str, tuple[Change, str]] = {
    "vocabulary alone": (without("tokenizer.json", "merges.txt"), r"tokenizer\.json, merges\.txt missing"),
    "other patches": (setting("preprocessor_config.json", patch_size=16), r"patch_size of its image processor is 16, "),
    "another kit's processor": (
        setting(
            "preprocessor_config.json", processor_class="LlavaProcessor", image_processor_type="CLIPImageProcessor"
        ),
        "LlavaProcessor has no video processor",
    ),
    "a shard less": (without("model-00002-of-00003.safetensors"), r"names 3 files, 1 of them .*: model-00002"),
    "half a shard": (halved("model-00002-of-00003.safetensors"), r"model-00002.*bytes, its header promises"),
    "half an index": (halved("model.safetensors.index.json"), r"index\.json: not JSON"),
}  # fmt: skip


def verbs(folder: Path, rows: Path, adapter: Path, out: Path) -> dict[str, list[str]]:
    """A command line of every verb that opens this base."""
    common = ["--model_id", str(folder), "--data_path", str(rows)]
    return {
        "train": arguments(folder, rows, rows.parent, out / "run"),
        "merge": ["merge", str(adapter), str(out / "merged"), "--base_model", str(folder)],
        "chat": ["chat", str(folder), "Hello?"],
        "plan": ["plan", *common],
        "check-data": ["check-data", *common],
        "preview": ["preview", str(rows), "--index", "0", *common[:2]],
    }


def refusals(lines: dict[str, list[str]], capsys) -> dict[str, str]:
    """The stderr of each verb; every verb must end with one message and status 1."""
    said = {}
    for verb, argv in lines.items():
        capsys.readouterr()
        assert main(argv) == 1, verb
        (said[verb],) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return said


@pytest.mark.parametrize("name", [*TINY, *PUBLISHED])
def test_a_broken_base_is_refused_at_every_door(name, base, published, rows, adapter, tmp_path, capsys):
    change, says = (TINY | PUBLISHED)[name]
    folder = Path(shutil.copytree(published if name in PUBLISHED else base, tmp_path / "broken"))
    change(folder)
    said = refusals(verbs(folder, rows, adapter, tmp_path), capsys)
    for message in said.values():
        assert re.search(says, message), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting("config.json", text_config=None), "tensors are missing for Qwen2VLForConditionalGeneration"),
        (
            setting("config.json", vision_config__mlp_ratio=2),
            r"fc1\.bias \(\[128\] in the files, \[64\] by config",
        ),
        (setting("config.json", text_config__num_attention_heads=5), "config.json describes no Qwen2VLFor"),
    ],
)
def test_a_config_of_another_size_is_refused_before_rows_are_read(change, says, base, rows, adapter, tmp_path, capsys):
    """transformers would make a random model of that size, and load the tensors that fit."""
    folder = Path(shutil.copytree(base, tmp_path / "broken"))
    change(folder)
    lines = verbs(folder, rows, adapter, tmp_path)
    for message in refusals({verb: lines[verb] for verb in ("train", "merge", "chat", "plan")}, capsys).values():
        assert re.search(says, message), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_folders_that_are_no_model_name_the_one_that_is(base, rows, adapter, tmp_path, capsys):
    snapshot = Path(shutil.copytree(base, tmp_path / "models--me--x" / "snapshots" / ("0" * 40)))
    above = adapter.parent
    lines = verbs(snapshot.parent.parent, rows, adapter, tmp_path)
    assert all(f"Give the snapshot in it, {snapshot}." in said for said in refusals(lines, capsys).values())
    of_adapter = verbs(adapter, rows, adapter, tmp_path)
    del of_adapter["chat"]  # which takes adapters
    assert all(f"Give its base, '{base}'" in said for said in refusals(of_adapter, capsys).values())
    for argv in (["chat", str(above), "Hi."], ["merge", str(above), str(tmp_path / "merged")]):
        assert f"an adapter in {adapter}" in refusals({"": argv}, capsys)[""]


def test_a_tokenizer_of_vocabulary_and_merges_is_a_tokenizer(published, tmp_path):
    folder = Path(shutil.copytree(published, tmp_path / "old"))
    (folder / "tokenizer.json").unlink()
    text = "Ångström <|im_end|>\n"
    assert load_processor(folder).tokenizer(text).input_ids == load_processor(published).tokenizer(text).input_ids


def test_a_header_says_what_safetensors_says(base):
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", framework="pt") as file:
        wanted = {n: (tuple((t := file.get_slice(n)).get_shape()), t.get_dtype()) for n in file.keys()}  # noqa: SIM118
    assert {name: (slot.shape, slot.dtype) for name, slot in slots_in(base / "model.safetensors").items()} == wanted
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        slots_in(base / "chat_template.jinja")


def test_a_row_that_the_template_refuses_is_a_bad_row_that_can_leave_a_worker(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "strict"))
    template = (folder / "chat_template.jinja").read_text()
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(strict + template)
    processor = load_processor(folder)
    recipe = Recipe.of(processor, RowFlags(max_length=999))
    encoder = Encoder(family=FAMILY, processor=processor, recipe=recipe)
    turns = tuple(
        Turn(role=role, parts=(Text(text="Hi."),), field=f"conversations[{k}]")  # type: ignore[arg-type]
        for k, role in enumerate(("system", "user", "assistant"))
    )
    with pytest.raises(DataError, match=r"d\.json\[3\]\.conversations.*refuses this.*no system turns") as caught:
        encoder.measure(Sample(file="d.json", index=3, id=None, turns=turns))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
