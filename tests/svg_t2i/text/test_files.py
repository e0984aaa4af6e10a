"""Prompt files: what is a line, what a record may say, and how mistakes are named."""

import csv
import json

import pytest

from autoencoder.common.config import UserError
from svg_t2i.text.files import Prompt, read_prompts

ODD = "two\u2028lines\u2029of\u0085one\x0b\x0c\x1cprompt"  # all of which str.splitlines would cut


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_only(tmp_path, mark, end):
    records = [{"prompt": ODD}, ODD]
    for name, text in {
        "a.jsonl": end.join(json.dumps(record, ensure_ascii=False) for record in records),
        "a.json": json.dumps(records, ensure_ascii=False),
        "a.txt": end.join(["", ODD, "  ", ODD, ""]),
    }.items():
        (tmp_path / name).write_bytes(mark + text.encode())
        assert read_prompts(tmp_path / name) == [Prompt(ODD), Prompt(ODD)]


def test_null_is_nothing_said(tmp_path):
    records = [
        {"prompt": "a", "negative_prompt": None, "guidance_scale": None},
        {"refined_prompt": None, "prompt": "b", "negative_prompt": "", "guidance_scale": "2.5"},
    ]
    (tmp_path / "p.json").write_text(json.dumps(records))
    assert read_prompts(tmp_path / "p.json") == [
        Prompt("a"),
        Prompt("b", {"negative_prompt": "", "guidance_scale": 2.5}),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"prompt": "a", "guidance_scale": "nan"}', "guidance_scale = 'nan' is no finite number"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale = nan is no finite number"),
        ('{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale = inf is no finite number"),
        ('{"prompt": "a", "guidance_scale": true}', "guidance_scale = True is no finite number"),
        ('{"prompt": "a", "guidance_scale": [2]}', r"guidance_scale = \[2\] is no finite number"),
        ('{"prompt": "a", "negative_prompt": ["b"]}', r"negative_prompt = \['b'\] is no text"),
        ('{"prompt": "a", "seed": -1}', "seed = -1 is no whole number from 0"),
        ('{"prompt": "a", "seed": 1.5}', "seed = 1.5 is no whole number from 0"),
        ('{"prompt": "a", "seed": 4611686018427387904}', "seed = 4611686018427387904 is no whole number from 0"),
        ('{"prompt": null}', "no prompt; a record needs one of the fields"),
        ('{"prompt": "a"', "not valid JSON"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, record, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'"fine"\n\n{record}\n')
    with pytest.raises(UserError, match=f"p.jsonl:3: {message}"):
        read_prompts(path)


def test_all_mistakes_are_named_together(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(["{}", '"fine"', *["[]"] * 6]))
    with pytest.raises(UserError, match=r"p.jsonl:1: .*p.jsonl:3: .*p.jsonl:6: .*; and 2 more$"):
        read_prompts(path)


def test_another_encoding_is_refused(tmp_path):
    for name in ("p.txt", "p.jsonl", "p.csv"):
        (tmp_path / name).write_bytes("a café".encode("latin-1"))
        with pytest.raises(UserError, match=f"prompt file .*{name} is not UTF-8 text"):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["p.tsv", "P.CSV"])
def test_tables(tmp_path, name, encoding):
    """As PartiPrompts (.tsv, "Prompt") and DrawBench (.csv, "Prompts") have them."""
    rows = [["Category", " Prompts", "guidance_scale"], ["x", f'"{ODD}"', ""], ["", '"two, in\nquotes"', "2.5"]]
    text = "\r\n".join(("\t" if name == "p.tsv" else ",").join(row) for row in rows)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_prompts(tmp_path / name) == [Prompt(ODD), Prompt("two, in\nquotes", {"guidance_scale": 2.5})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red fox\na dog\n", r"p.csv: none of the columns .'a red fox'. holds prompts"),
        ("prompt,seed\na,1\n,2\n", "p.csv:3: no prompt"),
        ("prompt,guidance_scale\na,nan\n", "p.csv:2: guidance_scale = 'nan' is no finite number"),
        ("prompt\n" + "x" * 200_000, r"p.csv:2: no valid table \(field larger than field limit"),
        ("prompt\n", "p.csv holds no prompt"),
        ("", "p.csv holds no prompt"),
    ],
)
def test_mistakes_in_tables_are_named(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    before = csv.field_size_limit(100_000)  # of the process: reading a table of images raises it
    try:
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "p.csv")
    finally:
        csv.field_size_limit(before)


def test_other_kinds_are_refused(tmp_path):
    (tmp_path / "p.md").write_text("a")
    with pytest.raises(UserError, match="unknown kind '.md'; use .txt, .json, .jsonl, .csv or .tsv"):
        read_prompts(tmp_path / "p.md")
