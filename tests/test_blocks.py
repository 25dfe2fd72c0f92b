"""Chosen blocks (`--language_blocks`, `--vision_blocks`): what trains, and where the backward pass ends."""

from __future__ import annotations

import json

import pytest
import torch
from chosen_models import lora, prepared
from mixed_models import LOAD, PLAIN, mixed, real_step
from models import flat_inputs
from runs import FULL, arguments, losses, weights
from safetensors.torch import load_file

from vlft.cli.main import main
from vlft.config.blocks import as_text, places_of
from vlft.errors import ConfigError
from vlft.families import FAMILIES
from vlft.model import activations, chosen, flops, groups

MODELS = ("qwen2_vl", "qwen3_vl", "qwen3_5")
RATES = dict.fromkeys(("vision", "merger", "language"), 1e-3)


def trained_blocks(model, tower: str) -> set[int | None]:
    """Places of the blocks with a gradient, and None if something outside of blocks has one."""
    part = "visual." if tower == "vision" else "language_model."
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    return {
        chosen.place_of(name.removeprefix("base_model.model."), tower)
        for name in names
        if part in name and ".merger" not in name and "deepstack_merger" not in name
    }


def kept_by(model, batch) -> tuple[torch.Tensor, dict[str, set[int]]]:
    """The loss, and tower -> places of the blocks during whose forward autograd saves a tensor."""
    from vlft.model import adapt

    now: list[tuple[str, int]] = []
    found: dict[str, set[int]] = {"vision": set(), "language": set()}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if now:
            found[now[-1][0]].add(now[-1][1])
        return tensor

    handles = []
    for part in adapt.PARTS:
        for place, block in enumerate(adapt.blocks(model, part)):
            handles.append(block.register_forward_pre_hook(lambda *_, at=(part, place): now.append(at)))
            handles.append(block.register_forward_hook(lambda *_: now.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    return loss, found


@pytest.mark.parametrize("model_type", MODELS)
def test_only_the_chosen_blocks_get_gradients_and_none_before_them_keeps_a_graph(stock_of, model_type):
    opened = stock_of(model_type)
    sizes = opened.family.sizes(opened.model.config)
    last, end = len(sizes.text.layers) - 1, sizes.vision.depth - 1
    batch = flat_inputs([row.flat for row in opened.rows.values()], opened.family)
    cases = {
        lora(language_blocks=(last,)): ({last}, set()),
        lora(language="full", language_blocks=(last,)): ({last}, set()),
        lora(language="frozen", vision="lora", vision_blocks=(end,)): (set(), {end}),
        lora(vision="full", vision_blocks=(end,), language_blocks=(0, last)): ({0, last}, {end}),
    }
    whole = prepared(opened, lora())(**batch).loss.item()
    for towers, (language, vision) in cases.items():
        model = prepared(opened, towers)
        loss, kept = kept_by(model, batch)
        assert loss.item() == pytest.approx(whole, rel=1e-6)  # LoRA starts at zero
        loss.backward()
        assert (trained_blocks(model, "language"), trained_blocks(model, "vision")) == (language, vision)
        assert kept["vision"] == vision
        assert kept["language"] == (set(range(last + 1)) if vision else language)
        again = prepared(opened, towers, ("vision", "language"))
        again(**batch).loss.backward()
        theirs = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(theirs.pop(name), parameter.grad)
        assert not theirs


@pytest.mark.parametrize("model_type", MODELS)
def test_the_table_of_a_model_that_is_not_built_is_that_of_the_live_model(stock_of, model_type):
    opened = stock_of(model_type)
    sizes = opened.family.sizes(opened.model.config)
    for towers in (
        lora(vision="full", vision_blocks=(1,), language_blocks=(1,)),
        lora(language="full", language_blocks=(0,), vision="full", vision_blocks=(0,)),
        lora(vision="lora", vision_blocks=(0,), language_blocks=(1,), lora_target="attention", tokens=(5, 9)),
    ):
        live = groups.parameter_groups(prepared(opened, towers), opened.family, learning_rates=RATES, weight_decay=0.1)
        told = groups.groups_of_shapes(opened.family, sizes, towers, learning_rates=RATES, weight_decay=0.1)
        assert [one.as_json() for one in live] == [one.as_json() for one in told]
    shown = groups.table(told, chosen.described(towers, sizes))
    assert "language: LoRA in block 1 of" in shown
    assert "tokens: 2 rows of the embedding" in shown


@pytest.mark.parametrize("model_type", MODELS[:1])
def test_required_operations_are_those_that_torch_counts(stock_of, model_type):
    from torch.utils.flop_counter import FlopCounterMode

    opened = stock_of(model_type)
    rows = [row.flat for row in opened.rows.values()]
    batch = flat_inputs(rows, opened.family)
    for towers in (
        lora(language_blocks=(1,)),
        lora(language="full", language_blocks=(1,)),
        lora(language="full", language_blocks=(1,), vision="full", vision_blocks=(1,)),
        lora(language="frozen", vision="lora", vision_blocks=(1,)),
    ):
        with FlopCounterMode(display=False) as counter:
            prepared(opened, towers)(**batch).loss.backward()
        want = flops.required_flops(
            opened.family.sizes(opened.model.config),
            towers,
            lengths=batch["lengths"],
            vision_lengths=batch["vision_lengths"],
            supervised=len(batch["targets"]),
            attention="full",
        )
        assert counter.get_total_flops() == pytest.approx(flops.total(want), rel=1e-3), towers


@pytest.mark.parametrize(
    ("model_type", "language", "vision"),
    [
        pytest.param("qwen3_5", (1, 3), None, marks=pytest.mark.grid),
        ("qwen3_vl", (3,), (2, 3)),
    ],
)
def test_activations_are_what_a_real_step_saves(model_type, language, vision):
    family = FAMILIES[model_type]
    config = mixed(family)
    towers = lora(language_blocks=language, vision_blocks=vision, vision="lora" if vision else "frozen")
    saved = activations.Saved(config=config, family=family, towers=towers, load=LOAD, numbers=PLAIN, device="cpu")
    for checkpointed in ((), ("vision", "language")):
        real = real_step(config, family, towers, checkpointed)
        told = saved.estimate(checkpointed)
        for part in activations.PARTS:
            assert told.kept[part] == pytest.approx(real[part], rel=0.02, abs=2000), (part, checkpointed)


def test_a_choice_is_read_as_it_is_written():
    assert places_of("last:8", 28, flag="f") == tuple(range(20, 28))
    assert places_of("first:2, 5,7-9", 28, flag="f") == (0, 1, 5, 7, 8, 9)
    assert places_of("all", 28, flag="f") is None
    assert as_text((0, 1, 2, 3, 28)) == "0-3,28"
    for text, word in {
        "last:29": "28 blocks, 0 to 27", "28": "28 blocks", "0-28": "28 blocks", "3-1": "descends",
        "last:0": "no block",
        "2,2": "twice", "4,1": "after", "0-3,3": "twice", "first:2,1": "twice", "1,,2": "empty", "": "empty",
        "last": "no choice", "-1": "no choice", "last:1-2": "no choice", "1.5": "no choice", "²": "no choice",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=word):
            places_of(text, 28, flag="f")


def test_a_full_run_of_chosen_blocks_leaves_every_other_byte_of_the_base(train, base, mixed_json, media, tmp_path):
    more = ("--vision_blocks", "1", "--language_blocks", "last:1", "--max_steps", "2")
    run = train(*FULL[:2], "--merger", "frozen", *FULL[4:], *more)
    before, after = weights(base), weights(run)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(name.startswith(("visual.blocks.1.", "model.layers.1.")) for name in changed), changed
    assert json.loads((run / "vlft.json").read_text())["training"]["blocks"] == {"language": [1], "vision": [1]}
    whole = train(*FULL[:2], "--merger", "frozen", *FULL[4:], "--max_steps", "1", name="whole")
    assert losses(run)[0] == losses(whole)[0]


def test_lora_in_chosen_blocks_merges_and_starts_another_run(train, base, mixed_json, media, tmp_path, capsys):
    more = ("--vision", "full", "--language", "lora", "--vision_blocks", "1", "--language_blocks", "0")
    saving = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1", "--lora_rank", "4")
    run = train(*more, *saving, "--max_steps", "2", "--lora_dropout", "0")
    out = tmp_path / "merged"
    assert main(["merge", str(run), str(out)]) == 0
    before, after = load_file(next(base.glob("*.safetensors"))), load_file(next(out.glob("*.safetensors")))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[2] for name in changed if name.startswith("visual")} == {"1"}
    assert {name.split(".")[2] for name in changed if name.startswith("model")} == {"0"}
    assert all(name.startswith(("visual.blocks.", "model.layers.")) for name in changed)
    capsys.readouterr()
    # another run from the adapter: it decides the blocks
    second = train("--adapter", str(run), "--max_steps", "1", name="second")
    assert set(weights(second)) == set(weights(run))
    assert json.loads((second / "vlft.json").read_text())["training"]["blocks"] == {"language": [0], "vision": [1]}
    capsys.readouterr()
    again = ("--adapter", str(run), "--max_steps", "1")
    assert main(arguments(base, mixed_json, media, tmp_path / "third", *again, "--language_blocks", "1")) == 1
    assert "--language_blocks is 1, but the adapter" in capsys.readouterr().err
    assert main(arguments(base, mixed_json, media, tmp_path / "third", *again, "--train_tokens", "<|im_end|>")) == 1
    assert "trains no tokens" in capsys.readouterr().err
    # a resumed run must choose the same
    other = [*more[:-1], "1", *saving[:4], "--lora_rank", "4", "--max_steps", "3"]
    assert main(arguments(base, mixed_json, media, run, *other)) == 1
    assert "chosen blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--vision_blocks", "0"), ("--vision is frozen", "set --vision to full or lora")),
        (("--language_blocks", "last:3"), ("2 blocks, 0 to 1", "last:2")),
        (("--language_blocks", "1,0"), ("ascending",)),
        (("--language_blocks", "some"), ("no choice of blocks", "last:8")),
    ],
)
def test_a_choice_that_cannot_be_is_refused(base, mixed_json, media, tmp_path, capsys, flags, words):
    for verb in ("train", "plan"):
        line = arguments(base, mixed_json, media, tmp_path / "run", *flags)
        line = ["plan", *line[1:7], *flags] if verb == "plan" else line
        assert main(line) == 1, verb
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert not (tmp_path / "run").exists()


def test_a_plan_names_the_blocks(base, mixed_json, media, capsys):
    line = ["plan", "--model_id", str(base), "--data_path", str(mixed_json), "--image_folder", str(media)]
    more = ("--vision", "lora", "--vision_blocks", "1", "--language_blocks", "last:1")
    assert main([*line, *more]) == 0
    shown = capsys.readouterr().out
    assert "language: LoRA in block 1 of 2" in shown
    assert "vision: LoRA in block 1 of 2" in shown
    assert main([*line, *more, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == {"language": [1], "vision": [1]}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("vision_blocks: [0, 1]", "takes one value, not 2: 0 1. Write its parts as one value: '0-3,28'"),
        ('train_tokens: ["<a>", "<b>"]', "takes one value, not 2: <a> <b>. Write its parts as one value: '<x>,<y>'"),
    ],
)
def test_a_list_in_a_config_is_refused_with_the_way_to_write_it(line, says, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"{line}\n")
    assert main(["train", "--config", str(config)]) == 2
    assert says in capsys.readouterr().err
