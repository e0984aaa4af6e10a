"""What a call refuses and how it fails: wrong arguments, too long prompts, no memory, values that are not finite."""

from __future__ import annotations

import pytest
import torch

from autoencoder.common.config import UserError
from svg_t2i.loading import components
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling.options import SamplingOptions
from svg_t2i.sampling.steps import plan_request
from svg_t2i.text.encoder import TextCache
from svg_t2i.transformer.model import SVGDiT

PROMPTS = ["a picture of noise", "a picture of very very much noise number 3", "noise"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 40}, "height = 40: image sides must be positive multiples of 16, such as 32"),
        ({"width": [32, 48]}, r"width = \[32, 48\]: give one value, or as many as prompts \(1\)"),
        ({"solver": "rk45"}, "choose one of dpm"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"solver": "euler", "num_inference_steps": 1}, "needs both ends"),
        ({"num_inference_steps": 0}, "must be at least 1"),
        ({"system_prompt": "nice"}, "choose one of"),
        ({"time_shift": 0.0}, r"time_shift = 0\.0"),
        ({"time_shift": "auto"}, "'dynamic'"),
        ({"guidance_interval": (0.5, 0.1)}, "0 ≤ lo ≤ hi ≤ 1"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": (1.0, 2.0)}, r"guidance_scale = \[1.0, 2.0\]: give one value, or as many as prompts \(1\)"),
        ({"renorm_cfg": -1.0}, "renorm_cfg"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"guidance_scal": 2.0}, "did you mean 'guidance_scale'"),
        ({"preset": "stage9"}, "choose one of stage1"),
        ({"output_type": "jpeg"}, "choose one of pil, np, pt, latent"),
        ({"seed": -1}, "seed = -1"),
        ({"latents": torch.zeros(1, 32, 3, 2)}, r"expected \[\(32, 2, 3\)\]"),
    ],
)
def test_wrong_arguments(pipeline, changes, message):
    with pytest.raises(UserError, match=message):
        pipeline(PROMPTS[0], **changes)
    with pytest.raises(UserError, match="empty list"):
        pipeline([])


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 16, "width": 16},
        {"num_inference_steps": 1},
        {"num_inference_steps": 2, "solver": "euler"},
        {"renorm_cfg": 0.0},
        {"guidance_scale": 0.0},
        {"guidance_interval": (0.0, 0.0)},
        {"guidance_interval": (1.0, 1.0)},
        {"time_shift": 1e-3},
    ],
)
def test_bounds_of_the_options_are_allowed(changes):
    assert vars(SamplingOptions(**changes)).items() >= changes.items()


def test_seeds_go_up_to_the_largest_number(pipeline):
    for seed in (0, 2**63 - 1):
        assert plan_request("x", 16, 16, 1, seed, pipeline.options).seeds == [seed]
    with pytest.raises(UserError, match="seed"):
        plan_request("x", 16, 16, 1, 2**63, pipeline.options)


def test_a_prompt_too_long_is_cut_with_a_warning_that_shows_what(pipeline, caplog):
    words = " ".join(["noise"] * 300)
    pipeline(words + " number", num_inference_steps=1)
    (warning,) = [record.message for record in caplog.records if "was cut" in record.message]
    assert "a text of 1906 characters and 322 tokens was cut" in warning  # with the system prompt
    assert warning.endswith(f"its prompt begins: {words[:80]!r}")


@pytest.mark.parametrize(
    ("part", "method", "stage", "option"),
    [
        ("text_encoder", "forward", "encoding the prompts", "fewer prompts"),
        ("transformer", "forward_packed", "denoising", "--batch_size"),
        ("autoencoder", "decode", "decoding", "smaller images"),
    ],
)
def test_out_of_memory_names_the_stage_and_an_option(pipeline, monkeypatch, part, method, stage, option):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    monkeypatch.setattr(pipeline, "_texts", TextCache())
    monkeypatch.setattr(getattr(pipeline, part), method, fail)
    with pytest.raises(UserError, match=f"out of memory while {stage}: .*{option}.*Tried to allocate 20.00 GiB"):
        pipeline(PROMPTS[0])


def test_out_of_memory_while_loading_and_encoding_images(pipeline, saved_pipeline, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 20 GiB")

    monkeypatch.setattr(pipeline.autoencoder, "encode", fail)
    with pytest.raises(UserError, match="out of memory while encoding the images: .*smaller images"):
        pipeline.variation(torch.zeros(3, 32, 48))
    monkeypatch.setattr(pipeline.transformer, "to", fail)
    with pytest.raises(UserError, match="out of memory while loading the weights: .*--cpu_offload"):
        pipeline.to("cpu")
    monkeypatch.setattr(components.SVGDiT, "from_pretrained", fail)
    with pytest.raises(UserError, match="out of memory while loading the weights: .*--dtype bf16"):
        SVGT2IPipeline.from_pretrained(saved_pipeline)


def test_other_errors_are_not_taken_for_a_lack_of_memory(pipeline, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipeline.transformer, "forward_packed", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pipeline(PROMPTS[0])


def test_latents_that_are_not_finite_are_an_error_that_names_prompt_and_step(pipeline, monkeypatch):
    forward, calls = SVGDiT.forward_packed, []

    def spoiled(self, tokens, sizes, timesteps, text):
        velocity = forward(self, tokens, sizes, timesteps, text)
        calls.append(1)
        if len(calls) == 6:  # the third step of the second image
            velocity[-1] = torch.nan
        return velocity

    monkeypatch.setattr(SVGDiT, "forward_packed", spoiled)
    message = r"image 2, 'noise', are not finite from step 3 on; use precision fp32"
    with pytest.raises(UserError, match=message):
        pipeline([PROMPTS[0], "noise"], guidance_scale=1.0, num_inference_steps=6, solver="euler")


def test_an_image_that_is_not_finite_is_an_error_and_no_black_picture(pipeline, monkeypatch):
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda raw: decode(raw) * torch.tensor(torch.nan))
    with pytest.raises(UserError, match="image 1 is not finite after decoding"):
        pipeline(PROMPTS[0], num_inference_steps=2)
