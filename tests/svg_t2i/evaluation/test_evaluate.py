"""Metrics of images against independent computations, and what becomes of metrics that cannot be had."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance

from autoencoder.common.config import UserError, build
from autoencoder.common.processes import World
from autoencoder.evaluation.metrics import Unavailable
from autoencoder.images.files import to_float
from autoencoder.model import SVGAutoencoder
from svg_t2i.evaluation import evaluate as evaluation
from svg_t2i.evaluation.clip_score import CLIPScorer, clip_score
from svg_t2i.evaluation.distances import frechet_distance, median_distance, mmd, polynomial_mmd, precision_recall
from svg_t2i.evaluation.evaluate import evaluate, measure, own_batches, rows
from svg_t2i.evaluation.settings import OF_IMAGES, EvaluationConfig
from svg_t2i.evaluation.shapes import TASKS

CPU = torch.device("cpu")
WORLD = World()


def random_images(count, seed=0, low=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(low, 256, (count, 3, 32, 48), generator=generator, dtype=torch.uint8))


@pytest.fixture(scope="module")
def autoencoder(toy_parts):
    return SVGAutoencoder.from_pretrained(toy_parts / "autoencoder")


def test_batches_do_not_depend_on_the_number_of_processes():
    dealt = [list(own_batches(11, 2, World(rank, rank, 3, CPU))) for rank in range(3)]
    assert sorted((b for share in dealt for b in share), key=lambda b: b.start) == list(own_batches(11, 2, WORLD))
    doubled = rows(lambda batch: torch.tensor(batch)[:, None] * 2, range(5), 2, WORLD)
    assert doubled.tolist() == [[0], [2], [4], [6], [8]]


def test_mmd_is_taken_over_pooled_unit_features_of_the_encoder(autoencoder):
    made, real = random_images(6), random_images(5, seed=1, low=100)
    own = [0, 0, 1, 2, 3, 4]
    report = measure(made, ["mmd"], references=real, own=own, autoencoder=autoencoder, batch_size=4, world=WORLD)
    features = [autoencoder.encode(to_float(torch.stack(images))).flatten(2).mean(2) for images in (made, real)]
    made, real = (x / x.norm(dim=1, keepdim=True) for x in features)
    assert report.values == {"mmd": pytest.approx(1000 * mmd(made, real, median_distance(real), own), rel=1e-3)}
    assert report.unavailable == {}


def test_every_network_is_asked_once_and_shared(autoencoder, clip_folder, monkeypatch):
    made, real, calls = random_images(6), random_images(5, seed=1), []

    class Colours(torch.nn.Module):
        def forward(self, images):
            calls.append(len(images))
            return images.float().mean(dim=(2, 3)) / 255

    monkeypatch.setattr(evaluation, "build_inception", Colours)
    report = measure(
        made, [name for name in OF_IMAGES if name != "clip_score"], references=real, autoencoder=autoencoder,
        clip=str(clip_folder), batch_size=4, world=WORLD,
    )  # fmt: skip
    assert report.unavailable == {}
    assert calls == [4, 2, 4, 1]
    colours = [torch.stack(images).double().mean(dim=(2, 3)) / 255 for images in (made, real)]
    assert report.values["kid"] == pytest.approx(1000 * polynomial_mmd(*colours), rel=1e-3)
    scorer = CLIPScorer(clip_folder)
    clip = [scorer.image_features([evaluation.to_image(image) for image in images]) for images in (made, real)]
    assert report.values["cmmd"] == pytest.approx(1000 * mmd(*clip, 10.0), abs=1e-4)
    features = [evaluation.pooled_features(autoencoder.encoder)(images) for images in (made, real)]
    assert (report.values["precision"], report.values["recall"]) == pytest.approx(precision_recall(*features))
    few = measure(made[:3], ["recall"], references=real, autoencoder=autoencoder, world=WORLD)
    assert few.unavailable == {"recall": "it needs more than 3 images, made and real"}


def test_fid_or_its_absence(monkeypatch):
    made, real = random_images(6), random_images(5, seed=1)

    def absent():
        raise Unavailable("no network, no weights")

    monkeypatch.setattr(evaluation, "build_inception", absent)
    report = measure(made, ["fid"], references=real, world=WORLD)
    assert (report.values, report.unavailable) == ({}, {"fid": "no network, no weights"})
    assert evaluation.describe_report(report) == {"fid": {"unavailable": "no network, no weights"}}

    class Colours(torch.nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            return images.float().mean(dim=(2, 3))

    monkeypatch.setattr(evaluation, "build_inception", Colours)
    report = measure(made, ["fid"], references=real, batch_size=4, world=WORLD)
    expected = frechet_distance(*(torch.stack(i).double().mean(dim=(2, 3)) for i in (made, real)))
    assert report.values == {"fid": pytest.approx(expected, rel=1e-4)}
    theirs = FrechetInceptionDistance(Colours()).set_dtype(torch.float64)
    for images, is_real in ((made, False), (real, True)):
        theirs.update(torch.stack(images), real=is_real)
    assert report.values == {"fid": pytest.approx(theirs.compute().item(), rel=1e-3)}


def test_clip_score_is_that_of_the_whole_model(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    images = random_images(3)
    captions = ["much noise", "a picture of very very much noise number 3", "noise " * 30]  # the last is cut
    report = measure(images, ["clip_score"], captions=captions, clip=str(clip_folder), batch_size=2, world=WORLD)

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    pixels = processor([evaluation.to_image(image) for image in images], return_tensors="pt")
    cosines = []
    for i, caption in enumerate(captions):
        text = tokenizer(caption, truncation=True, max_length=12, return_tensors="pt")
        inputs = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        with torch.no_grad():
            logits = model(pixel_values=pixels["pixel_values"][i : i + 1], **inputs).logits_per_image
        cosines.append(logits.item() / model.logit_scale.exp().item())
    assert report.values["clip_score"] == pytest.approx(100 * np.mean([max(c, 0) for c in cosines]), abs=1e-3)
    assert clip_score(torch.eye(2), -torch.eye(2)) == 0


def test_a_clip_that_is_not_there_has_a_reason(tmp_path, toy_parts):
    report = measure(random_images(2), ["clip_score"], captions=["a", "b"], clip=str(tmp_path / "no"), world=WORLD)
    assert report.values == {}
    assert "no" in report.unavailable["clip_score"]
    with pytest.raises(Unavailable, match="no image and text features|cannot be had"):
        CLIPScorer(toy_parts / "text_encoder")


def test_a_clip_without_some_of_its_weights_has_a_reason(clip_folder, tmp_path):
    """transformers would go on with random ones."""
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: x for name, x in weights.items() if "projection" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(Unavailable, match="lacks 2 weights of a CLIPModel, text_projection.weight among them"):
        CLIPScorer(tmp_path)


def test_pairs():
    real = random_images(4)
    made = [(image.int() + 10).clamp(max=255).to(torch.uint8) for image in real]
    made[2] = real[2]  # identical: infinite PSNR, left out of the mean
    values = measure(made, [], counterparts=real, batch_size=3, world=WORLD).values
    psnr = [peak_signal_noise_ratio(real[i].numpy(), made[i].numpy(), data_range=255) for i in (0, 1, 3)]
    assert values["psnr"] == pytest.approx(np.mean(psnr), rel=1e-6)
    assert 0 < values["ssim"] < 1
    report = measure(real, [], counterparts=real, world=WORLD)
    assert (report.values, list(report.unavailable)) == ({"ssim": pytest.approx(1)}, ["psnr"])


def test_evaluate_tracks_a_pipeline(toy_pipeline, toy_parts, caplog):
    """The trainer's hook: numbers by name, reproducible, and the global generator is left alone."""
    settings = build(EvaluationConfig, {
        "metrics": ["mmd", "clip_score", "shapes"], "manifest": str(toy_parts / "manifest.jsonl"), "num_images": 4,
        "clip": "nowhere/no-clip", "batch_size": 100,
        "sampling": {"width": 32, "height": 32, "num_inference_steps": 1, "system_prompt": "empty"},
    })  # fmt: skip
    state = torch.get_rng_state()
    values = evaluate(toy_pipeline, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(values) == {"mmd", *(f"shapes/{task}" for task in (*TASKS, "overall"))}
    assert all(isinstance(value, float) for value in values.values())
    assert any("clip_score is not measured" in record.message for record in caplog.records)
    fewer = replace(settings, metrics=("mmd",))
    assert evaluate(toy_pipeline, fewer) == {"mmd": values["mmd"]}
    assert evaluate(toy_pipeline, replace(fewer, seed=1)) != {"mmd": values["mmd"]}


@pytest.mark.parametrize(("values", "message"), [
    ({"metrics": ["fvd"]}, "metrics='fvd' must be some of mmd"),
    ({"metrics": ["mmd", "shapes"]}, "manifest is not set; mmd need"),
    ({"metrics": ["shapes"], "every": -1}, "every=-1"),
    ({"metrics": ["shapes"], "sampling": {"width": 40}}, "width = 40: image sides must be positive multiples of 16"),
    ({"metrics": ["shapes"], "sampling": {"solver": "rk"}}, "solver = 'rk'; choose one of"),
    ({"metrics": ["shapes"], "sampling": {"guidance_scale": [1, 2]}}, "one for all images"),
    ({"metrics": ["shapes"], "sampling": {"time_shift": 0}}, "time_shift = 0.0: must be positive"),
])  # fmt: skip
def test_wrong_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        build(EvaluationConfig, values)
