"""Index tables and packed captions against loops over samples."""

import pytest
import torch

from autoencoder.common.config import UserError
from svg_t2i.transformer.packing import TextFeatures, plan_packing

AXES_DIMS, AXES_LENS, CPU = (4, 6, 6), (20, 12, 12), torch.device("cpu")
CASES = {
    "one": (((4, 4),), (3,), 1),
    "equal sizes": (((2, 4),) * 4, (5, 1, 5, 2), 1),
    "ragged": (((4, 6), (8, 2), (2, 2), (2, 8)), (3, 9, 6, 3), 1),
    "patches of 2": (((4, 6), (8, 2), (2, 2)), (3, 1, 6), 2),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def test_joint_order_gives_each_sample_its_caption_then_its_image(case):
    sizes, lengths, patch = case
    counts = [h * w // patch**2 for h, w in sizes]
    packing = plan_packing(sizes, lengths, patch, AXES_DIMS, AXES_LENS, CPU)
    captions = [(i, "caption", k) for i, length in enumerate(lengths) for k in range(length)]
    images = [(i, "image", k) for i, count in enumerate(counts) for k in range(count)]
    entry = [captions[j] for j in packing.caption_index] + [images[j] for j in packing.image_index]
    joint = [entry[j] for j in packing.joint_index]

    start = 0
    for length in packing.joint.lengths:
        sample = joint[start][0]
        expected = [(sample, "caption", k) for k in range(lengths[sample])]
        expected += [(sample, "image", k) for k in range(counts[sample])]
        assert joint[start : start + length] == expected
        start += length
    assert [joint[j] for j in packing.output_index] == images
    assert packing.output_owner.tolist() == [i for i, _, _ in images]
    assert packing.joint.owner.tolist() == [i for i, _, _ in joint]
    split = len(captions)
    assert packing.captions.owner.tolist() == [i for i, _, _ in entry[:split]]
    assert packing.images.owner.tolist() == [i for i, _, _ in entry[split:]]
    for segments in (packing.captions, packing.images, packing.joint):
        assert segments.cu_seqlens.diff().tolist() == list(segments.lengths)
    assert sorted(packing.joint.lengths) == list(packing.joint.lengths)


def test_rotary_angles_follow_caption_index_row_and_column(case):
    sizes, lengths, patch = case
    packing = plan_packing(sizes, lengths, patch, AXES_DIMS, AXES_LENS, CPU)
    start = 0
    for sample, length in zip(_samples(packing.joint), packing.joint.lengths, strict=True):
        rows, columns = sizes[sample][0] // patch, sizes[sample][1] // patch
        positions = [(k, 0, 0) for k in range(lengths[sample])]
        positions += [(lengths[sample], row, column) for row in range(rows) for column in range(columns)]
        axes = [(axis, 10000 ** (-2 * i / dim)) for axis, dim in enumerate(AXES_DIMS) for i in range(dim // 2)]
        angles = torch.tensor([[position[axis] * frequency for axis, frequency in axes] for position in positions])
        rope = packing.joint_rope[start : start + length, 0]
        torch.testing.assert_close(rope, torch.stack((angles.cos(), angles.sin()), dim=-1), atol=1e-6, rtol=0)
        start += length
    entry_rope = torch.cat([packing.caption_rope, packing.image_rope])
    assert torch.equal(entry_rope[packing.joint_index], packing.joint_rope)


def _samples(segments):
    return segments.owner[segments.cu_seqlens[:-1]].tolist()


def test_equal_shapes_reuse_the_plan():
    arguments = ((2, 2), (4, 2)), (3, 4), 1, AXES_DIMS, AXES_LENS, CPU
    assert plan_packing(*arguments) is plan_packing(*arguments)


@pytest.mark.parametrize(
    ("size", "length", "message"),
    [
        ((4, 4), 20, r"21 caption positions.*\(20, 12, 12\).*20"),  # the image takes the position behind the caption
        ((13, 4), 3, "13 row positions"),
        ((4, 14), 3, "14 column positions"),
        ((4, 4), 0, "caption 1 has no tokens"),
    ],
)
def test_positions_beyond_the_model_are_named(size, length, message):
    with pytest.raises(UserError, match=message):
        plan_packing(((2, 2), size), (1, length), 1, AXES_DIMS, AXES_LENS, CPU)


def test_the_last_allowed_position_works():
    assert plan_packing(((12, 12),), (19,), 1, AXES_DIMS, AXES_LENS, CPU).joint.lengths == (163,)


def test_text_features_pack_padded_captions():
    padded, mask = torch.randn(3, 5, 2), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    text = TextFeatures.from_padded(padded, mask)
    assert text.lengths == (2, 5, 1)
    assert torch.equal(text.features, torch.cat([padded[0, :2], padded[1], padded[2, :1]]))
    chosen = text.select([2, 0, 2])
    assert chosen.lengths == (1, 2, 1)
    assert torch.equal(chosen.features, torch.cat([padded[2, :1], padded[0, :2], padded[2, :1]]))
    both = TextFeatures.cat([text, chosen])
    assert both.lengths == (2, 5, 1, 1, 2, 1)
    assert torch.equal(both.features, torch.cat([text.features, chosen.features]))
    assert text.to(dtype=torch.bfloat16).features.dtype == torch.bfloat16
