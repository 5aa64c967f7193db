"""Prompt files and sweeps, as text: what they mean, and which line is refused."""

from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from trainer.drawing.prompt_files import PictureSpec, parse_axis, read_prompts, sweep


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object with a prompt"),
        ('{"seed": 1}', "must be an object with a prompt"),
        ('{"prompt": "a", "colour": 1}', "unknown field colour"),
        ('{"prompt": 1}', "prompt must be a text"),
        ('{"prompt": "a", "width": 64.0}', "width must be a whole number"),
        ('{"prompt": "a", "steps": true}', "steps must be a whole number"),
        ('{"prompt": "a", "zoom": "2"}', "zoom must be a number"),
        ('{"prompt": "a", "zoom": null}', "zoom must be a number"),
        ('{"prompt": "a", "zoom": 1' + "0" * 400 + "}", "zoom must be a number"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_line_that_cannot_be_parsed_is_named(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "\u2028"}\n\n' + line)
    with pytest.raises(UsageError, match=f"p.jsonl, line 3: {named}"):
        read_prompts(file)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    for name, data in (("none.txt", None), ("empty.txt", b"\n \n"), ("binary.txt", b"\xff\xfe\x00"), ("folder", "dir")):
        path = tmp_path / name
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif data:
            path.mkdir()
        with pytest.raises(UsageError, match=name):
            read_prompts(path)


def test_a_sweep_has_every_combination_of_its_values() -> None:
    axes = [parse_axis("zoom=1,2"), parse_axis("x-shift=-0.25, 0,0.25")]
    assert axes[1].labels == ["x-shift -0.25", "x-shift 0", "x-shift 0.25"]
    found = sweep(PictureSpec({"prompt": "a", "zoom": 9.0}), axes)
    assert [(spec.fields["zoom"], spec.fields["x_shift"]) for spec in found] == [
        (zoom, x) for zoom in (1, 2) for x in (-0.25, 0, 0.25)
    ]
    assert parse_axis("time-shift=1").field == "shift"
    assert parse_axis("seed=1,2").values == [1, 2]
    for wrong in ("x-shift", "x-shift=", "x-shift=1,a", "colour=1", "steps=1.5", "prompt=a"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            parse_axis(wrong)
