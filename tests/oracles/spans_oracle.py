"""The grammar and the token rule by other means: text partitions and one label a character. Quadratic."""

WHITE = " \t\n\r\x0b\x0c"


def parse(token_bytes):
    """None when invalid, else (description, reasoning, answer): sets of the tokens that have bytes."""
    text = b"".join(token_bytes).decode("latin-1")  # one character a byte
    description, tag_1, rest = text.partition("</description>")
    gap_1, tag_2, rest = rest.partition("<think>")
    reasoning, tag_3, rest = rest.partition("</think>")
    gap_2, box, rest = rest.partition("\\boxed{")
    if not (tag_1 and tag_2 and tag_3 and box):
        return None
    closed = [i for i in range(len(rest)) if rest[: i + 1].count("}") == rest[: i + 1].count("{") + 1]
    if not closed:
        return None
    answer = rest[: closed[0]]
    if all(c in WHITE for c in description) or all(c in WHITE for c in reasoning) or answer == "":
        return None
    if not all(c in WHITE for c in gap_1 + gap_2):
        return None

    labels = "".join(
        letter * len(part)
        for letter, part in (
            ("d", description), ("#", tag_1), ("-", gap_1), ("#", tag_2), ("r", reasoning), ("#", tag_3),
            ("-", gap_2), ("-", box), ("a", answer), ("-", rest[closed[0] :]),
        )
    )  # fmt: skip
    assert len(labels) == len(text)
    parts = {"d": set(), "r": set(), "a": set()}
    start = 0
    for index, token in enumerate(token_bytes):
        touched = set(labels[start : start + len(token)])
        start += len(token)
        if "#" not in touched:
            for letter in touched & parts.keys():
                parts[letter].add(index)
    return parts["d"], parts["r"], parts["a"]
