"""Where a pipeline's parts are found: saved folders, runs, the published layout, the Hub."""

import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import yaml
from diffusers.utils import hub_utils
from huggingface_hub.utils import filter_repo_objects

from autoencoder.common.config import UserError
from autoencoder.common.weights import read_state_dict
from svg_t2i.checkpoints.published import export_published
from svg_t2i.checkpoints.weights import load_transformer
from svg_t2i.export import main as export
from svg_t2i.flow.paths import shift_time
from svg_t2i.loading.sources import find_sources, unused_files
from svg_t2i.pipeline import SVGT2IPipeline
from svg_t2i.sampling import options
from svg_t2i.sampling.options import PRESETS, SamplingOptions, trained_options
from svg_t2i.train import main as train
from svg_t2i.transformer.config import MODELS, DiTConfig
from svg_t2i.transformer.model import SVGDiT

RELEASE = [
    "README.md", "pre-trained/autoencoder/svg_autoencoder_P_stage3_1024.yaml",
    "pre-trained/autoencoder/svg_autoencoder-P-stage3.ckpt", "pre-trained/dinov3_s16p_layer_patchtoken_stats_dist.pt",
    "pre-trained/svg-t2i/stage1-256/consolidated.00-of-01.pth", "pre-trained/svg-t2i/stage1-256/model_args.pth",
    "pre-trained/svg-t2i/stage4-sft/consolidated.00-of-01.pth", "pre-trained/svg-t2i/stage4-sft/model_args.pth",
    "pre-trained/svg-t2i/stage4-sft/consolidated_ema.00-of-01.pth",
    "pre-trained/svg-t2i/stage4-sft/optimizer.00-of-08.pth",
]  # fmt: skip
NAME = "NextDiT_2B_GQA_patch1_Adaln_Refiner"


@pytest.fixture(scope="module")
def published(toy_parts, tmp_path_factory):
    """pre-trained/ as the release lays it out, at toy size."""
    root = tmp_path_factory.mktemp("published") / "pre-trained"
    (root / "autoencoder").mkdir(parents=True)
    state = read_state_dict(toy_parts / "autoencoder" / "model.safetensors", "autoencoder")
    encoder = {"model_name": "dinov3_vits16plus", "overrides": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    decoder = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 32}
    for stage in ("P_stage1_256", "P_stage3_1024"):
        params = {
            "embed_dim": 32,
            "ckpt_path": f"pre-trained/autoencoder/svg-{stage}.ckpt",
            "ddconfig": decoder,
            "dinoconfig": encoder,
        }
        config = yaml.safe_dump({"model": {"params": params}})
        (root / "autoencoder" / f"svg_autoencoder_{stage}.yaml").write_text(config)
        torch.save({"state_dict": state}, root / "autoencoder" / f"svg-{stage}.ckpt")
    stats = {"mean": torch.zeros(2, 32), "std": torch.ones(2, 32)}
    torch.save(stats, root / "dinov3_s16p_layer_patchtoken_stats_dist.pt")
    shutil.copytree(toy_parts / "text_encoder", root / "gemma-2-2b")
    return root


def add_transformer(folder, monkeypatch):
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "axes_dims": (4, 6, 6), "multiple_of": 32}
    small = DiTConfig(in_channels=32, cap_feat_dim=32, **sizes)
    monkeypatch.setitem(MODELS, NAME, small)
    export_published(SVGDiT(small), SVGDiT(small), folder)


def test_the_published_folder_is_enough(published, monkeypatch):
    add_transformer(published / "svg-t2i" / "stage4-sft", monkeypatch)
    pipeline = SVGT2IPipeline.from_pretrained(published)
    assert pipeline.options == PRESETS["stage4"]
    assert pipeline("noise", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)
    sources = find_sources(published)
    assert sources.autoencoder.config.endswith("svg_autoencoder_P_stage3_1024.yaml")
    assert sources.text_encoder.path.endswith("gemma-2-2b")

    add_transformer(published / "svg-t2i" / "stage1-256", monkeypatch)
    assert find_sources(published) == sources  # the last stage is the default
    add_transformer(published / "svg-t2i" / "other-stage4", monkeypatch)
    with pytest.raises(UserError, match=r"several DiTs \(svg-t2i/other-stage4, .*, svg-t2i/stage4-sft\); choose one"):
        SVGT2IPipeline.from_pretrained(published)
    first = find_sources(published, subfolder="svg-t2i/stage1-256")
    assert first.autoencoder.config.endswith("svg_autoencoder_P_stage1_256.yaml")
    assert first.options == PRESETS["stage1"]
    given = find_sources(published, subfolder="svg-t2i/stage1-256", autoencoder="a.yaml", text_encoder="t")
    assert (given.autoencoder.config, given.text_encoder.path) == ("a.yaml", "t")


def test_the_release_is_a_name_of_the_hub(published, monkeypatch, tmp_path):
    """As a snapshot of it lies in the cache: everything below pre-trained/, every file a link."""
    snapshot = tmp_path / "snapshots" / "0123"
    add_transformer(published / "svg-t2i" / "stage4-sft", monkeypatch)
    for path in published.rglob("*"):
        if path.is_file() and "stage1-256" not in path.parts and "other-stage4" not in path.parts:
            link = snapshot / "pre-trained" / path.relative_to(published)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append(how) or str(snapshot))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: RELEASE)
    monkeypatch.chdir(tmp_path)
    pipeline = SVGT2IPipeline.from_pretrained("KlingTeam/SVG-T2I")
    assert "pre-trained/svg-t2i/stage1-256/*" in asked[0]["ignore_patterns"]
    assert pipeline.options == PRESETS["stage4"]
    assert pipeline("noise", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)


def left(**choice):
    """The files of `RELEASE` that are downloaded, as the Hub's client chooses them."""
    patterns = unused_files(RELEASE, "the Hub", **{"subfolder": None, "use_ema": True, **choice})
    return set(filter_repo_objects(RELEASE, ignore_patterns=patterns))


@pytest.mark.parametrize(
    ("choice", "transformer"),
    [
        ({}, {"stage4-sft/consolidated_ema.00-of-01.pth", "stage4-sft/model_args.pth"}),
        ({"use_ema": False}, {"stage4-sft/consolidated.00-of-01.pth", "stage4-sft/model_args.pth"}),
        (
            {"subfolder": "pre-trained/svg-t2i/stage1-256"},  # which has raw weights only
            {"stage1-256/consolidated.00-of-01.pth", "stage1-256/model_args.pth"},
        ),
    ],
)
def test_of_several_transformers_one_is_downloaded(choice, transformer):
    others = {file for file in RELEASE if "/svg-t2i/" not in file}
    assert left(**choice) == others | {f"pre-trained/svg-t2i/{file}" for file in transformer}


def test_what_cannot_be_chosen_is_told_before_the_download():
    with pytest.raises(
        UserError, match="the Hub has no DiT in subfolder = 'stage2'; it has pre-trained/svg-t2i/stage1"
    ):
        left(subfolder="stage2")
    two = [file.replace("stage4-sft", "stage2-512") for file in RELEASE]
    with pytest.raises(UserError, match="the Hub holds several DiTs .pre-trained/svg-t2i/stage1-256, .*choose one"):
        unused_files(two, "the Hub", None, use_ema=True)
    at_the_top = [
        "model_args.pth",
        "consolidated_ema.00-of-01.pth",
        "consolidated.00-of-01.pth",
        "optimizer.00-of-01.pth",
    ]
    assert unused_files(at_the_top, "the Hub", None, use_ema=True) == ["optimizer*", "consolidated.00-of-01.pth"]
    assert unused_files(["model_index.json", "transformer/config.json"], "the Hub", None, use_ema=True) == []


def test_the_published_folder_stands_for_its_transformer(published, monkeypatch, tmp_path):
    root = shutil.copytree(published, tmp_path / "pre-trained", ignore=shutil.ignore_patterns("svg-t2i"))
    folder = root / "svg-t2i" / "stage1-256"
    add_transformer(folder, monkeypatch)
    export([str(root), str(tmp_path / "exported")])
    exported, original = load_transformer(tmp_path / "exported").state_dict(), load_transformer(folder).state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in original.items())
    pipeline = SVGT2IPipeline.from_pretrained(root, guide=root)
    assert torch.equal(pipeline.guide.x_embedder.weight, original["x_embedder.weight"])


def test_a_training_run_knows_its_parts_and_its_resolution(toy_parts, tmp_path):
    train(["--config", str(toy_parts / "train.yaml"), f"results_dir={tmp_path}", "train.max_steps=1"])
    pipeline = SVGT2IPipeline.from_pretrained(tmp_path)
    assert (pipeline.options.height, pipeline.options.time_shift) == (64, "dynamic")
    assert pipeline("noise", num_inference_steps=1).images[0].size == (64, 64)
    half = SVGT2IPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)  # with the fingerprints of its networks
    assert half.text_encoder.dtype == torch.float16
    assert half.networks.describe()["text_encoder"] == pipeline.networks.describe()["text_encoder"]


def test_what_a_run_made_moves_with_its_folder(toy_parts, tmp_path, monkeypatch):
    """Statistics and text encoder are recorded relative to where training ran; here nothing is there any more."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    made = ["text_encoder.path=random", "autoencoder.stats=measure"]
    train(["--config", str(toy_parts / "train.yaml"), "results_dir=results/run", "train.max_steps=1", *made])
    monkeypatch.chdir(tmp_path)
    moved = (tmp_path / "there" / "results" / "run").rename(tmp_path / "moved")
    sources = find_sources(moved)
    assert sources.autoencoder.stats == str(moved / "latent_stats.safetensors")
    assert sources.text_encoder.path == str(moved / "text_encoder")
    assert SVGT2IPipeline.from_pretrained(moved)("noise", num_inference_steps=1).images[0].size == (64, 64)


def test_a_checkpoint_does_not_read_the_environment(toy_parts, tmp_path, monkeypatch):
    """Its recorded paths keep the text of a resolver: neither resolved here nor sent to the Hub."""
    monkeypatch.setenv("SVG_PARTS", str(toy_parts))
    text = toy_parts / "train.yaml"
    config = tmp_path / "train.yaml"
    config.write_text(text.read_text().replace(str(toy_parts), "${oc.env:SVG_PARTS}"))
    assert "${oc.env:SVG_PARTS}/autoencoder" in config.read_text()
    train(["--config", str(config), f"results_dir={tmp_path / 'run'}", "train.max_steps=1"])
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert str(toy_parts) not in saved
    with pytest.raises(UserError, match=r"text_encoder = '\$\{oc.env:SVG_PARTS\}/text_encoder'.*give text_encoder"):
        find_sources(tmp_path / "run")
    given = {"text_encoder": toy_parts / "text_encoder"}
    with pytest.raises(UserError, match=r"autoencoder = '\$\{oc.env:SVG_PARTS\}/autoencoder'.*--autoencoder"):
        find_sources(tmp_path / "run", **given)
    sources = find_sources(tmp_path / "run", **given, autoencoder=toy_parts / "autoencoder")
    assert sources.autoencoder.config == str(toy_parts / "autoencoder")
    train(["--config", str(config), f"results_dir={tmp_path / 'run'}", "train.max_steps=2"])  # the same run goes on


def test_defaults_from_training_settings():
    config = {"data": {"resolution": 128, "system_prompt": "empty"}, "flow": {"shift": False}}
    expected = SamplingOptions(height=128, width=128, system_prompt="empty", time_shift=1.0)
    assert trained_options(config) == expected
    assert trained_options({}) == SamplingOptions()
    pictures = {"guidance_scale": 2.0, "time_shift": 8.0, "solver": "dpm", "height": None, "prompts": ["x"], "every": 9}
    assert trained_options({**config, "samples": pictures}) == replace(expected, guidance_scale=2.0, time_shift=8.0)
    config["flow"] |= {"snr_type": "lognorm", "mu": -2.0}  # half of the training times lie below sigmoid(-2)
    shift = trained_options(config).time_shift
    assert shift == 7.4
    assert shift_time(0.5, shift) == pytest.approx(torch.sigmoid(torch.tensor(-2.0)).item(), abs=1e-3)


def test_presets_are_valid_and_can_be_changed():
    for name, settings in PRESETS.items():
        assert options.preset_options(name) == settings
        assert options.changed(settings, {"solver": "heun", "height": None}).solver == "heun"


def test_push_and_pull(toy_pipeline, tmp_path, monkeypatch):
    """A Hub made of a folder: what is pushed is what is pulled."""
    hub, asked = tmp_path / "hub", []

    def create_repo(repo_id, private, token, exist_ok):
        assert (private, token, exist_ok) == (True, "secret", True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(repo_id, folder_path, **_):
        shutil.copytree(folder_path, hub / repo_id)
        return f"https://huggingface.co/{repo_id}/commit/0"

    def snapshot_download(name, **arguments):
        asked.append(arguments)
        return hub / name

    monkeypatch.setattr(hub_utils, "create_repo", create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **kwargs: huggingface_hub.ModelCard("hi"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert toy_pipeline.push_to_hub("me/foxes", private=True, token="secret").endswith("me/foxes/commit/0")
    where = {"revision": "v1", "cache_dir": tmp_path, "local_files_only": True}
    pulled = SVGT2IPipeline.from_pretrained("me/foxes", **where)
    assert asked == [where]
    assert pulled.options == toy_pipeline.options
    assert pulled.autoencoder.fingerprint() == toy_pipeline.autoencoder.fingerprint()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such folder; give .*owner/name"),
        ("svg_t2i/samplin", "no such folder .the nearest: .*svg_t2i/sampling"),  # not asked from the Hub
        ("no/such-model", "the Hugging Face Hub did not give it"),  # tests are offline
    ],
)
def test_what_is_nowhere_is_named(name, message):
    with pytest.raises(UserError, match=message):
        SVGT2IPipeline.from_pretrained(name)


def test_empty_and_broken_folders(tmp_path):
    with pytest.raises(UserError, match="no DiT here"):
        SVGT2IPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is broken"):
        SVGT2IPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"sampling": {"solver": "magic"}}')
    with pytest.raises(UserError, match="solver = 'magic'"):
        SVGT2IPipeline.from_pretrained(tmp_path)
