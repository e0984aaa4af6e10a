"""Latent statistics: the one-pass measurement against numpy, files, and refusals."""

import numpy as np
import pytest
import torch

from autoencoder.common.config import UserError
from autoencoder.common.weights import fingerprint, replacing
from autoencoder.latents.statistics import LatentStats, StatsAccumulator

D = 6


@pytest.fixture
def stats():
    generator = torch.Generator().manual_seed(4)
    return LatentStats(
        torch.randn(D, generator=generator),
        torch.rand(D, generator=generator) + 0.5,
        encoder="abc",
        resolutions=(64, 128),
    )


@pytest.fixture
def batches():
    """Batches of several sizes, with channel means far from zero compared with their deviations."""
    offsets = torch.linspace(-3000, 3000, D)[:, None, None]
    return [torch.randn(n, D, h, w) * 0.01 + offsets for n, h, w in ((3, 4, 4), (1, 2, 7), (5, 1, 1))]


def test_one_pass_equals_numpy(batches):
    accumulator = StatsAccumulator()
    for batch in batches:
        accumulator.update(batch)
    values = np.concatenate([batch.double().numpy().transpose(1, 0, 2, 3).reshape(D, -1) for batch in batches], axis=1)
    assert accumulator.count == values.shape[1]
    np.testing.assert_allclose(accumulator.moments()[0].numpy(), values.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(accumulator.moments()[1].numpy(), values.std(axis=1, ddof=1), rtol=1e-9)
    assert accumulator.moments()[0].dtype == torch.float64


def test_merging_equals_one_stream(batches):
    whole, first, second = StatsAccumulator(), StatsAccumulator(), StatsAccumulator()
    for batch in batches:
        whole.update(batch)
    first.update(batches[0])
    for batch in batches[1:]:
        second.update(batch)
    first.merge(second)
    first.merge(StatsAccumulator())
    assert first.count == whole.count
    torch.testing.assert_close(first.moments()[0], whole.moments()[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(first.moments()[1], whole.moments()[1], rtol=1e-9, atol=0)
    assert first.result("abc").encoder == "abc"


def test_too_little_to_measure():
    with pytest.raises(UserError, match="at least 2"):
        StatsAccumulator().result()
    constant = StatsAccumulator()
    constant.update(torch.ones(2, D, 2, 2))
    with pytest.raises(UserError, match="std positive"):
        constant.result()


def test_normalized_latents_have_unit_deviation_and_come_back():
    latents = torch.randn(64, D, 4, 4) * torch.arange(1, D + 1)[:, None, None] + 5
    accumulator = StatsAccumulator()
    accumulator.update(latents)
    stats = accumulator.result()
    normalized = stats.normalize(latents)
    torch.testing.assert_close(normalized.mean(dim=(0, 2, 3)), torch.zeros(D), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std(dim=(0, 2, 3)), torch.ones(D), atol=1e-3, rtol=0)
    torch.testing.assert_close(stats.denormalize(normalized), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.normalize(latents[0]), normalized[0])  # one latent without a batch


def test_stay_fp32_and_out_of_state_dicts(stats):
    module = torch.nn.Sequential(stats)
    mean = stats.mean.clone()
    assert module.state_dict() == {}
    module.bfloat16()
    assert torch.equal(stats.mean, mean)
    assert stats.normalize(torch.zeros(1, D, 1, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_own_file_keeps_values_and_encoder(stats, tmp_path):
    path = tmp_path / "new" / "stats.safetensors"
    stats.save(path)
    loaded = LatentStats.load(path, D)
    assert torch.equal(loaded.mean, stats.mean)
    assert torch.equal(loaded.std, stats.std)
    assert loaded.encoder == "abc"
    assert loaded.resolutions == (64, 128)
    assert loaded.fingerprint() == stats.fingerprint()
    assert LatentStats(stats.mean + 1, stats.std).fingerprint() != stats.fingerprint()
    assert [file.name for file in path.parent.iterdir()] == ["stats.safetensors"]
    (path.parent / "any").touch()
    assert path.stat().st_mode == (path.parent / "any").stat().st_mode  # readable by whom the umask says


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tiny_deviation_is_kept_from_zero():
    stats = LatentStats(torch.tensor([1.0]), torch.tensor([1e-8]))
    torch.testing.assert_close(stats.normalize(torch.full((1, 1, 1), 3.0)), torch.full((1, 1, 1), 1e8))  # 2 / 2e-8


def test_a_new_file_gets_its_folders(tmp_path):
    with replacing(tmp_path / "a" / "b" / "new.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "a" / "b" / "new.txt").read_text() == "new"


def test_fingerprints_stay_those_in_older_checkpoints():
    """Values that must not change, or every checkpoint and cache is refused."""
    assert LatentStats(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0])).fingerprint() == "1224c087dafe31c0"
    state = {"w": torch.tensor([[1.0, -2.5]]), "b": torch.arange(3.0)}
    assert fingerprint({"b": 1, "a": "x"}, state) == "0444b5555b91b4de"
    assert fingerprint({"a": "x", "b": 1}, {name: state[name].bfloat16() for name in ("b", "w")}) == "0444b5555b91b4de"


def test_published_file_rows_and_extra_channels(tmp_path):
    mean, std = torch.randn(3, D), torch.rand(3, D) + 0.1
    path = tmp_path / "published.pt"
    torch.save({"mean": mean, "std": std}, path)
    assert torch.equal(LatentStats.load(path, D).mean, mean[-1])
    assert torch.equal(LatentStats.load(path, D, num_layer=1).std, std[1])
    with pytest.raises(UserError, match="6 channels, the autoencoder has 14.*published_stats: true"):
        LatentStats.load(path, D + 8)
    extended = LatentStats.load(path, D + 8, made_up=8)
    assert torch.equal(extended.mean[:D], mean[-1])
    torch.testing.assert_close(extended.mean[D:], mean[-1].mean().repeat(8))
    torch.testing.assert_close(extended.std[D:], std[-1].mean().repeat(8))
    assert extended.encoder is None
    assert extended.resolutions == ()
    with pytest.raises(UserError, match="num_layer=3"):
        LatentStats.load(path, D, num_layer=3)


def test_files_that_do_not_fit_are_refused(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    with pytest.raises(UserError, match="6 channels, the autoencoder has 7.*measure_latents"):
        LatentStats.load(tmp_path / "stats.safetensors", 7)
    with pytest.raises(UserError, match="another encoder"):  # our own files are never extended
        LatentStats.load(tmp_path / "stats.safetensors", D + 8, made_up=8)
    with pytest.raises(UserError, match="there is no file"):
        LatentStats.load(tmp_path / "absent.pt", D)
    torch.save({"average": torch.ones(D)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="expected tensors mean and std, found average"):
        LatentStats.load(tmp_path / "odd.pt", D)
    with pytest.raises(UserError, match="must both be"):
        LatentStats(torch.zeros(D), torch.ones(D + 1))
    with pytest.raises(UserError, match="finite"):
        LatentStats(torch.full((D,), torch.nan), torch.ones(D))
    with pytest.raises(UserError, match=".safetensors"):
        stats.save(tmp_path / "stats.pt")
