"""The count of unusable samples: its limit, its file, and many processes that share it."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from autoencoder.common.config import UserError
from autoencoder.sources.failures import Failures


def filled(max_errors, samples, count):
    failures = Failures(max_errors)
    failures.expect("data", samples)
    for number in range(count):
        failures.add("data", number, f"{number}.png: broken")
    return failures


@pytest.mark.parametrize(
    ("max_errors", "samples", "limit"),
    [(0.01, 100, 16), (0.01, 10_000, 100), (0.01, 10_001, 101), (0.5, 1000, 500), (0, 1000, 0), (1, 9, 1), (40, 9, 40)],
)
def test_limits(max_errors, samples, limit):
    assert filled(max_errors, samples, limit).limit == limit
    with pytest.raises(UserError, match=rf"data: more than {limit} unusable samples"):
        filled(max_errors, samples, limit + 1)


@pytest.mark.parametrize("max_errors", [-1, float("nan")])
def test_limits_that_are_none(max_errors):
    with pytest.raises(UserError, match="max_errors=.* must be a share of the data"):
        Failures(max_errors)


def test_a_share_is_of_all_sources():
    failures = Failures(0.1)
    failures.expect("a", 1000)
    failures.expect("b", 500)
    assert failures.limit == 150


def test_a_sample_counts_once():
    failures = filled(2, 9, 2)
    failures.add("data", 1, "1.png: broken")
    assert len(failures) == 2
    assert ("data", 1) in failures
    assert ("other", 1) not in failures


def test_the_message_counts_kinds_and_names_what_to_do(tmp_path):
    failures = Failures(3)
    failures.expect("data", 50)
    failures.keep_in(tmp_path / "run" / "unusable.jsonl")
    for number in range(2):
        failures.add("data", number, f"{number}.png: no such image file")
    failures.add("data", "entry 3", "m.jsonl:3: not valid JSON: oops")
    with pytest.raises(UserError) as caught:
        failures.add("data", 7, "7.png: no such image file")
    message = str(caught.value)
    assert "max_errors=3 of 50): 3 × no such image file, 1 × not valid JSON;" in message
    assert f"delete {tmp_path / 'run' / 'unusable.jsonl'}" in message
    assert message.endswith("0.png: no such image file\n  1.png: no such image file\n  m.jsonl:3: not valid JSON: oops")


def test_many_failures_are_told_sparingly(caplog):
    caplog.set_level(logging.WARNING)
    filled(1000, 1000, 300)
    assert len(caplog.records) == 16 + 4  # then at 32, 64, 128, 256


def test_what_was_found_before_the_file_was_known_is_written(tmp_path):
    failures = filled(9, 9, 2)
    path = tmp_path / "unusable.jsonl"
    failures.keep_in(path)
    failures.keep_in(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"source": "data", "sample": number, "reason": f"{number}.png: broken"} for number in range(2)
    ]


def test_no_failure_no_file(tmp_path):
    failures = filled(9, 9, 0)
    failures.keep_in(tmp_path / "run" / "unusable.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_counting(tmp_path):
    path = tmp_path / "unusable.jsonl"
    first, again = filled(3, 9, 2), filled(3, 9, 0)
    first.keep_in(path)
    with path.open("a") as file:
        file.write('{"source": "of an earlier start", "sample": 1, "reason": "x"}\n{"source": "data", "sam')
    again.keep_in(path)
    assert len(again) == 2
    with path.open("a") as file:  # the line is finished by the machine that had begun it
        file.write('ple": 5, "reason": "5.png: broken"}\n')
    with pytest.raises(UserError, match="more than 3"):
        again.add("data", 6, "6.png: broken")


def add_some(failures, numbers):
    for number in numbers:
        failures.add("data", number, f"{number}.png: broken")


def test_processes_share_the_count(tmp_path):
    failures = filled(40, 99, 0)
    failures.keep_in(tmp_path / "unusable.jsonl")
    context = multiprocessing.get_context("fork")
    shares = [range(0, 20), range(10, 30), range(20, 40)]
    workers = [context.Process(target=add_some, args=(failures, share)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    lines = (tmp_path / "unusable.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines) == list(range(40))  # none twice
    with pytest.raises(UserError, match="more than 40 unusable samples"):
        failures.add("data", 40, "40.png: broken")


def test_folders_of_results_are_made_when_needed(tmp_path):
    failures = filled(9, 9, 0)
    failures.keep_in(Path(tmp_path, "a", "b", "unusable.jsonl"))
    failures.add("data", 0, "0.png: broken")
    assert (tmp_path / "a" / "b" / "unusable.jsonl").is_file()
