"""The behaviour that people know from diffusers' pipelines, after the list of what its own pipelines are tested for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from autoencoder.common.config import UserError
from tests.svg_t2i.drawing import PROMPT, latents, pixels


def test_sides_by_position_and_of_numpy(pipeline):
    assert pipeline(PROMPT, 48, 32).images[0].size == (32, 48)
    assert pipeline(PROMPT, height=np.int64(32), width=torch.tensor(64)).images[0].size == (64, 32)


def test_without_a_seed_every_image_is_new_and_names_its_seed(pipeline):
    torch.manual_seed(0)
    output = pipeline(PROMPT, num_images_per_prompt=2, output_type="pt")
    assert output["images"] is output[0] is output.images
    assert len(set(output.seeds)) == 2
    assert not torch.equal(*output.images)
    assert torch.equal(pixels(pipeline, seed=output.seeds[1])[0], output.images[1])
    assert pipeline(PROMPT).seeds != pipeline(PROMPT).seeds
    torch.manual_seed(0)  # torch's global generator decides, as with diffusers
    assert pipeline(PROMPT, num_images_per_prompt=2).seeds == output.seeds
    assert pipeline(PROMPT, generator=torch.Generator().manual_seed(1)).seeds is None


def test_embeddings_in_place_of_prompts(pipeline):
    prompts, negatives = [PROMPT, "noise"], ["", "number 3"]
    plain = latents(pipeline, prompts, negative_prompt=tuple(negatives), num_images_per_prompt=2)
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(prompts, negatives)
    assert embeds.shape[:2] == mask.shape
    assert not mask.all()
    settings = {"num_images_per_prompt": 2, "negative_prompt_embeds": negative}
    padded = latents(
        pipeline, None, prompt_embeds=embeds, prompt_attention_mask=mask, negative_prompt_attention_mask=negative_mask,
        **settings,
    )  # fmt: skip
    assert torch.equal(padded, plain)
    packed = pipeline.networks.text_encoder.encode([pipeline_text(pipeline, PROMPT)])
    assert torch.equal(latents(pipeline, None, prompt_embeds=packed), latents(pipeline))
    for wrong, message in (
        ({"prompt": PROMPT, "prompt_embeds": embeds}, "either prompt or prompt_embeds, not both"),
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt_embeds": embeds[..., :3]}, r"prompt_embeds = .*give \(B, L, 32\)"),
        ({"prompt_embeds": embeds, "prompt_attention_mask": mask[:, 1:]}, "prompt_attention_mask of"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(**wrong)


def pipeline_text(pipeline, prompt):
    from svg_t2i.text.encoder import build_prompt

    return build_prompt(prompt, pipeline.options.system_prompt)


def test_max_sequence_length(pipeline, caplog):
    short = latents(pipeline, "noise " * 100, max_sequence_length=40)
    assert "was cut to text_encoder.max_length=40" in caplog.text
    assert torch.equal(short, latents(pipeline, "noise " * 200, max_sequence_length=40))
    assert not torch.equal(short, latents(pipeline, "noise " * 100))
    with pytest.raises(UserError, match="max_length=1 does not fit"):
        pipeline(PROMPT, max_sequence_length=1)


def test_a_negative_prompt_without_guidance_warns(pipeline, caplog):
    pipeline(PROMPT, negative_prompt="number", guidance_scale=1.0)
    assert "the negative prompt does nothing: guidance_scale = 1.0" in caplog.text


def test_a_callback_may_interrupt(pipeline):
    seen = []

    def stop(pipe, step, t, kwargs):
        seen.append(step)
        pipe._interrupt = step == 1

    whole = []
    latents(pipeline, callback_on_step_end=lambda pipe, step, t, kwargs: whole.append(kwargs["latents"].clone()))
    ended = latents(pipeline, callback_on_step_end=stop)
    assert seen == [0, 1]
    assert torch.equal(ended, whole[1])
    assert len(whole) == 4  # and the next call runs to its end
    with pytest.raises(UserError, match=r"callback_on_step_end_tensor_inputs = \['text'\]: choose from \['latents'\]"):
        pipeline(PROMPT, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["text"])
    with pytest.raises(UserError, match="only latents can be replaced"):
        pipeline(PROMPT, callback_on_step_end=lambda *args: {"prompt_embeds": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "prompt = 3: give a text"),
        ({"prompt": ["noise", None]}, r"prompt\[1\] = None"),
        ({"height": "32"}, "height = '32': give a whole number"),
        ({"width": 32.5}, "width = 32.5: give a whole number"),
        ({"height": True}, "height = True: give a whole number"),
        ({"seed": "one"}, "seed = 'one': give a whole number"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt = 1.5: give a whole number"),
        ({"generator": 3}, "generator = 3: give a torch.Generator"),
        ({"latents": "noise"}, "latents = 'noise': give a tensor"),
        ({"scheduler": "euler"}, "scheduler = str: give a scheduler of diffusers"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(pipeline, changes, message):
    with pytest.raises(UserError, match=message):
        pipeline(**{"prompt": PROMPT, **changes})


def test_image_i_does_not_depend_on_the_batch(pipeline):
    """To the last bit, for random batches of several sizes and lengths."""
    rng = random.Random(0)
    for _ in range(4):
        count = rng.randint(2, 5)
        prompts = [rng.choice(["noise", PROMPT, "very much noise number 3 very very"]) for _ in range(count)]
        settings = {
            name: [rng.randrange(32, 97, 16) for _ in range(count)] for name in ("height", "width")
        } | {"seed": [rng.randrange(99) for _ in range(count)]}  # fmt: skip
        together = pixels(pipeline, prompts, **settings)
        for i, prompt in enumerate(prompts):
            alone = pixels(pipeline, prompt, **{name: values[i] for name, values in settings.items()})
            assert torch.equal(alone[0], together[i])
