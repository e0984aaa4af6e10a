"""Losses against a plain transcription of the formulas, and LPIPS against torchmetrics' copy of the network."""

import sys
import urllib.error

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.common.config import ConfigError, UserError
from autoencoder.training.losses import (
    AutoencoderLoss,
    LossConfig,
    PatchDiscriminator,
    build_loss,
    build_lpips,
    hinge_loss,
    vanilla_loss,
)


class SquaredError(nn.Module):
    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


def make_loss(**settings):
    settings = {"disc_start": 0, "disc_ndf": 8, "perceptual_weight": 0.7, "logvar_init": 0.1} | settings
    torch.manual_seed(1)
    return AutoencoderLoss(LossConfig(**settings), perceptual=SquaredError())


def make_groups(*shapes):
    """Images, features, and the last layer that makes reconstructions of them."""
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(n, 3, h, w, generator=generator) * 2 - 1 for n, h, w in shapes]
    features = [torch.randn(n, 4, h, w, generator=generator) for n, h, w in shapes]
    layer = (torch.randn(3, 4, 3, 3, generator=generator) * 0.2).requires_grad_()
    return images, features, layer


def reconstruct(features, layer):
    return [F.conv2d(group, layer, padding=1) for group in features]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shapes", [[(3, 32, 48)], [(2, 32, 32), (1, 48, 32)]])
def test_generator_loss_is_the_plain_formula(shapes, per_image):
    images, features, layer = make_groups(*shapes)
    total, logs = (loss := make_loss(disc_per_image=per_image)).generator_loss(
        images, reconstruct(features, layer), layer, step=0
    )
    total.backward()

    reference = make_loss()  # plain BatchNorm
    recons, logvar = reconstruct(features, layer), torch.tensor(0.1)
    nll = sum(
        (((x - y).abs() + 0.7 * (x - y).square().mean((1, 2, 3), keepdim=True)) / logvar.exp() + logvar).sum()
        for x, y in zip(images, recons)
    ) / sum(len(x) for x in images)
    singles = [image for group in recons for image in group.split(1)] if per_image else recons
    g = -torch.cat([reference.discriminator(y).flatten() for y in singles]).mean()
    norms = [torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (nll, g)]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4) * loss.config.disc_weight
    expected = nll + weight * g
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(logs["d_weight"], weight)
    torch.testing.assert_close(layer.grad, torch.autograd.grad(nll + weight * g, layer)[0], rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_per_image_statistics_are_those_of_images_that_come_alone():
    images, features, layer = make_groups((3, 32, 48), (2, 48, 32))
    loss, reference = make_loss(disc_per_image=True), make_loss()  # plain BatchNorm
    recons = [group.detach() for group in reconstruct(features, layer)]
    total, logs = loss.discriminator_loss(images, recons, step=0)
    total.backward()
    singles = [group.split(1) for group in (torch.cat([x, y]) for x, y in zip(images, recons))]
    for group, pair in zip(singles, images):  # as it goes through: a size's images, then their reconstructions
        n = len(pair)
        logits = [reference.discriminator(image) for image in group]
        terms = [0.5 * (F.relu(1 - logits[i]).mean() + F.relu(1 + logits[n + i]).mean()) / 5 for i in range(n)]
        sum(terms).backward()
    for (name, ours), theirs in zip(loss.discriminator.named_parameters(), reference.discriminator.parameters()):
        assert (ours.grad - theirs.grad).abs().max() < 1e-5 + 1e-3 * theirs.grad.abs().max(), name
    for ours, theirs in zip(loss.discriminator.buffers(), reference.discriminator.buffers()):
        torch.testing.assert_close(ours, theirs)
    for one in (loss, reference):
        one.eval()
    torch.testing.assert_close(loss.discriminator(images[0]), reference.discriminator(images[0]))


def test_discriminator_counts_images_equally():
    images, features, layer = make_groups((3, 32, 32), (1, 64, 48))
    loss, reference = make_loss(), make_loss()
    recons = reconstruct(features, layer)
    total, logs = loss.discriminator_loss(images, recons, step=0)
    total.backward()
    terms, reals = [], []
    for x, y in zip(images, recons):
        real, fake = reference.discriminator(x), reference.discriminator(y.detach())
        terms.append(0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) * len(x) / 4)
        reals.append(real.mean() * len(x) / 4)
    torch.testing.assert_close(total, sum(terms))
    torch.testing.assert_close(logs["logits_real"], sum(reals))
    assert layer.grad is None
    assert loss.discriminator.main[0].weight.grad.abs().max() > 0


def test_adversaries_are_cross_entropy_and_hinge():
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    entropies = [F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, label)) for x, label in ((real, 1), (fake, 0))]
    torch.testing.assert_close(vanilla_loss(real, fake), sum(entropies) / 2)
    torch.testing.assert_close(hinge_loss(real, fake), ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean() / 2)
    images, features, layer = make_groups((2, 32, 32))
    loss, reference = make_loss(disc_loss="vanilla"), make_loss()
    recons = [group.detach() for group in reconstruct(features, layer)]
    expected = vanilla_loss(*(reference.discriminator(x[0]) for x in (images, recons)))
    torch.testing.assert_close(loss.discriminator_loss(images, recons, step=0)[0], expected)


def test_unnamed_settings_are_the_published_ones():
    assert vars(LossConfig()) == {
        "disc_start": 5000, "disc_weight": 0.5, "disc_factor": 1.0, "perceptual_weight": 1.0, "logvar_init": 0.0,
        "disc_loss": "hinge", "disc_num_layers": 3, "disc_ndf": 64, "disc_in_channels": 3, "disc_per_image": False,
    }  # fmt: skip


def test_reconstruction_does_not_depend_on_grouping():
    images, features, layer = make_groups((3, 32, 32))
    recons = reconstruct(features, layer)
    whole = make_loss().reconstruction(images, recons)
    parts = make_loss().reconstruction([images[0][:1], images[0][1:]], [recons[0][:1], recons[0][1:]])
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", [{"disc_weight": 0.0}, {"disc_factor": 0.0}])
def test_no_weight_no_discriminator(settings):
    images, features, layer = make_groups((2, 32, 32))
    loss = make_loss(**settings)
    total, logs = loss.generator_loss(images, reconstruct(features, layer), layer, step=10**6)
    assert loss.discriminator is None
    torch.testing.assert_close(total, logs["nll_loss"])


def test_discriminator_sleeps_until_disc_start():
    images, features, layer = make_groups((2, 32, 32))
    loss = make_loss(disc_start=10)
    calls = []
    loss.discriminator.register_forward_hook(lambda *_: calls.append(1))
    loss.generator_loss(images, reconstruct(features, layer), layer, step=9)
    assert not calls
    assert loss.disc_factor(9) == 0
    _, logs = loss.generator_loss(images, reconstruct(features, layer), layer, step=10)
    assert calls
    assert logs["disc_factor"] == 1


def test_perceptual_weight_zero_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    loss = build_loss({"params": {"perceptual_weight": 0, "disc_ndf": 8}})
    assert loss.perceptual_loss is None
    assert {key.split(".")[0] for key in loss.state_dict()} == {"discriminator", "logvar"}


def test_missing_vgg_weights_name_the_way_out(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", offline)
    with pytest.raises(UserError, match="perceptual_weight=0"):
        build_loss({"params": {"perceptual_weight": 1.0}})


def test_lpips_is_torchmetrics_lpips(monkeypatch):
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import vgg16

    with torch.device("meta"):
        trunk = vgg16(weights=None).features
    trunk = trunk.to_empty(device="cpu")
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.05)
    weights = {f"features.{key}": value for key, value in trunk.state_dict().items()}
    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", lambda *args, **kwargs: weights)
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):  # slow, and overwritten below
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    model = build_lpips()

    peer = _LPIPS(net="vgg", pnet_rand=True)
    numbered = {name.split(".")[1]: name.split(".")[0] for name in peer.net.state_dict()}
    peer.net.load_state_dict({f"{numbered[key.split('.')[0]]}.{key}": v for key, v in trunk.state_dict().items()})
    x, y = torch.rand(2, 2, 3, 32, 48) * 2 - 1
    y = y.requires_grad_()
    torch.testing.assert_close(model(x, y), peer(x, y).reshape(2, 1, 1, 1), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(model(x, y).sum(), y)[0].abs().max() > 0
    names = {name.rpartition(".")[0] for name in model.state_dict() if name.endswith(".weight")}
    assert {"net.slice1.0", "net.slice5.28", "lin0.model.1", "lin4.model.1"} <= names
    assert not any(name.startswith("lins") for name in names)
    loss = AutoencoderLoss(LossConfig(disc_ndf=8), perceptual=model).train()
    assert not any(module.training for module in loss.perceptual_loss.modules())


def test_discriminator_shape_and_initialisation():
    discriminator = PatchDiscriminator()
    assert discriminator(torch.zeros(1, 3, 64, 96)).shape == (1, 1, 6, 10)
    widths = [m.out_channels for m in PatchDiscriminator(ndf=2, n_layers=5).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]  # eight times the first at most
    weights = torch.cat([m.weight.flatten() for m in discriminator.modules() if isinstance(m, nn.Conv2d)])
    assert abs(weights.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize(("n_layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_of_the_discriminator_sees_a_patch_of_this_side(n_layers, pixels):
    discriminator = PatchDiscriminator(ndf=4, n_layers=n_layers).eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(images)
    centre = logits.shape[2] // 2
    (grad,) = torch.autograd.grad(logits[0, 0, centre, centre], images)
    seen = grad[0].abs().sum(dim=0) > 0  # (H, W)
    rows, columns = seen.any(dim=1).nonzero(), seen.any(dim=0).nonzero()
    for places in (rows, columns):
        assert places.max() - places.min() + 1 == pixels
    assert seen.sum() > 0.9 * pixels**2


@pytest.mark.parametrize(("n_layers", "side"), [(1, 6), (2, 12), (3, 24)])
def test_the_smallest_image_of_the_discriminator_gets_one_logit(n_layers, side):
    discriminator = PatchDiscriminator(ndf=4, n_layers=n_layers).eval()
    assert discriminator.smallest_side == side
    assert discriminator(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, side - 1, side))


@pytest.mark.parametrize(
    ("lossconfig", "message"),
    [
        ({"target": "torch.nn.MSELoss"}, "unknown target"),
        ({"params": {"disc_wieght": 1.0}}, "did you mean 'disc_weight'"),
        ({"params": {"disc_weight": -1.0}}, "must not be negative"),
        ({"params": {"disc_loss": "wgan"}}, "choose one of hinge, vanilla"),
    ],
)
def test_bad_config_is_named(lossconfig, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(lossconfig)


def test_published_targets_choose_the_variant():
    params = {"perceptual_weight": 0, "disc_ndf": 8}
    native = build_loss({"target": "ldm.modules.losses.LPIPSWithDiscriminatorDecoder", "params": params})
    square = build_loss({"target": "ldm.modules.losses.LPIPSWithDiscriminatorDecoderIN", "params": params})
    assert native.config.disc_per_image
    assert not square.config.disc_per_image
