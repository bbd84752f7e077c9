"""Passages: from whole files only, with a start token, seeded, and on record."""

import json
from types import SimpleNamespace

import pytest
import torch

from hooked_recurrent.zoo.corpus import SourceFile, fingerprint
from writesae.stream.corpus import passages, start_token, text_folder


class Letters:
    """A tokenizer of one token per letter."""

    bos_token_id, eos_token_id = 0, 1

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


FILES = [
    SourceFile("a.py", "abcdefgh"),
    SourceFile("b.py", "xyz"),
    SourceFile("c.py", "ABCDEFGHIJKL"),
    SourceFile("d.py", "0123456789"),
]


def text_of(row):
    return "".join(map(chr, row[1:].tolist()))


def test_every_passage_is_a_piece_of_one_file_behind_a_start_token():
    cut = passages(FILES, Letters(), 5, split="train")
    assert cut.tokens.shape == (7, 5) and cut.tokens.dtype == torch.int64
    assert (cut.tokens[:, 0] == 0).all()
    whole = {file.name: file.text for file in FILES}
    for row, name, offset in zip(cut.tokens, cut.files, cut.offsets, strict=True):
        assert whole[name][offset : offset + 4] == text_of(row)
    assert sorted(map(text_of, cut.tokens)) == sorted(["abcd", "efgh", "ABCD", "EFGH", "IJKL", "0123", "4567"])
    assert (cut.n_files, cut.too_short, len(cut)) == (4, 1, 7)


def test_passages_follow_from_the_seed():
    first, again, other = (passages(FILES, Letters(), 5, split="train", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens) and first.files == again.files
    assert not torch.equal(first.tokens, other.tokens)


def test_max_passages_reads_no_more_files_than_it_needs():
    many = [SourceFile(f"{i}.py", "abcdefgh") for i in range(50)]
    cut = passages(many, Letters(), 5, split="train", max_passages=3)
    assert len(cut) == 3 and cut.n_files == 6  # 2 passages a file, 12 candidates for 3
    assert len(passages(many, Letters(), 5, split="train", max_passages=1000)) == 100


def test_the_record_is_plain_and_complete():
    cut = passages(FILES, Letters(), 5, split="heldout", max_passages=2, seed=3)
    record = json.loads(json.dumps(cut.record()))
    assert record["split"] == "heldout" and record["seed"] == 3
    assert record["n_passages"] == 2 and record["length"] == 5
    assert record["fingerprint"] == fingerprint(FILES)


def test_a_model_lends_its_tokenizer():
    cut = passages(FILES, SimpleNamespace(tokenizer=Letters()), 5, split="train")
    assert len(cut) == 7


def test_the_start_token_is_bos_or_else_eos():
    assert start_token(SimpleNamespace(bos_token_id=7, eos_token_id=9)) == 7
    assert start_token(SimpleNamespace(bos_token_id=None, eos_token_id=0)) == 0
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        start_token(SimpleNamespace(bos_token_id=None))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"length": 1}, "length must be at least 2"),
        ({"length": 100}, "none of the 4 files has 99 tokens"),
        ({"max_passages": 0}, "max_passages must be at least 1"),
        ({"tokenizer": SimpleNamespace(tokenizer=None)}, "no tokenizer"),
        ({"files": []}, "none of the 0 files"),
    ],
)
def test_bad_inputs_give_one_clear_error(arguments, word):
    with pytest.raises(ValueError, match=word):
        passages(**{"files": FILES, "tokenizer": Letters(), "length": 5, "split": "train", **arguments})


def test_a_folder_of_texts_is_split_by_the_names_of_its_files(tmp_path):
    for number in range(40):
        path = tmp_path / f"part{number % 2}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {number}", encoding="utf-8")
    (tmp_path / "other.md").write_text("no", encoding="utf-8")
    train, heldout = (text_folder(tmp_path, split) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 40 and 0 < len(heldout) < 12
    assert [file.name for file in train] == sorted(file.name for file in train)
    assert all(file.text == f"text {file.name.split('/')[1].removesuffix('.txt')}" for file in [*train, *heldout])
    (tmp_path / "part0" / heldout[0].name.split("/")[1]).unlink(missing_ok=True)
    assert [file.name for file in text_folder(tmp_path, "train")] == [file.name for file in train]


@pytest.mark.parametrize(
    ("pattern", "split", "word"),
    [
        ("*.txt", "train", "not UTF-8"),
        ("*.tex", "train", r"no files '\*.tex'"),
        ("a.md", "heldout", "none of the 1 files"),
    ],
)
def test_folders_without_text_are_clear_errors(tmp_path, pattern, split, word):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "a.md").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=word):
        text_folder(tmp_path, split, pattern)
    with pytest.raises(ValueError, match="which is no folder"):
        text_folder(tmp_path / "nowhere", "train")
