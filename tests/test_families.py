"""Families: refused types, sizes, and Qwen3-VL everywhere, without code for it outside its record."""

from __future__ import annotations

import ast
import dataclasses
import json

import pytest
import rooms
import torch
from build import row, write_json
from models import PRESETS, assert_close, assert_same_step, build, flat_inputs, gradients, stock_loss
from torch.utils.flop_counter import FlopCounterMode

from vlft.cli.main import main
from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.errors import CheckpointError, ConfigError
from vlft.families import DEFAULT, FAMILIES, REFUSED, Family
from vlft.model import adapt, attention, flops, segments, towers
from vlft.model.apply import apply_towers
from vlft.model.load import empty_model, load_base, load_config, load_processor

FULL, LORA = PRESETS["full"], PRESETS["vision-lora"]


SECOND = FAMILIES["qwen3_vl"]


@pytest.fixture(scope="module")
def base(base_of):
    return base_of(SECOND)


@pytest.fixture(scope="module")
def data(tmp_path_factory, media):
    rows = [
        row("<image>\nWhat is it?", "A temple.", id="still", image="china.jpg"),
        row("<image><image>\nCompare.", "A flower and a face.", id="two", image=["flower.jpg", "astronaut.jpg"]),
        row("2+2?", "4", id="text"),
    ]
    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", rows)


@pytest.fixture(scope="module")
def encoded(base, data, media):
    from vlft.config.recipe import Recipe
    from vlft.config.row_flags import RowFlags
    from vlft.data.encode import Encoder
    from vlft.data.files.index import index_rows, parsed

    processor = load_processor(base)
    recipe = Recipe.of(processor, RowFlags(max_length=32768))
    encoder = Encoder(family=SECOND, processor=processor, recipe=recipe)
    samples = parsed(index_rows([str(data)], image_folder=str(media), family=SECOND)).samples
    return {sample.id: encoder.encode(sample) for sample in samples}


def inputs(rows) -> dict:
    return flat_inputs(rows, SECOND)


# ---- the record


def test_what_is_no_family_of_ours_says_so_and_why():
    assert Family.of("qwen2_vl") is DEFAULT
    for model_type, reason in REFUSED.items():
        with pytest.raises(CheckpointError) as refused:
            Family.of(model_type, where="here")
        assert f"here: model_type is '{model_type}', not a Qwen-VL model that this version trains ({reason})." in str(
            refused.value
        )
        assert "Supported: Qwen2-VL ('qwen2_vl')" in str(refused.value)
    for model_type in ("llama", None, ["qwen2_vl"]):
        with pytest.raises(CheckpointError, match=r"this version trains\. Supported"):
            Family.of(model_type)


def test_sizes_have_one_spelling(base):
    config, family = load_config(base)
    sizes = family.sizes(config)
    assert family is SECOND
    vision, text = dataclasses.asdict(sizes.vision), dataclasses.asdict(sizes.text)
    assert vision == {
        "depth": 3, "width": 32, "inner": 48, "mlp_linears": 2, "heads": 2, "out": 64, "channels": 3, "patch": 16,
        "merge": 2, "temporal": 2, "deepstack": (0, 1), "window": None, "full_blocks": (), "positions": 8,
        "tokens_per_second": None,
    }  # fmt: skip
    assert text.pop("layers") == ({"inner": 128, "recurrent": None, "experts": None},) * 3
    assert text == {
        "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "query_gate": False, "partial_rotary": False,
        "tied": True, "max_positions": 262144, "vocab": config.text_config.vocab_size,
    }  # fmt: skip
    assert SECOND.factor == 32


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda one: one.label)
def test_sizes_count_the_linear_layers_of_a_model(family):
    """Against the weights of every linear layer that a LoRA pattern matches."""
    config = tiny_config(tiny_processor(family), family)
    sizes, model = family.sizes(config), empty_model(config, family)
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {"vision": [], "merger": [], "language": []}
    for name, shape in shapes.items():
        if not name.endswith(("lm_head", "shared_expert_gate")):
            found[family.tower_of(name)].append(shape)
    expected = {
        "vision": sizes.vision.block * sizes.vision.depth,
        "merger": sizes.vision.merger * sizes.vision.mergers,
        "language": [one for layer in sizes.text.layers for one in sizes.text.linears(layer)],
    }
    for tower, linears in expected.items():
        assert sorted(found[tower]) == sorted((one.outputs, one.inputs) for one in linears), tower


@pytest.mark.parametrize(("part", "name", "value"), [("vision_config", "num_heads", 0), ("text_config", "head_dim", 0)])
def test_a_size_that_is_none_is_refused_by_name(part, name, value):
    config = tiny_config(tiny_processor(SECOND), SECOND)
    setattr(getattr(config, part), name, value)
    with pytest.raises(
        CheckpointError, match=rf"{name} in the {part} of its config.json is 0, expected a whole number"
    ):
        SECOND.sizes(config)


# ---- what trains


def trained(model) -> set[str]:
    return {
        towers.plain_name(name).replace(".modules_to_save.default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_a_tower_in_full_beside_lora_trains_all_of_it(base):
    for modes in ({"merger": "full"}, {"vision": "full"}, {"vision": "full", "merger": "full"}):
        asked = towers.Towers(**modes, language="lora", lora_rank=4)
        plain = load_base(base, SECOND)
        whole = {name for name, _ in plain.named_parameters() if asked.modes[SECOND.tower_of(name)] == "full"}
        assert any("deepstack_merger_list" in name for name in whole) == ("merger" in modes)
        model = apply_towers(plain, SECOND, asked, masters=True)
        assert {name for name in trained(model) if ".lora_" not in name} == whole


def test_lora_is_counted_in_every_merger(base):
    sizes = SECOND.sizes(load_config(base)[0])
    assert towers.lora_counts(sizes, LORA) == {"vision": 12, "merger": 6, "language": 21}
    attention_only = dataclasses.replace(LORA, lora_target="attention")
    assert towers.lora_counts(sizes, attention_only) == {"vision": 6, "merger": 6, "language": 12}
    for asked in (LORA, attention_only):
        apply_towers(load_base(base, SECOND), SECOND, asked, masters=True)  # counts what PEFT made


def _loose(model):
    model.model.visual.register_parameter("class_token", torch.nn.Parameter(torch.zeros(3)))


def _loose_in_a_list(model):
    model.model.visual.blocks.register_parameter("scale", torch.nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize("loosen", [_loose, _loose_in_a_list])
def test_a_parameter_that_no_module_can_hold_stops_the_run(loosen, base):
    """PEFT saves modules. A parameter outside them would not train, without a warning."""
    model = load_base(base, SECOND)
    loosen(model)
    asked = towers.Towers(vision="full", language="lora", lora_rank=4)
    with pytest.raises(
        ConfigError, match=r"1 parameters of a tower .* would not train: model\.visual\.(class_tok|blocks\.s)"
    ):
        apply_towers(model, SECOND, asked, masters=True)
    apply_towers(model, SECOND, FULL, masters=True)  # without an adapter it trains like all other parameters
    assert {name.rpartition(".")[2] for name in trained(model)} & {"class_token", "scale"}


def test_a_parameter_of_no_tower_stops_the_run(base):
    model = load_base(base, SECOND)
    model.model.register_parameter("ears", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ConfigError, match=r"a parameter model\.ears, which belongs to no tower of Qwen3-VL"):
        apply_towers(model, SECOND, FULL, masters=True)


# ---- what it computes


def test_a_merger_in_full_beside_lora_gets_the_stock_gradients(base, encoded):
    preset = "lora-full-merger"
    stock, ours = (build(base, preset, flat=flat, family=SECOND) for flat in (False, True))
    processor, rows = load_processor(base), list(encoded.values())
    assert_same_step(stock, ours, rows, processor, inputs(rows))
    assert any("deepstack_merger_list" in name for name in gradients(ours))
    bound, _ = stock_loss(ours, rows[1], processor)  # without cu_seqlens it is still the stock forward
    assert_close(bound, stock_loss(stock, rows[1], processor)[0], "stock way")


@pytest.mark.parametrize("preset", ["full", "vision-lora", "lora-full-merger"])
def test_a_step_does_the_required_operations(base, encoded, preset):
    model, batch = build(base, preset, flat=True, family=SECOND), inputs(list(encoded.values()))
    sizes = adapt.sizes_of(model)
    shape = {"lengths": batch["lengths"], "vision_lengths": batch["vision_lengths"]}
    want = flops.required_flops(sizes, PRESETS[preset], **shape, supervised=len(batch["targets"]), attention="full")
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops.total(want), rel=1e-3)


def test_attention_takes_its_heads_from_the_sizes(base, monkeypatch):
    handed = {}

    def choose(choice, heads, **_):
        handed[heads.causal] = heads
        return attention.Chosen(backend="sdpa")

    monkeypatch.setattr(attention, "choose_backend", choose)
    model = load_base(base, SECOND)
    assert attention.install(model, "sdpa", dtype=torch.float32) == {"language": "sdpa", "vision": "sdpa"}
    assert (handed[True].heads, handed[True].kv_heads, handed[True].head_dim) == (4, 2, 32)
    assert (handed[False].heads, handed[False].kv_heads, handed[False].head_dim) == (2, 2, 16)
    assert handed == {heads.causal: heads for heads in segments.heads_of(adapt.sizes_of(model)).values()}


# ---- the commands


def test_it_is_planned_trained_and_merged(base, data, media, tmp_path, capsys):
    flags = ["--model_id", base, "--data_path", data, "--image_folder", media, "--merger", "full", "--language", "lora"]
    flags = [*map(str, flags), "--dataloader_num_workers", "0"]
    assert main(["plan", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    merger = sum(p.numel() for n, p in load_base(base, SECOND).named_parameters() if SECOND.tower_of(n) == "merger")
    assert sum(g["parameters"] for g in planned["groups"] if g["name"].startswith("merger")) == merger
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["train", *flags, "--output_dir", str(run), "--max_steps", "1", "--report_to", "none"]) == 0
    capsys.readouterr()
    assert main(["merge", str(run), str(merged), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["towers"] == {"vision": "frozen", "merger": "full", "language": "lora"}
    before, after = (load_base(folder, SECOND).state_dict() for folder in (base, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if ".visual." in name} == {n for n in before if SECOND.tower_of(n) == "merger"}
    assert any("deepstack_merger_list" in name for name in changed)


# ---- the seam itself


def _of_one_family(source: str) -> list[str]:
    """Find what only families/ may use: a model type, a test for one, parts of a config, towers of a live model."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in {*FAMILIES, *REFUSED, "vision_config", "text_config"}:
            wrong.append(f"{node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr in ("vision_config", "text_config"):
            wrong.append(f"{node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Compare | ast.Match) and "model_type" in ast.unparse(node):
            wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


def test_no_module_outside_families_knows_a_family():
    wrong = [
        f"{module}:{line}"
        for module, file in rooms.modules().items()
        if rooms.room_of(module) != "families"
        for line in _of_one_family(file.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_only_adapt_touches_the_towers_of_a_live_model():
    inside = {"visual", "language_model", "embed_tokens", "pooler_output", "_attn_implementation_internal"}
    wrong = [
        f"{module}:{node.lineno}: .{node.attr}"
        for module, file in rooms.modules().items()
        if module != "vlft.model.adapt"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in inside
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        'Family.of("qwen2_vl")',
        "if config.model_type == word: pass",
        "depth = config.vision_config.depth",
        'text = getattr(config, "text_config")',
        "match model.config.model_type:\n    case _: pass",
    ],
)
def test_the_walk_sees_a_family(source):
    assert len(_of_one_family(source)) == 1
