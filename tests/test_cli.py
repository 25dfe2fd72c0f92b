"""The entry point of the command line: help, version, wrong usage, exit statuses, and the time they take."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest

import vlft
from vlft.cli import help
from vlft.cli.main import HELP, main
from vlft.cli.stdout import json_only
from vlft.cli.verbs import VERBS
from vlft.errors import BadRow, ConfigError, DataError, UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def verb(monkeypatch):
    """Replace `vlft plan`, whose flags are checked before it runs, and `vlft merge` by a function."""

    def put(run):
        for name in ("vlft.cli.plan", "vlft.cli.merge"):
            module = types.ModuleType(name)
            module.run = run
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_help(capsys):
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert out == HELP
    assert err == ""
    assert all(f"  {name}" in out for name in VERBS)


def test_nothing_asked_is_wrong_usage(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == HELP


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlft {vlft.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian", "vlft train"),
        ("check_data", "vlft check-data"),
        ("--vesion", "vlft --version"),
        ("xyz", "vlft --help"),
    ],
)
def test_unknown_verb_names_the_closest(capsys, typed, meant):
    assert main([typed, "--config", "a.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: unknown command '{typed}'")
    assert err.endswith(f": {meant}\n")


def test_the_rest_is_handed_over_unparsed(verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 7)
    assert main(["merge", "-x", "a b"]) == 7
    assert seen == [["-x", "a b"]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("nothing is trained"), 1),
        (UsageError("--bits has another name"), 2),
        (DataError(BadRow(file="a.json", index=3, id="x", field="image[0]", reason="no such file")), 1),
    ],
)
def test_a_user_error_is_its_message_without_traceback(verb, capsys, error, status):
    def run(argv):
        raise error

    verb(run)
    assert main(["merge", "x"]) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")


def test_a_fault_of_ours_keeps_its_traceback(verb):
    def run(argv):
        raise ZeroDivisionError

    verb(run)
    with pytest.raises(ZeroDivisionError):
        main(["merge", "x"])


def test_interrupted(verb, capsys):
    def run(argv):
        raise KeyboardInterrupt

    verb(run)
    assert main(["merge", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def _vlft(*argv, **options):
    return subprocess.run([sys.executable, "-m", "vlft", *argv], capture_output=True, text=True, **options)


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "vlft", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_module_and_exit_status():
    assert _vlft("--version").stdout == f"vlft {vlft.__version__}\n"
    assert _vlft("nonsense").returncode == 2


with_stored_help = pytest.mark.skipif(
    version("transformers") != (help.FOLDER / "transformers.txt").read_text().strip(),
    reason="the help is stored for another transformers, and not used",
)


@with_stored_help
@pytest.mark.parametrize(
    ("file", "verb", "every"), [*help.texts()], ids=lambda value: str(getattr(value, "name", value))
)
def test_stored_help_is_what_the_parser_prints(file, verb, every, monkeypatch):
    """Every change of the command line shows here. To store an intended change: python -m vlft.cli.help"""
    monkeypatch.setattr(help, "answer", lambda *_: None)
    monkeypatch.setenv("COLUMNS", str(help.WIDTH))
    text = help.printed(verb, every=every)
    assert (help.FOLDER / file).read_text() == text
    assert "\nexamples:\n  vlft " in text


TWO_TIERS = [name for name, verb in VERBS.items() if verb.train_flags]


@with_stored_help
@pytest.mark.parametrize("verb", TWO_TIERS)
@pytest.mark.parametrize("words", [["--help", "all"], ["--help=all"], ["--help-all"], ["a.json", "-h", "all"]])
def test_help_all_lists_every_flag(verb, words, capsys):
    assert main([verb, *words]) == 0
    every = capsys.readouterr().out
    assert main([verb, "-h"]) == 0
    common = capsys.readouterr().out
    assert common.endswith(f"\nMore flags: vlft {verb} --help all\n")
    assert _listed(common) < _listed(every)
    assert len(common.splitlines()) < 80
    assert {"box_format", "attn"} <= _listed(every) - _listed(common)


@with_stored_help
def test_the_common_flags_are_enough_for_a_first_run(capsys):
    """The flags of the finetune scripts and of README's first commands, each with its values and its default."""
    assert main(["train", "--help"]) == 0
    common = capsys.readouterr().out
    first = {"config", "model_id", "data_path", "image_folder", "output_dir", "vision", "merger", "language"}
    assert first | {"learning_rate", "num_train_epochs", "global_batch", "max_length"} <= _listed(common)
    assert "--vision {full,lora,frozen}" in common
    assert "passes over the training data (default: 3)" in common


def _listed(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?--(\w+)", text, re.M))


@pytest.mark.parametrize("stored", [pytest.param(True, marks=with_stored_help), False])
@pytest.mark.parametrize("verb", [name for name in VERBS if name not in TWO_TIERS])
def test_help_all_of_a_verb_with_one_tier_is_its_help(verb, stored, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(help.WIDTH))
    if stored:
        assert main([verb, "--help", "all"]) == 0
    else:
        monkeypatch.setattr(help, "answer", lambda *_: None)
        with pytest.raises(SystemExit) as left:
            main([verb, "--help-all"])
        assert left.value.code == 0
    assert capsys.readouterr().out == (help.FOLDER / f"{verb}.txt").read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["merge", "output/run"], "vlft merge: the following arguments are required: OUT"),
        (["merge", "a", "b", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["report"], "vlft report: the following arguments are required: RUN"),
        (["import", "story-reasoning", "a", "b", "--limit", "0"], "vlft import: --limit 0: must be at least 1"),
        (["demo", "--fast"], "vlft demo: unrecognized arguments: --fast"),
    ],
)
def test_wrong_usage_is_one_message_of_every_verb(argv, says, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.endswith(f"\n  All flags: vlft {argv[0]} --help\n")


def test_beside_another_transformers_the_verb_answers(monkeypatch, tmp_path, capsys, verb):
    shutil.copytree(help.FOLDER, tmp_path / "help")
    monkeypatch.setattr(help, "FOLDER", tmp_path / "help")
    (tmp_path / "help" / "transformers.txt").write_text("4.0.0\n")
    verb(lambda argv: print("live") or 0)
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out == "live\n"


@with_stored_help
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--lora_renk", "8"], "unknown flag --lora_renk; did you mean --lora_rank?"),
        (["train", "--no-bf17"], "unknown flag --no_bf17"),
        (["check-data", "a.json", "--freeze_llm", "true"], "--freeze_llm true  ->  --language frozen"),
        (["preview", "a.json", "--fsdp", "x"], "--fsdp x: use --deepspeed zero2 or zero3"),
        (["plan"], "no data file and no model"),
    ],
)
def test_a_slip_is_told_without_loading_anything(argv, says, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, f"vlft.cli.{argv[0].replace('-', '_')}", None)
    assert main(argv) == 2
    assert says in capsys.readouterr().err


@with_stored_help
def test_bench_alone_is_asked_what_to_measure_by_itself():
    assert help.answer(VERBS["bench"], []) is None


@with_stored_help
def test_flags_that_exist_go_through(verb, tmp_path):
    seen = []
    verb(lambda argv: seen.append(argv) or 0)
    (tmp_path / "x.yaml").write_text(f"model_id: some/model\ndata_path: {tmp_path}\n")
    argv = ["--learning-rate=1e-4", "--no_skip_memory_metrics", "--gpus", "2", "--vision", "lora"]
    argv += ["--config", str(tmp_path / "x.yaml")]
    assert main(["plan", *argv]) == 0
    assert seen == [argv]


@with_stored_help
def test_help_and_wrong_usage_answer_at_once_and_import_nothing_heavy():
    script = """if True:
        import sys, time
        start = time.process_time()
        from vlft.cli.main import main
        for line in ("--help", "trian", "train --help", "train --help all", "train --lora_renk 8", "chat --help"):
            main(line.split())
        print(time.process_time() - start)
        print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.splitlines()[-2:]
    assert float(seconds) < 0.5  # of the processor, all six together; Python itself starts in 0.03 s
    assert not set(modules.split()) & {"torch", "transformers", "peft", "numpy", "PIL"}


@with_stored_help
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("vlft pl", ["plan"]),
        ("vlft train --lora_", ["--lora_rank", "--lora_alpha", "--lora_dropout", "--lora_target"]),
        ("vlft check-data x.json --vision ", ["full", "lora", "frozen"]),
        ("vlft merge a b --dtype ", ["keep", "bf16", "fp16", "fp32"]),
    ],
)
def test_completion(line, words, tmp_path):
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
    to = {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
    _vlft(env={**os.environ, **asked, **to})
    assert [word.strip() for word in (tmp_path / "words").read_text().split("|")] == words


def test_json_only_keeps_stdout_for_the_document():
    script = """if True:
        import os
        from vlft.cli.stdout import json_only
        with json_only(True) as write:
            print("a library's words")
            os.write(1, b"a C library's words\\n")
            write({"\u00e9": 1.5})
            print("more")
        print("back again")"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    document, _, rest = done.stdout.decode().rpartition("}\n")
    assert json.loads(document + "}") == {"\u00e9": 1.5}
    assert rest == "back again\n"
    assert sorted(done.stderr.decode().splitlines()) == ["a C library's words", "a library's words", "more"]


def test_json_only_without_descriptors(capsys):
    with json_only(True) as write:
        print("noise")
        write([])
    out, err = capsys.readouterr()
    assert (out, err) == ("[]\n", "noise\n")


def test_json_only_not_wanted(capsys):
    with json_only(False) as write:
        print("text")
        write(1)
    assert capsys.readouterr().out == "text\n1\n"


def test_a_kernel_that_bitsandbytes_does_not_download_is_no_news(caplog):
    import logging

    from vlft.cli.quiet import quiet

    quiet()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no network")
    log.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
