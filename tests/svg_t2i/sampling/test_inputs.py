"""Images and masks as people have them, and inpainting that keeps what it should keep."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.common.config import UserError
from tests.svg_t2i.drawing import PROMPT


def test_an_image_may_be_anything_that_holds_one(pipeline, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "x.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    settings = {"seed": 1, "output_type": "latent", "num_inference_steps": 2}
    expected = pipeline.variation(picture, **settings).images
    with (tmp_path / "x.png").open("rb") as file:
        for image in (tmp_path / "x.png", str(tmp_path / "x.png"), file, io.BytesIO((tmp_path / "x.png").read_bytes()),
                      array, tensor, array / np.float32(255), tensor / 255, array[None], [picture]):  # fmt: skip
            torch.testing.assert_close(
                pipeline.variation(image, **settings).images, expected, atol=2e-5, rtol=1e-4
            )  # fmt: skip
    for wrong in (None, 3, array[..., :2], np.zeros((32, 48, 3), dtype=int), tensor.double() * 2):
        with pytest.raises(UserError, match="image"):
            pipeline.variation(wrong)
    with pytest.raises(UserError, match="image width = 8: images are at least 16 pixels"):
        pipeline.variation(Image.new("RGB", (8, 32)))


def test_inpainting_keeps_the_other_pixels_exactly(pipeline):
    array = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:16, 16:32], mask[20:24, :4] = 255, 100  # a cell, and a soft place that is less than half white
    painted = pipeline.inpaint(PROMPT, Image.fromarray(array), Image.fromarray(mask), seed=0).images[0]
    changed = (np.asarray(painted) != array).any(axis=2)
    assert not changed[mask == 0].any()
    assert changed[mask == 255].mean() > 0.9
    redrawn = pipeline.inpaint(
        PROMPT, Image.fromarray(array), Image.fromarray(mask), seed=0, paste_original=False
    ).images[0]
    assert (np.asarray(redrawn) != array).any(axis=2)[mask == 0].mean() > 0.5
    soft, whole, old = (np.asarray(x, float)[mask == 100] for x in (painted, redrawn, array))
    assert np.abs(soft - (100 * whole + 155 * old) / 255).max() <= 1


def test_a_mask_for_each_image_or_one_for_all(pipeline):
    images = [Image.effect_noise((48, 32), 90).convert("RGB") for _ in range(2)]
    left, right = torch.tensor([[1, 0, 0]] * 2), torch.tensor([[0, 0, 1]] * 2)
    settings = {"seed": 3, "output_type": "pt", "num_inference_steps": 2}
    both = pipeline.inpaint([PROMPT] * 2, images, [left, right], **settings).images
    for i, mask in enumerate((left, right)):
        assert torch.equal(both[i], pipeline.inpaint(PROMPT, images[i], mask, **settings).images[0])
    as_pixels = left.repeat_interleave(16, 0).repeat_interleave(16, 1)
    for mask in (as_pixels.float(), as_pixels.float()[None], as_pixels.bool(), as_pixels.float().numpy()):
        assert torch.equal(pipeline.inpaint(PROMPT, images[0], mask, **settings).images[0], both[0])
    with pytest.raises(UserError, match="2 masks for 1 images"):
        pipeline.inpaint(PROMPT, images[0], [left, right])


def test_a_close_up_goes_back_into_its_image(pipeline):
    array = np.random.default_rng(0).integers(0, 256, (200, 150, 3), dtype=np.uint8)
    mask = np.zeros((200, 150), dtype=np.uint8)
    mask[90:110, 60:90] = 255
    output = pipeline.inpaint(
        [PROMPT] * 2, Image.fromarray(array), Image.fromarray(mask), seed=[1, 2], padding_mask_crop=8
    )
    assert [image.size for image in output.images] == [(150, 200)] * 2
    for image in output.images:
        changed = (np.asarray(image) != array).any(axis=2)
        assert not changed[mask == 0].any()
        assert changed[mask > 0].mean() > 0.9
    assert not np.array_equal(*map(np.asarray, output.images))
    with pytest.raises(UserError, match="make them equal"):
        pipeline.inpaint(PROMPT, Image.fromarray(array), Image.new("L", (10, 10), 255), padding_mask_crop=8)


def test_a_strength_below_one_step_is_an_error(pipeline):
    image = Image.new("RGB", (48, 32))
    with pytest.raises(UserError, match=r"strength = 0\.2: of 4 steps that is less than one; at least 0\.25"):
        pipeline.image_to_image(PROMPT, image, strength=0.2)
    pipeline.image_to_image(PROMPT, image, strength=0.25)
