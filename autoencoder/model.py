"""The SVG autoencoder: frozen encoder, decoder and latent statistics in one object that owns the latent contract.

    images       (B, 3, 16h, 16w) float in [-1, 1]
    latents      (B, D, h, w) raw: the encoder's normalised patch tokens, as the decoder reads them
    normalised   (B, D, h, w) fp32, about zero mean and unit deviation per channel: what the diffusion model sees

`encode` and `decode` speak raw latents, `normalize` and `denormalize` change between the two. Training and sampling
use the same fp32 statistics, which are measured for one encoder and checked against its fingerprint.

    folder/                     written by save_pretrained, read by from_pretrained
    ├── config.json             ModelConfig and fingerprints
    ├── model.safetensors       encoder.* and decoder.*, names of the published checkpoints
    └── latent_stats.safetensors   mean, std (if there are statistics)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder.config import REPO_ROOT, ConfigError, UserError, build, find_config, read_config, to_dict
from autoencoder.decoder import ConvDecoder, DecoderConfig
from autoencoder.encoders import EncoderConfig, build_encoder
from autoencoder.latents import LatentStats
from autoencoder.weights import load_strictly, read_state_dict, replacing

CONFIG_FILE, WEIGHTS_FILE, STATS_FILE = "config.json", "model.safetensors", "latent_stats.safetensors"
FORMAT_VERSION = 1
DROPPED = ("loss.", "norm_vit.")  # all that a load may leave out: training losses, and a norm that nothing uses


@dataclass(frozen=True)
class ModelConfig:
    """`model.params` of the published YAML files.

    ckpt_path: autoencoder checkpoint, relative to the working directory, the YAML file or the repository.
    embed_dim: D, checked. num_layer: row of the published statistics. lossconfig and is_train concern training only.
    """

    ckpt_path: str | None = None
    embed_dim: int | None = None
    lossconfig: dict[str, Any] | None = None
    ddconfig: DecoderConfig | None = field(default_factory=DecoderConfig)
    hyconfig: dict[str, Any] | None = None
    dinoconfig: EncoderConfig = field(default_factory=EncoderConfig)
    extra_vit_config: dict[str, Any] | None = None
    is_train: bool = True
    num_layer: int = -1

    def __post_init__(self) -> None:
        for name in ("extra_vit_config", "hyconfig"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"model.params.{name}: this part of the published family arrives with the residual autoencoder; "
                    "use a configuration of configs/autoencoder/pure"
                )
        if self.ddconfig is None:
            raise UserError("model.params.ddconfig: the decoder's settings are missing")


class SVGAutoencoder(nn.Module):
    """Encoder, decoder and statistics. UserError where their channels or scales disagree.

    Its state dict has the published names: `encoder.` (official DINOv3) and `decoder.`; statistics are kept apart.
    """

    def __init__(self, config: ModelConfig, stats: LatentStats | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.dinoconfig)
        self.decoder = ConvDecoder(config.ddconfig)
        self.stats: LatentStats | None = None
        self._check_sizes()
        if stats is not None:
            self.set_stats(stats)

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return self.encoder.channels

    @property
    def patch_size(self) -> int:
        """Pixels per latent cell and side."""
        return self.encoder.patch_size

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → raw latents (B, D, H/16, W/16), without gradients."""
        if not images.is_floating_point():
            raise UserError(f"encode wants float images in [-1, 1], got {images.dtype}; use images.to_float")
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, D, h, w) → images (B, 3, 16h, 16w), nominally in [-1, 1] but not clipped."""
        return self.decoder(latents.to(self.decoder.last_layer.dtype))

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw → normalised latents, fp32. UserError without statistics."""
        return self._require_stats().normalize(latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised → raw latents, fp32. UserError without statistics."""
        return self._require_stats().denormalize(latents)

    def fingerprint(self) -> dict[str, Any]:
        """What a diffusion model trained on these latents depends on; compare with `require_fingerprint`."""
        stats = None if self.stats is None else self.stats.fingerprint()
        return {"encoder": self.encoder.fingerprint(), "stats": stats, "channels": self.channels}

    def require_fingerprint(self, recorded: Mapping[str, Any], source: str) -> None:
        """UserError unless `recorded`, the fingerprint kept in `source`, is this autoencoder's."""
        own = self.fingerprint()
        differing = [f"{name} {recorded.get(name)} ≠ {own[name]}" for name in own if recorded.get(name) != own[name]]
        if differing:
            raise UserError(
                f"{source} was made with another autoencoder ({', '.join(differing)}); load the encoder weights and "
                "latent statistics that it was made with"
            )

    def set_stats(self, stats: LatentStats) -> None:
        """Attach statistics; UserError if they were measured on another encoder."""
        if stats.channels != self.channels:
            raise UserError(f"latent statistics have {stats.channels} channels, the autoencoder has {self.channels}")
        if stats.encoder is not None and stats.encoder != self.encoder.fingerprint():
            raise UserError(
                f"latent statistics were measured on another encoder (fingerprint {stats.encoder}, this one has "
                f"{self.encoder.fingerprint()}); measure them anew with python -m autoencoder.measure_latents"
            )
        self.stats = stats.to(self.decoder.last_layer.device)

    def load_checkpoint(self, path: str | Path) -> None:
        """Load a published or own checkpoint (.ckpt, .pth, .safetensors; Lightning or plain) weights-only, strictly.

        Only `loss.*` and `norm_vit.*` are left out. UserError naming keys and remedy otherwise.
        """
        self._load_state(read_state_dict(path, "autoencoder checkpoint"), path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything needed to load this autoencoder again (the drawing at the top); each file atomically."""
        folder = Path(folder)
        params = replace(self.config, ckpt_path=None, dinoconfig=replace(self.config.dinoconfig, weights=None))
        config = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint(), "params": to_dict(params)}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.stats is not None:
            stats = LatentStats(self.stats.mean, self.stats.std, encoder=self.encoder.fingerprint())
            stats.save(folder / STATS_FILE)
        with replacing(folder / WEIGHTS_FILE) as path:
            save_file(state, path, {"kind": "svg_autoencoder"})
        with replacing(folder / CONFIG_FILE) as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, source: str | Path, checkpoint: str | Path | None = None, stats: str | Path | LatentStats | None = None
    ) -> SVGAutoencoder:
        """From a folder of `save_pretrained`, or from a YAML file with `checkpoint` and `stats` as in `from_config`.

        `stats` replaces the folder's own statistics.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            return cls.from_config(source, checkpoint, stats)
        if checkpoint is not None:
            raise UserError(f"{folder} holds its own weights; leave out checkpoint {checkpoint} or give a YAML file")
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise UserError(f"{folder} is no saved autoencoder: there is no {CONFIG_FILE} in it")
        try:
            content = json.loads(path.read_text())
            params, recorded = content["params"], dict(content["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is broken ({error!r}); save the autoencoder again") from error
        model = cls(build(ModelConfig, params, str(path)))
        model.load_checkpoint(folder / WEIGHTS_FILE)
        own = folder / STATS_FILE if recorded.get("stats") is not None else None
        model._attach(own if stats is None else stats)
        if stats is not None:
            recorded["stats"] = model.fingerprint()["stats"]
        model.require_fingerprint(recorded, str(path))
        return model

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, Any],
        checkpoint: str | Path | None = None,
        stats: str | Path | LatentStats | None = None,
        overrides: Sequence[str] = (),
    ) -> SVGAutoencoder:
        """From a published-style YAML file, or its content: all of it, or `{"model": {"params": …}}`.

        checkpoint: instead of `model.params.ckpt_path`; its encoder, if it holds one, takes the place of
        `dinoconfig.weights`. stats: a file, or statistics. overrides: "model.params.ddconfig.ch=64", for files only.
        """
        source, base = "model config", Path()
        if not isinstance(config, Mapping):
            source, base = str(config), find_config(config).parent
            config = read_config(config, overrides)
        params = build(ModelConfig, _params(config, source), source)
        if checkpoint is None and params.ckpt_path is not None:
            checkpoint = _locate(params.ckpt_path, base)
        state = {} if checkpoint is None else read_state_dict(checkpoint, "autoencoder checkpoint")
        if any(name.startswith("encoder.") for name in state):
            params = replace(params, dinoconfig=replace(params.dinoconfig, weights=None))
        model = cls(params)
        if checkpoint is not None:
            model._load_state(state, checkpoint)
        model._attach(stats)
        return model

    def _attach(self, stats: str | Path | LatentStats | None) -> None:
        """`set_stats` of statistics, a file of them, or nothing."""
        if stats is not None and not isinstance(stats, LatentStats):
            stats = LatentStats.load(stats, self.channels, self.config.num_layer)
        if stats is not None:
            self.set_stats(stats)

    def _load_state(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        if any(name.startswith("extra_vit.") for name in state):
            raise UserError(f"autoencoder checkpoint {path} has a residual branch (extra_vit.*), which arrives later")
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(DROPPED)}
        remedy = "Use the YAML file that belongs to it (dinoconfig.model_name, ddconfig, embed_dim)"
        load_strictly(self, kept, f"autoencoder checkpoint {path}", remedy)

    def _require_stats(self) -> LatentStats:
        if self.stats is None:
            raise UserError(
                "the autoencoder has no latent statistics: measure them with python -m autoencoder.measure_latents and "
                "give the file as `stats` (published: dinov3_s16p_layer_patchtoken_stats_dist.pt)"
            )
        return self.stats

    def _check_sizes(self) -> None:
        config, channels = self.config, self.encoder.channels
        if config.ddconfig.z_channels != channels or config.embed_dim not in (None, channels):
            raise UserError(
                f"model.params: the encoder {config.dinoconfig.model_name} gives {channels} channels, but "
                f"ddconfig.z_channels is {config.ddconfig.z_channels} and embed_dim {config.embed_dim}; make them equal"
            )
        if self.decoder.scale != self.encoder.patch_size:
            raise UserError(
                f"model.params.ddconfig.ch_mult {tuple(config.ddconfig.ch_mult)} scales by {self.decoder.scale}, the "
                f"encoder's patches have {self.encoder.patch_size} px; give it 5 entries for 16"
            )


def _params(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The `model.params` section."""
    model = config.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("params"), Mapping):
        raise ConfigError(f"{source}: there is no section model.params, which describes the autoencoder")
    return model["params"]


def _locate(path: str, base: Path) -> Path:
    """A checkpoint path as given, beside the YAML file, or from the repository's root."""
    given = Path(path).expanduser()
    return next((found for found in (given, base / given, REPO_ROOT / given) if found.is_file()), given)
