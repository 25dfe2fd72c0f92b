"""Rows and their tokens, kept for all processes forked later: equal to new ones, and never those of another row."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import astuple, replace

import pytest
from build import FAMILY
from kit_rows import LLAMA_FACTORY, LLAVA, MS_SWIFT, SHAREGPT

from vlft.data import pieces
from vlft.data.encode import Encoder
from vlft.data.files import index as files
from vlft.data.rows.access import Access
from vlft.data.rows.fetch import RemoteMedia
from vlft.data.sample import Sample, Text
from vlft.data.shared_cache import SharedCache
from vlft.errors import DataError


def in_a_fork(run) -> None:
    """Call a function in a forked process, which must succeed."""
    if not (child := os.fork()):
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_processes_share_a_cache():
    cache = SharedCache()
    in_a_fork(lambda: [cache.put(b"%d" % i, b"value %d" % i) for i in range(1000)])
    assert [cache.get(b"%d" % i) for i in range(1000)] == [b"value %d" % i for i in range(1000)]
    assert cache.get(b"1000") is None
    assert pickle.loads(pickle.dumps(cache)).get(b"1") is None


def test_a_full_cache_keeps_what_it_has():
    cache = SharedCache(size=500, places=16)
    for i in range(60):
        cache.put(b"%d" % i, b"x" * i)
    kept = [i for i in range(60) if cache.get(b"%d" % i) is not None]
    assert 5 < len(kept) <= 16
    assert all(cache.get(b"%d" % i) == b"x" * i for i in kept)


def test_a_process_killed_while_it_writes():
    """It leaves the lock taken: reading works, and nothing waits."""
    cache = SharedCache()
    cache.put(b"a", b"1")
    in_a_fork(lambda: cache._lock.acquire())
    assert cache.get(b"a") == b"1"
    cache.put(b"b", b"2")
    assert cache.get(b"b") is None


def same(one, other) -> bool:
    names = ("input_ids_T", "labels_T", "kinds_T", "positions_3T")
    return one.text == other.text and all(
        getattr(one, name).tolist() == getattr(other, name).tolist() for name in names
    )


def test_kept_tokens_are_those_of_the_row(encoder: Encoder, samples: dict[str, Sample], monkeypatch):
    """Rows of every kind, measured in one process and encoded in another that cannot render."""

    def fresh() -> Encoder:
        return replace(encoder)

    shared = fresh()
    in_a_fork(lambda: [shared.measure(sample) for sample in samples.values()])
    new = {name: fresh().tokens(sample) for name, sample in samples.items()}
    monkeypatch.setattr(pieces, "render", None)
    for name, sample in samples.items():
        assert same(shared.tokens(sample), new[name]), name
        assert same(shared.encode(sample), new[name]), name
    with pytest.raises(TypeError):
        fresh().tokens(samples["still"])


def test_a_row_that_changes_is_tokenised_again(encoder: Encoder, samples: dict[str, Sample], monkeypatch):
    sample = samples["still"]
    encoder = replace(encoder)
    before = encoder.tokens(sample)
    last = sample.turns[-1]
    (text,) = last.parts
    other = replace(sample, turns=(*sample.turns[:-1], replace(last, parts=(Text(text=text.text + "!"),))))
    half = (replace(text, trained=False), Text(text=" And more."))
    masked = replace(sample, turns=(*sample.turns[:-1], replace(last, parts=half)))
    for changed in (other, masked):
        found = encoder.tokens(changed)
        assert same(found, replace(encoder).tokens(changed))
        assert not same(found, before)
    template = encoder.processor.chat_template
    monkeypatch.setattr(
        encoder.processor, "chat_template", template.replace("You are a helpful assistant.", "Be brief.")
    )
    assert "Be brief." in encoder.tokens(sample).text


def index_of(path, rows=None, **options):
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files.index_rows([str(path)], image_folder=None, family=FAMILY, **options)


def test_kept_rows_are_those_of_the_file(tmp_path, monkeypatch):
    """Rows of every kit, parsed in one process and read in another that cannot parse, also as samples of a part."""
    boxes = {"ref": ["a cup"], "bbox": [[1, 2.5, 30, 40]], "width": [100], "height": [80]}
    rows = [*LLAVA, *SHAREGPT, *LLAMA_FACTORY, *MS_SWIFT]
    rows += [
        {"images": ["a.jpg"], "objects": boxes, "messages": [
            {"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]},
        {"video": [["a.jpg", "b.jpg"]], "max_pixels": 5000, "fps": 1.5, "odd": 1, "conversations": [
            {"from": "human", "value": "<video>Täglich 日本語?"}, {"from": "gpt", "value": "Yes.", "train": False},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    ]  # fmt: skip
    shared = index_of(tmp_path / "a.jsonl", rows)
    in_a_fork(lambda: list(files.each(shared)))
    kept = list(files.each(index_of(tmp_path / "a.jsonl")))
    assert sum(isinstance(one, Sample) for one in kept) > len(rows) / 2
    with monkeypatch.context() as patched:
        patched.setattr(files, "parse_record", None)
        for place, one in enumerate(kept):
            if isinstance(one, Sample):
                assert astuple(shared[place]) == astuple(one)
                assert astuple(shared.take([0, place])[1]) == astuple(one)
        with pytest.raises(TypeError):
            index_of(tmp_path / "a.jsonl")[0]
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    with pytest.raises(DataError, match="was written to"):
        shared[0]


def test_a_kept_row_whose_file_cannot_be_fetched_is_refused(tmp_path):
    remote = RemoteMedia(tmp_path)
    row = {**LLAVA[0], "image": ["https://a.org/1.jpg", "https://a.org/2.jpg"]}
    index = index_of(tmp_path / "a.jsonl", [row], access=Access(remote=remote))
    path = index[0].media[1].path
    remote.failed[path] = "404"
    with pytest.raises(DataError, match="404"):
        index[0]
