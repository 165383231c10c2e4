"""The user's mistakes: one sentence that helps, exit code 2, and nothing computed."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        # Names.
        (
            ["--distillers", "randm"],
            "'randm' is not the name of a distiller; did you mean 'random'?",
        ),
        (["--architectures", "convnt"], "not the name of an architecture; did you mean 'convnet'?"),
        (["--attacks", "pdg"], "'pdg' is not the name of an attack; did you mean 'pgd'?"),
        (["--datasets", "digit"], "not the name of a dataset; did you mean 'digits'?"),
        (["--distillers", "zzz"], "'zzz' is not the name of a distiller. Available: "),
        (["--distillers", "random,"], "has an empty name"),
        (["--distillers", "random:7"], "takes no ':7'; say 'random'"),
        (["--tracks", "nature"], "there is no track 'nature'; the tracks are natural, author"),
        # Options.
        (["--set", "pgd.stps=3"], "pgd.stps is not an option. Options of 'pgd': steps,"),
        (["--set", "pgd.steps=many"], "pgd.steps='many': input should be a valid integer"),
        (["--set", "pgd.steps=0"], "pgd.steps=0: input should be greater than or equal to 1"),
        (["--set", "pdg.steps=3"], "options are given for 'pdg', which this run does not use"),
        (["--set", "pgd.steps"], "expected name.option=value, such as dm.iterations=500"),
        (["--set", "steps=3"], "expected name.option=value"),
        # Numbers.
        (["--ipc", "0"], "images per class are 1 or more"),
        (["--ipc", "one"], "'one' is no whole number; write 1,10 or 0-4"),
        (["--seeds", "4-"], "is no whole number"),
        (["--seeds", "3-1"], "no seeds are named"),
        (["--workers", "0"], "'--workers': 0 is not in the range"),
        # Places.
        (["--device", "gpu"], "--device gpu: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--device", "meta"], "--device meta: rdd-bench runs on cpu and cuda"),
        (["--config", "no-such-file.toml"], "cannot read no-such-file.toml: No such file"),
        (["--protocol", "no-such-file.toml"], "cannot read no-such-file.toml: No such file"),
        (["--protocol", "digits-v2"], "not the name of a protocol; did you mean 'digits-v1'?"),
        (["--protocl", "x"], "No such option"),
    ],
)
def test_a_mistake_is_one_helpful_sentence(tiny, out, tmp_path, arguments, says):
    assert says in tiny(*arguments).mistake
    assert not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps = 3", "'steps' is not expected here; write options as tables such as [options.dm]"),
        ("[options]\npgd = 3", "options.pgd is not a table; write [options.pgd]"),
        ("[options.pgd\nsteps = 3", "is not TOML"),
        ("[options.pgd]\nstps = 3", "pgd.stps is not an option"),
    ],
)
def test_a_mistake_in_the_config_is_one_sentence(tiny, tmp_path, text, says):
    config = tmp_path / "options.toml"
    config.write_text(text)
    assert says in tiny("--config", config).mistake


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('ranked = "16/255"', 'ranked = "8/255"', "is not among the eps"),
        ('eps = ["16/255"]', 'eps = ["16/255", "8"]', "write 8/255 if you meant 8 grey levels"),
        ('eps = ["16/255"]', 'eps = ["16/255", "x"]', "'x' is not a budget; write 0.1 or 8/255"),
        ('norm = "linf"', 'norm = "l7"', "threats.0.norm"),
        ('summary = "Everything there is, in a second."', "", "summary: field required"),
        ("ipc = [1]", "ipcs = [1]", "ipcs: extra inputs are not permitted"),
        ("steps = 2", "stps = 2", "pgd.stps is not an option"),
        ('distillers = ["random"]', 'distillers = ["randm"]', "did you mean 'random'?"),
        ("epochs = 3", "epochs = 0", "recipe.epochs"),
        ("epochs = 3", "epochs = ", "is not TOML"),
    ],
)
def test_a_mistake_in_the_protocol_is_one_sentence(tiny, protocol, out, old, new, says):
    text = protocol.read_text()
    assert old in text
    protocol.write_text(text.replace(old, new))
    assert says in tiny().mistake
    assert not out.exists()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_run_folder_that_cannot_be_written_is_named(tiny, tmp_path, below):
    # A file in its place: root may write into any folder.
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / below
    answer = tiny("--out", folder)
    assert f"cannot write to the run folder {folder}" in answer.mistake
    assert "name another one with --out" in answer.mistake


def test_a_mistake_is_found_before_anything_is_computed(tiny, out):
    # The wrong name is the last one.
    assert tiny("--distillers", "random,kcenter,herdin").code == 2
    assert not out.exists()


def test_a_plugin_that_did_not_load_is_named_where_it_is_missed(tiny, install):
    install("planted", "raise ImportError('no module named numpyy')")
    answer = tiny("--distillers", "planted")
    assert answer.code == 2
    warning, mistake = answer.err.splitlines()
    assert warning == "plugin not loaded: planted:planted: ImportError: no module named numpyy"
    assert "Not loaded: planted:planted (see 'rdd-bench plugins')" in mistake


def test_a_plugin_that_did_not_load_stops_nobody_else(tiny, install):
    install("planted", "raise SystemExit")
    answer = tiny()
    assert answer.code == 0
    assert "plugin not loaded: planted:planted: SystemExit" in answer.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shwo", "dm"], "No such command 'shwo'"),
        (["show"], "Missing argument 'NAME'"),
        (["show", "convnt"], "component or protocol; did you mean 'convnet'?"),
        (["list", "attack"], "'attack' is not one of"),
        (["check", "rdd-bnch"], "'rdd-bnch' offers no plugins; distributions that do:"),
        (["leaderboard"], "Missing argument 'RUNS...'"),
        (["leaderboard", "no-such-run"], "no-such-run does not exist"),
        (["leaderboard", "."], "holds no records; expected a run folder or .jsonl files"),
    ],
)
def test_a_mistake_in_another_command_is_one_sentence(cli, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in cli(*arguments).mistake
