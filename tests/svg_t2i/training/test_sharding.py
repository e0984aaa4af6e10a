"""Recomputed and compiled blocks compute the same; one graph per kind of block serves every number of tokens."""

import pytest
import torch
from torch import nn

from autoencoder.common.config import UserError
from autoencoder.common.processes import World
from svg_t2i.training.settings import ParallelConfig
from svg_t2i.training.sharding import clip_gradients, compiled_graphs, parallelize
from svg_t2i.transformer import attention
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT
from svg_t2i.transformer.packing import TextFeatures

SIZES = DiTConfig(
    dim=32, n_layers=3, n_heads=2, n_kv_heads=1, n_refiner_layers=1, axes_dims=(4, 6, 6), in_channels=4,
    cap_feat_dim=8, multiple_of=32,
)  # fmt: skip
ALONE = World()


@pytest.fixture
def model():
    model = SVGDiT(SIZES)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def gradients(model, sizes, lengths):
    """Those of a batch of latents of these sizes with captions of these lengths."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, *size, generator=generator) for size in sizes]
    text = TextFeatures(torch.randn(sum(lengths), 8, generator=generator), tuple(lengths))
    model.zero_grad()
    velocity = model(latents, torch.rand(len(sizes), generator=generator), text)
    sum(v.square().mean() for v in velocity).backward()
    return {name: weight.grad.clone() for name, weight in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_give_the_same_gradients_under_the_same_names(model, mode):
    batch = ([(2, 3), (2, 2)], [5, 2])
    expected = gradients(model, *batch)
    forwards = []
    for block in model.layers:
        block.feed_forward.register_forward_hook(lambda *_: forwards.append(1))
    parallelize(model, ParallelConfig(activation_checkpointing=mode), "fp32", ALONE)
    actual = gradients(model, *batch)
    assert len(forwards) == 2 * len(model.layers)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_selective_keeps_what_is_dear(model):
    """Attention runs once, and half of the matrix products of a block are not repeated."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = ([(4, 4)] * 2, [5, 5])

    def operations(mode):
        again = SVGDiT(SIZES)
        parallelize(again, ParallelConfig(activation_checkpointing=mode), "fp32", ALONE)
        with FlopCounterMode(display=False) as counter:
            gradients(again, *batch)
        return counter.get_total_flops()

    none, selective, full = (operations(mode) for mode in ("none", "selective", "full"))
    assert none < selective < (none + 2 * full) / 3


def test_compiled_blocks_need_no_new_graphs_for_new_shapes(model, monkeypatch):
    eager = {}
    batches = [([(2, 3), (2, 2)], [5, 2]), ([(4, 3), (1, 2), (3, 3)], [3, 7, 4]), ([(5, 5), (2, 1)], [9, 8])]
    if torch.__version__.startswith("2.10."):  # it guards on the number of samples around the CPU's eager attention
        del batches[1]
    for i, batch in enumerate(batches):
        eager[i] = gradients(model, *batch)
    torch._dynamo.reset()
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile(self, backend="eager", **options))
    parallelize(model, ParallelConfig(compile=True), "fp32", ALONE)
    before = compiled_graphs()
    gradients(model, *batches[0])
    warm = compiled_graphs()
    assert warm > before
    assert warm - before <= 6  # three kinds of block, in two parts around attention, which stays eager on the CPU
    for i, batch in enumerate(batches):
        for name, gradient in gradients(model, *batch).items():
            torch.testing.assert_close(gradient, eager[i][name], atol=1e-4, rtol=1e-4)
    assert compiled_graphs() == warm


@pytest.mark.parametrize(("mode", "backend"), [("full", "eager"), ("selective", "aot_eager")])
def test_compiled_blocks_may_be_recomputed(model, monkeypatch, mode, backend):
    """With an attention that is traced, as on a GPU: one graph for each of two kinds of block, the same gradients.

    torch 2.10 learns that sizes vary from the second batch, and compiles each once more.
    """

    def dense(q, k, v, segments, backend):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        same = segments.owner[:, None] == segments.owner
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=same).transpose(0, 1)

    monkeypatch.setattr(attention, "attention_by_runs", dense)
    batches = [([(2, 3), (2, 2)], [5, 2]), ([(4, 3), (1, 2), (3, 3)], [3, 7, 4]), ([(3, 4), (2, 4)], [6, 1])]
    expected = [gradients(model, *batch) for batch in batches]
    graphs_of_a_kind = 1 if torch.__version__ >= "2.14" else 2
    torch._dynamo.reset()
    compile, before = nn.Module.compile, compiled_graphs()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile(self, backend=backend, **options))
    parallelize(model, ParallelConfig(compile=True, activation_checkpointing=mode), "bf16", ALONE)
    made = []
    for batch, eager in zip(batches, expected, strict=True):
        for name, gradient in gradients(model, *batch).items():
            torch.testing.assert_close(gradient, eager[name], atol=1e-5, rtol=1e-4)
        made.append(compiled_graphs() - before)
    assert made[0] == 2
    assert made[1] == made[2] <= 2 * graphs_of_a_kind


def test_compiling_what_cannot_be_traced_is_reported(model, caplog):
    parallelize(model, ParallelConfig(compile=True, activation_checkpointing="full"), "fp32", ALONE)
    assert "parallel.compile does nothing" in caplog.text


def test_clip_returns_the_norm_before():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
    torch.testing.assert_close(clip_gradients(list(layer.parameters()), 0.1), before)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm(), torch.tensor(0.1))


@pytest.mark.parametrize("settings", [{"shard_size": 2}, {"data_parallel": "hsdp", "shard_size": 0}])
def test_shard_size_belongs_to_hsdp(settings):
    with pytest.raises(UserError, match="shard_size"):
        ParallelConfig(**settings)
