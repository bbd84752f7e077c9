import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hooked_recurrent.zoo.corpus import standard_library
from hooked_recurrent.zoo.tokenizer import END_OF_TEXT, encode_documents, load_tokenizer, train_tokenizer

CODE = "class Area:\n    def of(self, sides):\n\n        return sides[0] * 2  # half\n"


def pieces(tokenizer, text: str) -> list[str]:
    """What the regular expression cuts, before any merge."""
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@given(text=st.text(max_size=80))
def test_every_text_comes_back(small_tokenizer, text):
    ids = small_tokenizer.encode(text, add_special_tokens=False)
    assert small_tokenizer.decode(ids) == text


@given(text=st.text(alphabet=" \t\n\r\x0c\x1cab(:.'_0é\u2028", max_size=40))
def test_white_space_comes_back(small_tokenizer, text):
    assert small_tokenizer.decode(small_tokenizer.encode(text, add_special_tokens=False)) == text
    assert "".join(pieces(small_tokenizer, text)) == text


def test_every_byte_has_a_piece_of_its_own(small_tokenizer):
    singles = [chr(number) for number in range(0x80)] + ["é", "漢", "🙂"]
    assert all(small_tokenizer.decode(small_tokenizer.encode(one, add_special_tokens=False)) == one for one in singles)
    assert len(small_tokenizer) == 400
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= set(small_tokenizer.get_vocab())


def test_line_break_and_indent_are_one_piece(small_tokenizer):
    cut = pieces(small_tokenizer, CODE)
    assert cut[:3] == ["class", " Area", ":\n    "]
    assert "):\n\n        " in cut and " *" in cut and cut[-4:] == ["  ", "#", " half", "\n"]
    ids = small_tokenizer.encode("x\n    y", add_special_tokens=False)
    assert "\n    " in [small_tokenizer.decode([token]) for token in ids]


def test_library_files_come_back_and_shrink(small_tokenizer):
    files = standard_library("heldout")[:10]
    documents = encode_documents(small_tokenizer, [file.text for file in files])
    for file, document in zip(files, documents, strict=True):
        assert document[0] == 0 and small_tokenizer.decode(document[1:]) == file.text
    assert sum(file.n_bytes for file in files) > 1.7 * sum(len(document) for document in documents)


def test_end_of_text_is_the_only_special_token(small_tokenizer):
    assert small_tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    assert small_tokenizer.all_special_tokens == [END_OF_TEXT]
    roles = (small_tokenizer.bos_token_id, small_tokenizer.eos_token_id, small_tokenizer.pad_token_id)
    assert roles == (0, 0, 0)


def test_same_text_same_tokenizer(few_files, small_tokenizer):
    again = train_tokenizer((file.text for file in few_files), 400)
    assert again.backend_tokenizer.to_str() == small_tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_saved_and_read_back(small_tokenizer, tmp_path, load):
    small_tokenizer.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    assert loaded.encode(CODE, add_special_tokens=False) == small_tokenizer.encode(CODE, add_special_tokens=False)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (END_OF_TEXT,) * 3


def test_auto_tokenizer_beside_a_model(small_model, tmp_path):
    """The model's config names a family whose own tokenizer cuts otherwise: ours must still be the one that loads."""
    small_model.save_pretrained(tmp_path)
    ids = small_model.tokenizer.encode(CODE, add_special_tokens=False)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(CODE, add_special_tokens=False) == ids


def test_errors_are_clear(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 257.*got 100"):
        train_tokenizer(["text"], 100)
    with pytest.raises(ValueError, match="no tokenizer.json in"):
        load_tokenizer(tmp_path)
