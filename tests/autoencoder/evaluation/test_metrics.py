"""Metrics against scikit-image, scipy and torch-fidelity on the same images."""

import urllib.error

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from autoencoder.evaluation import metrics
from autoencoder.evaluation.metrics import FrechetDistance, ImageMetrics, Unavailable, to_8bit
from autoencoder.images.files import to_pil, to_uint8_tensor


def pairs(n=3, height=40, width=56):
    """Images with structure, and noisy copies of different quality."""
    low = torch.rand(n, 3, height // 8, width // 8)
    images = (nn.functional.interpolate(low, (height, width), mode="bilinear") * 255).round()
    noise = torch.randn(n, 3, height, width) * torch.tensor([2.0, 15.0, 60.0])[:n, None, None, None]
    return images.to(torch.uint8), (images + noise + 3).clamp(0, 255).to(torch.uint8)


def test_8_bit_is_what_a_png_keeps():
    images = torch.cat([torch.randn(1, 3, 16, 16), torch.linspace(-1.2, 1.2, 768).view(1, 3, 16, 16)])
    levels = to_8bit(images)
    assert torch.equal(levels, torch.stack([to_uint8_tensor(to_pil(image)) for image in images]))
    assert (levels[1].min(), levels[1].max()) == (0, 255)
    assert torch.equal(to_8bit(torch.arange(256) / 127.5 - 1), torch.arange(256, dtype=torch.uint8))


def test_psnr_and_ssim_are_those_of_scikit_image():
    images, recons = pairs()
    values = ImageMetrics(lpips=None)(images, recons)
    for row, x, y in zip(values, images.permute(0, 2, 3, 1).numpy(), recons.permute(0, 2, 3, 1).numpy()):
        assert row[0].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-5)
        difference = y.astype(float) - x.astype(float)
        np.testing.assert_allclose(row[3:].numpy(), difference.mean(axis=(0, 1)), atol=1e-9)
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        # scikit-image leaves out a border of 5 pixels, where windows would reach beyond the image
        x, y = (np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (x, y))
        expected = structural_similarity(x, y, data_range=255, channel_axis=2, **window)
        assert row[1].item() == pytest.approx(expected, abs=2e-5)
    assert values[:, 2].isnan().all()


def test_values_of_an_image_do_not_depend_on_its_batch():
    images, recons = pairs()
    alone = torch.cat([ImageMetrics(None)(x[None], y[None]) for x, y in zip(images, recons)])
    torch.testing.assert_close(ImageMetrics(None)(images, recons), alone, rtol=0, atol=1e-6, equal_nan=True)


def test_lpips_sees_the_rounded_pair_in_its_range():
    class Distance(nn.Module):
        def forward(self, x, y):
            assert min(x.min(), y.min()) >= -1
            return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    images, recons = pairs()
    expected = (images.double() - recons.double()).abs().mean(dim=(1, 2, 3)) / 127.5
    torch.testing.assert_close(ImageMetrics(Distance())(images, recons)[:, 2], expected, rtol=0, atol=1e-6)


class TinyFeatures(nn.Module):
    """Eight features of an image: non-linear functions of two pixels each."""

    num_features = 8

    def forward(self, images):
        return (images[:, 0, :4, :4].flatten(1).float() / 255).view(-1, 8, 2).prod(dim=2) * 3


def scipy_fid(x, y):
    """Heusel et al. 2017, eq. 6, with the unbiased covariance."""
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    mean = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return mean + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))


def random_images(n):
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 200, (n, 3, 8, 8)).to(torch.uint8)


def test_frechet_distance_is_that_of_scipy():
    images, recons = random_images(60)
    extractor = TinyFeatures()
    frechet = FrechetDistance(extractor)
    for x, y in zip(images.split(13), recons.split(13)):  # the last batch has 8
        frechet.update(x, y)
    expected = scipy_fid(extractor(images).double().numpy(), extractor(recons).double().numpy())
    assert frechet.distance(frechet.sums()) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1


def test_frechet_distance_does_not_depend_on_order_or_grouping():
    images, recons = random_images(50)
    distances = set()
    for order, batch in ((torch.arange(50), 50), (torch.randperm(50), 7), (torch.randperm(50), 1)):
        parts = [FrechetDistance(TinyFeatures()) for _ in range(3)]  # as many processes
        for number, (x, y) in enumerate(zip(images[order].split(batch), recons[order].split(batch))):
            parts[number % 3].update(x, y)
        sums = {name: sum(part.sums()[name] for part in parts) for name in parts[0].sums()}
        distances.add(parts[0].distance(sums))
    assert len(distances) == 1


def test_one_image_has_no_frechet_distance():
    frechet = FrechetDistance(TinyFeatures())
    frechet.update(*random_images(1))
    with pytest.raises(Unavailable, match="at least 2 images"):
        frechet.distance(frechet.sums())


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty folder for torch.hub, and no way to fill it."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("builder", [metrics.build_inception, metrics.build_lpips])
def test_missing_weights_give_a_reason_and_a_remedy(builder, no_network):
    with pytest.raises(Unavailable, match=rf"cannot be had .*no network.*put .*\.pth into {no_network}"):
        builder()


def test_inception_is_the_original_of_torch_fidelity(no_network, monkeypatch):
    """With random weights: theirs cannot be had here. The features are compared, and images of three sizes resized."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Original

    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(Original, "load_state_dict", lambda *a, **k: None)
        original = Original("inception-v3-compat", ["2048"]).eval()
    for norm in (m for m in original.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 1.0, 3.0)
    no_network.mkdir(parents=True)
    torch.save(original.state_dict(), no_network / metrics.INCEPTION_FILE)
    inception = metrics.build_inception()
    for side in (96, 320):
        images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
        with torch.no_grad():
            features = inception(images)
            assert features.shape == (1, inception.num_features)
            torch.testing.assert_close(features, original(images)[0])
            assert features.std() > 1e-3
