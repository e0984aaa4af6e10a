"""The networks of GenEval's verdicts, tiny and random, against transformers' own reading of their answers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from autoencoder.common.config import UserError
from svg_t2i.evaluation.clip_score import CLIPScorer
from svg_t2i.evaluation.detector import ColourReader, Detector, box_of, cut_out, instances
from svg_t2i.evaluation.geneval import COLOURS, NAMES, Found


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8))


def test_objects_are_those_that_transformers_reads_off(detector_folder, picture):
    """Its reading is at 384 × 384, the size of this picture."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    detector = Detector(detector_folder, least=0.0)
    found = detector(picture)
    processor = Mask2FormerImageProcessor.from_pretrained(detector_folder)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    with torch.no_grad():
        output = model(pixel_values=processor(images=picture, return_tensors="pt")["pixel_values"])
    (theirs,) = processor.post_process_instance_segmentation(
        output, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    expected = {
        (NAMES[segment["label_id"]], mask.numpy().astype(bool).tobytes()): segment["score"]
        for segment, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True)
    }
    ours = {(name, one.mask.tobytes()): one.confidence for name, ones in found.items() for one in ones}
    assert len(expected) > 3
    assert ours == pytest.approx(expected, rel=1e-4)
    sure = sorted(ours.values())[len(ours) // 2]
    assert all(
        one.confidence > sure for ones in Detector(detector_folder, least=sure)(picture).values() for one in ones
    )


def test_confidence_is_the_class_s_times_the_mask_s():
    """Two queries: a cat in the left half of which the network is half sure, and nothing."""
    classes = torch.full((2, 81), -50.0)
    classes[0, NAMES.index("cat")], classes[0, NAMES.index("dog")], classes[1, 80] = 0.0, 0.0, 50.0
    masks = torch.full((2, 4, 4), -9.0)
    masks[0, :, :2] = 9.0
    labels, scores, found = instances(classes, masks, (4, 4), least=0.1)
    assert {NAMES[label] for label in labels} == {"cat", "dog"}
    assert scores.tolist() == pytest.approx([0.5 * torch.sigmoid(torch.tensor(9.0)).item()] * 2)
    assert found[0].tolist() == [[True, True, False, False]] * 4
    assert len(instances(classes, masks, (4, 4), least=0.5)[0]) == 0
    assert len(instances(classes, masks - 20, (4, 4), least=0.0)[0]) == 0  # no pixel


def test_boxes_and_cut_outs():
    mask = np.zeros((6, 8), bool)
    mask[2:5, 3], mask[3, 3:7] = True, True
    assert box_of(mask) == (3, 2, 7, 5)
    crop = cut_out(Image.new("RGB", (8, 6), "red"), Found(box_of(mask), 1.0, mask))
    assert crop.size == (4, 3)
    assert (crop.getpixel((0, 0)), crop.getpixel((3, 0))) == ((255, 0, 0), (153, 153, 153))
    assert cut_out(Image.new("L", (8, 6), 9), Found((1, 1, 3, 2), 1.0)).getpixel((0, 0)) == (9, 9, 9)


def test_a_colour_is_the_one_whose_descriptions_are_most_like_it(clip_folder, picture):
    reader, clip = ColourReader(clip_folder), CLIPScorer(clip_folder)
    boxes = [(0, 0, 100, 90), (100, 40, 300, 380)]
    read = reader(picture, [Found(box, 1.0) for box in boxes], "bus")
    images = clip.image_features([picture.crop(box) for box in boxes])
    kinds = ["a photo of a {} bus", "a photo of a {}-colored bus", "a photo of a {} object"]
    likeness = [
        images @ normalize(clip.text_features([kind.format(c) for kind in kinds]).mean(dim=0), dim=0) for c in COLOURS
    ]
    assert read == [COLOURS[i] for i in torch.stack(likeness).argmax(dim=0)]


def test_networks_of_another_kind_are_refused(detector_folder, clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"--detector .* lacks \d+ weights of a Mask2FormerForUniversal"):
        Detector(clip_folder)
    with pytest.raises(UserError, match="--detector .* cannot be had"):
        Detector(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Detector("nowhere/no/such")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    config = Mask2FormerConfig.from_pretrained(detector_folder, num_labels=3)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="knows 3 classes; wanted are COCO's 80"):
        Detector(tmp_path)
