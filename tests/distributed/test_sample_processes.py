"""torchrun with two processes against one: the same pixels, one set of records, nothing made twice."""

import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image

from svg_t2i.sample import main

PROMPTS = ["noise one", "very much noise", "noise number 3"]


def test_two_processes_make_what_one_makes(repo_root, saved_pipeline, tmp_path):
    arguments = ["--checkpoint", str(saved_pipeline), "--num_inference_steps", "2", "--batch_size", "2"]
    arguments += ["--num_images_per_prompt", "3", "--resolution", "32x48"]
    arguments += [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "svg_t2i/sample.py", *arguments, "--output", str(tmp_path / "two")],
        cwd=repo_root, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("9 images in") == 1
    main([*arguments, "--output", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "data.json").read_text()) for name in ("one", "two"))
    assert [r["caption"] for r in two] == [prompt for prompt in PROMPTS for _ in range(3)]
    for a, b in zip(one, two, strict=True):
        assert {**a, "image_url": ""} == {**b, "image_url": ""}
        left, right = (np.asarray(Image.open(record["image_url"])) for record in (a, b))
        assert np.array_equal(left, right)
    assert (tmp_path / "two" / "grid.png").is_file()
    # one process goes on where two stopped
    (tmp_path / "two" / "images" / "dpm_2_4_32x48.png").unlink()
    main([*arguments, "--output", str(tmp_path / "two")])
    assert np.array_equal(np.asarray(Image.open(two[4]["image_url"])), np.asarray(Image.open(one[4]["image_url"])))
