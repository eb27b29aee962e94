import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import common, distributed, gpu, host, overhead, start, step, tables, time_to_accuracy
from benchmarks import input as input_benchmark
from benchmarks.peers import __main__ as peers
from benchmarks.peers import one
from config import parse_config
from tests.test_compare import make_seeds
from utils import Epoch, History


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
    assert 0.47 < library <= 0.5  # both of its workers draw the same; a few draws coincide besides


def test_step_compares_the_course_with_ours(tmp_path, capsys, monkeypatch):
    def run_here(name, folder, flags):  # the test of the peers starts the processes
        monkeypatch.setattr(sys, "argv", ["one", peers.PEERS[name][0], str(folder), *flags])
        one.main()
        return common.read_json(folder / f"{peers.PEERS[name][0]}.json")

    monkeypatch.setattr(peers, "run_peer", run_here)
    result = result_of(step, tmp_path)
    check(result, ["the course's loop", "ours"], ["ours / the course's loop"])
    assert common.render(result) in capsys.readouterr().out


@pytest.mark.parametrize("dtype, least", [(torch.bfloat16, 2.5), (torch.float32, 1)])
def test_step_claims_a_multiple_where_the_cpu_computes_in_bf16(tmp_path, monkeypatch, dtype, least):
    monkeypatch.setattr(step, "compare", lambda names, *_: {name: [{"rate": 1.0}] for name in names})
    monkeypatch.setattr(step, "pick_precision", lambda *_: dtype)
    (claim,) = result_of(step, tmp_path)["claims"]
    assert claim["target"] == least


def test_host_compares_train_with_a_bare_loop_and_times_its_parts(tmp_path):
    rows = [row["variant"] for row in result_of(host, tmp_path)["rows"]]
    assert rows[:2] == ["bare loop", "train"]
    assert rows[2:] == [f"part: {name}" for name in host.parts()]


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


@pytest.mark.slow
def test_two_processes_are_compared_with_two_threads(tmp_path, monkeypatch):
    measured = distributed.rate_of(2, 1, width=4, batch=32, steps=2, device="cpu")
    assert measured["rate"] > 0 and measured["agreeing"] > 0 and measured["sum of gradients"] > 0
    monkeypatch.setattr(distributed, "rate_of", lambda world, threads, **work: measured)
    variants = (
        "one process, two threads",
        "two processes, one thread each",
        "the same, norms not synced",
    )
    ratios = ("two processes / one of two threads", "norms not synced / synced")
    ratios += ("agreeing / step", "sum of gradients / step")
    check(
        result_of(distributed, tmp_path),
        [f"width {width}, {variant}" for width in (4, 2) for variant in variants],
        [f"width {width}: {ratio}" for width in (4, 2) for ratio in ratios],
    )


def test_processes_that_fail_say_why(monkeypatch):
    with pytest.raises(RuntimeError, match="there is no device 'tpu' here"):
        distributed.rate_of(1, 1, width=4, batch=32, steps=2, device="tpu")


@pytest.mark.slow
def test_start_sees_what_an_import_brings_in(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "seconds_of", lambda code, *flags: 1.0 + ("import" in code))
    result = result_of(start, tmp_path)
    assert {"torch", "albumentations"} <= set(result["settings"]["imported"])
    assert "matplotlib" not in result["settings"]["imported"]
    assert [row["median"] for row in result["rows"]] == [1.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.slow
def test_the_first_update_of_a_command_is_seen_and_a_failing_command_is_no_time():
    assert start.first_step("--recipe", "demo", "--width", "4", "--lr", "0.01") > 0
    with pytest.raises(RuntimeError, match="exit code 1: no"):
        start.seconds_of("raise SystemExit('no')")


@pytest.mark.slow
def test_peers_make_the_same_updates_from_the_same_weights(tmp_path):
    result = result_of(peers, tmp_path, "--only", "plain loop")
    check(result, ["plain loop", "ours"], ["ours / plain loop"])
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


# Time to accuracy


@pytest.fixture
def fake_main(monkeypatch, tmp_path):
    """main.py as a function: two epochs, 50 % in the second; exit codes from a list, then 0."""
    calls, codes = [], []
    row = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "images_per_second": 1.0}
    first = Epoch(**row, test_loss=1.0, test_accuracy=0.4, seconds=3.0)

    def call_main(flags, log, deadline):
        calls.append(flags)
        folder = Path(flags[flags.index("--output") + 1])
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        History([first, replace(first, epoch=2, test_accuracy=0.5)]).save(folder)
        (folder / "predictions.csv").write_text("image,label,predicted,probability\n" + "0,a,a,1\n" * 9)
        return codes.pop(0) if codes else 0, ""

    monkeypatch.setattr(time_to_accuracy, "call_main", call_main)
    monkeypatch.setattr(time_to_accuracy, "RUNS", tmp_path / "runs")
    return calls, codes


def record_in(folder):
    """The one record that was written."""
    (path,) = (folder / "accuracy").glob("*.json")
    return json.loads(path.read_text())


def seeds_of(calls):
    """The seeds that were run."""
    return [flags[flags.index("--seed") + 1] for flags in calls]


def test_a_seed_that_is_done_is_not_run_again(fake_main, tmp_path, capsys):
    command = ["--recipe", "quick", "--output", str(tmp_path), "--target", "0.45", "--epochs", "2"]
    time_to_accuracy.main([*command, "--seeds", "1"])
    time_to_accuracy.main([*command, "--seeds", "3"])
    assert seeds_of(fake_main[0]) == ["0", "1", "2"]
    record = record_in(tmp_path)
    assert (record["seeds"], record["accuracies"], record["deviation"]) == ([0, 1, 2], [0.5] * 3, 0.0)
    assert (record["epochs"], record["training_seconds"], record["epoch_seconds"]) == (2, 6.0, 3.0)
    assert record["settings"] == parse_config(["--recipe", "quick", "--epochs", "2"]).recipe
    assert [run["images"] for run in record["runs"]] == [9] * 3
    assert "45.00% after epoch 2, 6.0 s" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_the_folder_of_seeds_of_a_run_is_read_and_nothing_runs(fake_main, tmp_path, capsys):
    folder = make_seeds(tmp_path / "five", {0: 0.87, 3: 0.88}, width=16, epochs=2)
    for place in Path(folder).glob("seed-*"):
        (place / "environment.json").write_text('{"machine": "a GPU", "versions": "x", "precision": ""}')
        (place / "predictions.csv").write_text("image,label,predicted,probability\n0,a,a,1\n")
    command = ["--recipe", "quick", "--epochs", "2", "--runs", folder, "--output", str(tmp_path / "r")]
    time_to_accuracy.main(command)
    record = record_in(tmp_path / "r")
    assert (record["seeds"], record["accuracies"], record["machine"]) == ([0, 3], [0.87, 0.88], "a GPU")
    assert record["command_seconds"] is None and not fake_main[0]
    with pytest.raises(ValueError, match="five is not of custom_resnet: it differs in width"):
        time_to_accuracy.main(["--recipe", "custom_resnet", *command[2:]])


def test_a_seed_that_was_stopped_is_resumed_and_its_time_added_up(fake_main, tmp_path, capsys):
    calls, codes = fake_main
    codes.append(time_to_accuracy.STOPPED[0])
    command = ["--recipe", "quick", "--seeds", "1", "--output", str(tmp_path)]
    time_to_accuracy.main(command)
    assert "the same command goes on" in capsys.readouterr().out
    assert record_in(tmp_path)["mean"] is None
    time_to_accuracy.main(command)
    assert len(calls) == 2 and calls[0] == calls[1] and "--resume" in calls[1]
    (run,) = record_in(tmp_path)["runs"]
    assert len(run["pieces"]) == 2 and run["command_seconds"] == round(sum(run["pieces"]), 2)


def test_a_run_that_fails_is_an_error_and_no_result(fake_main, tmp_path):
    fake_main[1].append(1)
    with pytest.raises(RuntimeError, match="quick, seed 0: exit code 1"):
        time_to_accuracy.main(["--recipe", "quick", "--output", str(tmp_path)])


@pytest.mark.slow
def test_a_real_command_is_measured_and_one_over_its_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_accuracy, "RUNS", tmp_path / "runs")
    assert not time_to_accuracy.run_seed("demo", 0, gpu.TINY, tmp_path, time.monotonic())
    assert time_to_accuracy.run_seed("demo", 0, gpu.TINY, tmp_path)
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["runs"][0]["images"] == 32 and record["parameters"] == 103954
    assert len(record["runs"][0]["pieces"]) == 2


def test_accuracy_is_shown_with_its_deviation_and_number_of_seeds():
    run = {"accuracy": 0.94, "training_seconds": 80.0, "command_seconds": None, "epoch_seconds": [4.0]}
    record = {
        "model": "custom_resnet",
        "width": 64,
        "parameters": 6573130,
        "epochs": 24,
        "tta": False,
        "machine": "a machine",
        "command": "python main.py",
        "runs": [run | {"seed": 1}, run | {"seed": 0, "accuracy": 0.942}, {"seed": 2, "accuracy": None}],
    }
    text = time_to_accuracy.render([time_to_accuracy.summarize(record)])
    assert "| 6,573,130 | 24 | 94.10 ± 0.14 % (2) | 80.00 |  | a machine | `python main.py` |" in text


def test_a_run_that_does_not_stop_when_told_to_is_made_to(monkeypatch):
    deaf = "from signal import *; signal(SIGTERM, SIG_IGN); print(flush=True); pause()"
    monkeypatch.setattr(time_to_accuracy, "PATIENCE", 0.1)
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert time_to_accuracy.end(process) in time_to_accuracy.STOPPED
        assert process.returncode == -signal.SIGKILL


# The programme for a GPU


@pytest.mark.slow
def test_the_programme_for_a_gpu_does_everything_once_and_names_what_failed(
    fake_main, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(distributed, "rate_of", lambda world, threads, **work: {"rate": 90.0 * world})
    command = ["--smoke", "--device", "cpu", "--rounds", "1", "--seeds", "2", "--output", str(tmp_path)]
    assert gpu.main(command) == 1
    known = [recipe for recipe in gpu.RECIPE_ORDER if recipe in gpu.RECIPES]
    assert seeds_of(fake_main[0]) == ["0"] * len(known) + ["1"] * len(known)
    names = ["compile-32", "compile-64", "scaling-32", "speed-32", "speed-64"]
    assert sorted(path.stem for path in tmp_path.glob("gpu/*/*.json")) == names
    (path,) = tmp_path.glob("gpu/*/scaling-32.json")
    claims = {claim["claim"]: claim["median"] for claim in json.loads(path.read_text())["claims"]}
    one = "1 processes, batch 32 / processes"
    assert claims == {f"2 processes, batch {size} / {one}": 1.0 for size in (32, 64)}
    assert [path.stem for path in tmp_path.glob("gpu/*/*.failed")] == ["synchronisations"]
    fake_main[0].clear()
    capsys.readouterr()
    assert gpu.main(command) == 1
    assert not fake_main[0]
    said = capsys.readouterr().out
    assert "begun" not in said and said.endswith("failed: synchronisations\n")


def test_the_programme_for_a_gpu_stops_in_time_and_says_so(fake_main, tmp_path, monkeypatch):
    calls, codes = fake_main
    command = ["--smoke", "--device", "cpu", "--output", str(tmp_path)]
    assert gpu.main([*command, "--minutes", "0"]) == gpu.UNFINISHED
    assert not calls
    codes.append(time_to_accuracy.STOPPED[0])
    assert gpu.main(command) == gpu.UNFINISHED
    assert len(calls) == 1


def test_a_recipe_that_is_not_there_is_left_out_by_name(fake_main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "RECIPE_ORDER", ("no_such_recipe", "quick"))
    monkeypatch.setattr(gpu, "run_measurements", lambda bench, deadline: True)
    gpu.main(["--smoke", "--device", "cpu", "--seeds", "1", "--output", str(tmp_path)])
    assert "no_such_recipe: config.py has no such recipe" in capsys.readouterr().out
    assert len(fake_main[0]) == 1


def test_synchronisations_are_watched_from_the_first_update_to_the_last(monkeypatch):
    modes = []
    monkeypatch.setattr(gpu.torch.cuda, "set_sync_debug_mode", modes.append)
    watch = gpu.Watch(3)
    watch.step()
    watch.step()
    assert modes == ["warn"]
    watch.step()
    assert modes == ["warn", "default"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla T4", 65e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),  # not an L4
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda device: name)
    assert gpu.peak_of(gpu.torch.device("cuda")) == peak


# Tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert text == tables.fill(text)


def test_every_result_has_its_one_table_on_a_page():
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    names = [name for text in texts for _, name, _ in tables.MARKERS.findall(text)]
    assert len(names) == len(set(names))
    assert {"accuracy", "battery", "input", "step", "overhead", "start", "peers"} <= set(names)
    assert [name for _, name, _ in tables.MARKERS.findall(texts[0])] == ["accuracy"]


def test_a_table_comes_from_its_file_and_leaves_the_rest_of_the_text_alone(tmp_path):
    text = "before\n<!-- bench:step -->\nold\n<!-- end -->\n"
    text += "between\n<!-- bench:peers -->\n<!-- end -->\nafter"
    shutil.copy(common.RESULTS / "step.json", tmp_path)
    result = common.read_json(tmp_path / "step.json")
    filled = tables.fill(text, tmp_path)
    assert "old" not in filled
    assert filled.startswith(
        f"before\n<!-- bench:step -->\n{common.render(result)}\n<!-- end -->\nbetween\n"
    )
    assert filled.endswith("\nNot measured yet: `python -m benchmarks.peers`.\n<!-- end -->\nafter")
    assert tables.fill(filled, tmp_path) == filled


def test_a_result_of_tiny_settings_is_refused(tmp_path):
    result = common.read_json(common.RESULTS / "step.json")
    (tmp_path / "step.json").write_text(json.dumps(result | {"smoke": True}))
    with pytest.raises(ValueError, match="tiny settings"):
        tables.table_of("step", tmp_path)


def test_the_accuracy_table_has_a_row_for_every_recipe_that_has_a_seed_done(fake_main, tmp_path):
    assert tables.table_of("accuracy", tmp_path) == "Not measured yet."
    for recipe in ("resnet18", "quick"):
        time_to_accuracy.main(["--recipe", recipe, "--seeds", "2", "--output", str(tmp_path)])
    fake_main[1].append(time_to_accuracy.STOPPED[0])
    time_to_accuracy.main(["--recipe", "resnet34", "--output", str(tmp_path)])
    lines = tables.table_of("accuracy", tmp_path).splitlines()[2:]
    assert [line.rpartition("`")[0].rpartition(" ")[2] for line in lines] == ["quick", "resnet18"]
    assert all("50.00 ± 0.00 % (2)" in line for line in lines)
