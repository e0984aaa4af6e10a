"""SVGDiT against diffusers' transformer of the same family, and the properties that packing must not break."""

import random

import pytest
import torch

from autoencoder.common.config import UserError
from benchmarks.forward import lumina2_peer, randomise
from benchmarks.forward import main as run_benchmark
from svg_t2i.transformer import attention as attention_module
from svg_t2i.transformer import model as model_module
from svg_t2i.transformer.attention import BACKENDS
from svg_t2i.transformer.model import (
    MODELS,
    Block,
    DiTConfig,
    SVGDiT,
    build_model,
    load_published_state_dict,
    published_state_dict,
)
from svg_t2i.transformer.packing import TextFeatures, plan_packing

SIZES = {"dim": 48, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "n_refiner_layers": 1, "axes_dims": (4, 6, 6)}
SMALL = DiTConfig(**SIZES, in_channels=5, cap_feat_dim=12, multiple_of=32, axes_lens=(32, 16, 16))


@pytest.fixture
def model():
    model = SVGDiT(SMALL)
    randomise(model)
    return model


def random_text(lengths, width=SMALL.cap_feat_dim):
    return TextFeatures(torch.randn(sum(lengths), width), tuple(lengths))


def padded(text):
    parts = text.features.split(text.lengths)
    mask = torch.arange(max(text.lengths)) < torch.tensor(text.lengths)[:, None]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), mask.int()


# ------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("lengths", [(6, 6), (9, 2, 5)])
def test_equals_diffusers_with_the_same_weights(patch_size, lengths):
    model = SVGDiT(DiTConfig(**SIZES, in_channels=5, cap_feat_dim=12, multiple_of=32, patch_size=patch_size))
    randomise(model)
    peer = lumina2_peer(model)
    latents, timesteps, text = torch.randn(len(lengths), 5, 4, 6), torch.rand(len(lengths)), random_text(lengths)
    features, mask = padded(text)
    ours, theirs = model(latents, timesteps, text), peer(latents, timesteps, features, mask, return_dict=False)[0]
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    pairs = [
        (model.x_embedder.weight, peer.x_embedder.weight),
        (model.layers[0].feed_forward.w1.weight, peer.layers[0].feed_forward.linear_1.weight),
        (model.layers[1].attention_norm1.weight, peer.layers[1].norm1.norm.weight),
        (model.layers[1].attention.k_norm.weight, peer.layers[1].attn.norm_k.weight),
        (model.context_refiner[0].ffn_norm2.weight, peer.context_refiner[0].ffn_norm2.weight),
        (model.cap_embedder[0].weight, peer.time_caption_embed.caption_embedder[0].weight),
        (model.t_embedder.mlp[0].weight, peer.time_caption_embed.timestep_embedder.linear_1.weight),
        (model.noise_refiner[0].adaLN_modulation[1].weight, peer.noise_refiner[0].norm1.linear.weight),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4)


def test_benchmark_reports_agreement_and_ratio(capsys):
    sizes = {"dim": 32, "layers": 1, "kv-heads": 1, "channels": 4, "batch": 2, "repeats": 1}
    run_benchmark([f"--{name}={value}" for name, value in sizes.items()])
    report = capsys.readouterr().out
    assert float(report.split("outputs: ")[1].split()[0]) < 1e-4
    assert "ratio" in report


# ------------------------------------------------------------------------------------------------------------ packing


def test_an_image_does_not_depend_on_its_neighbours(model):
    latents = [torch.randn(5, h, w) for h, w in ((4, 6), (2, 2), (8, 3), (4, 6))]
    timesteps, text = torch.rand(4), random_text((7, 3, 7, 1))
    together = model(latents, timesteps, text)
    for i in range(4):
        alone = model(latents[i][None], timesteps[i : i + 1], text.select([i]))[0]
        torch.testing.assert_close(together[i], alone, atol=5e-6, rtol=0)
    order = [2, 0, 3, 1]
    shuffled = model([latents[i] for i in order], timesteps[order], text.select(order))
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled[place], together[i], atol=5e-6, rtol=0)


def test_tensor_list_and_packed_tokens_agree(model):
    latents, timesteps, text = torch.randn(3, 5, 4, 2), torch.rand(3), random_text((4, 2, 4))
    batched, listed = model(latents, timesteps, text), model(list(latents), timesteps, text)
    assert isinstance(listed, list)
    assert torch.equal(batched, torch.stack(listed))
    tokens, sizes = model.pack(latents)
    assert sizes == ((4, 2),) * 3
    assert torch.equal(model.forward_packed(tokens, sizes, timesteps, text), model.pack(batched)[0])


def test_tokens_are_row_major_with_channels_last():
    model = SVGDiT(DiTConfig(**SIZES, in_channels=3, cap_feat_dim=12, multiple_of=32, patch_size=2))
    latents = torch.arange(3 * 4 * 6).view(1, 3, 4, 6).float()
    tokens, sizes = model.pack([latents[0], latents[0] + 1000])
    expected = [
        [latents[0, c, 2 * row + i, 2 * column + j] for i in range(2) for j in range(2) for c in range(3)]
        for row in range(2)
        for column in range(3)
    ]
    assert torch.equal(tokens[:6], torch.tensor(expected))
    first, second = model.unpack(tokens, sizes)
    assert torch.equal(first, latents[0])
    assert torch.equal(second, latents[0] + 1000)


def test_a_plan_made_for_inference_serves_training(model):
    arguments = torch.randn(2, 5, 6, 2), torch.rand(2), random_text((11, 10))
    with torch.inference_mode():
        expected = model(*arguments)
    trained = model(*arguments)
    trained.sum().backward()
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- precision


def test_bfloat16_stays_close_to_float32(model):
    latents, timesteps, text = torch.randn(3, 5, 4, 4), torch.rand(3), random_text((6, 3, 6))
    exact = model(latents, timesteps, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(latents, timesteps, text)
    half = model.to(torch.bfloat16)(latents, timesteps, text)
    for approximate in (mixed, half):
        assert approximate.dtype == torch.float32  # that of the latents
        error = (approximate - exact).norm() / exact.norm()
        assert 1e-4 < error < 3e-2


@pytest.mark.parametrize(("knows_gqa", "kernel"), [(True, "flash"), (False, "flash"), (True, "cudnn")])
def test_compiled_block_serves_all_lengths_with_one_graph(model, monkeypatch, knows_gqa, kernel):
    """With a variable-length kernel, here played by an operator of our own, a block is one graph for all batches."""
    played = _rounded_varlen_on_cpu if kernel == "cudnn" else _varlen_on_cpu
    operator = torch.library.custom_op(f"svg_t2i_test::varlen_{knows_gqa}_{kernel}", played, mutates_args=())
    operator.register_fake(lambda q, *_: torch.empty_like(q))
    monkeypatch.setattr(attention_module, "has_varlen_kernel", lambda q: True)
    monkeypatch.setattr(attention_module, "VARLEN_KNOWS_GQA", knows_gqa)
    monkeypatch.setattr(attention_module, "packed_kernels", lambda device, longest: (kernel,))
    monkeypatch.setattr(model_module, "plan_packing", plan_packing.__wrapped__)  # without the kernels of other tests
    options = ["enable_gqa"] if knows_gqa and kernel == "flash" else []

    def varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **given):
        assert list(given) == options or q.shape[1] == k.shape[1]
        return operator(q, k, v, cu_q, longest_q)

    monkeypatch.setattr(attention_module, "varlen_attn", varlen_attn)
    torch.compiler.reset()
    graphs, block = [], model.layers[0]
    count = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    compiled = torch.compile(block, dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad():
        for sizes, lengths in [(((2, 3),) * 3, (3, 5, 3)), (((2, 2),) * 4, (4, 2, 9, 1)), (((4, 5),) * 5, (7,) * 5)]:
            packing = model.plan(sizes, lengths, torch.device("cpu"))
            x, t_emb = torch.randn(sum(packing.joint.lengths), SMALL.dim), torch.randn(len(sizes), SMALL.dim)
            arguments = x, packing.joint, packing.joint_rope, t_emb
            torch.testing.assert_close(compiled(*arguments), block(*arguments), atol=2e-6, rtol=0)
    assert len(graphs) == 1


def test_compiled_blocks_are_two_graphs_without_a_break_over_ten_batches(model, monkeypatch):
    """Forward and backward: one for batches, one for a single sample, whose gains are not looked up by token."""
    operator = torch.library.custom_op("svg_t2i_test::varlen_ten", _varlen_on_cpu, mutates_args=())
    operator.register_fake(lambda q, *_: torch.empty_like(q))
    monkeypatch.setattr(attention_module, "VARLEN_KNOWS_GQA", True)
    operator.register_autograd(lambda ctx, grad: (grad, grad[:, :1], grad[:, :1], None, None))  # of the right shapes
    monkeypatch.setattr(attention_module, "has_varlen_kernel", lambda q: True)
    monkeypatch.setattr(
        attention_module, "varlen_attn", lambda q, k, v, cu, _, most, *__, **___: operator(q, k, v, cu, most)
    )
    torch.compiler.reset()
    monkeypatch.setattr(torch.fx.experimental._config, "use_duck_shape", False)
    graphs = []
    count = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    block = torch.compile(model.layers[0], dynamic=True, fullgraph=True, backend=count)  # a break would be an error
    rng = random.Random(0)
    for samples in (4, 3, 1, 6, 2, 1, 5, 3, 8, 1):
        sizes = tuple((rng.randint(2, 6), rng.randint(2, 6)) for _ in range(samples))
        packing = model.plan(sizes, tuple(rng.randint(1, 9) for _ in sizes), torch.device("cpu"))
        x, t_emb = torch.randn(sum(packing.joint.lengths), SMALL.dim), torch.randn(samples, SMALL.dim)
        block(x, packing.joint, packing.joint_rope, t_emb).sum().backward()
    assert len(graphs) <= 2


def _varlen_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
) -> torch.Tensor:
    lengths = cu_seqlens.diff().tolist()
    assert max(lengths) == longest
    owner = torch.repeat_interleave(cu_seqlens.diff())
    return attention_module.attention_by_runs(q, k, v, attention_module.Segments.build(lengths, cu_seqlens, owner))


def _rounded_varlen_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
) -> torch.Tensor:
    assert longest == attention_module.CUDNN_STEP
    return _varlen_on_cpu(q, k, v, cu_seqlens, int(cu_seqlens.diff().max()))


# ------------------------------------------------------------------------------------- construction and checkpoints


def test_fresh_model_is_silent_and_its_blocks_are_identities():
    model = SVGDiT(SMALL)
    latents, timesteps, text = torch.randn(2, 5, 4, 4), torch.rand(2), random_text((3, 4))
    assert not model(latents, timesteps, text).any()
    packing = model.plan(((4, 4),) * 2, text.lengths, torch.device("cpu"))
    x = torch.randn(32, SMALL.dim)
    arguments = packing.images, packing.image_rope
    assert torch.equal(model.noise_refiner[0](x, *arguments, model.t_embedder(timesteps)), x)
    assert not torch.equal(model.context_refiner[0](x, *arguments), x)


def test_initial_spreads():
    torch.manual_seed(0)
    model = SVGDiT(DiTConfig(dim=192, n_layers=1, n_heads=4, axes_dims=(16, 16, 16), cap_feat_dim=256))
    xavier = (2 / (192 + 768)) ** 0.5
    assert model.layers[0].feed_forward.w1.weight.std().item() == pytest.approx(xavier, rel=0.02)
    assert model.t_embedder.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.cap_embedder[1].weight.std().item() == pytest.approx(0.02, rel=0.02)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("NextDiT_2B_GQA_patch1_Adaln_Refiner", 2_611_246_336), ("NextDiT_08B_GQA_patch1_Adaln_Refiner", 784_896_640)],
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = build_model(name)
    assert sum(value.numel() for value in published_state_dict(model).values()) == parameters


@pytest.mark.parametrize(
    ("name", "dim", "layers", "heads"),
    [
        ("08B", 1152, 28, 16),
        ("2B", 2304, 26, 24),
        ("3B", 2592, 30, 24),
        ("4B", 2880, 32, 24),
        ("7B", 3840, 32, 32),
    ],
)
def test_published_models_have_these_sizes(name, dim, layers, heads):
    assert vars(MODELS[f"NextDiT_{name}_GQA_patch1_Adaln_Refiner"]) == {
        "dim": dim, "n_layers": layers, "n_heads": heads, "axes_dims": (dim // heads // 3,) * 3, "n_kv_heads": 8,
        "n_refiner_layers": 2, "patch_size": 1, "in_channels": 384, "cap_feat_dim": 2304, "multiple_of": 256,
        "ffn_dim_multiplier": None, "norm_eps": 1e-5, "qk_norm": True, "axes_lens": (600, 512, 512),
        "prediction": "velocity", "aux_loss": None, "aux_block": None,
        "guidance_embed": False,
    }  # fmt: skip


def test_smallest_sizes_are_allowed():
    ones = dict.fromkeys(("n_layers", "n_heads", "n_kv_heads", "patch_size", "in_channels", "cap_feat_dim"), 1)
    config = DiTConfig(**ones, dim=6, axes_dims=(2, 2, 2), n_refiner_layers=0, multiple_of=1)
    assert not SVGDiT(config)([torch.randn(1, 2, 3)], torch.rand(1), random_text((1,), width=1))[0].any()


def test_every_listed_size_builds():
    for name, config in MODELS.items():
        with torch.device("meta"):
            assert build_model(name, in_channels=392).config.in_channels == 392
            assert isinstance(Block(config, modulated=True), Block)
    with pytest.raises(UserError, match="NextDiT_2B_GQA_patch1_Adaln_Refiner"):
        build_model("NextDiT_5B")


def test_published_state_dict_round_trip(model):
    state = published_state_dict(model)
    assert state["norm_final.weight"].shape == (SMALL.dim,)
    other = SVGDiT(SMALL)
    load_published_state_dict(other, state)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_wrong_state_dicts_are_refused_by_name(model):
    state = published_state_dict(model)
    state["extra.weight"] = state.pop("x_embedder.bias")
    state["cap_embedder.1.bias"] = torch.zeros(3)
    before = model.cap_embedder[1].bias.clone()
    with pytest.raises(UserError) as error:
        load_published_state_dict(model, state)
    for part in ("1 missing: x_embedder.bias", "1 unexpected: extra.weight", r"is (3,), the model wants (48,)"):
        assert part in str(error.value)
    assert torch.equal(model.cap_embedder[1].bias, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 50}, "dim 50 .* n_heads 3"),
        ({"n_kv_heads": 2}, "n_heads 3 .* n_kv_heads 2"),
        ({"axes_dims": (4, 6, 4)}, r"axes_dims \(4, 6, 4\) .* 16"),
        ({"axes_dims": (3, 7, 6)}, r"axes_dims \(3, 7, 6\)"),
        ({"axes_dims": (8, 8)}, "axes_dims needs 3 entries"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"n_refiner_layers": -1}, "n_refiner_layers .* -1"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DiTConfig(**(SIZES | changes))


def test_wrong_inputs_are_named(model):
    text, timesteps = random_text((3,)), torch.rand(1)
    with pytest.raises(UserError, match=r"latents of shape \(1, 4, 6, 6\): expected \(B, 5, h, w\)"):
        model(torch.randn(1, 4, 6, 6), timesteps, text)
    with pytest.raises(ValueError, match="2 latents, 1 timesteps, 1 captions"):
        model(torch.randn(2, 5, 4, 4), timesteps, text)
    with pytest.raises(UserError, match="caption features have 7 channels.*cap_feat_dim is 12"):
        model(torch.randn(1, 5, 4, 4), timesteps, random_text((3,), width=7))
    with pytest.raises(UserError, match="17 row positions"):
        model(torch.randn(1, 5, 17, 4), timesteps, text)


def test_refined_captions_and_a_shared_time_change_nothing():
    torch.manual_seed(1)
    model = SVGDiT(DiTConfig(dim=32, n_layers=2, n_heads=2, axes_dims=(4, 6, 6), in_channels=8, cap_feat_dim=16))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    lengths = (5, 2, 9, 2)
    text = TextFeatures(torch.randn(sum(lengths), 16), lengths)
    latents = [torch.randn(8, *size) for size in ((2, 3), (4, 4), (1, 2), (3, 3))]
    with torch.no_grad():
        expected = model(latents, torch.full((4,), 0.3), text)
        calls = []
        hook = model.context_refiner[0].register_forward_pre_hook(lambda *_: calls.append(1))
        refined = model.refine(text)
        apart = TextFeatures.cat([model.refine(text.select([0, 1, 2])), model.refine(text.select([3]))])
        assert len(calls) == 3
        for given in (refined, apart):
            for left, right in zip(model(latents, torch.tensor([0.3]), given), expected):
                torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
        assert len(calls) == 3
        hook.remove()
        shuffled = model([latents[i] for i in (2, 0)], torch.tensor([0.3]), refined.select([2, 0]))
    torch.testing.assert_close(shuffled[0], expected[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled[1], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_by_name(backend, monkeypatch):
    """What a CPU has gives the same velocities, for several lengths and grouped heads; the rest is refused."""
    config = DiTConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, axes_dims=(4, 6, 6), in_channels=8, cap_feat_dim=16)
    model = SVGDiT(config)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    latents, text = [torch.randn(8, 4, 4), torch.randn(8, 2, 6)], TextFeatures(torch.randn(7, 16), (3, 4))
    wanted, asked, chosen = model(latents, torch.tensor([0.2, 0.7]), text), set(), attention_module.sdpa_kernel
    if backend in ("cudnn", "efficient"):
        with pytest.raises(UserError, match=f"attention = '{backend}' cannot compute torch.float32 with 16 channels"):
            model.set_attention_backend(backend)
        assert {block.attention.backend for block in model.layers} == {"auto"}
        return
    model.set_attention_backend(backend)
    monkeypatch.setattr(attention_module, "sdpa_kernel", lambda kernel: asked.add(kernel) or chosen(kernel))
    found = model(latents, torch.tensor([0.2, 0.7]), text)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert asked == {attention_module.KERNELS[backend]} if backend in ("flash", "math") else not asked


def test_an_unknown_kernel_of_attention():
    with pytest.raises(UserError, match="attention = 'fast': choose one of auto, sdpa, flash, cudnn"):
        SVGDiT(MODELS["tiny"]).set_attention_backend("fast")
