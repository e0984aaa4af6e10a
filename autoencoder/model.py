"""The SVG autoencoder: frozen encoder, decoder and latent statistics in one object that owns the latent contract.

    images       (B, 3, 16h, 16w) float in [-1, 1]
    latents      (B, D, h, w) raw, as the decoder reads them: the encoder's normalised patch tokens, and in the "R"
                 variants the 8 channels of the residual branch after them
    normalised   (B, D, h, w) fp32, about zero mean and unit deviation per channel: what the diffusion model sees

`encode` and `decode` speak raw latents, `normalize` and `denormalize` change between the two. Training and sampling
use the same fp32 statistics, which are measured for one encoder and checked against its fingerprint.

    folder/                     written by save_pretrained, read by from_pretrained
    ├── config.json             ModelConfig and fingerprints
    ├── model.safetensors       encoder.*, extra_vit.* (R) and decoder.*, names and shapes of the published checkpoints
    └── latent_stats.safetensors   mean, std (if there are statistics)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder.common.config import ConfigError, UserError, build, find_config, locate, read_config, to_dict
from autoencoder.common.weights import fingerprint, load_strictly, read_state_dict, replacing, write_json
from autoencoder.decoders import striped
from autoencoder.decoders.convolutional import ConvDecoder, DecoderConfig
from autoencoder.decoders.hy import HyDecoder, HyDecoderConfig
from autoencoder.encoders.encoder import EncoderConfig, build_encoder
from autoencoder.encoders.residual import DROPPED as RESIDUAL_DROPPED
from autoencoder.encoders.residual import ResidualConfig, ResidualViT
from autoencoder.latents.statistics import LatentStats

CONFIG_FILE, WEIGHTS_FILE, STATS_FILE = "config.json", "model.safetensors", "latent_stats.safetensors"
FORMAT_VERSION = 1
# All that a load may leave out: training losses, a norm that nothing uses, and what the residual branch does not need
DROPPED = ("loss.", "norm_vit.", *(f"extra_vit.{name}" for name in RESIDUAL_DROPPED))


@dataclass(frozen=True)
class ModelConfig:
    """`model.params` of the published YAML files.

    ckpt_path: autoencoder checkpoint, relative to the YAML file or a folder around it, the working directory, the
        repository or its svg_t2i.
    ddconfig, hyconfig: one of the two decoders. extra_vit_config: the residual branch of the "R" variants.
    num_layer: row of the published statistics. lossconfig and is_train concern training only. embed_dim is accepted and
    changes nothing: in the release it sizes a norm (`norm_vit`) that is never applied. use_ema (own): take the averaged
    weights of the checkpoint, which training keeps with ema_decay.
    """

    ckpt_path: str | None = None
    embed_dim: int | None = None
    lossconfig: dict[str, Any] | None = None
    ddconfig: DecoderConfig | None = None
    hyconfig: HyDecoderConfig | None = None
    dinoconfig: EncoderConfig = field(default_factory=EncoderConfig)
    extra_vit_config: ResidualConfig | None = None
    is_train: bool = True
    num_layer: int = -1
    use_ema: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("ddconfig", "hyconfig") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"model.params: an autoencoder has one decoder, given are {' and '.join(given) or 'none'}; describe it "
                "in ddconfig or in hyconfig and set the other to null"
            )

    @property
    def decoder(self) -> tuple[str, DecoderConfig | HyDecoderConfig]:
        """The decoder's settings, and the name of their section."""
        return ("ddconfig", self.ddconfig) if self.ddconfig is not None else ("hyconfig", self.hyconfig)


class SVGAutoencoder(nn.Module):
    """Encoder, residual branch or none, decoder and statistics. UserError where their channels or scales disagree.

    Its state dict has the published names: `encoder.` (official DINOv3), `extra_vit.` and `decoder.`; statistics are
    kept apart. It is made in eval mode; only training turns on gradients through, and noise in, the residual branch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        self.encoder = build_encoder(config.dinoconfig)
        self.extra_vit = None if config.extra_vit_config is None else ResidualViT(config.extra_vit_config)
        self.decoder = HyDecoder(config.hyconfig) if config.ddconfig is None else ConvDecoder(config.ddconfig)
        self.stats: LatentStats | None = None
        self._check_sizes()
        self.eval()

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return self.encoder.channels + (0 if self.extra_vit is None else self.extra_vit.config.output_dim)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training changes: the decoder, and the residual branch unless it is frozen."""
        parts = [self.decoder] if self.extra_vit is None else [self.decoder, self.extra_vit]
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def draws_in_training(self) -> bool:
        """Whether training mode makes encoding or decoding random: dropout, or masked residual channels."""
        dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        return dropout or (self.extra_vit is not None and self.extra_vit.config.mask_ratio > 0)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → raw latents (B, D, H/16, W/16).

        Gradients reach the residual branch where it is in training mode, and never the encoder.
        """
        if not images.is_floating_point():
            raise UserError(f"encode wants float images in [-1, 1], got {images.dtype}; use images.to_float")
        features = self.encoder(images)  # (B, D or D - 8, h, w)
        if self.extra_vit is None:
            return features
        with torch.set_grad_enabled(self.extra_vit.training and torch.is_grad_enabled()):
            residual = self.extra_vit(self.encoder.normalize_images(images), features)  # (B, 8, h, w)
            return torch.cat([features, residual], dim=1).contiguous(memory_format=torch.channels_last)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, D, h, w) → images (B, 3, 16h, 16w), nominally in [-1, 1] but not clipped.

        Without gradients, images beyond 2048×2048 are decoded in little memory (`striped`), equal up to rounding.
        """
        latents = latents.to(self.decoder.last_layer.dtype)
        return self.decoder(latents) if torch.is_grad_enabled() else striped.decode(self.decoder, latents)

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw → normalised latents, fp32. UserError without statistics."""
        return self._require_stats().normalize(latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised → raw latents, fp32. UserError without statistics."""
        return self._require_stats().denormalize(latents)

    def latent_fingerprint(self) -> str:
        """16 hex digits that name what makes the raw latents: the encoder, and the residual branch if there is one."""
        if self.extra_vit is None:
            return self.encoder.fingerprint()
        config = self.extra_vit.config
        identity = [self.encoder.fingerprint(), config.vit_type, config.overrides, config.published_grid]
        identity += [config.outnorm if config.use_outnorm else None]
        return fingerprint(identity, self.extra_vit.state_dict())

    def fingerprint(self) -> dict[str, Any]:
        """What a diffusion model trained on these latents depends on; compare with `require_fingerprint`."""
        stats = None if self.stats is None else self.stats.fingerprint()
        return {"encoder": self.latent_fingerprint(), "stats": stats, "channels": self.channels}

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
        if stats.encoder is not None and stats.encoder != self.latent_fingerprint():
            raise UserError(
                f"latent statistics were measured on another encoder (fingerprint {stats.encoder}, this one has "
                f"{self.latent_fingerprint()}); measure them anew with python -m autoencoder.measure_latents"
            )
        self.stats = stats.to(self.decoder.last_layer.device)

    def load_checkpoint(self, path: str | Path) -> None:
        """Load a published or own checkpoint (.ckpt, .pth, .safetensors; Lightning or plain) weights-only, strictly.

        Only what DROPPED names is left out. UserError naming keys and remedy otherwise.
        """
        self._load_state(read_state_dict(path, "autoencoder checkpoint", self.model_config.use_ema, verify=True), path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything needed to load this autoencoder again (the drawing at the top); each file atomically."""
        folder = Path(folder)
        dinoconfig = replace(self.model_config.dinoconfig, weights=None)
        params = replace(self.model_config, ckpt_path=None, use_ema=False, dinoconfig=dinoconfig)
        config = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint(), "params": to_dict(params)}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.stats is not None:
            stats = LatentStats(self.stats.mean, self.stats.std, self.latent_fingerprint(), self.stats.resolutions)
            stats.save(folder / STATS_FILE)
        with replacing(folder / WEIGHTS_FILE) as path:
            save_file(state, path, {"kind": "svg_autoencoder"})
        write_json(config, folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        checkpoint: str | Path | None = None,
        stats: str | Path | LatentStats | None = None,
        overrides: Sequence[str] = (),
        *,
        resolvers: bool = False,
    ) -> SVGAutoencoder:
        """From a folder of `save_pretrained`, or from a YAML file, for which all arguments are as in `from_config`.

        `stats` replaces the folder's own statistics; `checkpoint` and `overrides` are for YAML files only.
        """
        folder = locate(source)
        if not folder.is_dir():
            return cls.from_config(source, checkpoint, stats, overrides, resolvers=resolvers)
        if checkpoint is not None:
            raise UserError(f"{folder} holds its own weights; leave out checkpoint {checkpoint} or give a YAML file")
        if overrides:
            raise UserError(f"{folder} is a saved autoencoder and takes no overrides: {' '.join(overrides)}")
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
        *,
        resolvers: bool = False,
    ) -> SVGAutoencoder:
        """From a published-style YAML file, or its content: all of it, or `{"model": {"params": …}}`.

        checkpoint: instead of `model.params.ckpt_path`; its encoder, if it holds one, takes the place of
        `dinoconfig.weights`. stats: a file, or statistics. overrides: "model.params.ddconfig.ch=64", for files only.
        resolvers: whether the file may read the environment (`${oc.env:NAME}`); see `read_config`.
        """
        source, file = "model config", None
        if not isinstance(config, Mapping):
            source, file = str(config), find_config(config)
            config = read_config(config, overrides, resolvers)
        model = config.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("params"), Mapping):
            raise ConfigError(f"{source}: there is no section model.params, which describes the autoencoder")
        params = build(ModelConfig, model["params"], source)
        if checkpoint is None and params.ckpt_path is not None:
            checkpoint = _find_checkpoint(params.ckpt_path, file)
        state = {}
        if checkpoint is not None:
            checkpoint = locate(checkpoint)
            state = read_state_dict(checkpoint, "autoencoder checkpoint", params.use_ema, verify=True)
        if any(name.startswith("encoder.") for name in state):
            params = replace(params, dinoconfig=replace(params.dinoconfig, weights=None))
        model = cls(params)
        if checkpoint is not None:
            model._load_state(state, checkpoint)
        model._attach(stats)
        return model

    def read_stats(self, path: str | Path) -> LatentStats:
        """Statistics of latents like these from a file, which `set_stats` may attach."""
        residual = self.model_config.extra_vit_config
        made_up = residual.output_dim if residual is not None and residual.published_stats else 0
        return LatentStats.load(locate(path), self.channels, self.model_config.num_layer, made_up)

    def _attach(self, stats: str | Path | LatentStats | None) -> None:
        """`set_stats` of statistics, a file of them, or nothing."""
        if stats is not None:
            self.set_stats(stats if isinstance(stats, LatentStats) else self.read_stats(stats))

    def _load_state(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        self._check_variant(state, path)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(DROPPED)}
        remedy = "Use the YAML file that belongs to it (dinoconfig.model_name, ddconfig or hyconfig, extra_vit_config)"
        load_strictly(self, kept, f"autoencoder checkpoint {path}", remedy, state.keys() - kept.keys())

    def _check_variant(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        """UserError where the checkpoint is of another kind of autoencoder than the config describes."""
        residual = any(name.startswith("extra_vit.") for name in state)
        if residual != (self.extra_vit is not None):
            found, wanted = ("a", "none") if residual else ("no", "one")
            raise UserError(
                f"autoencoder checkpoint {path} has {found} residual branch (extra_vit.*), the configuration has "
                f"{wanted}: {'describe it in' if residual else 'set to null'} model.params.extra_vit_config, as the "
                f"files svg_autoencoder_{'R' if residual else 'P'}_* in configs/autoencoder/pre-trained do"
            )
        kernel, (section, _) = state.get("decoder.conv_in.weight"), self.model_config.decoder
        stored = "hyconfig" if kernel is not None and kernel.ndim == 5 else "ddconfig"
        if kernel is not None and stored != section:
            raise UserError(
                f"autoencoder checkpoint {path} has the decoder of a {stored}, but model.params describes one in "
                f"{section}; compare configs/autoencoder/residual"
            )

    def _require_stats(self) -> LatentStats:
        if self.stats is None:
            raise UserError(
                "the autoencoder has no latent statistics: measure them with python -m autoencoder.measure_latents and "
                "give the file as `stats` (published: dinov3_s16p_layer_patchtoken_stats_dist.pt)"
            )
        return self.stats

    def _check_sizes(self) -> None:
        section, decoder = self.model_config.decoder
        if decoder.z_channels != self.channels:
            residual = "" if self.extra_vit is None else f" and the residual branch {self.extra_vit.config.output_dim}"
            raise UserError(
                f"model.params: the encoder {self.model_config.dinoconfig.model_name} gives {self.encoder.channels} "
                f"channels{residual}, but {section}.z_channels is {decoder.z_channels}; set it to {self.channels}"
            )
        if self.decoder.scale != self.encoder.patch_size:
            levels = "ch_mult" if section == "ddconfig" else "block_out_channels"
            raise UserError(
                f"model.params.{section}: {levels} {tuple(getattr(decoder, levels))} scales by {self.decoder.scale}, "
                f"the encoder's patches have {self.encoder.patch_size} px; give it 5 entries for 16"
            )
        if self.extra_vit is not None and self.extra_vit.patch_size != self.encoder.patch_size:
            raise UserError(
                f"model.params.extra_vit_config: its patches have {self.extra_vit.patch_size} px, the encoder's "
                f"{self.encoder.patch_size}; make them equal"
            )


def _find_checkpoint(path: str, config: Path | None) -> Path:
    """The file that `ckpt_path` names: from the folder of its YAML file or one around it, as in the release, whose path
    begins with pre-trained/; beside the YAML file; or where `locate` finds it."""
    if config is None:
        return locate(path)
    around = (config.parent, *config.parent.resolve().parents[:2])
    candidates = [*(folder / path for folder in around), config.with_name(Path(path).name)]
    return next((candidate for candidate in candidates if candidate.is_file()), locate(path))
