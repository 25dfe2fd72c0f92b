"""The command line's door: help, version, wrong usage, exit statuses, and what it costs to ask."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import vlft
from vlft.cli.main import HELP, VERBS, main
from vlft.cli.stdout import json_only
from vlft.errors import BadRow, ConfigError, DataError, UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def verb(monkeypatch):
    """Puts a function in the place of `vlft plan`."""

    def put(run):
        module = types.ModuleType("vlft.cli.plan")
        module.run = run
        monkeypatch.setitem(sys.modules, "vlft.cli.plan", module)

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
    assert err.startswith(f"error: '{typed}'")
    assert err.endswith(f": {meant}\n")


def test_the_rest_is_handed_over_unparsed(verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 7)
    assert main(["plan", "--help", "-x", "a b"]) == 7
    assert seen == [["--help", "-x", "a b"]]


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
    assert main(["plan"]) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")


def test_a_fault_of_ours_keeps_its_traceback(verb):
    def run(argv):
        raise ZeroDivisionError

    verb(run)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_interrupted(verb, capsys):
    def run(argv):
        raise KeyboardInterrupt

    verb(run)
    assert main(["plan"]) == 130
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


def test_help_and_wrong_usage_import_nothing_heavy():
    script = (
        "import sys; from vlft.cli.main import main; main(['--help']); main(['trian']);"
        "print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) <= {"vlft", "__main__"}


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
