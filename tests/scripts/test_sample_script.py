"""scripts/sample.sh as a user runs it, from inside svg_t2i/, on a tiny random pipeline."""

import json
import os
import subprocess
import sys


def sample(repo_root, environment, *arguments):
    bin_folder = os.path.dirname(sys.executable)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"} | environment
    command = ["bash", "scripts/sample.sh", *arguments]
    return subprocess.run(command, cwd=repo_root / "svg_t2i", env=environment, capture_output=True, text=True)


def test_sample_script(repo_root, saved_pipeline, tmp_path):
    own_run = {"CHECKPOINT": str(saved_pipeline)}
    output = tmp_path / "out"
    environment = own_run | {"OUTPUT": str(output), "RESOLUTION": "64:64x32"}
    done = sample(repo_root, environment, "--num_inference_steps", "2", "--prompt", "noise")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((output / "data.json").read_text())
    assert record["resolution"] == "64x32"
    assert (output / "images" / "dpm_2_0_64x32.png").exists()

    again = sample(repo_root, environment, "--prompt", "noise")
    assert again.returncode == 2
    message = again.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: --output {output} holds images with other settings (num_inference_steps was 2")


def test_missing_weights_are_named(repo_root, tmp_path):
    environment = {"CHECKPOINT": str(tmp_path / "nowhere"), "OUTPUT": str(tmp_path / "out")}
    done = sample(repo_root, environment)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "nowhere" in message
