"""Trained tokens (`--train_tokens`): rows of a frozen embedding and head, against plain peft, on disk and merged."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import transformers
from build import row, write_json
from chosen_models import lora, prepared
from models import flat_inputs, loss_of
from peft import LoraConfig, PeftModel, get_peft_model
from runs import losses, weights
from safetensors.torch import load_file, save_file
from stock_rows import opened

from vlft.cli.main import main
from vlft.demo.tiny import build_tiny
from vlft.families import FAMILIES
from vlft.model import chosen

NEW = ("<a>", "<b>")
QWEN2 = FAMILIES["qwen2_vl"]
EMBEDDING = "model.embed_tokens.weight"  # in published files of Qwen2-VL


def stock_adapter(model, family, tokens, *, tied: bool):
    """Plain peft with the same settings; every trained tensor filled by its name."""
    names = ["model.language_model.embed_tokens"] + ([] if tied else ["lm_head"])
    config = LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=family.lora_targets["language"],
        trainable_token_indices={name: list(tokens) for name in names},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def fill(model) -> None:
    """Give every trained tensor values that depend on its name alone."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return opened(build_tiny(tmp_path_factory.mktemp("untied"), QWEN2, tied=False), QWEN2)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "qwen3_5", "untied"])
def test_a_step_gives_the_rows_the_gradients_of_plain_peft(stock_of, untied, model_type):
    """Tokens that are read, predicted, and in no row. Also the log-probabilities, and with the adapter switched off."""
    one = untied if model_type == "untied" else stock_of(model_type)
    rows = [one.rows[name] for name in ("text", "picture", "video")]
    labels = rows[0].flat.labels_T
    tokens = tuple(sorted({int(rows[0].flat.input_ids_T[3]), int(labels[labels >= 0][1]), 7}))
    tied = one.family.sizes(one.model.config).text.tied
    theirs = stock_adapter(copy.deepcopy(one.model), one.family, tokens, tied=tied).train()
    ours = prepared(one, lora(tokens=tokens))
    fill(theirs)
    fill(ours)
    total = sum(loss_of(theirs(**each.stock).logits, each.flat.labels_T)[0] for each in rows)
    total.backward()
    batch = flat_inputs([each.flat for each in rows], one.family)
    ours(**batch).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    assert sum(chosen.TOKENS in name for name in found) == (1 if tied else 2)
    share = 1e-4 if "recurrent" in one.family.features else 1e-5  # its rule adds in another order than transformers'
    for name, gradient in wanted.items():
        most = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=share * max(1.0, most))
    ours.zero_grad()
    loss = -ours(**batch, return_log_probs=True).log_probs.sum()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, found[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), ours.disable_adapter():
        without = ours(**batch).loss
        base = sum(loss_of(one.model(**each.stock).logits, each.flat.labels_T)[0] for each in rows)
    torch.testing.assert_close(without, base, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # as `generate` calls it
        ids = rows[0].stock
        torch.testing.assert_close(ours.eval()(**ids).logits, theirs.eval()(**ids).logits, rtol=1e-4, atol=1e-4)


def test_rows_are_float32_masters_under_autocast(stock_of):
    one = stock_of("qwen2_vl")
    half = copy.copy(one)
    object.__setattr__(half, "model", copy.deepcopy(one.model).to(torch.bfloat16))
    model = prepared(half, lora(tokens=(5, 66)))
    batch = flat_inputs([one.rows["picture"].flat], one.family)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    (delta,) = [p for name, p in model.named_parameters() if chosen.TOKENS in name]
    assert delta.dtype == delta.grad.dtype == torch.float32
    assert float(delta.grad[1].abs().max()) > 0


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A base whose tokenizer has two more tokens, for which its embedding has rows."""
    folder = build_tiny(tmp_path_factory.mktemp("taught"), QWEN2)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(list(NEW))
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [row(f"Who is {token}?", f"{token} is here, {n}.") for n in range(4) for token in NEW]
    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", rows)


def line(base, data, out, *more: str) -> list[str]:
    return [
        *("train", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(out)),
        *("--learning_rate", "1e-2", "--lora_rank", "4", "--lora_dropout", "0", "--dataloader_num_workers", "0"),
        *("--packing", "false", "--gradient_accumulation_steps", "2", "--max_steps", "4", *more),
    ]


def ids_of(base) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return tokenizer.convert_tokens_to_ids(list(NEW))


def logits(model, base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return model(**tokenizer("Who is <a> and <b>?", return_tensors="pt")).logits


def test_a_run_resumes_is_read_by_plain_peft_merges_and_starts_another(taught, data, tmp_path, capsys):
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--train_tokens", "<a>,<b>")
    run = tmp_path / "run"
    assert main(line(taught, data, run, *saving)) == 0
    assert losses(run)[-1] < losses(run)[0]
    record = json.loads((run / "vlft.json").read_text())
    assert record["training"]["tokens"] == dict(zip(NEW, ids_of(taught), strict=True))
    # resumed from step 2: the same weights, bit by bit
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("checkpoint-4"))
    (again / "adapter_model.safetensors").unlink()
    state = json.loads((again / "vlft.json").read_text())
    state["training"]["finished"] = False
    (again / "vlft.json").write_text(json.dumps(state))
    assert main(line(taught, data, again, *saving, "--resume_from_checkpoint", str(again / "checkpoint-2"))) == 0
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(run).items())
    capsys.readouterr()
    # plain peft reads it; merged gives the same logits and changes two rows of the embedding
    stock = transformers.Qwen2VLForConditionalGeneration.from_pretrained(taught, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, str(run)).eval()
    wanted = logits(adapted, taught)
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    merged = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval(), taught), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), taught), wanted, rtol=1e-5, atol=1e-5)
    before, after = (load_file(folder / "model.safetensors")[EMBEDDING] for folder in (taught, tmp_path / "merged"))
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == ids_of(taught)
    assert merged.lm_head.weight is merged.model.language_model.embed_tokens.weight
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    # another run from it: the adapter decides, and its first loss is that of the end
    capsys.readouterr()
    second = line(taught, data, tmp_path / "second", "--adapter", str(run), "--max_steps", "1")
    assert main([word for n, word in enumerate(second) if "lora_rank" not in (word[2:], second[n - 1][2:])]) == 0
    assert "2 trained tokens" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "second" / "vlft.json").read_text())["training"]["tokens"]
        == record["training"]["tokens"]
    )
    assert main(line(taught, data, tmp_path / "third", "--adapter", str(run), "--train_tokens", "<a>")) == 1
    assert "--train_tokens is <a>, but the adapter" in capsys.readouterr().err
    # the tokens are part of the run
    assert (
        main(line(taught, data, run, "--train_tokens", "<a>", "--max_steps", "6", "--overwrite_output_dir", "false"))
        == 1
    )
    assert "trained tokens" in capsys.readouterr().err


def test_a_foreign_adapter_of_an_untied_base_merges(untied, tmp_path):
    """Rows of embedding and head, which differ; and with a head alone, as peft can also be told."""
    for names in (None, ["lm_head"]):
        model = stock_adapter(copy.deepcopy(untied.model), QWEN2, (5, 66), tied=False)
        if names:
            config = LoraConfig(
                r=4,
                target_modules=r"model\.visual\.blocks\.\d+\.attn\.qkv",
                trainable_token_indices={"lm_head": [66, 5]},
            )
            model = get_peft_model(copy.deepcopy(untied.model), config)
        fill(model)
        adapter, out = tmp_path / f"adapter{bool(names)}", tmp_path / f"out{bool(names)}"
        model.save_pretrained(adapter, save_embedding_layers=False)
        assert main(["merge", str(adapter), str(out), "--base_model", str(untied.base)]) == 0
        merged = transformers.Qwen2VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
        theirs = model.eval().merge_and_unload()
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_a_tied_base_that_stores_its_head_too_gets_the_rows_in_both(stock_of, tmp_path):
    one = stock_of("qwen2_vl")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(one.base, base)
    stored = load_file(base / "model.safetensors")
    save_file(stored | {"lm_head.weight": stored[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    model = stock_adapter(copy.deepcopy(one.model), QWEN2, (5, 66), tied=True)
    fill(model)
    model.save_pretrained(adapter, save_embedding_layers=False)
    assert main(["merge", str(adapter), str(out), "--base_model", str(base)]) == 0
    merged = load_file(out / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged[EMBEDDING])
    assert (merged[EMBEDDING] != stored[EMBEDDING]).any(1).nonzero().flatten().tolist() == [5, 66]


def test_an_adapter_whose_rows_are_unknown_is_refused(stock_of, tmp_path, capsys):
    one = stock_of("qwen2_vl")
    model = stock_adapter(copy.deepcopy(one.model), QWEN2, (5, 66), tied=True)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for ids in ([5], [5, 5], [5, 10**6], None, "5", {"lm_head": [5, 66]}):
        file.write_text(json.dumps(settings | {"trainable_token_indices": ids}))
        assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--base_model", str(one.base)]) == 1
        said = capsys.readouterr().err
        assert "Copy both files" in said or "tokens up to" in said, (ids, said)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--train_tokens", "<a>,<zebra>"), ("<zebra> is 7 tokens", "add_tokens", "resize_token_embeddings")),
        (("--train_tokens", "<a>,<a>"), ("appears twice",)),
        (("--train_tokens", "<a>,"), ("empty",)),
        (("--train_tokens", "<|image_pad|>"), ("never used",)),
        (("--train_tokens", "<a>", "--language", "full"), ("whole embedding", "--language lora")),
        (("--train_tokens", "<a>", "--language", "frozen", "--vision", "full"), ("no tower is lora",)),
        (("--train_tokens", "<a>", "--deepspeed", "zero3"), ("ZeRO-3", "zero2")),
    ],
)
def test_tokens_that_cannot_train_are_refused(taught, data, tmp_path, capsys, flags, words):
    plain = line(taught, data, tmp_path / "run", *flags)
    if "full" in flags:
        plain = [word for word in plain if not word.startswith("--lora_") and word not in ("4", "0")]
        plain = [word for word in plain if word not in ("--max_steps", "--dataloader_num_workers")]
    assert main(plain) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_the_rows(taught, data, capsys):
    plan = ["plan", "--model_id", str(taught), "--data_path", str(data), "--train_tokens", "<b>,<a>", "--json"]
    assert main(plan) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trained_tokens"] == dict(zip(NEW, ids_of(taught), strict=True))
    group = next(one for one in told["groups"] if one["name"] == "language_tokens")
    assert (group["parameters"], group["lr"]) == (2 * 64, 1e-4)
    assert main([*plan[:-1], "--language", "frozen", "--merger", "lora", "--gpu", "h100"]) == 0
    assert "language_tokens" in capsys.readouterr().out
