"""The plan of training the autoencoder (stage 1): memory of a GPU by part, arithmetic, time and cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.common.config import UserError, build, resolve_target
from autoencoder.evaluation.metrics import lpips_network
from autoencoder.images.files import LATENT_PIXELS
from autoencoder.model import SVGAutoencoder
from autoencoder.training.batches import DATA, FolderParams
from autoencoder.training.losses import AutoencoderLoss, build_loss
from autoencoder.training.settings import AutoencoderTrainConfig
from svg_t2i.planning.gpus import GPU, own_share
from svg_t2i.planning.memory import META, measure_pass
from svg_t2i.planning.networks import autoencoder_of, count, size
from svg_t2i.planning.training import GB

UTILISATION = 0.3  # an assumption: it was not measured


@dataclass(frozen=True)
class AutoencoderPlan:
    """What `plan_autoencoder` finds, for a step in which the discriminator plays.

    Attributes:
        memory: bytes on a GPU by part. flops: of an image. seconds: of a step.
    """

    parameters: int
    discriminator_parameters: int
    side: int
    images_per_gpu: int
    images_per_step: int
    memory: dict[str, float]
    flops: float
    seconds: float | None
    steps: int | None
    checkpoint_bytes: float
    gpu: GPU
    gpus: int

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu.memory * GB


def plan_autoencoder(
    config: AutoencoderTrainConfig, gpu: GPU, gpus: int, utilisation: float = UTILISATION
) -> AutoencoderPlan:
    """The plan of a run on so many GPUs. Arithmetic in fp32 is taken to run as TF32, at half the peak of bf16.

    Raises:
        UserError: a setting of the configuration, or a number out of its range.
    """
    if gpus < 1 or not 0 < utilisation <= 1:
        raise UserError(f"gpus = {gpus}, utilisation = {utilisation}: must be positive")
    data = build(resolve_target(config.data.target, "data.target", DATA), config.data.params, "data.params")
    side = data.train.params.size if isinstance(data, FolderParams) else data.train_resol
    autoencoder = autoencoder_of(config.model.params)
    with META:
        loss = build_loss(config.model.params.lossconfig, perceptual=lpips_network())
    loss.to(META).train()  # some buffers of LPIPS are made on the CPU
    trained = sum(weight.numel() for weight in autoencoder.trainable_parameters())
    rival = 0 if loss.discriminator is None else count(loss.discriminator)
    mixed = config.training.trainer.precision == "bf16-mixed"
    frozen = size(autoencoder, loss) - 4 * (trained + rival)
    kept = 4 if config.training.ema_decay is not None else 0
    activations, flops = _step(autoencoder, loss, side, data.batch_size, mixed)
    memory: dict[str, float] = {
        "weights": 4 * (trained + rival), "gradients": 4 * (trained + rival), "moments": 8 * (trained + rival),
        "averages": kept * trained, "activations": activations, "frozen networks": frozen,
    }  # fmt: skip
    memory["device's own"] = own_share(sum(memory.values()), gpus)
    accumulated = config.training.accumulate_grad_batches
    seconds = None
    if gpu.tflops is not None:
        peak = gpu.tflops * 1e12 * (1 if mixed else 0.5)
        seconds = accumulated * data.batch_size * flops / (peak * utilisation)
    return AutoencoderPlan(
        trained, rival, side, data.batch_size, data.batch_size * gpus * accumulated, memory, flops, seconds,
        config.training.trainer.max_steps, size(autoencoder, loss) + 8 * (trained + rival) + kept * trained, gpu, gpus,
    )  # fmt: skip


def _step(
    autoencoder: SVGAutoencoder, loss: AutoencoderLoss, side: int, images: int, mixed: bool
) -> tuple[float, float]:
    """Bytes of activations of the larger of the two players' turns, and operations of a step for one image."""
    residual = autoencoder.extra_vit
    players = nn.ModuleList([autoencoder.decoder, loss] + [residual] * (residual is not None))
    step, grid = loss.config.disc_start + 1, (side // LATENT_PIXELS,) * 2

    def batch() -> Tensor:
        return torch.empty(images, 3, side, side, device=META)

    def decoder_turn() -> Tensor:
        latents = torch.empty(images, autoencoder.encoder.channels, *grid, device=META)
        if residual is not None:
            latents = torch.cat([latents, residual(batch(), latents)], dim=1)
        recons = [autoencoder.decoder(latents)]
        return loss.generator_loss([batch()], recons, autoencoder.decoder.last_layer, step)[0]

    def discriminator_turn() -> Tensor:
        return loss.discriminator_loss([batch()], [batch()], step)[0]

    turns = [decoder_turn] + [discriminator_turn] * (loss.discriminator is not None)
    with FlopCounterMode(display=False) as counted:
        activations = max(measure_pass(players, turn, autocast=mixed).peak for turn in turns)
    encoding = 2 * count(autoencoder.encoder) * (side // LATENT_PIXELS) ** 2  # a multiply-add a weight and token
    return activations, counted.get_total_flops() / images + encoding
