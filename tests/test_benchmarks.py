import json
import subprocess

import pytest

from benchmarks import common, overhead, start, step
from benchmarks import input as input_benchmark
from benchmarks.peers import __main__ as peers


def result_of(module, folder, *flags):
    """Run a benchmark with tiny settings and read the file that it wrote."""
    module.main(["--smoke", "--rounds", "1", "--output", str(folder), *flags])
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def check(result, variants, claims):
    """Every variant has a positive speed or time, every claim with an aim a verdict."""
    assert [row["variant"] for row in result["rows"]] == variants
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in result["rows"])
    assert [claim["claim"] for claim in result["claims"]] == claims
    assert all((claim["met"] is None) == (claim["target"] is None) for claim in result["claims"])
    assert result["smoke"] and result["machine"] and "torch" in result["versions"]


def test_input_compares_batches_and_workers_and_finds_what_the_library_repeats(tmp_path):
    result = result_of(input_benchmark, tmp_path)
    kinds = ["Albumentations, image by image", "ours image by image, one process"]
    check(
        result,
        ["whole batches", *kinds, "ours image by image, two workers"],
        [
            "whole batches / Albumentations",
            "two workers / one process",
            "different draws, our two workers",
            "different draws, the library's own",
        ],
    )
    ours, library = (claim["median"] for claim in result["claims"][2:])
    assert ours > 0.98
    assert library == 0.5  # both of its workers draw the same


def test_step_compares_the_course_with_ours(tmp_path, capsys):
    result = result_of(step, tmp_path)
    check(result, ["the course's loop", "ours"], ["ours / the course's loop"])
    assert common.render(result) in capsys.readouterr().out


def test_overhead_compares_fit_model_with_a_bare_loop_at_two_widths(tmp_path):
    result = result_of(overhead, tmp_path)
    parts = ("bare loop", "fit_model", "a checkpoint")
    written = "all that is written in an epoch / bare epoch"
    ratios = ("fit_model's loop / bare loop", written, "both / bare")
    check(
        result,
        [f"width {width}, {part}" for width in (4, 2) for part in parts],
        [f"width {width}: {ratio}" for width in (4, 2) for ratio in ratios],
    )


def test_start_sees_what_an_import_brings_in(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "first_step", lambda *flags: 1.0)  # seconds, each
    result = result_of(start, tmp_path)
    assert {"torch", "albumentations"} <= set(result["settings"]["imported"])
    assert "matplotlib" not in result["settings"]["imported"]
    assert result["rows"][2]["median"] > result["rows"][0]["median"]


def test_the_first_update_of_a_command_is_seen_and_a_failing_command_is_no_time():
    assert start.first_step("--recipe", "demo", "--width", "4", "--lr", "0.01") > 0
    with pytest.raises(RuntimeError, match="unknown model"):
        start.first_step("--model", "vgg")


def test_peers_make_the_same_updates_from_the_same_weights(tmp_path):
    names = ["the course's loop", "plain loop"]
    result = result_of(peers, tmp_path, "--only", *names)
    check(result, [*names, "ours"], [f"ours / {name}" for name in names])
    losses = [float(row["columns"]["loss"]) for row in result["rows"]]
    assert max(losses) - min(losses) < 0.5


@pytest.mark.parametrize("name", ["Lightning", "fastai"])
def test_a_peer_that_is_installed_makes_the_same_updates_too(tmp_path, name):
    package = peers.PEERS[name][1]
    if not (peers.ENVIRONMENTS / package / "whole").exists():
        pytest.skip(f"{package} is not installed: python -m benchmarks.peers --smoke")
    check(result_of(peers, tmp_path, "--only", name), [name, "ours"], [f"ours / {name}"])


def test_a_peer_that_cannot_be_installed_is_left_out_by_name(tmp_path, monkeypatch):
    def fail(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers.subprocess, "run", fail)
    found, lines = peers.available(["plain loop", "fastai"])
    assert found == ["plain loop"]
    assert len(lines) == 1 and lines[0].startswith("fastai is left out")


def test_peers_that_made_different_numbers_of_updates_are_not_compared():
    one = {"rate": 1.0, "loss": 2.0, "version": "", "note": ""}
    results = {"plain loop": [one | {"updates": 3}], "ours": [one | {"updates": 2}]}
    with pytest.raises(RuntimeError, match="different numbers of updates"):
        peers.summarize(results, {"steps": 2}, None)


def test_rounds_take_the_variants_in_turn_and_every_other_round_backwards():
    order = []
    variants = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert common.measure(variants, 3) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert order == list("abbaab")


def test_a_claim_is_met_by_its_median():
    assert common.make_claim("x", [1.0, 30.0, 26.0], 25)["met"]
    assert not common.make_claim("x", [1.0, 30.0, 24.0], 25)["met"]
    assert common.make_claim("x", [1.0, 1.03, 1.01], 1.02, most=True)["met"]
    assert not common.make_claim("x", [1.0, 1.03, 1.03], 1.02, most=True)["met"]
    assert common.make_claim("x", [1.0])["met"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(152345.6, "152,346"), (249.31, "249.3"), (25.2, "25.20"), (1.0187, "1.019"), (0.00512, "0.00512")],
)
def test_numbers_keep_the_digits_that_count(value, text):
    assert common.quantity(value) == text
