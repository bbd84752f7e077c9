"""Files that are written whole."""

from hooked_recurrent.files import write_text


def test_text_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two" and [file.name for file in path.parent.iterdir()] == ["a.json"]
