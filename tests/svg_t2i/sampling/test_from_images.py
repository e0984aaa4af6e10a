"""Sampling from images: limits in which the result is known, and formulas written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i.sampling.from_images import embed_images, slerp
from svg_t2i.sampling.inputs import prepare_image, prepare_mask
from svg_t2i.sampling.steps import encode_images

PROMPTS = ["a picture of noise", "very much noise"]


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def other():
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clean(toy_pipeline, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return toy_pipeline.autoencoder.normalize(toy_pipeline.autoencoder.encode(pixels[None]))


def assert_near(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def latents(method, *args, **kwargs):
    return method(*args, output_type="latent", **{"seed": 0, **kwargs}).images


def test_full_strength_is_text_to_image_and_little_changes_little(toy_pipeline, image, clean):
    plain = latents(toy_pipeline, PROMPTS, seed=4)
    assert_near(latents(toy_pipeline.image_to_image, PROMPTS, image, strength=1.0, seed=4), plain)
    steps = []
    near = latents(
        toy_pipeline.image_to_image, PROMPTS[0], image, strength=0.1, num_inference_steps=40, time_shift=1.0,
        callback_on_step_end=lambda pipe, step, t, kwargs: steps.append(step),
    )  # fmt: skip
    assert steps == [0, 1, 2, 3]  # a tenth of the steps
    far = latents(toy_pipeline.image_to_image, PROMPTS[0], image, strength=0.9, num_inference_steps=40, time_shift=1.0)
    assert (near - clean).square().mean() < 0.1 * (far - clean).square().mean()


def test_images_of_several_sizes_start_where_each_of_their_shifts_says(toy_pipeline, image):
    """A dynamic time shift depends on the size, and so does where the last steps begin."""
    large = image.resize((272, 256))
    settings = {"strength": 0.5, "time_shift": "dynamic", "num_inference_steps": 4}
    seen = []
    together = latents(
        toy_pipeline.image_to_image, PROMPTS, [image, large], seed=[1, 2], **settings,
        callback_on_step_end=lambda pipe, step, t, kwargs: seen.append((round(t, 6), kwargs["indices"])),
    )  # fmt: skip
    assert [indices for _, indices in seen] == [[0], [0], [1], [1]]
    assert seen[0][0] != seen[2][0]
    for i, one in enumerate([image, large]):
        alone = latents(toy_pipeline.image_to_image, PROMPTS[i], one, seed=1 + i, **settings)
        assert_near(together[i], alone[0])


@pytest.mark.parametrize("solver", ["dpm", "euler"])
def test_variation_starts_from_the_image_noised_to_t(toy_pipeline, image, clean, solver):
    """Two steps by hand: the first velocity is that of t·image + (1 − t)·noise."""
    noise = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(9))
    first = []

    def velocity(tokens, sizes, timesteps, text, original=toy_pipeline.transformer.forward_packed):
        first.append((tokens.clone(), float(timesteps[0])))
        return original(tokens, sizes, timesteps, text)

    toy_pipeline.transformer.forward_packed = velocity
    try:
        toy_pipeline.variation(image, t=0.7, seed=9, solver=solver, guidance_scale=1.0)
    finally:
        del toy_pipeline.transformer.forward_packed
    tokens, t = first[0]
    assert t == pytest.approx(0.7)
    assert_near(tokens, toy_pipeline.transformer.pack(0.7 * clean + 0.3 * noise)[0], atol=1e-5)
    assert_near(latents(toy_pipeline.variation, image, t=0.999), clean, atol=0.05)
    plain = latents(toy_pipeline, "", seed=9, solver=solver)
    assert_near(latents(toy_pipeline.variation, image, t=0.0, seed=9, solver=solver), plain)


@pytest.mark.parametrize("solver", ["dpm", "euler", "heun", "dopri5"])
def test_inpainting_keeps_the_other_cells_exactly(toy_pipeline, image, clean, solver):
    cells = torch.tensor([[1, 0, 0], [0, 0, 1]])
    painted = latents(toy_pipeline.inpaint, PROMPTS[0], image, cells, seed=2, solver=solver)[0]
    kept = cells == 0
    assert_near(painted[:, kept], clean[0][:, kept], atol=1e-6)
    assert (painted - clean[0])[:, ~kept].abs().min(dim=1).values.max() > 1e-3
    everything = latents(toy_pipeline.inpaint, PROMPTS[0], image, torch.ones(2, 3), seed=2, solver=solver)
    assert_near(everything, latents(toy_pipeline, PROMPTS[0], seed=2, solver=solver))


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 5), (0.4, 2)])
def test_known_cells_are_seen_on_their_straight_way_from_noise_to_image(toy_pipeline, image, clean, strength, steps):
    noise, seen = torch.randn(32, 2, 3, generator=torch.Generator().manual_seed(2)), []

    def watch(pipe, step, t, kwargs):
        seen.append((t, kwargs["latents"][0].clone()))

    cells = torch.tensor([[1, 0, 0], [0, 0, 0]])
    settings = {"solver": "heun", "num_inference_steps": 6, "time_shift": 2.0, "strength": strength}
    toy_pipeline.inpaint(PROMPTS[0], image, cells, seed=2, callback_on_step_end=watch, **settings)
    assert len(seen) == steps
    for t, x in seen:
        assert_near(x[:, cells == 0], (t * clean[0] + (1 - t) * noise)[:, cells == 0])


def test_mask_images_become_cells(other):
    mask = Image.new("L", (48, 32))
    mask.putpixel((17, 3), 255)  # one white pixel in the second cell of the first row
    assert prepare_mask(mask, (2, 3)).cells.tolist() == [[0, 1, 0], [0, 0, 0]]
    with pytest.raises(UserError, match="nothing to repaint"):
        prepare_mask(Image.new("L", (48, 32)), (2, 3))
    with pytest.raises(UserError, match=r"mask of \(3, 2\): the image has 2×3 cells and 32×48 pixels"):
        prepare_mask(torch.ones(3, 2), (2, 3))


def test_between_prompts_the_velocities_are_mixed(toy_pipeline):
    between = latents(toy_pipeline.interpolate, PROMPTS, weights=[0.0, 0.25, 1.0], seed=3)
    for row, prompt in ((0, PROMPTS[0]), (2, PROMPTS[1])):
        assert_near(between[row], latents(toy_pipeline, prompt, seed=3)[0])
    settings = {"solver": "euler", "num_inference_steps": 2, "guidance_scale": 1.0}
    noise, first, second, mixed = (
        torch.randn(32, 2, 3, generator=torch.Generator().manual_seed(3)),
        latents(toy_pipeline, PROMPTS[0], seed=3, **settings)[0],
        latents(toy_pipeline, PROMPTS[1], seed=3, **settings)[0],
        latents(toy_pipeline.interpolate, PROMPTS, weights=[0.25], seed=3, **settings)[0],
    )
    assert_near(mixed - noise, 0.75 * (first - noise) + 0.25 * (second - noise))


def test_between_images_the_latents_are_mixed(toy_pipeline, image, other, clean):
    ends = latents(toy_pipeline.interpolate, "", [image, other], weights=[0.0, 0.5, 1.0], t=1.0)
    assert_near(ends[0], clean[0])
    assert ends.shape == (3, 32, 2, 3)
    variation = latents(toy_pipeline.variation, image, t=0.4, seed=5)
    assert_near(latents(toy_pipeline.interpolate, "", [image, other], weights=2, t=0.4, seed=5)[0], variation[0])


def test_a_number_of_weights_goes_evenly_from_the_first_end_to_the_second(toy_pipeline, image, other):
    def mixed(**weights):
        return latents(toy_pipeline.interpolate, "", [image, other], t=1.0, **weights)

    assert torch.equal(mixed(weights=4), mixed(weights=[0.0, 1 / 3, 2 / 3, 1.0]))
    assert torch.equal(mixed(), mixed(weights=[0.0, 0.25, 0.5, 0.75, 1.0]))


def test_slerp_walks_the_circle_at_even_speed():
    a, b = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    cosine = torch.cosine_similarity(a, b, dim=0)
    for share in (0.0, 0.3, 1.0):
        mixed = slerp(a, b, share)
        torch.testing.assert_close(torch.cosine_similarity(a, mixed, dim=0).clamp(max=1).acos(), share * cosine.acos())
        torch.testing.assert_close(mixed.norm(dim=0), (1 - share) * a.norm(dim=0) + share * b.norm(dim=0))
    torch.testing.assert_close(slerp(a, a, 0.4), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)


def test_retrieval_passes_over_broken_files(toy_pipeline, image, other, tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    image.save(tmp_path / "deep" / "same.png")
    other.save(tmp_path / "other.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    best = toy_pipeline.retrieve(image, tmp_path)
    assert [match.path.name for match in best] == ["same.png", "other.png"]
    assert best[0].similarity == pytest.approx(1, abs=1e-5)
    assert best[1].similarity < 0.9999
    assert "broken.jpg" in caplog.text
    vectors = embed_images(toy_pipeline.networks, [image, other])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        toy_pipeline.retrieve(image, tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("image_to_image", {"prompt": "noise", "strength": 0.0}, "strength = 0.0"),
        ("image_to_image", {"prompt": ["a", "b", "c"], "image": ["x", "x"]}, "2 images for 3 prompts"),
        ("variation", {"t": 1.0}, r"t = 1.0: must lie in \[0, 1\)"),
        ("inpaint", {"prompt": "noise", "mask_image": torch.ones(1, 1)}, "the image has 2×3"),
        ("interpolate", {"prompt": "noise", "image": None}, "two prompts, or two images"),
        ("interpolate", {"prompt": ["a", "b", "c"], "image": None}, "two prompts"),
        ("interpolate", {"image": ["x", "x"], "weights": [0.0, 1.5]}, r"numbers in \[0, 1\]"),
        ("interpolate", {"image": ["x", "x"], "weights": 1}, "at least 2"),
        ("retrieve", {"folder": "nowhere"}, "folder nowhere does not exist"),
    ],
)
def test_wrong_arguments(toy_pipeline, image, name, arguments, message):
    given = {"image": image} | arguments
    if isinstance(given["image"], list):
        given["image"] = [image] * len(given["image"])
    with pytest.raises(UserError, match=message):
        getattr(toy_pipeline, name)(**given)


def test_image_tensors_are_checked(toy_pipeline):
    wrong_ones = [torch.zeros(1, 32, 48), torch.zeros(3, 32, 40), torch.zeros(3, 32, 48, dtype=torch.int64)]
    for wrong in [*wrong_ones, torch.full((3, 32, 48), -1e-3), torch.full((3, 32, 48), 1.001)]:
        with pytest.raises(UserError, match="image"):
            toy_pipeline.variation(wrong)
    picture = Image.new("RGB", (48, 32), (255, 255, 255))
    assert_near(encode_images(toy_pipeline.networks, [prepare_image(torch.ones(3, 32, 48))])[0],
                encode_images(toy_pipeline.networks, [prepare_image(picture)])[0])  # fmt: skip
    assert toy_pipeline.variation(torch.zeros(3, 32, 48)).images[0].size == (48, 32)
