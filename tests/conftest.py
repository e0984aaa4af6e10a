"""Shared by all tests: one thread per process, and the parity folder's command-line option."""

import os

# Before torch, whatever the shell says: two thread pools on two cores stall each other, and forks of a process whose
# pool has begun wait for its threads for ever.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # sums on a GPU differ from run to run in the last bits
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

REPO_ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--parity-dir",
        default=str(REPO_ROOT.parent / "shared" / "parity"),
        help="folder of numeric vectors of the published release (see tests/parity/harness.py)",
    )
    parser.addoption("--parity-device", default="cpu", help="device to compare the vectors on: cpu or cuda")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """A test that begins a pool of threads would break those after it which fork, in another file."""
    yield
    assert torch.get_num_threads() == 1, "this test changed the number of threads of the whole process"


@pytest.fixture(autouse=True)
def _no_logging_of_earlier_tests():
    """Commands log to the streams of the test that called them, which are closed after it."""

    def reset():
        root = logging.getLogger()
        root.handlers[:] = [one for one in root.handlers if type(one).__module__.startswith("_pytest")]
        root.setLevel(logging.WARNING)

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def tiny_for_test() -> list[str]:
    """Overrides that make the published forTest configuration of the autoencoder tiny, but for its number of steps."""
    return [
        "model.params.dinoconfig.weights=random",
        "model.params.dinoconfig.overrides={embed_dim: 32, depth: 1, num_heads: 1}",
        "model.params.ddconfig={z_channels: 32, ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 0}",
        "model.params.lossconfig.params.disc_ndf=8",
        "data.params.train_resol=64",
        "training.trainer.accelerator=cpu",
    ]


@pytest.fixture(scope="session")
def toy_parts(tmp_path_factory) -> Path:
    """All that a DiT run reads, tiny: manifest.jsonl and images, autoencoder/, text_encoder/, train.yaml."""
    import json

    import numpy as np
    from PIL import Image

    from autoencoder.common.config import save_config
    from autoencoder.latents.statistics import LatentStats
    from autoencoder.model import SVGAutoencoder
    from svg_t2i.text.toy import make_toy_text_encoder

    folder = tmp_path_factory.mktemp("toy_parts")
    rng, samples = np.random.default_rng(0), []
    for i, size in enumerate([(64, 64), (96, 48), (64, 64), (48, 96), (64, 64), (70, 70), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        samples.append({"path": f"{i}.png", "prompt": f"a picture of {'very ' * (i % 3)}much noise number {i}"})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, samples)))
    encoder = {"model_name": "dinov3_vits16plus", "weights": "random"}
    encoder["overrides"] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    decoder = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 32}
    params = {"embed_dim": 32, "ddconfig": decoder, "dinoconfig": encoder}
    stats = LatentStats(torch.linspace(-0.1, 0.1, 32), torch.linspace(0.8, 1.2, 32))
    SVGAutoencoder.from_config({"model": {"params": params}}, stats=stats).save_pretrained(folder / "autoencoder")
    make_toy_text_encoder([sample["prompt"] for sample in samples], folder / "text_encoder", hidden_size=32, layers=2)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [4, 6, 6], "multiple_of": 32}
    config = {
        "model": "tiny",
        "model_overrides": sizes,
        "results_dir": str(folder / "unused"),
        "data": {"path": str(folder / "manifest.jsonl"), "resolution": 64, "num_workers": 0},
        "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "log_every": 1},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "autoencoder": {"config": str(folder / "autoencoder")},
        "text_encoder": {"path": str(folder / "text_encoder")},
    }
    save_config(config, folder / "train.yaml")
    return folder


@pytest.fixture(scope="session")
def toy_pipeline(toy_parts):
    """A random pipeline of three tiny networks; latents of 32 channels. Shared: put back what a test changes."""
    from autoencoder.model import SVGAutoencoder
    from svg_t2i.pipeline import SVGT2IPipeline
    from svg_t2i.sampling.options import SamplingOptions
    from svg_t2i.text.encoder import TextEncoder
    from svg_t2i.transformer.config import DiTConfig
    from svg_t2i.transformer.model import SVGDiT

    torch.manual_seed(3)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "axes_dims": (4, 6, 6), "multiple_of": 32}
    transformer = SVGDiT(DiTConfig(in_channels=32, cap_feat_dim=32, **sizes))
    for parameter in transformer.parameters():  # the published initialisation predicts zero: nothing would be tested
        parameter.data += 0.05 * torch.randn_like(parameter)
    text = TextEncoder.from_pretrained(toy_parts / "text_encoder")
    pipeline = SVGT2IPipeline(
        SVGAutoencoder.from_pretrained(toy_parts / "autoencoder"),
        transformer,
        text.model,
        text.tokenizer,
        sampling=SamplingOptions(height=32, width=48, num_inference_steps=4, guidance_scale=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def saved_pipeline(toy_pipeline, tmp_path_factory) -> Path:
    """`toy_pipeline` in its own folder."""
    folder = tmp_path_factory.mktemp("saved_pipeline")
    toy_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def odd_images(tmp_path) -> Path:
    """A folder as people have it: pictures of many modes and their texts, one damaged, and what is no picture."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "odd"
    folder.mkdir()
    picture = Image.linear_gradient("L").resize((90, 70)).convert("RGB")
    grey = picture.convert("L")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.merge("LA", (grey, grey)).save(folder / "grey_alpha.png")
    picture.convert("1").save(folder / "bilevel.png")
    picture.convert("P").save(folder / "palette.gif", transparency=3)
    picture.convert("RGBA").save(folder / "alpha.webp")
    Image.fromarray(np.asarray(grey, np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(folder / "float.tif")
    picture.save(folder / "colour_key.png", transparency=(20, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "on its side [1].jpg", exif=exif)
    content = (folder / "cmyk.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(content[: len(content) // 2])
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"\ufeffa picture called {path.stem}", encoding="utf-8")
    for name in ("._cmyk.jpg", ".DS_Store", "__MACOSX/cmyk.jpg", ".ipynb_checkpoints/cmyk-checkpoint.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(40))
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, toy_parts):
    """A tiny random CLIP in Hugging Face format, with the toy text encoder's word tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(toy_parts / "text_encoder")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory):
    """A tiny random Mask2Former of 80 classes in Hugging Face format."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("detector")
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
                          out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=80, num_queries=12, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
