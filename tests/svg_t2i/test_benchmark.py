"""The benchmark's command line on a tiny random pipeline: folders, resuming, refusals, sweeps."""

import csv
import errno
import json
import os

import pytest
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.files import load_image
from svg_t2i import benchmark
from svg_t2i.benchmark import main
from svg_t2i.evaluation import suite_images
from svg_t2i.evaluation.shapes import TASKS, benchmark_scenes, draw_scene


@pytest.fixture(scope="module")
def saved(toy_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    toy_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def geneval_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "evaluation_metadata.jsonl"
    prompts = ["a photo of a teapot", "a photo of much noise", "a picture of two kites"]
    lines = [{"tag": "single_object", "include": [], "prompt": prompt} for prompt in prompts]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


QUICK = ["--resolution", "32x32", "--num_inference_steps", "2", "--system_prompt", "empty", "--device", "cpu"]


def run(verb, saved, output, *arguments):
    main([verb, "--checkpoint", str(saved), "--output", str(output), *QUICK, *map(str, arguments)])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_geneval_resumes_to_the_same_images(saved, geneval_file, tmp_path, monkeypatch):
    arguments = ["--prompts", geneval_file, "--batch_size", 5, "--num_images_per_prompt", 3]
    run("geneval", saved, tmp_path, *arguments)
    images = contents(tmp_path / "images")
    assert len(images) == 3 * (3 + 2)  # samples, grid and metadata of every prompt
    assert json.loads(images[next(p for p in images if p.name == "metadata.jsonl")])["tag"] == "single_object"
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["sampling"]["num_inference_steps"] == 2
    assert settings["model"]["text_encoder"]
    sample = Image.open(tmp_path / "images" / "00001" / "samples" / "0002.png")
    parameters = json.loads(sample.text["parameters"])
    assert (parameters["caption"], parameters["seed"]) == ("a photo of much noise", 5)

    lost = [tmp_path / "images" / "00001" / "samples" / "0000.png", tmp_path / "images" / "00001" / "grid.png"]
    for path in lost:
        path.unlink()
    batches, sample_batch = [], suite_images.sample_batch
    monkeypatch.setattr(suite_images, "sample_batch", lambda *a: batches.append(a) or sample_batch(*a))
    run("geneval", saved, tmp_path, *arguments)
    assert len(batches) == 1
    assert contents(tmp_path / "images") == images

    with pytest.raises(UserError, match="with other settings.*guidance_scale"):
        run("geneval", saved, tmp_path, *arguments, "--guidance_scale", 2)
    with pytest.raises(UserError, match="with other settings .model was.*float32"):
        run("geneval", saved, tmp_path, *arguments, "--dtype", "bf16")
    assert contents(tmp_path / "images") == images


def test_a_full_disk_leaves_what_is_finished(saved, geneval_file, tmp_path, monkeypatch):
    save_image = suite_images.save_image

    def full_after_two(image, path, text):
        if len(list(tmp_path.glob("images/*/samples/*"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_image(image, path, text)

    monkeypatch.setattr(suite_images, "save_image", full_after_two)
    arguments = ["--prompts", geneval_file, "--batch_size", 4, "--num_images_per_prompt", 1]
    with pytest.raises(UserError, match="is full; its finished images and records are whole"):
        run("geneval", saved, tmp_path, *arguments)
    before = contents(tmp_path / "images")
    assert len(before) == 2
    monkeypatch.undo()
    run("geneval", saved, tmp_path, *arguments)
    assert before.items() <= contents(tmp_path / "images").items()
    assert len(list(tmp_path.glob("images/*/samples/*"))) == 3


def test_settings_are_the_model_s_own_where_none_are_given(saved, geneval_file, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_images, "sample_batch", lambda pipeline, texts, batch, seed, sampling: [
        Image.new("RGB", sampling.size) for _ in batch
    ])  # fmt: skip
    arguments = ["geneval", "--checkpoint", str(saved), "--prompts", str(geneval_file), "--device", "cpu"]
    main([*arguments, "--output", str(tmp_path / "own"), "--guidance_interval", "0.1", "0.9"])
    sampling = json.loads((tmp_path / "own" / "settings.json").read_text())["sampling"]
    chosen = {"width": 48, "height": 32, "num_inference_steps": 4, "guidance_interval": [0.1, 0.9]}
    assert chosen.items() <= sampling.items()
    main([*arguments, "--output", str(tmp_path / "preset"), "--preset", "stage1", "--time_shift", "3"])
    sampling = json.loads((tmp_path / "preset" / "settings.json").read_text())["sampling"]
    assert (sampling["width"], sampling["num_inference_steps"], sampling["time_shift"]) == (256, 50, 3.0)


def test_dpg(saved, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "teapot3.txt").write_text("a picture of a teapot")
    run("dpg", saved, tmp_path / "out", "--prompts", prompts)
    assert [p.name for p in (tmp_path / "out" / "images").iterdir()] == ["teapot3.png"]
    assert Image.open(tmp_path / "out" / "images" / "teapot3.png").size == (64, 64)
    assert len(list((tmp_path / "out" / "samples" / "teapot3").iterdir())) == 4
    with pytest.raises(UserError, match="squares"):
        run("dpg", saved, tmp_path / "other", "--prompts", prompts, "--resolution", "48x32")


def test_folder_measures_what_it_makes(saved, toy_parts, tmp_path, capsys):
    reference = toy_parts / "manifest.jsonl"
    arguments = ["--prompts", reference, "--reference", reference, "--metrics", "mmd", "clip_score"]
    run("folder", saved, tmp_path, *arguments, "--clip", tmp_path / "none", "--limit", 3)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["images"], metrics["references"]) == (3, 7)
    assert isinstance(metrics["mmd"], float)
    assert "none" in metrics["clip_score"]["unavailable"]
    assert "clip_score: unavailable: " in capsys.readouterr().out


def test_folder_measures_what_is_there(toy_parts, tmp_path):
    arguments = ["--images", toy_parts, "--reference", toy_parts, "--autoencoder", toy_parts / "autoencoder"]
    main(["folder", "--output", str(tmp_path / "out"), *map(str, arguments)])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["psnr"] == {"unavailable": "every image equals its counterpart"}
    assert metrics["ssim"] == pytest.approx(1)
    assert metrics["mmd"] == pytest.approx(0, abs=1e-6)


def test_shapes(saved, tmp_path, monkeypatch):
    scenes = [s for s in benchmark_scenes() if s.task != "single"][::20] + benchmark_scenes()[:1]
    monkeypatch.setattr(benchmark, "benchmark_scenes", lambda: scenes)
    wanted = {scene.caption: scene for scene in scenes}

    def perfect(pipeline, texts, batch, seed, sampling):
        assert (sampling.size, sampling.system_prompt) == ((64, 64), "empty")
        return [draw_scene(wanted[texts[i]]) for i in batch]

    monkeypatch.setattr(suite_images, "sample_batch", perfect)
    main(["shapes", "--checkpoint", str(saved), "--output", str(tmp_path), "--device", "cpu"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == {f"shapes/{task}": 1.0 for task in (*TASKS, "overall")}
    assert load_image(tmp_path / "grid.png").width > 64


def test_sweep(saved, toy_parts, tmp_path):
    arguments = ["--over", "guidance_scale=1,3", "--manifest", toy_parts / "manifest.jsonl", "--num_images", 3]
    run("sweep", saved, tmp_path, *arguments, "--over", "num_inference_steps=1,2")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = [("1.0", "1"), ("1.0", "2"), ("3.0", "1"), ("3.0", "2")]
    assert [(row["guidance_scale"], row["num_inference_steps"]) for row in rows] == points
    assert len({float(row["mmd"]) for row in rows}) == 4
    assert Image.open(tmp_path / "sweep.png").width > 300

    (tmp_path / "sweep.csv").write_text("guidance_scale,num_inference_steps,mmd\n1.0,1,7.5\n")
    run("sweep", saved, tmp_path, *arguments, "--over", "num_inference_steps=1,2,3")
    with (tmp_path / "sweep.csv").open() as file:
        again = list(csv.DictReader(file))
    assert again[0]["mmd"] == "7.5"  # taken over, not measured again
    assert len(again) == 6
    assert rows[1] in again


def test_summarise(tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text('{"tag": "counting", "correct": true}\n{"tag": "counting", "correct": false}\n')
    (tmp_path / "d.txt").write_text("/a/x.png, 0.5, 0.5\nDPG-Bench score: 50.0\n")
    main(["summarise", "--geneval", str(tmp_path / "r.jsonl"), "--dpg", str(tmp_path / "d.txt"), "--name", "toy"])
    table = capsys.readouterr().out.splitlines()
    assert table[2].endswith("| 0.75 | 85.78 |")
    assert table[3] == "| toy | – | – | 0.50 | – | – | – | – | 50.00 |"
    assert table[-1] == "toy: GenEval: 2 images; DPG-Bench: 1 prompts."


@pytest.mark.parametrize(("arguments", "message"), [
    (["geneval", "--prompts", "nowhere.jsonl"], "--checkpoint is missing"),
    (["geneval", "--prompts", "nowhere.jsonl", "--checkpoint", "x"], "nowhere.jsonl does not exist"),
    (["dpg", "--prompts", "nowhere", "--checkpoint", "x"], "nowhere is no folder"),
    (["dpg", "--prompts", ".", "--checkpoint", "x", "--num_images_per_prompt", "0"], "--num_images_per_prompt 0"),
    (["dpg", "--prompts", ".", "--checkpoint", "x", "--num_images_per_prompt", "5"], "tool reads 4 at most"),
    (["geneval", "--prompts", ".", "--checkpoint", "x", "--renorm_cfg", "-1"], "renorm_cfg"),
    (["geneval", "--prompts", ".", "--checkpoint", "x", "--device", "quantum"], "no such device"),
    (["folder", "--checkpoint", "x"], "--metrics mmd needs real images"),
    (["folder", "--checkpoint", "x", "--reference", "."], "folder needs --prompts"),
    (["folder", "--images", ".", "--reference", "."], "needs an --autoencoder"),
    (["folder", "--images", ".", "--metrics", "clip_score"], "needs captions"),
    (["sweep", "--checkpoint", "x", "--over", "guidance=1,2"], "expected NAME=VALUE"),
    (["sweep", "--checkpoint", "x", "--over", "guidance_scale=1,a"], "'a' is not a number"),
    (["sweep", "--checkpoint", "x", "--over", "guidance_scale=1,1"], "names a value twice"),
    (["sweep", "--checkpoint", "x", "--over", "num_inference_steps=0"], "num_inference_steps = 0 must be at least 1"),
    (["sweep", "--checkpoint", "x", "--over", "guidance_scale=1"], "evaluation.manifest is not set"),
    (["sweep", "--checkpoint", "x", *["--over", "guidance_scale=1"] * 2], "one or two different"),
    (["summarise"], "nothing to summarise"),
])  # fmt: skip
def test_wrong_arguments_are_named_before_anything_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_something_else_is_refused(saved, geneval_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty; nothing was overwritten"):
        run("geneval", saved, tmp_path, "--prompts", geneval_file)
