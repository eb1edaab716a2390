r"""JSON Lines as editors, other programs and power cuts leave them: "\n" alone ends a line, torn ones are named."""

import json

import pytest

from vigos_jax.runtime.jsonl import lines_of, named, parse_object, read_steps

ENDS = "\u2028 \u2029 \u0085"  # where str.splitlines ends a line, and JSON texts do not
BOM = b"\xef\xbb\xbf"


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    values = [{"a": ENDS}, {"b": "x"}]
    text = "\n\n \r\n".join(json.dumps(v, ensure_ascii=False) for v in values)
    for data in (text.encode(), BOM + text.encode() + b"\r\n", text.encode().replace(b'{"b"', BOM + BOM + b'{"b"')):
        path.write_bytes(data)
        assert [parse_object(line) for _, line in lines_of(path)] == values
        assert [number for number, _ in lines_of(path)] == [1, 4]
    assert len(text.splitlines()) > 4


@pytest.mark.parametrize("line", [b"", b"[1]", b"null", b"{", b'{"a": "\xff"}', b"[" * 100_000, b"\x00", b'"a"'])
def test_what_is_not_an_object(line):
    with pytest.raises(ValueError):
        parse_object(line)


GOOD = [b'{"step": 1}', b'{"step": 2, "x": "\xe2\x80\xa8"}']
TORN = [b'{"step": 2', b"\x00\x00", b'{"loss": 1}', b'{"step": ""}', b'{"step": true}', b'{"step": 2, "\xff": 1}', b"7"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line(tmp_path, torn):
    """At the end it is nobody's loss; before whole rows it is named, and they are kept."""
    path = tmp_path / "metrics.jsonl"
    for end in (b"", b"\n", b"\n" + torn + b"\n"):
        path.write_bytes(b"\n".join(GOOD) + b"\n" + torn + end)
        rows, broken = read_steps(path)
        assert [row.text for row in rows] == GOOD and broken == []
    path.write_bytes(b"\n".join([GOOD[0], torn, torn, GOOD[1], torn]))
    rows, broken = read_steps(path)
    assert [row.value["step"] for row in rows] == [1, 2] and broken == [2, 3]


def test_no_file_has_no_rows(tmp_path):
    assert read_steps(tmp_path / "none.jsonl") == ([], [])


def test_line_numbers_in_words():
    assert named([3]) == "line 3" and named([3, 4]) == "lines 3, 4"
    assert named(range(1, 10)) == "lines 1, 2, 3, 4, 5 and 4 more"
