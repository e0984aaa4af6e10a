"""Two processes over gloo against one: the same images, bit for bit, and the same numbers."""

import json
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from svg_t2i.benchmark import main


def start(rank, port, arguments):
    """One of two processes, with torchrun's environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_two_processes_make_and_measure_what_one_does(toy_pipeline, toy_parts, tmp_path):
    toy_pipeline.save_pretrained(tmp_path / "model")
    manifest = toy_parts / "manifest.jsonl"
    arguments = ["folder", "--checkpoint", tmp_path / "model", "--prompts", manifest, "--reference", manifest]
    arguments += ["--resolution", "32x32", "--num_inference_steps", "2", "--batch_size", "3", "--output"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: all imports are done. A failure in a process is raised here.
    mp.start_processes(start, (port, [*map(str, arguments), str(tmp_path / "two")]), nprocs=2, start_method="fork")
    main([*map(str, arguments), str(tmp_path / "one")])
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "images").iterdir()} for n in ("one", "two"))
    assert len(one) == 7
    assert one == two
    numbers = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert numbers[0] == numbers[1]
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["run"]["processes"] == 2
