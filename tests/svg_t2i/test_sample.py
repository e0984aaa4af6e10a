"""The command line: files and records, resuming, failures, every verb."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.saving import read_parameters
from svg_t2i import sample as sample_entry
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.rendering import folder as rendering
from svg_t2i.text.files import read_prompts

PROMPTS = ["--prompt", "noise one", "--prompt", "very much noise"]


def run(saved_pipeline, output, *arguments):
    common = ["--checkpoint", saved_pipeline, "--output", output, "--resolution", "48x32", "--num_inference_steps", "3"]
    sample_entry.main([str(argument) for argument in common + list(arguments)])
    return json.loads((output / "data.json").read_text())


def pixels(record):
    return np.asarray(Image.open(record["image_url"]), int)


def test_files_names_and_records(saved_pipeline, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"refined_prompt": "noise one", "prompt": "no"}\n"noise two"\n{"caption": ["noise three"]}\n')
    more = ["--num_images_per_prompt", "2", "--seed", "4"]
    records = run(saved_pipeline, tmp_path / "out", "--prompts", str(prompts), *more)
    assert [r["caption"] for r in records] == [p for p in ("noise one", "noise two", "noise three") for _ in range(2)]
    assert [r["seed"] for r in records] == [4, 5] * 3
    files = sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert files == [f"dpm_3_{i}_48x32.png" for i in range(6)]
    for record in records:
        with Image.open(record["image_url"]) as image:
            assert image.size == (48, 32)
            assert json.loads(image.text["parameters"]) == record
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width >= 2 * 48


def test_batch_size_does_not_change_images(saved_pipeline, tmp_path):
    arguments = [*PROMPTS, "--resolution", "48x32", "2:32x48"]
    one = run(saved_pipeline, tmp_path / "one", *arguments, "--batch_size", "1")
    four = run(saved_pipeline, tmp_path / "four", *arguments, "--batch_size", "4")
    assert [r["resolution"] for r in one] == ["48x32", "32x48"] * 2
    for a, b in zip(one, four):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["--prompt", "x", "--resolution", "50x32"], "width = 50: .*multiples of 16, such as 48"),
        (["--prompt", "x", "--resolution", "big"], "expected WIDTHxHEIGHT"),
        (["--prompt", "x", "--batch_size", "0"], "at least 1"),
        (["--prompts", "missing.txt"], "does not exist"),
        (["--prompt", "x", "--guidance_interval", "0.9", "0.1"], "0 ≤ lo ≤ hi ≤ 1"),
        (["--prompt", "x", "--time_shift", "-1"], "must be positive"),
        (["--prompt", "x", "--solver", "heun", "--num_inference_steps", "1"], "needs both ends"),
        (["--prompt", "x", "--seed", "-1"], "--seed -1: must be a whole number"),
        (["--prompt", "x", "--device", "quantum"], "--device quantum: no such device"),
        (["--prompt", "x", "--device", "cuda:99"], "GPUs are visible here"),
        (["--prompt", "x", "--guide", "nowhere"], "nowhere: no DiT here"),
        (["--prompt", "x", "--text_encoder", "./nowhere"], "no such folder"),
        (["--prompt", "x", "--autoencoder", "nowhere.yaml"], "'nowhere.yaml' does not exist"),
        (["--prompt", "x", "--latent_stats", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_wrong_command_lines(saved_pipeline, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(SVGT2IPipeline, "from_pretrained", None)  # refused before any weight is read
    with pytest.raises(UserError, match=message):
        run(saved_pipeline, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "holds no prompt"),
        ("empty.json", "[]", "holds no prompt"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"broken\.jsonl:2: not valid JSON"),
        ("field.jsonl", '{"prompt": "a"}\n{"title": "b"}\n', r"field\.jsonl:2: no prompt"),
        ("list.json", '{"prompt": "a"}', "expected a list"),
        ("p.yaml", "a", "unknown kind"),
        ("scale.jsonl", '{"prompt": "a", "guidance_scale": "much"}', r"scale\.jsonl:1: guidance_scale = 'much'"),
    ],
)
def test_wrong_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_a_used_output_folder_is_left_alone(saved_pipeline, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    monkeypatch.setattr(SVGT2IPipeline, "from_pretrained", None)  # refused before any weight is read
    with pytest.raises(UserError, match="not empty; nothing was overwritten"):
        run(saved_pipeline, tmp_path / "out", "--prompt", "noise")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


def test_a_folder_of_other_weights_is_refused(saved_pipeline, toy_pipeline, tmp_path, monkeypatch):
    """The same path may hold other weights by now: a training run goes on."""
    run(saved_pipeline, tmp_path, "--prompt", "noise")
    weight = toy_pipeline.transformer.x_embedder.weight
    changed = toy_pipeline.networks.describe()["transformer"]
    monkeypatch.setattr(weight, "data", weight.data + 0.1)
    monkeypatch.setattr(SVGT2IPipeline, "from_pretrained", lambda *args, **kwargs: toy_pipeline)
    assert toy_pipeline.networks.describe()["transformer"] != changed
    with pytest.raises(UserError, match=f"other settings .model was .*{changed}"):
        run(saved_pipeline, tmp_path, "--prompt", "noise two")


def test_the_same_command_again_makes_only_what_is_missing(saved_pipeline, tmp_path, monkeypatch):
    arguments = [*PROMPTS, "--num_images_per_prompt", "2", "--batch_size", "3"]
    records = run(saved_pipeline, tmp_path, *arguments)
    before = [pixels(record) for record in records]
    times = [(tmp_path / "images" / f"dpm_3_{i}_48x32.png").stat().st_mtime_ns for i in range(4)]
    (tmp_path / "images" / "dpm_3_1_48x32.png").unlink()
    (tmp_path / "images" / ".dpm_3_1_48x32.png.7.tmp").write_bytes(b"half")
    made, call = [], SVGT2IPipeline.__call__
    monkeypatch.setattr(SVGT2IPipeline, "__call__", lambda self, *a, **k: made.append(k["seed"]) or call(self, *a, **k))
    again = run(saved_pipeline, tmp_path, *arguments)
    assert made == [[0, 1, 0]]  # its whole batch, so that not one bit differs
    assert again == records
    assert all(np.array_equal(a, pixels(record)) for a, record in zip(before, again))
    after = [(tmp_path / "images" / f"dpm_3_{i}_48x32.png").stat().st_mtime_ns for i in range(4)]
    assert [a == b for a, b in zip(times, after)] == [True, False, True, True]
    assert not list((tmp_path / "images").glob(".*"))

    with pytest.raises(UserError, match=r"other settings \(guidance_scale was 3.0, is 5.0\)"):
        run(saved_pipeline, tmp_path, *arguments, "--guidance_scale", "5")
    with pytest.raises(UserError, match="another image .caption 'noise one'"):
        run(saved_pipeline, tmp_path, "--prompt", "other", "--num_images_per_prompt", "2")
    assert len(run(saved_pipeline, tmp_path, *arguments, "--prompt", "noise three")) == 6  # more prompts may follow


def test_a_failed_image_is_reported_and_does_not_stop_the_rest(saved_pipeline, tmp_path, monkeypatch, caplog):
    call = SVGT2IPipeline.__call__

    def fail_on_five(self, prompts, *, seed, **settings):
        if 5 in seed:
            raise RuntimeError("broken kernel")
        return call(self, prompts, seed=seed, **settings)

    monkeypatch.setattr(SVGT2IPipeline, "__call__", fail_on_five)
    arguments = ["--prompt", "noise", "--num_images_per_prompt", "4", "--seed", "3"]
    with pytest.raises(UserError, match="1 of 4 images failed"):
        run(saved_pipeline, tmp_path, *arguments)
    assert [r["seed"] for r in json.loads((tmp_path / "data.json").read_text())] == [3, 4, 6]
    assert json.loads((tmp_path / "failed.json").read_text()) == {"2": "RuntimeError: broken kernel"}
    assert "image 2 failed" in caplog.text
    monkeypatch.undo()
    assert [r["seed"] for r in run(saved_pipeline, tmp_path, *arguments)] == [3, 4, 5, 6]
    assert not (tmp_path / "failed.json").exists()


def test_a_full_disk_leaves_what_is_finished(saved_pipeline, tmp_path, monkeypatch):
    save = Image.Image.save

    def full_after_two(self, path, *args, **kwargs):
        if len(list((tmp_path / "images").glob("*.png"))) == 2:
            save(self.crop((0, 0, 8, 8)), path, *args, **kwargs)  # a part of it fits
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(rendering, "RECORD_EVERY", 0.0)
    monkeypatch.setattr(Image.Image, "save", full_after_two)
    arguments = [*PROMPTS, "--num_images_per_prompt", "2", "--batch_size", "2"]
    with pytest.raises(UserError, match="is full; its finished images and records are whole"):
        run(saved_pipeline, tmp_path, *arguments)
    records = json.loads((tmp_path / "data.json").read_text())
    assert len(records) == 2
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["dpm_3_0_48x32.png", "dpm_3_1_48x32.png"]
    assert [pixels(record).shape for record in records] == [(32, 48, 3)] * 2
    monkeypatch.undo()
    assert len(run(saved_pipeline, tmp_path, *arguments)) == 4


def test_settings_of_single_prompts_and_presets(saved_pipeline, tmp_path):
    lines = [{"prompt": "noise", "guidance_scale": 1.5}, {"prompt": "noise"}]
    lines += [{"prompt": "a", "negative_prompt": "noise"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = run(saved_pipeline, tmp_path / "out", "--prompts", tmp_path / "p.jsonl", "--preset", "quickstart")
    assert [r["guidance_scale"] for r in records] == [1.5, 2.0, 2.0]
    assert records[2]["negative_prompt"] == "noise"
    assert records[0]["system_prompt"] == "empty"
    assert np.abs(pixels(records[0]) - pixels(records[1])).max() > 0
    settings = ["--preset", "quickstart", "--guidance_scale", 1.5]
    alone = run(saved_pipeline, tmp_path / "one", "--prompt", "noise", *settings)
    assert np.abs(pixels(records[0]) - pixels(alone[0])).max() <= 1


def test_a_record_has_its_own_seed(saved_pipeline, tmp_path):
    """The records of a run are a prompt file, which gives the same images."""
    (tmp_path / "p.csv").write_text("prompt,seed\nnoise,7\na,\n")
    records = run(saved_pipeline, tmp_path / "out", "--prompts", tmp_path / "p.csv", "--num_images_per_prompt", 2)
    assert [record["seed"] for record in records] == [7, 8, 0, 1]
    again = run(saved_pipeline, tmp_path / "again", "--prompts", tmp_path / "out" / "data.json")
    assert [record["seed"] for record in again] == [7, 8, 0, 1]
    assert all(np.array_equal(pixels(one), pixels(other)) for one, other in zip(records, again, strict=True))


# ------------------------------------------------------------------------------------------------------ the other verbs


def verb(saved_pipeline, output, name, *arguments):
    common = [name, "--checkpoint", saved_pipeline, "--output", output, "--num_inference_steps", "3"]
    sample_entry.main([str(argument) for argument in common + list(arguments)])
    return json.loads((output / "data.json").read_text())


@pytest.fixture
def picture(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "picture.png"
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


def test_verbs_that_start_from_images(saved_pipeline, toy_parts, picture, tmp_path):
    more = ["--num_images_per_prompt", "2"]
    records = verb(saved_pipeline, tmp_path / "i2i", "image_to_image", "--image", picture, "--prompt", "noise", *more)
    assert [r["resolution"] for r in records] == ["64x48"] * 2
    assert records[0]["strength"] == 0.6
    both = ["--image", picture, "--image", toy_parts / "0.png"]
    records = verb(saved_pipeline, tmp_path / "var", "variation", *both, "--t", "0.5", *more)
    assert [r["resolution"] for r in records] == ["64x48"] * 2 + ["64x64"] * 2
    assert [r["image"] for r in records] == [str(picture)] * 2 + [str(toy_parts / "0.png")] * 2
    mask = tmp_path / "mask.png"
    Image.new("L", (70, 50), 255).save(mask)
    records = verb(saved_pipeline, tmp_path / "in", "inpaint", "--image", picture, "--mask", mask, "--prompt", "noise")
    assert records[0]["mask"] == str(mask)
    records = verb(saved_pipeline, tmp_path / "between", "interpolate", *both, "--weights", "3")
    assert [r["weight"] for r in records] == [0.0, 0.5, 1.0]
    assert len(verb(saved_pipeline, tmp_path / "words", "interpolate", *PROMPTS, "--weights", "2")) == 2


def test_retrieve_and_enhance(saved_pipeline, toy_parts, tmp_path, capsys):
    command = ["--checkpoint", saved_pipeline, "--output", tmp_path]
    query = ["--image", toy_parts / "1.png", "--folder", toy_parts, "--top_k", "3"]
    sample_entry.main([str(argument) for argument in ["retrieve", *command, *query]])
    best = json.loads((tmp_path / "matches.json").read_text())["matches"]
    assert best[0] == {"path": str(toy_parts / "1.png"), "similarity": pytest.approx(1.0, abs=1e-5)}
    assert len(best) == 3
    assert capsys.readouterr().out.splitlines()[0].endswith("1.png")
    assert (tmp_path / "grid.png").is_file()
    sample_entry.main([str(argument) for argument in ["enhance", *command, "--prompt", "much noise"]])
    assert capsys.readouterr().out.startswith("much noise")


def test_the_grid_has_as_many_columns_as_asked_for(saved_pipeline, tmp_path, capsys):
    """Also of images that are there already; 0 takes it away."""
    words = ["--checkpoint", str(saved_pipeline), "--output", str(tmp_path / "out"), "--num_inference_steps", "2"]
    words += [word for i in range(6) for word in ("--prompt", f"noise {i}")]
    widths = []
    for columns in (3, 2):
        sample_entry.main([*words, "--grid", str(columns)])
        with Image.open(tmp_path / "out" / "grid.png") as grid:
            widths.append(grid.width)
    assert widths[0] / widths[1] == pytest.approx(3 / 2, rel=0.05)
    assert "nothing was loaded" in capsys.readouterr().out
    sample_entry.main([*words, "--grid", "0"])
    assert not (tmp_path / "out" / "grid.png").exists()
    with pytest.raises(UserError, match="--grid -1: must be from 0 to 64"):
        sample_entry.main([*words, "--grid", "-1"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("variation --image nowhere.png", "nowhere.png: no such image file"),
        ("variation --image IMAGE --t 1", r"--t 1.0: must be in \[0, 1\)"),
        ("variation --image tiny.png", "image width = 8: images are at least 16 pixels"),
        ("image_to_image --image IMAGE --prompt a --strength 0", "--strength 0.0: must be above 0"),
        ("image_to_image --image IMAGE", "nothing to draw"),
        ("inpaint --image IMAGE --mask nowhere.png --prompt a", "nowhere.png: no such image file"),
        ("inpaint --image IMAGE --mask black.png --prompt a", "the mask is black everywhere"),
        ("interpolate --prompt a --prompt b --prompt c", "up to two --prompt and none or two --image"),
        ("interpolate --prompt a", "nothing to go between"),
        ("interpolate --image IMAGE --image IMAGE --t 1.5", r"--t 1.5: must be in \[0, 1\]"),
        ("interpolate --prompt a --prompt b --weights 1", "--weights 1: must be at least 2"),
        ("retrieve --image IMAGE --folder nowhere", "image folder nowhere does not exist"),
        ("retrieve --image IMAGE --image IMAGE --folder .", "retrieve takes one --image"),
        ("retrieve --image IMAGE --folder . --top_k 0", "--top_k 0 must be at least 1"),
        ("enhance", "nothing to draw"),
    ],
)
def test_what_no_verb_can_do_is_said_early(saved_pipeline, picture, tmp_path, monkeypatch, command, message):
    monkeypatch.setattr(SVGT2IPipeline, "from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (70, 50)).save("black.png")
    Image.new("RGB", (8, 8)).save("tiny.png")
    words = command.replace("IMAGE", str(picture)).split()
    with pytest.raises(UserError, match=message):
        sample_entry.main([*words, "--checkpoint", str(saved_pipeline), "--output", "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_each_kind_of_file_holds_its_parameters(saved_pipeline, tmp_path, kind):
    prompt = "noise, “quoted” 🦊 <b>"
    records = run(saved_pipeline, tmp_path / "out", "--prompt", prompt, "--format", kind, "--seed", "7")
    path = tmp_path / "out" / "images" / f"dpm_3_0_48x32.{kind}"
    with Image.open(path) as image:
        assert (image.format, image.size) == ({"jpg": "JPEG"}.get(kind, kind.upper()), (48, 32))
    assert read_parameters(path) == records[0]
    assert (read_parameters(path)["caption"], read_parameters(path)["seed"]) == (prompt, 7)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f'<img src="images/{path.name}"' in page
    assert "noise, “quoted” 🦊 &lt;b&gt;" in page
    other = "webp" if kind == "png" else "png"
    with pytest.raises(UserError, match=f"format was '{kind}', is '{other}'"):
        run(saved_pipeline, tmp_path / "out", "--prompt", prompt, "--format", other)


def test_the_same_command_again_loads_nothing(saved_pipeline, tmp_path, monkeypatch, capsys):
    before = run(saved_pipeline, tmp_path, *PROMPTS)
    monkeypatch.setattr(SVGT2IPipeline, "from_pretrained", None)
    assert run(saved_pipeline, tmp_path, *PROMPTS) == before
    assert f"all 2 images are in {tmp_path / 'images'}; nothing was loaded" in capsys.readouterr().out
    for other in (["--dtype", "bf16"], ["--raw_weights"], ["--quantization", "int8"]):  # could be another model
        with pytest.raises(TypeError):
            run(saved_pipeline, tmp_path, *PROMPTS, *other)
    (tmp_path / "images" / "dpm_3_1_48x32.png").unlink()
    with pytest.raises(TypeError):
        run(saved_pipeline, tmp_path, *PROMPTS)


def test_height_and_width_in_place_of_a_resolution(saved_pipeline, tmp_path):
    common = ["--checkpoint", str(saved_pipeline), "--num_inference_steps", "2", "--prompt", "noise"]

    def sizes(name, *arguments):
        sample_entry.main([*arguments[:1], *common, "--output", str(tmp_path / name), *arguments[1:]])
        return [record["resolution"] for record in json.loads((tmp_path / name / "data.json").read_text())]

    assert sizes("both", "generate", "--height", "64", "--width", "80") == ["80x64"]
    assert sizes("one", "generate", "--height", "64") == ["48x64"]  # the width is the model's
    Image.new("RGB", (90, 70)).save(tmp_path / "x.png")
    image = ["--image", str(tmp_path / "x.png")]
    assert sizes("image", "image_to_image", "--height", "32", "--width", "32", *image) == ["32x32"]
    for arguments, message in (
        (["generate", "--height", "64", "--resolution", "48x32"], "--resolution and --height say the same"),
        (["generate", "--height", "60"], "height = 60: image sides must be positive multiples of 16"),
        (["image_to_image", "--width", "64", *image], "--width alone would stretch the images"),
    ):
        with pytest.raises(UserError, match=message):
            sizes("wrong", *arguments)
