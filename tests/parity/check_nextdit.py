"""The diffusion transformer against the published one: outputs, guidance, intermediate tensors, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import Vectors
from svg_t2i.flow.guidance import guided_velocity
from svg_t2i.transformer.config import DiTConfig
from svg_t2i.transformer.model import SVGDiT, load_published_state_dict, published_state_dict
from svg_t2i.transformer.packing import TextFeatures


def check(vectors: Vectors) -> None:
    model = SVGDiT(DiTConfig(**vectors.config["ctor"]))
    load_published_state_dict(model, vectors.state_dict())
    shapes = {key: value.shape for key, value in published_state_dict(model).items()}
    assert shapes == {key: value.shape for key, value in vectors.state_dict().items()}
    with torch.no_grad():
        for case in ("square", "rect"):
            inputs = vectors.tensors[f"in.{case}.x"], vectors.tensors[f"in.{case}.t"], captions(vectors, case)
            vectors.compare(f"out.{case}", model(*inputs))
        for i, velocity in enumerate(list_velocities(vectors, model)):
            vectors.compare(f"out.list.{i}", velocity)
        check_guidance(vectors, model)
        check_intermediate(vectors, model)
    check_gradients(vectors, model)


def captions(vectors: Vectors, case: str) -> TextFeatures:
    return TextFeatures.from_padded(vectors.tensors[f"in.{case}.cap_feats"], vectors.tensors[f"in.{case}.cap_mask"])


def list_items(vectors: Vectors, name: str) -> list[Tensor]:
    keys = [key for key in vectors.tensors if key.startswith(f"in.list.{name}.")]
    return [vectors.tensors[f"in.list.{name}.{i}"] for i in range(len(keys))]


def list_velocities(vectors: Vectors, model: SVGDiT) -> list[Tensor]:
    return model(list_items(vectors, "x"), vectors.tensors["in.list.t"], captions(vectors, "list"))


def check_guidance(vectors: Vectors, model: SVGDiT) -> None:
    """The published batch holds the conditional captions first; the latents of its second half are ignored."""
    text, timesteps = captions(vectors, "cfg"), vectors.tensors["in.cfg.t"]
    half = len(timesteps) // 2
    latents, cond_text = vectors.tensors["in.cfg.x"][:half], text.select(range(half))

    def pair(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
        return model(torch.cat([x, x]), timesteps, text).chunk(2)

    def conditional(x: Tensor, _: float) -> Tensor:
        return model(x, timesteps[:half], cond_text)

    for name, variant in vectors.meta["cfg_variants"].items():
        options = {"renorm_cfg": 0} if variant == {"mode": "standard"} else variant
        velocity = guided_velocity(pair, conditional, vectors.config["cfg_scale"], **options)
        guided = velocity(latents, timesteps[0].item())
        vectors.compare(f"out.cfg.{name}", torch.cat([guided, guided]))


def check_intermediate(vectors: Vectors, model: SVGDiT) -> None:
    vectors.compare("out.mid.t_emb", model.t_embedder(vectors.tensors["in.square.t"]))
    vectors.compare("out.mid.cap_emb", model.cap_embedder(vectors.tensors["in.square.cap_feats"]))

    latents, lengths = list_items(vectors, "x"), captions(vectors, "list").lengths
    packing = model.plan(tuple(x.shape[1:] for x in latents), lengths, torch.device("cpu"))
    joint_inputs = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, inputs: joint_inputs.append(inputs[0]))
    list_velocities(vectors, model)
    hook.remove()

    # Our sequence is packed and sorted by length; the published one is (samples, longest), padded behind each sample.
    owner = packing.joint.owner.long()
    position = torch.cat([torch.arange(length) for length in packing.joint.lengths])
    samples, longest = len(latents), packing.joint.max_length

    def padded(tokens: Tensor, fill: float) -> Tensor:
        out = tokens.new_full((samples, longest, *tokens.shape[1:]), fill)
        out[owner, position] = tokens
        return out

    vectors.compare("out.mid.list.tokens", padded(joint_inputs[0], 0))
    vectors.compare("out.mid.list.mask", padded(torch.ones_like(owner, dtype=torch.bool), False))
    vectors.compare("out.mid.list.rope_cos", padded(packing.joint_rope[:, 0, :, 0], 1))  # padding sits at position 0
    vectors.compare("out.mid.list.rope_sin", padded(packing.joint_rope[:, 0, :, 1], 0))


def check_gradients(vectors: Vectors, model: SVGDiT) -> None:
    square = model(vectors.tensors["in.square.x"], vectors.tensors["in.square.t"], captions(vectors, "square"))
    loss = (square - vectors.tensors["in.square.target"]).square().mean()
    gradients = compare_gradients(vectors, model, "square", loss)
    norms = [gradients[name].norm() if name in gradients else torch.zeros(()) for name in vectors.meta["param_order"]]
    vectors.compare("out.grad.square.all_norms", torch.stack(norms))  # norm_final is not a parameter of ours: zero

    errors = zip(list_velocities(vectors, model), list_items(vectors, "target"), strict=True)
    compare_gradients(vectors, model, "list", sum((velocity - target).square().mean() for velocity, target in errors))


def compare_gradients(vectors: Vectors, model: SVGDiT, case: str, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    vectors.compare(f"out.grad.{case}.loss", loss)
    prefix = f"out.grad.{case}.param."
    for key in vectors.tensors:
        if key.startswith(prefix):
            vectors.compare(key, gradients[key.removeprefix(prefix)])
    return gradients
