"""SVGT2IPipeline on tiny random networks: every option against calls written out by hand."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload

from autoencoder.common.config import UserError
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling import denoising
from svg_t2i.sampling.options import changed
from svg_t2i.text.encoder import SYSTEM_PROMPTS, TextCache
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT

PROMPTS = ["a picture of noise", "a picture of very very much noise number 3", "noise"]


BASE = SYSTEM_PROMPTS["base"]


def latents(pipeline, *args, **kwargs):
    return pipeline(*args, output_type="latent", **{"seed": 0, **kwargs}).images


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def count_rows(module, calls):
    """Record how many captions each forward of the transformer sees."""
    original = module.forward_packed

    def counting(tokens, sizes, timesteps, text):
        calls.append(len(sizes))
        return original(tokens, sizes, timesteps, text)

    return counting


def test_output_types_and_orientation(pipeline):
    assert [image.size for image in pipeline(PROMPTS[:1]).images] == [(48, 32)]  # the release swapped the two
    tensors, arrays = (pipeline(PROMPTS[0], seed=0, output_type=kind).images for kind in ("pt", "np"))
    assert (tensors.shape, arrays.shape) == ((1, 3, 32, 48), (1, 32, 48, 3))
    picture = np.asarray(pipeline(PROMPTS[0], seed=0).images[0])
    assert np.array_equal((arrays[0] * 255).round(), picture)  # both in [0, 1], as in diffusers
    assert np.array_equal((tensors[0].permute(1, 2, 0).numpy() * 255).round(), picture)
    two_sizes = pipeline(PROMPTS[:2], height=[32, 48], output_type="np").images
    assert [image.shape for image in two_sizes] == [(32, 48, 3), (48, 48, 3)]
    assert latents(pipeline, PROMPTS[0]).shape == (1, 32, 2, 3)
    (images,) = pipeline(PROMPTS[0], return_dict=False)
    assert images[0].size == (48, 32)


@pytest.mark.parametrize("solver", ["dpm", "euler", "heun", "midpoint", "dopri5"])
def test_an_image_does_not_depend_on_its_batch(pipeline, solver):
    """Three prompts of different lengths at three sizes, together and alone."""
    heights, widths = [32, 48, 32], [48, 32, 64]
    together = latents(pipeline, PROMPTS, seed=[5, 6, 7], solver=solver, height=heights, width=widths)
    for i, prompt in enumerate(PROMPTS):
        alone = latents(pipeline, prompt, seed=5 + i, solver=solver, height=heights[i], width=widths[i])
        assert alone[0].shape == (32, heights[i] // 16, widths[i] // 16)
        assert_near(together[i], alone[0])


def test_on_a_cpu_few_latent_cells_go_through_the_model_at_once(pipeline, monkeypatch):
    settings = {"seed": [1, 2, 3, 4], "height": [32, 64, 32, 32], "guidance_scale": 1.0, "num_inference_steps": 1}
    whole = latents(pipeline, [PROMPTS[0]] * 4, packed=True, **settings)
    calls = []
    monkeypatch.setattr(denoising, "CPU_NUMBERS", 12 * pipeline.transformer.config.dim)
    monkeypatch.setattr(pipeline.transformer, "forward_packed", count_rows(pipeline.transformer, calls))
    for few, together in zip(latents(pipeline, [PROMPTS[0]] * 4, packed=True, **settings), whole, strict=True):
        assert_near(few, together)
    assert calls == [1, 1, 2]  # of 6, 12 and twice 6 cells


def test_seeds_generators_and_given_latents(pipeline):
    four = latents(pipeline, PROMPTS[:2], num_images_per_prompt=2, seed=11)
    for row, (prompt, seed) in enumerate([(0, 11), (0, 12), (1, 11), (1, 12)]):
        assert_near(latents(pipeline, PROMPTS[prompt], seed=seed)[0], four[row])
    start = torch.randn(32, 2, 3, generator=torch.Generator().manual_seed(11))
    assert_near(latents(pipeline, PROMPTS[0], latents=start[None])[0], four[0])
    generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    assert_near(latents(pipeline, PROMPTS[0], num_images_per_prompt=2, generator=generators), four[:2])
    one = torch.Generator().manual_seed(11)
    assert_near(latents(pipeline, PROMPTS[0], num_images_per_prompt=2, generator=one)[0], four[0])


def test_callback_sees_every_step_and_may_replace_latents(pipeline):
    seen = []

    def watch(pipe, step, t, kwargs):
        seen.append((step, t, tuple(kwargs["latents"].shape), kwargs["indices"]))

    final = latents(pipeline, PROMPTS[:2], callback_on_step_end=watch)
    assert [entry[0] for entry in seen] == [0, 1, 2, 3]
    assert seen[-1][1:] == (1.0, (2, 32, 2, 3), [0, 1])
    zeros = latents(pipeline, PROMPTS[:2], callback_on_step_end=lambda *args: {"latents": torch.zeros_like(final)})
    assert zeros.abs().max() == 0


def encoded(pipeline, text):
    return pipeline.networks.text_encoder.encode([text])


def euler_velocities(pipeline, noise, *texts):
    """Velocities at t = 0 from separate plain model calls."""
    with torch.no_grad():
        return [pipeline.transformer(noise, torch.zeros(1), encoded(pipeline, text)) for text in texts]


EULER = {"solver": "euler", "renorm_cfg": 0, "num_inference_steps": 2}


def test_guidance_equals_two_plain_runs_combined_by_hand(pipeline):
    noise = torch.randn(1, 32, 2, 3)
    guided = latents(pipeline, PROMPTS[0], negative_prompt="noise", latents=noise, guidance_scale=2.5, **EULER)
    v_cond, v_uncond = euler_velocities(pipeline, noise, BASE + PROMPTS[0], BASE + "noise")
    torch.testing.assert_close(guided, noise + v_uncond + 2.5 * (v_cond - v_uncond), atol=1e-5, rtol=1e-5)


def test_scales_and_negative_prompts_of_each_prompt(pipeline):
    noise = torch.randn(2, 32, 2, 3)
    settings = {"guidance_scale": (1.5, 6.0), "negative_prompt": ("", "number 3")}
    both = latents(pipeline, PROMPTS[:2], latents=noise, **settings, **EULER)
    for i, (scale, negative) in enumerate(zip(*settings.values())):
        single = {"guidance_scale": scale, "negative_prompt": negative}
        assert_near(both[i], latents(pipeline, PROMPTS[i], latents=noise[i : i + 1], **single, **EULER)[0])
    twice = noise.repeat_interleave(2, dim=0)  # and of all images of a prompt, as in diffusers
    four = latents(pipeline, PROMPTS[:2], latents=twice, num_images_per_prompt=2, **settings, **EULER)
    assert_near(four, both.repeat_interleave(2, dim=0))


def test_autoguidance_equals_its_formula(pipeline):
    guide = SVGDiT(DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), in_channels=32, cap_feat_dim=32))
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.set_guide(guide)
    noise = torch.randn(1, 32, 2, 3)
    guided = latents(pipeline, PROMPTS[0], latents=noise, guidance_scale=2.0, **EULER)
    (strong,) = euler_velocities(pipeline, noise, BASE + PROMPTS[0])
    with torch.no_grad():
        weak = guide(noise, torch.zeros(1), encoded(pipeline, BASE + PROMPTS[0]))
    torch.testing.assert_close(guided, noise + weak + 2 * (strong - weak), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="negative_prompt does nothing under autoguidance"):
        pipeline(PROMPTS[0], negative_prompt="noise")
    other = DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), in_channels=16, cap_feat_dim=32)
    with pytest.raises(UserError, match="guide's in_channels is 16, the transformer's is 32"):
        pipeline.set_guide(SVGDiT(other))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"guidance_scale": 1.0}, [1] * 4),
        ({"solver": "euler", "time_shift": 1.0, "cfg_trunc": 0.5}, [2, 2, 1]),  # t = 0, 1/3, 2/3
        ({"solver": "euler", "time_shift": 1.0, "guidance_interval": (0.2, 0.5)}, [1, 2, 1]),
        ({"guidance_interval": (0.0, 0.0)}, [1] * 4),
    ],
)
def test_the_unconditional_branch_runs_only_where_it_guides(pipeline, monkeypatch, settings, rows):
    calls = []
    monkeypatch.setattr(pipeline.transformer, "forward_packed", count_rows(pipeline.transformer, calls))
    pipeline(PROMPTS[0], **settings)
    assert calls == rows


def test_each_distinct_text_is_encoded_and_refined_once(pipeline, monkeypatch):
    seen, refined, encoder = [], [], pipeline.networks.text_encoder
    encode, refine = encoder.encode, pipeline.transformer.context_refiner[0].forward
    monkeypatch.setattr(encoder, "encode", lambda texts, limit: seen.append(list(texts)) or encode(texts, limit))
    block = pipeline.transformer.context_refiner[0]
    monkeypatch.setattr(block, "forward", lambda x, *args: refined.append(len(x)) or refine(x, *args))
    texts, lengths = [BASE + PROMPTS[0], ""], encode([BASE + PROMPTS[0], ""]).lengths
    monkeypatch.setattr(pipeline, "_texts", TextCache())
    pipeline([PROMPTS[0]] * 3)
    assert (seen, refined) == ([[text] for text in texts], list(lengths))
    pipeline([PROMPTS[0]] * 3, packed=True)
    assert (seen[2:], refined[2:]) == ([texts], [sum(lengths)])


def test_texts_of_earlier_calls_are_not_encoded_again(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "_texts", TextCache(most=2))
    encoder, seen = pipeline.networks.text_encoder, []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts, limit: seen.extend(texts) or encode(texts, limit))
    first = latents(pipeline, PROMPTS[0])
    assert torch.equal(latents(pipeline, PROMPTS[0]), first)
    assert seen == [BASE + PROMPTS[0], ""]
    latents(pipeline, PROMPTS[0], max_sequence_length=40)  # is another text's features, and drops the oldest
    latents(pipeline, PROMPTS[2], guidance_scale=1.0)
    assert len(pipeline._texts._kept) == 2
    seen.clear()
    assert torch.equal(latents(pipeline, PROMPTS[0]), first)
    assert seen == [BASE + PROMPTS[0], ""]
    other = copy.deepcopy(pipeline.text_encoder)
    other.embed_tokens.weight.data += 1
    monkeypatch.setattr(pipeline, "text_encoder", other)
    assert not torch.equal(latents(pipeline, PROMPTS[0]), first)


def test_the_fast_preset_evaluates_less_and_stays_near(pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr(pipeline.transformer, "forward_packed", count_rows(pipeline.transformer, calls))
    plain = latents(pipeline, PROMPTS[0], num_inference_steps=16, time_shift=2.0)
    full = sum(calls)
    calls.clear()
    fast = latents(pipeline, PROMPTS[0], num_inference_steps=16, time_shift=2.0, preset="fast")
    assert sum(calls) * 1.6 <= full == 32
    assert (fast - plain).norm() < 0.1 * plain.norm()
    with pytest.raises(UserError, match="step_cache = 1.5 goes with dpm and euler, .* not with heun"):
        pipeline(PROMPTS[0], preset="fast", solver="heun")
    with pytest.raises(UserError, match="step_cache = -1"):
        pipeline(PROMPTS[0], step_cache=-1.0)


def test_dynamic_shift_groups_images_by_size(pipeline):
    dynamic = {"time_shift": "dynamic"}
    shifts = [changed(pipeline.options, dynamic).shift_for(cells) for cells in (256, 1024, 4096, 4090)]
    assert shifts == [5.2, 5.9, 10.0, 10.0]
    sizes = {"height": [32, 256, 32], "width": [32, 512, 48]}
    together = latents(pipeline, PROMPTS, seed=[1, 2, 3], **dynamic, **sizes)
    alone = latents(pipeline, PROMPTS[1], seed=2, **dynamic, height=256, width=512)
    assert_near(together[1], alone[0])


def test_save_and_load_give_the_same_images(pipeline, saved_pipeline):
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline)
    assert loaded.options == pipeline.options
    assert loaded.config.max_length == pipeline.networks.text_encoder.max_length == 256
    assert sorted(p.suffix for p in saved_pipeline.rglob("*") if p.stat().st_size > 20_000 and p.is_file()) == [
        ".safetensors", ".safetensors", ".safetensors"
    ]  # fmt: skip
    for before, after in zip(pipeline(PROMPTS, seed=3).images, loaded(PROMPTS, seed=3).images):
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_parts_that_do_not_belong_together_are_refused(pipeline, saved_pipeline, toy_parts, tmp_path):
    config = json.loads((saved_pipeline / "transformer" / "config.json").read_text())
    own = config["fingerprints"]["autoencoder"]["stats"]
    config["fingerprints"]["autoencoder"]["stats"] = "0" * 16
    other = tmp_path / "transformer"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (other / weights).write_bytes((saved_pipeline / "transformer" / weights).read_bytes())
    with pytest.raises(UserError, match=f"autoencoder's stats was 0000000000000000 and is {own}"):
        SVGT2IPipeline.from_pretrained(
            other, autoencoder=toy_parts / "autoencoder", text_encoder=toy_parts / "text_encoder"
        )
    with pytest.raises(UserError, match="autoencoder's stats was 0000000000000000"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, guide=other)
    with pytest.raises(UserError, match="does not say which text_encoder"):
        SVGT2IPipeline.from_pretrained(saved_pipeline / "transformer")
    wide = SVGDiT(DiTConfig(dim=32, n_layers=1, n_heads=2, axes_dims=(4, 6, 6), in_channels=32, cap_feat_dim=64))
    with pytest.raises(UserError, match="features are 32 wide, the transformer expects 64"):
        SVGT2IPipeline(pipeline.autoencoder, wide, pipeline.text_encoder, pipeline.tokenizer)


def test_guide_from_a_second_checkpoint(pipeline, saved_pipeline):
    """A model guided by itself is itself, whatever the scale."""
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, guide=saved_pipeline / "transformer")
    plain = latents(pipeline, PROMPTS[0], guidance_scale=1.0)
    assert_near(latents(loaded, PROMPTS[0], guidance_scale=5.0), plain)


def test_dtype_and_device_moves(saved_pipeline, pipeline):
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.autoencoder.decoder.last_layer.dtype == torch.float32
    loaded.set_progress_bar_config(disable=True)
    half = loaded(PROMPTS[0], seed=0, output_type="pt").images
    assert half.dtype == torch.float32
    assert (half - pipeline(PROMPTS[0], seed=0, output_type="pt").images).abs().mean() < 0.05
    assert loaded.to(torch.float32).dtype == torch.float32
    assert loaded.text_encoder.dtype == torch.float32
    assert loaded.to("cpu").device == torch.device("cpu")


def test_model_offload_lets_the_networks_take_turns(saved_pipeline, pipeline, monkeypatch):
    """Here both ends are the CPU; who is called to the device when is what counts."""
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline)
    loaded.set_progress_bar_config(disable=True)
    names, called = {id(part): name for name, part in loaded.components.items()}, []
    arrive = CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload, "pre_forward", lambda *args, **kwargs: called.append(names[id(args[1])]) or arrive(*args, **kwargs)
    )
    loaded.enable_model_cpu_offload(device="cpu")
    assert loaded.networks.device.type == "cpu"
    image = loaded(PROMPTS[0], seed=0, output_type="pt").images
    assert list(dict.fromkeys(called)) == ["text_encoder", "transformer", "autoencoder"]
    assert called == sorted(called, key=["text_encoder", "transformer", "autoencoder"].index)
    assert torch.equal(image, pipeline(PROMPTS[0], seed=0, output_type="pt").images)


def test_compiled_blocks_are_asked_for_with_dynamic_shapes(saved_pipeline, monkeypatch):
    loaded, asked = SVGT2IPipeline.from_pretrained(saved_pipeline), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: asked.append(kwargs))
    loaded.compile(mode="reduce-overhead")
    assert asked == [{"dynamic": True, "mode": "reduce-overhead"}] * 6  # 2 + 2 refiner blocks, 2 layers
