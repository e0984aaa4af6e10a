"""The report of a GPU: in its form for CPUs, and cut off, failing and running out of time at its parts."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

from autoencoder.common.config import UserError
from benchmarks import gpu_report
from benchmarks.gpu_report import Failed, Part, call, parse_arguments, planned_gib, report
from benchmarks.training import in_turn


@pytest.fixture
def options(tmp_path):
    return parse_arguments(["--device", "cpu", "--output", str(tmp_path), "--minutes", "5"])


def test_the_parts_run_on_a_cpu_at_toy_size(tmp_path, repo_root):
    words = ["--device", "cpu", "--minutes", "4", "--output", tmp_path, "--parity_dir", tmp_path / "none"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *words],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_report.json").read_text())
    assert list(found) == [part.name for part in gpu_report.PARTS]
    assert "skipped" in found["parity"]
    assert all("failed" not in entry for entry in found.values())
    assert found["survival"]["found"]["largest_difference"] <= 1e-6
    assert "vs diffusers" in "\n".join(found["training_256"]["output"])
    ways = found["pipeline"]["found"]
    assert ways["preset fast"]["evaluations"] < ways["all networks on the device"]["evaluations"]
    assert {"int8 weights", "networks taking turns"} < set(ways)
    assert "## Sampling" in (tmp_path / "gpu_report.md").read_text()


def test_what_is_done_stays(options):
    """Files after each part; a failed part and one for which there is no time do not end the report."""
    seen = []

    def fine(_, left):
        seen.append(sorted(json.loads((options.output / "gpu_report.json").read_text())) if seen else [])
        assert 0 < left <= 300
        return {"value": 3}, "a line"

    def failing(*_):
        raise Failed("exit code 1\nits last words")

    def cut_off(*_):
        raise KeyboardInterrupt

    parts = [Part("a", "A", 0, fine), Part("b", "B", 0, failing), Part("c", "C", 0, fine)]
    report(options, parts)
    assert seen == [[], ["a", "b"]]
    text = (options.output / "gpu_report.md").read_text()
    assert "failed, exit code 1" in text
    assert "its last words" in text
    options.device = "cuda"
    results = report(options, [Part("late", "Late", 10**6, fine)])
    assert results["late"]["skipped"].startswith("1000000 s are needed and ")
    with pytest.raises(KeyboardInterrupt):
        report(options, [Part("a", "A", 9, fine), Part("d", "D", 9, cut_off)])
    assert list(json.loads((options.output / "gpu_report.json").read_text())) == ["a"]


def test_chosen_parts_join_an_earlier_report(options):
    parts = [Part(name, name.upper(), 0, lambda *_: ({"value": 1}, "")) for name in ("versions", "attention")]
    report(options, parts)
    options.parts = ["attention"]
    again = [Part("attention", "A", 0, lambda *_: ({"value": 2}, "")), Part("other", "B", 0, lambda *_: 1 / 0)]
    found = {name: entry["found"]["value"] for name, entry in report(options, again).items()}
    assert found == {"versions": 1, "attention": 2}


TRAINING = """
ours: 312.0 ms, 81.9 GiB
diffusers: 617.0 ms, 131.3 GiB
"""
CALLS = """
all networks on the device: 5.60 s, 100 evaluations, 11.7 GiB (planned: 11.9)
preset fast: 3.10 s, 52 evaluations, 11.7 GiB
8-bit products (fp8_dynamic): needs a GPU of compute capability 8.9
"""


def test_what_was_measured_before_the_time_was_up_is_kept(monkeypatch, options):
    printed = iter([TRAINING, CALLS])

    def cut_off(*_):
        raise Failed(f"not done after 300 s{next(printed)}")

    monkeypatch.setattr(gpu_report, "call", cut_off)
    options.device = "cuda"
    parts = {part.name: part for part in gpu_report.PARTS}
    found = report(options, [parts["training_256"], parts["pipeline"]])
    assert found["training_256"]["failed"] == found["pipeline"]["failed"] == "not done after 300 s"
    cases = found["training_256"]["found"]
    assert cases["ours"] == {"ms": 312.0, "gib": 81.9, "times as fast as diffusers": 1.98}
    assert cases["planned, ours"]["ratio"] == pytest.approx(1, abs=0.06)
    assert found["pipeline"]["found"] == {
        "all networks on the device": {"seconds": 5.6, "evaluations": 100, "gib": 11.7, "planned gib": 11.9},
        "preset fast": {"seconds": 3.1, "evaluations": 52, "gib": 11.7},
    }


def test_a_command_that_fails_or_takes_too_long_is_noted():
    with pytest.raises(Failed, match="exit code 1"):
        call(["no.such.module"], 30)
    with pytest.raises(Failed, match="not done after 2 s\nbegun"):
        call(["timeit", "-n1", "-r1", "import time; print('begun', flush=True); time.sleep(60)"], 2)


def test_a_model_that_finds_no_memory_costs_the_others_nothing(capsys):
    """As the peer at 1024 px does on most cards."""

    def ours(*_):
        return {"ours": lambda: None}

    def peer(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def greedy(*_):
        return {"first": lambda: None, "second": lambda: peer()}

    options = argparse.Namespace(repeats=1, profile=False)
    makers = [(ours, False), (peer, True), (greedy, False)]
    seconds, _ = in_turn(makers, None, None, options, torch.device("cpu"))
    assert list(seconds) == ["ours", "first"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "out of memory" in line] == [
        "peer, compiled: out of memory",
        "second: out of memory",
    ]


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu runs all parts"):
        gpu_report.main(["--output", str(tmp_path)])
    with pytest.raises(UserError, match="--minutes 0.0 must be positive"):
        gpu_report.main(["--device", "cpu", "--minutes", "0", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("pixels", "batch", "checkpointing", "measured"), [(256, 24, "none", 81.9), (1024, 2, "selective", 51.9)]
)
def test_the_plan_agrees_with_what_an_h200_measured(pixels, batch, checkpointing, measured):
    """docs/benchmarks.md, eager, GiB."""
    assert planned_gib(pixels, batch, checkpointing) == pytest.approx(measured, rel=0.06)
