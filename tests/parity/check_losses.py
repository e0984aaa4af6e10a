"""Patch discriminator, adaptive weight and both players' losses against the published ones.

The published list variant trains on the last image's reconstruction term only (spec section 11). Ours trains on all;
its parts are public, so the check composes the published total from them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.training.losses import AutoencoderLoss, LossConfig, hinge_loss, vanilla_loss


class StandIn(nn.Module):
    """Takes LPIPS's place in the vectors: mean squared difference per image."""

    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


def build(vectors, case, per_image):
    config = vectors.config
    loss = AutoencoderLoss(
        LossConfig(
            disc_start=case["disc_start"],
            disc_weight=case["disc_weight"],
            perceptual_weight=case["pw"],
            logvar_init=config["logvar"],
            disc_loss=case["loss"],
            disc_num_layers=config["n_layers"],
            disc_ndf=config["ndf"],
            disc_per_image=per_image,
        ),
        perceptual=StandIn(),
    )
    loss.load_state_dict(vectors.state_dict())
    return loss


def check(vectors):
    tensors = vectors.tensors
    vectors.compare("out.hinge", hinge_loss(tensors["in.logits_real"], tensors["in.logits_fake"]))
    vectors.compare("out.vanilla", vanilla_loss(tensors["in.logits_real"], tensors["in.logits_fake"]))
    check_discriminator(vectors)
    sizes = range(len(vectors.config["list_sizes"]))
    for case in vectors.config["cases"]:
        check_case(vectors, case, "batch", [tensors["in.inputs"]], [tensors["in.features"]])
        images, features = ([tensors[f"in.list.{name}.{i}"] for i in sizes] for name in ("inputs", "features"))
        check_case(vectors, case, "list", images, features)


def check_discriminator(vectors):
    discriminator = build(vectors, vectors.config["cases"][0], per_image=False).discriminator
    images = vectors.tensors["in.inputs"]
    vectors.compare("out.disc.eval_logits", discriminator.eval()(images))
    vectors.compare("out.disc.train_logits", discriminator.train()(images))
    prefix = "out.disc.after_train."
    for key in [key for key in vectors.tensors if key.startswith(prefix)]:
        vectors.compare(key, discriminator.state_dict()[key.removeprefix(prefix)])


def check_case(vectors, case, variant, images, features):
    prefix, step, per_image = f"out.{variant}.{case['name']}.", case["step"], variant == "list"
    weight = vectors.tensors["in.last_layer.weight"].clone().requires_grad_()
    bias = vectors.tensors["in.last_layer.bias"]

    def reconstruct():
        return [F.conv2d(group, weight, bias, padding=1) for group in features]

    loss, recons = build(vectors, case, per_image), reconstruct()
    total, logs = loss.generator_loss(images, recons, weight, step)
    total.backward()
    pieces = adversarial_pieces(build(vectors, case, per_image), images, reconstruct(), weight)
    logs |= pieces  # before disc_start ours does not evaluate them
    if per_image:
        ours = loss.disc_factor(step) * pieces["d_weight"] * pieces["g_loss"] + logs["nll_loss"]
        torch.testing.assert_close(total, ours)
        published = published_list_total(build(vectors, case, per_image), images, reconstruct(), weight, step)
        logs["total_loss"], gradient = published.detach(), torch.autograd.grad(published, weight)[0]
        logs["disc_factor"] = torch.tensor(loss.disc_factor(step))  # logs the factor in force
    else:
        gradient = weight.grad
        vectors.compare(prefix + "adaptive_weight", pieces["d_weight"])
        vectors.compare(prefix + "nll_only", logs["nll_loss"])
        vectors.compare(prefix + "g_only", pieces["g_loss"])
        logs["disc_factor"] = torch.tensor(loss.config.disc_factor)  # logs the configured one
    vectors.compare(prefix + "generator_total", logs["total_loss"])
    vectors.compare(prefix + "grad_last_layer", gradient)
    for name, value in logs.items():
        vectors.compare(f"{prefix}log.{name}", value)

    loss = build(vectors, case, per_image)
    d_total, d_logs = loss.discriminator_loss(images, reconstruct(), step)
    vectors.compare(prefix + "discriminator_total", d_total)
    for name, value in d_logs.items():
        vectors.compare(f"{prefix}dlog.{name}", value)
    if prefix + "grad_disc_first_conv" in vectors.tensors:
        gradient = torch.autograd.grad(d_total, loss.discriminator.main[0].weight)[0]
        vectors.compare(prefix + "grad_disc_first_conv", gradient)


def adversarial_pieces(loss, images, recons, weight):
    """g and λ, which the release evaluates and logs before `disc_start` too."""
    g_loss, nll = loss.adversarial(recons), loss.reconstruction(images, recons).nll.mean()
    grads = [torch.autograd.grad(term, recons) for term in (nll, g_loss)]
    return {"g_loss": g_loss.detach(), "d_weight": loss.adaptive_weight(*grads, recons, weight).detach()}


def published_list_total(loss, images, recons, weight, step):
    nll, g_loss = loss.reconstruction(images, recons).nll, loss.adversarial(recons)
    grads = [torch.autograd.grad(term, recons, retain_graph=True) for term in (nll.mean(), g_loss)]
    adaptive = loss.adaptive_weight(*grads, recons, weight).detach()
    return nll[-1] / len(recons) + adaptive * loss.disc_factor(step) * g_loss
