"""Text in and out: a tokenizer of single letters stands for a real one."""

import pytest
import torch

from tests.hooked_recurrent.models import tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


class Letters:
    """One token per letter; token 28 begins a text if `bos` is asked for."""

    def __init__(self, bos=False):
        self.bos_token_id = 28 if bos else None

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [LETTERS.index(letter) for letter in text]

    def decode(self, tokens):
        return "".join("<bos>" if token == 28 else LETTERS[token] for token in tokens)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tokenizer=Letters()).requires_grad_(False)


@pytest.fixture(scope="module")
def model_with_bos():
    return tiny_model(tokenizer=Letters(bos=True)).requires_grad_(False)


def test_to_tokens_and_back(model):
    tokens = model.to_tokens("a cab.")
    assert tokens.tolist() == [[0, 26, 2, 0, 1, 27]] and tokens.dtype == torch.int64
    assert model.to_string(tokens) == ["a cab."] and model.to_string(tokens[0]) == "a cab."
    assert model.to_string([0, 1]) == "ab" and model.to_string(2) == "c"
    assert model.to_tokens(["ab", "cd"]).tolist() == [[0, 1], [2, 3]]
    assert model.to_string(model.to_tokens(["ab", "cd"])) == ["ab", "cd"]
    assert model.to_str_tokens("cab") == model.to_str_tokens(tokens[0, 2:5]) == ["c", "a", "b"]
    assert model.to_str_tokens(tokens[:, 2:5]) == ["c", "a", "b"]
    assert model.to_single_token("c") == 2


def test_beginning_of_text(model, model_with_bos):
    assert model_with_bos.to_tokens("ab").tolist() == [[28, 0, 1]]
    assert model_with_bos.to_tokens("ab", prepend_bos=False).tolist() == [[0, 1]]
    assert model_with_bos.to_tokens("ab", move_to_device=False, truncate=False).tolist() == [[28, 0, 1]]
    for prepend_bos in (True, False):
        expected = model_with_bos(model_with_bos.to_tokens("ab", prepend_bos))
        assert torch.equal(model_with_bos("ab", prepend_bos=prepend_bos), expected)
        tokens = model_with_bos.to_tokens("ab", prepend_bos=False)  # tokens stay as they are
        assert model_with_bos(tokens, prepend_bos=prepend_bos).shape[1] == 2
    assert model_with_bos.to_str_tokens("ab") == ["<bos>", "a", "b"]
    with pytest.raises(ValueError, match="prepend_bos=True, but this tokenizer has no BOS token"):
        model.to_tokens("ab", prepend_bos=True)


def test_calls_take_text(model):
    tokens = model.to_tokens(["abc", "cba"])
    assert torch.equal(model(["abc", "cba"]), model(tokens))
    assert torch.equal(model("abc"), model(tokens[:1]))
    assert torch.equal(model.run_with_cache("abc")[0], model(tokens[:1]))
    assert model.snapshots("abc", [2])[2].position == 2


def test_generation_returns_what_it_was_given(model):
    tokens = model.generate(model.to_tokens("ab"), max_new_tokens=3)
    text = model.generate("ab", max_new_tokens=3)
    assert text == model.to_string(tokens)[0] and text.startswith("ab") and len(text.replace("<bos>", "?")) == 5
    assert model.generate(["ab", "cd"], max_new_tokens=3)[0] == text
    assert model.generate(["ab"], max_new_tokens=3) == [text]
    assert torch.equal(model.generate("ab", max_new_tokens=3, return_type="tokens"), tokens)
    assert model.generate(model.to_tokens("ab"), max_new_tokens=3, return_type="str") == text
    answer, state = model.generate("ab", max_new_tokens=3, return_state=True)
    assert answer == text and state.position == 4


def test_errors(model):
    with pytest.raises(ValueError, match=r"equally many tokens, got \[2, 3\]"):
        model.to_tokens(["ab", "abc"])
    for call in (model, model.generate, model.generate_stream):
        with pytest.raises(ValueError, match=r"got \[2, 3\]: .* run such texts one by one, or cut them to one length"):
            call(["ab", "abc"])
    with pytest.raises(ValueError, match=r"at least one token, got shape \(1, 0\)"):
        model("")
    with pytest.raises(ValueError, match="'ab' is 2 tokens, not one"):
        model.to_single_token("ab")
    with pytest.raises(ValueError, match="takes one sequence, got a batch of 2"):
        model.to_str_tokens(torch.zeros(2, 3, dtype=torch.long))
    bare = tiny_model()
    for call in (bare.to_tokens, bare.to_str_tokens, bare.to_single_token, bare, bare.generate):
        with pytest.raises(ValueError, match="this model has no tokenizer"):
            call("ab")
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        bare.to_string([0])


def test_generated_text_leaves_out_the_token_that_began_it(model_with_bos):
    text = model_with_bos.generate("ab", max_new_tokens=3)
    assert text.startswith("ab")
    tokens = model_with_bos.generate(model_with_bos.to_tokens("ab"), max_new_tokens=3)
    assert text == model_with_bos.to_string(tokens[0, 1:])
    assert "ab" + "".join(model_with_bos.generate_stream("ab", max_new_tokens=3)) == text
    plain = model_with_bos.generate("ab", max_new_tokens=3, prepend_bos=False)
    assert plain == model_with_bos.generate(torch.tensor([0, 1]), max_new_tokens=3, return_type="str")
