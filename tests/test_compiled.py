"""What is kept of compiled programs between test sessions: whole entries, not more than fits."""

import compiled


def test_entries_are_kept_whole_and_bounded(tmp_path, monkeypatch):
    folder, kept = tmp_path / "session", tmp_path / "kept"
    folder.mkdir()
    (folder / "a").write_bytes(b"1" * 10)
    monkeypatch.setattr(compiled, "KEPT", kept)
    monkeypatch.setattr(compiled, "MOST", 25)
    compiled.keep(folder)
    (folder / "b").write_bytes(b"2" * 10)
    compiled.keep(folder)
    assert {p.name: p.read_bytes()[:1] for p in kept.iterdir()} == {"a": b"1", "b": b"2"}
    (folder / "c").write_bytes(b"3" * 10)
    compiled.keep(folder)
    assert [p.name for p in kept.iterdir()] == ["c"]  # all began anew


def test_a_session_begins_with_what_was_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", tmp_path)
    (tmp_path / "a").write_bytes(b"1")
    assert compiled.share() is None  # this session has a folder
    monkeypatch.delenv(compiled.VARIABLE)
    folder = compiled.share()
    assert (folder / "a").read_bytes() == b"1" and folder != tmp_path


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled, "KEPT", tmp_path / "file" / "kept")
    compiled.keep(tmp_path)
