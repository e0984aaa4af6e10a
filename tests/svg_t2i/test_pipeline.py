from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.config import UserError
from autoencoder.model import SVGAutoencoder
from svg_t2i import sample as sample_entry
from svg_t2i.model import DiTConfig, SVGDiT
from svg_t2i.packing import TextFeatures
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.text import SYSTEM_PROMPTS, TextEncoder


@pytest.fixture(scope="module")
def pipeline(toy_parts) -> SVGT2IPipeline:
    torch.manual_seed(3)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "axes_dims": (4, 6, 6), "multiple_of": 32}
    transformer = SVGDiT(DiTConfig(in_channels=32, cap_feat_dim=32, **sizes))
    for parameter in transformer.parameters():  # the published initialisation predicts zero: nothing would be tested
        parameter.data += 0.05 * torch.randn_like(parameter)
    autoencoder = SVGAutoencoder.from_pretrained(toy_parts / "autoencoder")
    return SVGT2IPipeline(autoencoder, transformer, TextEncoder.from_pretrained(toy_parts / "text_encoder"))


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 3.0}
PROMPTS = ["a picture of noise", "a picture of very very much noise number 3", "noise"]


def test_output_types_and_orientation(pipeline):
    images = pipeline(PROMPTS[:1], **SETTINGS)
    assert [image.size for image in images] == [(48, 32)]  # PIL says (width, height); the release swapped the two
    assert pipeline(PROMPTS[0], output_type="pt", **SETTINGS).shape == (1, 3, 32, 48)
    assert pipeline(PROMPTS[0], output_type="latent", **SETTINGS).shape == (1, 32, 2, 3)


@pytest.mark.parametrize("solver", ["dpm", "euler", "heun", "midpoint", "dopri5"])
def test_an_image_does_not_depend_on_its_batch(pipeline, solver):
    together = pipeline(PROMPTS, seed=[5, 6, 7], solver=solver, output_type="latent", **SETTINGS)
    for i, prompt in enumerate(PROMPTS):
        alone = pipeline(prompt, seed=5 + i, solver=solver, output_type="latent", **SETTINGS)
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-2


def test_seeds_and_images_per_prompt(pipeline):
    four = pipeline(PROMPTS[:2], num_images_per_prompt=2, seed=11, output_type="latent", **SETTINGS)
    for row, (prompt, seed) in enumerate([(0, 11), (0, 12), (1, 11), (1, 12)]):
        one = pipeline(PROMPTS[prompt], seed=seed, output_type="latent", **SETTINGS)
        torch.testing.assert_close(one[0], four[row], atol=2e-5, rtol=1e-4)
    start = torch.randn(32, 2, 3, generator=torch.Generator().manual_seed(11))
    given = pipeline(PROMPTS[0], latents=start[None], output_type="latent", **SETTINGS)
    torch.testing.assert_close(given[0], four[0], atol=2e-5, rtol=1e-4)


def test_guidance_equals_two_plain_runs_combined_by_hand(pipeline):
    """One Euler step of the guided pipeline against v_u + s (v_c − v_u), written out with separate model calls."""
    scale, noise = 2.5, torch.randn(1, 32, 2, 3)
    guided = pipeline(
        PROMPTS[0], negative_prompt="noise", latents=noise, output_type="latent", solver="euler", renorm_cfg=0,
        height=32, width=48, num_inference_steps=2, guidance_scale=scale,
    )  # fmt: skip
    encode = pipeline.text_encoder.encode
    t = torch.zeros(1)
    with torch.no_grad():
        v_cond = pipeline.transformer(noise, t, encode([SYSTEM_PROMPTS["base"] + PROMPTS[0]]))
        v_uncond = pipeline.transformer(noise, t, encode([SYSTEM_PROMPTS["base"] + "noise"]))
    torch.testing.assert_close(guided, noise + v_uncond + scale * (v_cond - v_uncond), atol=1e-5, rtol=1e-5)


def test_guidance_one_and_truncation_skip_the_unconditional_branch(pipeline):
    calls = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        pipeline(PROMPTS[0], **SETTINGS | {"guidance_scale": 1.0})
        assert calls == [1] * 4
        calls.clear()
        pipeline(PROMPTS[0], time_shift=1.0, solver="euler", cfg_trunc=0.5, **SETTINGS)
        assert calls == [2, 2, 1]  # t = 0, 1/3, 2/3
    finally:
        hook.remove()


def test_save_and_load_give_the_same_images(pipeline, saved):
    loaded = SVGT2IPipeline.from_pretrained(saved)
    for before, after in zip(pipeline(PROMPTS, **SETTINGS), loaded(PROMPTS, **SETTINGS)):
        assert np.abs(np.asarray(before, int) - np.asarray(after, int)).max() <= 1


def test_parts_that_do_not_belong_together_are_refused(pipeline, saved, toy_parts, tmp_path):
    config = json.loads((saved / "transformer" / "config.json").read_text())
    config["fingerprints"]["autoencoder"]["stats"] = "0" * 16
    other = tmp_path / "transformer"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes((saved / "transformer" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="autoencoder's stats was 0000000000000000 and is"):
        SVGT2IPipeline.from_pretrained(
            other, autoencoder=toy_parts / "autoencoder", text_encoder=toy_parts / "text_encoder"
        )
    with pytest.raises(UserError, match="does not say which autoencoder"):
        SVGT2IPipeline.from_pretrained(saved / "transformer")
    wide = SVGDiT(DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), in_channels=32, cap_feat_dim=64))
    with pytest.raises(UserError, match="features are 32 wide, the transformer expects 64"):
        SVGT2IPipeline(pipeline.autoencoder, wide, pipeline.text_encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 40}, "height = 40"),
        ({"solver": "rk45"}, "choose one of dpm"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"solver": "euler", "num_inference_steps": 1}, "needs both ends"),
        ({"system_prompt": "nice"}, "choose one of"),
        ({"time_shift": 0.0}, r"time_shift = 0\.0"),
    ],
)
def test_wrong_arguments(pipeline, changes, message):
    with pytest.raises(UserError, match=message):
        pipeline(PROMPTS[0], **SETTINGS | changes)
    with pytest.raises(UserError, match="empty list"):
        pipeline([], **SETTINGS)


# ------------------------------------------------------------------------------------------------------ the entry


def run(saved, output, *arguments):
    sample_entry.main(
        ["--checkpoint", str(saved), "--output", str(output), "--resolution", "48x32", "--num_inference_steps", "3"]
        + list(arguments)
    )
    return json.loads((output / "data.json").read_text())


def test_files_names_and_records(saved, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"refined_prompt": "noise one", "prompt": "no"}\n"noise two"\n{"caption": ["noise three"]}\n')
    records = run(saved, tmp_path / "out", "--prompts", str(prompts), "--num_images_per_prompt", "2", "--seed", "4")
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


def test_batch_size_does_not_change_images(saved, tmp_path):
    arguments = ["--prompt", "noise one", "--prompt", "very much noise", "--resolution", "48x32", "2:32x48"]
    one = run(saved, tmp_path / "one", *arguments, "--batch_size", "1")
    four = run(saved, tmp_path / "four", *arguments, "--batch_size", "4")
    assert [r["resolution"] for r in one] == ["48x32", "32x48"] * 2
    for a, b in zip(one, four):
        left, right = (np.asarray(Image.open(r["image_url"]), int) for r in (a, b))
        assert np.abs(left - right).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["--prompt", "x", "--resolution", "50x32"], "width 50 is not divisible by 16; try 48"),
        (["--prompt", "x", "--resolution", "big"], "expected WIDTHxHEIGHT"),
        (["--prompt", "x", "--batch_size", "0"], "at least 1"),
        (["--prompts", "missing.txt"], "does not exist"),
    ],
)
def test_wrong_command_lines(saved, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(saved, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "holds no prompt"),
        ("empty.json", "[]", "holds no prompt"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"broken\.jsonl:2: not valid JSON"),
        ("field.jsonl", '{"prompt": "a"}\n{"title": "b"}\n', r"field\.jsonl:2: no prompt"),
        ("list.json", '{"prompt": "a"}', "expected a list"),
        ("p.csv", "a", "unknown kind"),
    ],
)
def test_wrong_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        sample_entry.read_prompts(tmp_path / name)


def test_a_used_output_folder_is_left_alone(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty; nothing was overwritten"):
        run(saved, tmp_path / "out", "--prompt", "noise")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep.txt"]


def test_text_features_are_shared_between_equal_prompts(pipeline):
    encoded = []
    original = pipeline.text_encoder.encode

    def counting(texts) -> TextFeatures:
        encoded.append(list(texts))
        return original(texts)

    pipeline.text_encoder.encode = counting
    try:
        pipeline([PROMPTS[0]] * 3, **SETTINGS)
    finally:
        del pipeline.text_encoder.encode
    assert encoded == [[SYSTEM_PROMPTS["base"] + PROMPTS[0], ""]]
