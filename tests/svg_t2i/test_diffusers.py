"""The behaviour that people know from diffusers' pipelines, after the list of what its own pipelines are tested for."""

from __future__ import annotations

import io
import json
import random
import sys

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i import sample
from svg_t2i.checkpoints.weights import load_transformer
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.loading.components import SVGAutoencoder, SVGDiT
from svg_t2i.loading.quantization import quantized_layers
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling import schedulers

PROMPT = "a picture of noise"


@pytest.fixture
def pipeline(toy_pipeline):
    yield toy_pipeline
    toy_pipeline.set_guide(None)
    toy_pipeline.scheduler = None


@pytest.fixture
def loaded(saved_pipeline):
    pipeline = SVGT2IPipeline.from_pretrained(saved_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(pipeline, prompt=PROMPT, seed=1, **settings):
    return pipeline(prompt, seed=seed, output_type="pt", **settings).images


def latents(pipeline, prompt=PROMPT, seed=1, **settings):
    return pipeline(prompt, seed=seed, output_type="latent", **settings).images


# ------------------------------------------------------------------------------------------------- saving and loading


def test_the_parts_are_those_of_the_libraries(pipeline):
    assert isinstance(pipeline, DiffusionPipeline)
    for network in (pipeline.transformer, pipeline.autoencoder):
        assert isinstance(network, diffusers.ModelMixin)
        assert isinstance(network, diffusers.ConfigMixin)
    assert set(pipeline.components) == {
        "autoencoder", "transformer", "text_encoder", "tokenizer", "scheduler", "guide"
    }  # fmt: skip
    assert type(pipeline.text_encoder).__module__.startswith("transformers.")
    assert pipeline.transformer.config["dim"] == pipeline.transformer.config.dim == 32
    assert "SVGDiT" in repr(pipeline)


def test_diffusers_loads_the_folder_by_itself(pipeline, saved_pipeline):
    index = json.loads((saved_pipeline / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "SVGT2IPipeline"]
    found = DiffusionPipeline.from_pretrained(saved_pipeline, trust_remote_code=True)
    assert type(found) is SVGT2IPipeline
    assert found.options == pipeline.options
    assert torch.equal(pixels(found), pixels(pipeline))


def test_our_own_loading_runs_no_code_of_the_folder(saved_pipeline, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (saved_pipeline / "pipeline.py").write_text(f"open({str(ran)!r}, 'w')")
    try:
        SVGT2IPipeline.from_pretrained(saved_pipeline)
    finally:
        (saved_pipeline / "pipeline.py").write_text("from svg_t2i.pipeline import SVGT2IPipeline as SVGT2IPipeline\n")
    assert not ran.exists()
    index = saved_pipeline / "model_index.json"
    before = index.read_text()
    for entry in ({"transformer": ["antigravity", "SVGDiT"]}, {"extra": ["transformers", "BertModel"]}):
        index.write_text(json.dumps(json.loads(before) | entry))
        try:
            with pytest.raises(UserError, match="is no component of SVGT2IPipeline"):
                SVGT2IPipeline.from_pretrained(saved_pipeline)
        finally:
            index.write_text(before)


def test_weights_in_shards_are_read_by_everyone(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="40KB")
    folder = tmp_path / "transformer"
    assert len(list(folder.glob("*.safetensors"))) > 1
    torch.testing.assert_close(pixels(SVGT2IPipeline.from_pretrained(tmp_path)), pixels(pipeline), atol=1e-3, rtol=0)
    state, read = pipeline.transformer.state_dict(), load_transformer(folder).state_dict()
    assert all(torch.equal(state[name], read[name]) for name in state)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its weights are not files beside it"):
        load_transformer(folder)


def test_a_variant_is_saved_and_loaded(saved_pipeline, tmp_path):
    half = SVGT2IPipeline.from_pretrained(saved_pipeline, torch_dtype="fp16")
    assert half.dtype == half.text_encoder.dtype == torch.float16
    half.save_pretrained(tmp_path, variant="fp16")
    assert list((tmp_path / "transformer").glob("*.fp16.safetensors"))
    again = SVGT2IPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(latents(again, num_inference_steps=2), latents(half, num_inference_steps=2))
    with pytest.raises(UserError, match="variant"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, variant="fp16")


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16"])
def test_a_dtype_may_be_a_text(saved_pipeline, name):
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, dtype=name)
    assert (loaded.dtype, loaded.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert loaded.autoencoder.dtype == torch.float32
    with pytest.raises(UserError, match="dtype = 'int3'"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, dtype="int3")


def test_components_can_be_given_and_shared(pipeline, saved_pipeline):
    given = SVGT2IPipeline.from_pretrained(saved_pipeline, transformer=pipeline.transformer)
    assert given.transformer is pipeline.transformer
    assert SVGT2IPipeline.from_pipe(pipeline).options == pipeline.options
    shared = SVGT2IPipeline(**pipeline.components, sampling=pipeline.options)
    assert torch.equal(pixels(shared), pixels(pipeline))
    assert isinstance(SVGDiT.from_pretrained(saved_pipeline, subfolder="transformer"), SVGDiT)
    assert isinstance(SVGAutoencoder.from_pretrained(saved_pipeline, subfolder="autoencoder"), SVGAutoencoder)


def test_device_map_and_what_only_a_saved_pipeline_takes(saved_pipeline, toy_parts):
    assert SVGT2IPipeline.from_pretrained(saved_pipeline, device_map="cpu").device.type == "cpu"
    parts = {"autoencoder": toy_parts / "autoencoder", "text_encoder": toy_parts / "text_encoder"}
    single = SVGT2IPipeline.from_pretrained(saved_pipeline / "transformer", device_map="cpu", **parts)
    assert single.device.type == "cpu"
    for wrong in ({"variant": "fp16"}, {"device_map": "balanced"}):
        with pytest.raises(UserError, match=f"only one takes .*{next(iter(wrong))}"):
            SVGT2IPipeline.from_pretrained(saved_pipeline / "transformer", **wrong, **parts)


# ------------------------------------------------------------------------------------------------------------ offload


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_changes_nothing(loaded, pipeline, kind):
    loaded.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(pixels(loaded), pixels(pipeline))


def test_sequential_offload_changes_nothing(loaded, pipeline):
    """Layer by layer; by accelerate's own call, because diffusers asks for "cpu:0", which it cannot offload to."""
    for network in (loaded.text_encoder, loaded.transformer):
        cpu_offload(network, torch.device("cpu"))
    assert all(weight.is_meta for weight in loaded.transformer.parameters())
    assert torch.equal(pixels(loaded), pixels(pipeline))
    assert all(weight.is_meta for weight in loaded.transformer.parameters())


def test_offload_and_what_starts_from_images(loaded, pipeline):
    loaded.enable_model_cpu_offload(device="cpu")
    settings = {"seed": 1, "output_type": "pt"}
    image = Image.effect_noise((48, 32), 90).convert("RGB")
    for name in ("image_to_image", "variation"):
        arguments = (PROMPT, image) if name == "image_to_image" else (image,)
        offloaded = getattr(loaded, name)(*arguments, **settings).images
        assert torch.equal(offloaded, getattr(pipeline, name)(*arguments, **settings).images)
    assert loaded.enhance(PROMPT)


# --------------------------------------------------------------------------------------------------------------- calls


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


# ---------------------------------------------------------------------------------------------------------- schedulers


def on_the_grid_of(scheduler, solver, steps):
    """The latents of one of our solvers on a scheduler's own grid."""
    return lambda velocity, x, _: SOLVERS[solver].solve(velocity, x, schedulers.prepare(scheduler, steps, None)[1])


@pytest.mark.parametrize("start", [{}, {"t": 0.35}])
@pytest.mark.parametrize(
    ("scheduler", "solver", "points", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=6.0), "euler", 9, 6.0),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "euler", 9, 3.0),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0),
            "dpm",
            8,
            6.0,
        ),
    ],
)
def test_a_scheduler_gives_what_our_solver_of_its_kind_gives(pipeline, scheduler, solver, points, shift, start):
    settings = {"seed": 1, "output_type": "latent", "time_shift": shift}
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    call = (
        (lambda **own: pipeline.variation(image, **start, **own)) if start else (lambda **own: pipeline(PROMPT, **own))
    )
    seen = []
    ours = call(solver=solver, num_inference_steps=points, **settings).images
    theirs = call(
        scheduler=scheduler, num_inference_steps=8, callback_on_step_end=lambda *args: seen.append(args[1]), **settings
    ).images
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert seen == list(range(len(seen)))
    if not start:
        assert len(seen) == 8
        pipeline.scheduler = scheduler  # as a component
        again = call(num_inference_steps=8, **settings).images
        assert torch.equal(again, theirs)


def test_a_scheduler_of_second_order(pipeline):
    """Heun's rule on the scheduler's grid, whose inner times are there twice."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    times = list(dict.fromkeys(schedulers.prepare(scheduler, 8, None)[1]))

    def velocity(x, t):
        return torch.sin(3 * x) - t * x

    noise = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for start in (0.0, 0.4):
        own = [start, *(t for t in times if t > start)] if start else times
        prepared, grid = schedulers.prepare(scheduler, 8, None)
        x = schedulers.integrate(prepared, grid, velocity, noise, None, start)
        expected = SOLVERS["heun"].solve(velocity, noise, own[:-1])  # its last step is Euler's
        expected = expected + (1 - own[-2]) * velocity(expected, own[-2])
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "it predicts epsilon, and this model is a flow"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "draws noise at every step"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(pipeline, scheduler, message):
    with pytest.raises(UserError, match=message):
        pipeline(PROMPT, scheduler=scheduler)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_peft_adapters_go_on_and_come_off(loaded, pipeline, tmp_path):
    plain = pixels(pipeline)
    loaded.transformer.add_adapter(LoraConfig(r=4, target_modules=["qkv", "out", "w1", "w2", "w3"]))
    for name, weight in loaded.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    adapted = pixels(loaded)
    assert not torch.equal(adapted, plain)
    loaded.transformer.disable_adapters()
    assert torch.equal(pixels(loaded), plain)
    loaded.transformer.enable_adapters()
    loaded.transformer.save_lora_adapter(tmp_path)
    loaded.transformer.delete_adapters("default")
    assert torch.equal(pixels(loaded), plain)
    loaded.transformer.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(pixels(loaded), adapted)


@pytest.fixture
def loras(saved_pipeline, tmp_path):
    """Two adapters of other ranks and layers, each in a folder of its own, as a pipeline saves them."""
    folders = []
    for i, targets in enumerate((["qkv", "out"], ["w1", "w2", "w3"])):
        made = SVGT2IPipeline.from_pretrained(saved_pipeline)
        made.transformer.add_adapter(LoraConfig(r=2 + i, lora_alpha=4, target_modules=targets))
        for name, weight in made.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(i))
        folders.append(tmp_path / f"lora{i}")
        made.save_lora_weights(folders[i], transformer_lora_layers=get_peft_model_state_dict(made.transformer))
    return folders


def test_several_adapters_with_weights(loaded, pipeline, loras):
    plain = pixels(pipeline)
    for i, folder in enumerate(loras):
        loaded.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=f"a{i}")
    loaded.set_adapters(["a0", "a1"], [0.5, 2.0])
    both = pixels(loaded)
    layer = loaded.transformer.layers[0].attention.qkv
    change = 0.5 * layer.lora_B["a0"].weight @ layer.lora_A["a0"].weight
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.T)
    loaded.fuse_lora(adapter_names=["a0", "a1"])
    loaded.unload_lora_weights()
    torch.testing.assert_close(pixels(loaded), both, atol=1e-4, rtol=0)
    assert (both - plain).abs().mean() > 1e-3


def test_adapters_of_the_command_line(saved_pipeline, loras, tmp_path):
    def draw(name, *adapters):
        options = [option for adapter in adapters for option in ("--lora", str(adapter))]
        sample.main(
            ["--checkpoint", str(saved_pipeline), "--prompt", PROMPT, "--output", str(tmp_path / name), *options]
        )
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        return np.asarray(Image.open(next((tmp_path / name / "images").iterdir())), int), settings["model"]

    plain, first, half, both = (
        draw("plain"), draw("first", loras[0]), draw("half", f"{loras[0]}:0.5"),
        draw("both", loras[0] / "pytorch_lora_weights.safetensors", f"{loras[1]}:2"),
    )  # fmt: skip
    images = [image for image, _ in (plain, first, half, both)]
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])
    assert "adapters" not in plain[1]
    assert [sorted(model["adapters"].values()) for _, model in (first, half, both)] == [[1.0], [0.5], [1.0, 2.0]]
    with pytest.raises(UserError, match="other settings"):
        draw("half", loras[0])
    for wrong, message in (
        (tmp_path / "none", "no such file or folder"),
        (f"{loras[0]}:much", "'much' is no weight"),
        (tmp_path, "0 safetensors files in this folder"),
        (saved_pipeline / "transformer" / "config.json", "only safetensors are read"),
        (saved_pipeline / "autoencoder" / "model.safetensors", "is no adapter of this model"),
    ):
        with pytest.raises(UserError, match=message):
            draw("wrong", wrong)


# -------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("fp8", 0.15)])
def test_quantised_weights_change_little(saved_pipeline, pipeline, kind, most):
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, quantization=kind)
    assert len(quantized_layers(loaded.transformer)) == 5 * 6  # qkv, out, w1, w2, w3 of 2 + 2 refiners and 2 layers
    assert quantized_layers(loaded.text_encoder)
    assert not quantized_layers(loaded.autoencoder)
    plain, quantised = latents(pipeline), latents(loaded)
    assert 1e-4 < (quantised - plain).norm() / plain.norm() < most
    described, before = loaded.networks.describe(), pipeline.networks.describe()
    assert described["transformer"] != before["transformer"]
    assert described["text_encoder"] == before["text_encoder"]
    assert torch.equal(latents(loaded.to("cpu")), quantised)


def test_products_in_8_bits_change_little(saved_pipeline, monkeypatch):
    """fp8_dynamic: torch has these products on a CPU too, slow ones; torchao's demand of a GPU is left out here."""
    for module in ("torchao.quantization.quant_api", "torchao.float8.inference"):
        monkeypatch.setattr(f"{module}._check_hardware_support", lambda granularities: None)
    plain = SVGT2IPipeline.from_pretrained(saved_pipeline, dtype="bf16")
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, dtype="bf16", quantization="fp8_dynamic")
    assert len(quantized_layers(loaded.transformer)) == 5 * 6
    for one in (plain, loaded):
        one.set_progress_bar_config(disable=True)
    expected, found = latents(plain), latents(loaded)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.15
    with pytest.raises(UserError, match="quantization = 'fp8_dynamic' is not possible here: PerRow .* bfloat16"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="fp8_dynamic")


def test_plain_weights_are_not_copied_to_be_identified(pipeline, monkeypatch):
    """`dequantize` of a tensor in bf16 makes one in fp32: at full size, ten gigabytes."""
    before = pipeline.networks.describe()
    monkeypatch.setattr(torch.Tensor, "dequantize", lambda self: pytest.fail("copied"))
    assert pipeline.networks.describe() == before


def test_what_cannot_be_quantised_or_saved_so(saved_pipeline, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="quantization = 'int3'; choose one of int8, fp8, fp8_dynamic"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="int3")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="quantization = 'fp8_dynamic' is not possible here"):
            SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="fp8_dynamic")
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="int8")
    with pytest.raises(UserError, match="quantised weights are not saved"):
        loaded.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="pip install torchao"):
        SVGT2IPipeline.from_pretrained(saved_pipeline, quantization="int8")


# ----------------------------------------------------------------------------------------------------------- images in


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


def test_weights_kept_in_fp8_and_computed_in_fp32(saved_pipeline, tmp_path):
    """diffusers' layerwise casting: the blocks' linear layers take a quarter of the memory, and little is lost."""
    loaded = SVGT2IPipeline.from_pretrained(saved_pipeline)
    loaded.set_progress_bar_config(disable=True)
    call = {"prompt": "noise", "seed": 0, "num_inference_steps": 3, "output_type": "latent"}
    wanted = loaded(**call).images
    loaded.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {name for name, weight in loaded.transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert "layers.0.attention.qkv.weight" in kept
    assert not any("norm" in name or "embedder" in name for name in kept)
    assert loaded.dtype == torch.float32
    found = loaded(**call).images
    difference = (found - wanted).norm() / wanted.norm()
    assert 0 < difference < 0.2
    settings = ["--checkpoint", str(saved_pipeline), "--prompt", "noise", "--output", str(tmp_path / "out")]
    sample.main([*settings, "--num_inference_steps", "3", "--layerwise_casting", "--attention", "math"])
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1
    with pytest.raises(UserError, match="give one of them"):
        sample.main([*settings, "--layerwise_casting", "--quantization", "int8"])
