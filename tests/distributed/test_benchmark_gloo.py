"""Two processes over gloo against one: the same images, bit for bit, the same numbers and verdicts."""

import json
import os
import socket
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from svg_t2i.benchmark import main


def start(rank, port, arguments):
    """One of two processes, with torchrun's environment."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(arguments)


def in_two_processes(arguments):
    """Forked: all imports are done. A failure in a process is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(start, (port, [str(word) for word in arguments]), nprocs=2, start_method="fork")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_two_processes_make_and_measure_what_one_does(toy_pipeline, toy_parts, tmp_path):
    toy_pipeline.save_pretrained(tmp_path / "model")
    manifest = toy_parts / "manifest.jsonl"
    arguments = ["folder", "--checkpoint", tmp_path / "model", "--prompts", manifest, "--reference", manifest]
    arguments += ["--resolution", "32x32", "--num_inference_steps", "2", "--batch_size", "3", "--output"]
    in_two_processes([*arguments, tmp_path / "two"])
    main([*map(str, arguments), str(tmp_path / "one")])
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "images").iterdir()} for n in ("one", "two"))
    assert len(one) == 7
    assert one == two
    numbers = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert numbers[0] == numbers[1]
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["run"]["processes"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_two_processes_judge_as_one_does(detector_folder, clip_folder, tmp_path, capsys):
    """GenEval's verdicts by tiny random networks, which are certain of nothing."""
    for number, tag in enumerate(["colors", "counting", "single_object"]):
        (tmp_path / "images" / f"{number:05d}" / "samples").mkdir(parents=True)
        include = [{"class": "cup", "count": 1} | ({"color": "red"} if tag == "colors" else {})]
        record = {"tag": tag, "include": include, "prompt": "a photo of a cup"}
        (tmp_path / "images" / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(record))
        for i in range(3):
            noise = np.random.default_rng(10 * number + i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / f"{number:05d}" / "samples" / f"{i:04d}.png")
    arguments = ["judge", "--images", tmp_path / "images", "--detector", detector_folder, "--clip", clip_folder]
    in_two_processes([*arguments, "--output", tmp_path / "two.jsonl"])
    main([*map(str, arguments), "--name", "tiny"])
    one, two = (tmp_path / "results.jsonl").read_text(), (tmp_path / "two.jsonl").read_text()
    assert one == two
    assert len(one.splitlines()) == 9
    assert "| tiny | 0.00 | – | 0.00 | 0.00 | – | – | – | – |" in capsys.readouterr().out
    used = json.loads((tmp_path / "results.json").read_text())
    assert (used["pictures"], used["detector"], used["torch"]) == (9, str(detector_folder), version("torch"))
