"""Saved pipelines: written and read by diffusers' own means, offloaded and spread by them."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DiffusionPipeline,
)
from PIL import Image

from autoencoder.common.config import UserError
from svg_t2i.checkpoints.weights import load_transformer
from svg_t2i.loading.components import SVGAutoencoder, SVGDiT
from svg_t2i.pipeline import SVGT2IPipeline
from tests.svg_t2i.drawing import PROMPT, latents, pixels


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
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "model_index.json").stat().st_mode}
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
