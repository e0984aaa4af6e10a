"""GenEval's and DPG-Bench's files, invented small ones: read, laid out, and their results summarised."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from autoencoder.common.config import UserError
from autoencoder.images.files import save_png
from svg_t2i.evaluation import suites
from svg_t2i.evaluation.suites import (
    GENEVAL_TASKS,
    SuitePrompt,
    complete,
    image_path,
    read_dpg_results,
    read_geneval_results,
)

RECORDS = [
    {"tag": "single_object", "include": [{"class": "teapot", "count": 1}], "prompt": "a photo of a teapot"},
    {"tag": "counting", "include": [{"class": "kite", "count": 2}], "exclude": [{"class": "kite", "count": 3}],
     "prompt": "a photo of two kites"},
]  # fmt: skip


def test_geneval_prompts_and_folders(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    prompts = suites.read_geneval(path)
    assert [prompt.text for prompt in prompts] == ["a photo of a teapot", "a photo of two kites"]
    for number in range(3):
        save_png(Image.new("RGB", (32, 32), (number, 0, 0)), image_path("geneval", tmp_path, prompts[1], number))
    complete("geneval", tmp_path, prompts[1], 3)
    folder = tmp_path / "images" / "00001"
    # As GenEval's evaluate_images.py walks it: numbered folders, one JSON object, samples of digits
    assert json.load((folder / "metadata.jsonl").open()) == RECORDS[1]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert all(re.match(r"\d+\.png", p.name) for p in (folder / "samples").iterdir())
    assert Image.open(folder / "grid.png").width > 64


def test_characters_that_other_tools_take_for_line_ends(tmp_path):
    odd = "a photo\u2028of a\u0085kite"
    path = tmp_path / "m.jsonl"
    records = [{**record, "prompt": odd} for record in RECORDS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(x, ensure_ascii=False) for x in records).encode())
    assert [prompt.text for prompt in suites.read_geneval(path)] == [odd, odd]


@pytest.mark.parametrize(("line", "message"), [
    ('{"tag": "counting", "prompt": "x"}', "jsonl:2: no include"),
    ("{broken", "jsonl:2: not valid JSON"),
    ("[1]", "jsonl:2: no tag, include, prompt"),
    (b"\xff", "m.jsonl is not UTF-8 text"),
])  # fmt: skip
def test_bad_geneval_lines_are_named(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(UserError, match=message):
        suites.read_geneval(path)


def test_dpg_prompts_and_folders(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "drawn12.txt").write_text("A red kite\nover a lake.\n")
    (tmp_path / "prompts" / "coco3.txt").write_text("Two pears.")
    prompts = suites.read_dpg(tmp_path / "prompts")
    assert prompts == [SuitePrompt("coco3", "Two pears."), SuitePrompt("drawn12", "A red kite over a lake.")]
    for number in range(4):
        save_png(Image.new("RGB", (32, 32), (50 * number, 0, 0)), image_path("dpg", tmp_path, prompts[0], number))
    complete("dpg", tmp_path, prompts[0], 4)
    # The tool lists this folder, so that it holds the grids alone, and cuts squares of the resolution out of them.
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["coco3.png"]
    grid = Image.open(tmp_path / "images" / "coco3.png")
    corners = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
    for number, corner in enumerate(corners):
        assert (np.asarray(grid.crop(corner)) == (50 * number, 0, 0)).all()
    assert grid.size == (64, 64)

    (tmp_path / "prompts" / "a.b.txt").write_text("x")
    with pytest.raises(UserError, match="first dot"):
        suites.read_dpg(tmp_path / "prompts")


def test_geneval_results(tmp_path):
    """Scores of summary_scores.py: means over images per task, then over tasks, which have different sizes."""
    path, lines = tmp_path / "results.jsonl", []
    for size, tag in enumerate(GENEVAL_TASKS, 2):
        lines += [
            {"filename": "out/00000/samples/0000.png", "tag": tag, "prompt": "a photo", "correct": i == 0,
             "reason": "expected kite>=2, found 1", "metadata": json.dumps(RECORDS[1]), "details": "{}"}
            for i in range(size)
        ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)).replace("/", "\\/"))  # as pandas writes them
    scores, images = read_geneval_results(path)
    tasks = [1 / size for size in range(2, 8)]
    assert [scores[column] for column in GENEVAL_TASKS.values()] == pytest.approx(tasks)
    assert scores["GenEval"] == pytest.approx(sum(tasks) / 6)
    assert images == len(lines)

    path.write_text("\n".join(json.dumps(line) for line in lines if line["tag"] != "position"))
    scores, _ = read_geneval_results(path)
    assert "GenEval" not in scores
    assert "| mine | 0.50 | 0.33 | 0.25 | 0.20 | – | 0.14 | – | – |" in suites.table({"mine": scores})
    path.write_text('{"tag": "cubes", "correct": true}')
    with pytest.raises(UserError, match=r"jsonl:1.*cubes"):
        read_geneval_results(path)


def test_published_row_agrees_with_itself():
    tasks = [suites.PUBLISHED[column] for column in GENEVAL_TASKS.values()]
    assert round(sum(tasks) / 6, 2) == suites.PUBLISHED["GenEval"]
    row = suites.table({}).splitlines()[2]
    assert row == "| SVG-T2I (published) | 0.94 | 0.89 | 0.49 | 0.89 | 0.69 | 0.62 | 0.75 | 85.78 |"


def test_dpg_results(tmp_path):
    path = tmp_path / "results.txt"
    lines = ["/a, b/coco3.png, 0.5, 1.0, 0.75", "/a, b/drawn12.png, 0.25, 0.25, 0.25"]
    path.write_text("\n".join(lines) + "\n")
    assert read_dpg_results(path) == (pytest.approx(50.0), 2)  # the tool was stopped before its summary
    summary = ["Model: images", "L1 category scores:", "\tentity: 51.0", "Save results to: r.txt"]
    path.write_text("\n".join([*lines, *summary, "DPG-Bench score: 50.25"]) + "\n")
    assert read_dpg_results(path) == (50.25, 2)
    path.write_text("/a/coco3.png, (0, 0, 32, 32), is there a kite?, yes\n")
    with pytest.raises(UserError, match="holds no score"):
        read_dpg_results(path)
