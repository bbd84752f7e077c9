"""The stream of a generation: the same tokens and text as `generate`, no broken character, and no hook left behind."""

import inspect
from functools import lru_cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.text import BROKEN, TextPieces
from tests.hooked_recurrent.generation.test_generate import hooks_and_edits
from tests.hooked_recurrent.models import HYBRID, over_stacks, tiny_model, tokens_of

BYTES = "é€😀".encode() + b"abcdefghijklmnopqrst"


class Bytes:
    """One token per byte, as a real tokenizer's rare characters are; 29 of them."""

    bos_token_id = None
    eos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [BYTES.index(byte) for byte in text.encode()]

    def decode(self, tokens):
        return bytes(BYTES[token] for token in tokens).decode(errors="replace")


@lru_cache
def model_of(layer_types=HYBRID, tokenizer=None):
    return tiny_model(layer_types, seed=1, tokenizer=tokenizer).requires_grad_(False)


@over_stacks
def test_the_steps_are_what_generate_returns(layer_types):
    model = model_of(layer_types)
    tokens = tokens_of(model, batch=3, length=7)
    options = hooks_and_edits(model.cfg.recurrent_layers) | {"do_sample": True, "seed": 3, "max_new_tokens": 9}
    steps = list(model.generate_stream(tokens, **options))
    assert [step.shape for step in steps] == [(3, 1)] * 9
    assert torch.equal(torch.cat([tokens, *steps], dim=1), model.generate(tokens, **options))


def test_between_two_steps_the_model_is_the_callers_own():
    model = model_of()
    tokens = tokens_of(model, length=5)
    plain = model(tokens)
    options = hooks_and_edits(model.cfg.recurrent_layers) | {"max_new_tokens": 9}
    expected, steps = model.generate(tokens, **options), []
    seen = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(x.shape[1]))]):
        for step in model.generate_stream(tokens, **options):
            steps.append(step)
            assert torch.equal(model(tokens), plain) and torch.is_grad_enabled()
    assert torch.equal(torch.cat([tokens, *steps], dim=1), expected)
    assert seen == [5, 5, *[1, 5] * 8]  # the caller's own hook fires in both


def test_an_abandoned_stream_leaves_nothing():
    model = model_of()
    tokens = tokens_of(model, length=5)
    stream = model.generate_stream(tokens, **hooks_and_edits(model.cfg.recurrent_layers))
    assert not any(point.in_use for point in model.hook_dict.values())
    next(stream)
    next(stream)
    assert not any(point.in_use for point in model.hook_dict.values())
    stream.close()


def test_a_failing_hook_leaves_nothing():
    model = model_of()

    def fail(tensor, hook):
        raise RuntimeError("mine")

    stream = model.generate_stream(tokens_of(model), fwd_hooks=[("blocks.1.hook_mixer_out", fail)])
    with pytest.raises(RuntimeError, match="mine"):
        next(stream)
    assert not any(point.in_use for point in model.hook_dict.values())


def test_bad_arguments_are_refused_before_the_first_step():
    model = model_of()
    with pytest.raises(ValueError, match="top_p must be greater than 0"):
        model.generate_stream(tokens_of(model), top_p=0.0)
    with pytest.raises(KeyError, match="no hook 'hook_embd'; did you mean 'hook_embed'"):
        model.generate_stream(tokens_of(model), fwd_hooks=[("hook_embd", print)])
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_beams'"):
        model.generate_stream(tokens_of(model), num_beams=2)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_text_join_to_the_whole(seed):
    model = model_of(tokenizer=Bytes())
    options = {"do_sample": True, "temperature": 2.0, "seed": seed, "max_new_tokens": 30}
    pieces = list(model.generate_stream("abc", **options))
    assert "abc" + "".join(pieces) == model.generate("abc", **options)
    assert not any(piece.endswith(BROKEN) for piece in pieces[:30])
    batch = list(model.generate_stream(["abc", "éd"], **options))
    joined = ["".join(row) for row in zip(*batch, strict=True)]
    assert [a + b for a, b in zip(["abc", "éd"], joined, strict=True)] == model.generate(["abc", "éd"], **options)


@given(tokens=st.lists(st.integers(0, 28), max_size=40), prompt=st.text(alphabet="é€😀ab"))
def test_no_character_is_broken(tokens, prompt):
    tokenizer = Bytes()
    start = tokenizer.encode(prompt)
    pieces = TextPieces(tokenizer, start)
    made = [pieces.add(token) for token in tokens]
    whole = tokenizer.decode(start + tokens)
    assert not any(piece.endswith(BROKEN) for piece in made)
    assert prompt + "".join(made) + pieces.rest() == whole and pieces.rest() == ""


def test_a_character_waits_for_its_last_byte():
    tokenizer = Bytes()
    pieces = TextPieces(tokenizer, [])
    assert [pieces.add(token) for token in tokenizer.encode("a€b😀")] == ["a", "", "", "€", "b", "", "", "", "😀"]
    halfway = TextPieces(tokenizer, tokenizer.encode("a€")[:2])  # the prompt itself ends in the middle of one
    assert [halfway.add(token) for token in tokenizer.encode("€")[1:]] == ["", "€"]


@pytest.mark.parametrize("name", ["tiny-gated-deltanet", "tiny-rwkv7"])
def test_with_a_real_tokenizer(name):
    model = HookedRecurrentModel.from_pretrained(name).requires_grad_(False)
    options = {"max_new_tokens": 40, "do_sample": True, "seed": 0, "temperature": 3.0}
    prompt = "Once upon a time there was"
    assert prompt + "".join(model.generate_stream(prompt, **options)) == model.generate(prompt, **options)


def test_options_of_streams_and_of_generate_agree():
    stream = inspect.signature(HookedRecurrentModel.generate_stream).parameters
    whole = dict(inspect.signature(HookedRecurrentModel.generate).parameters)
    whole.pop("return_state")
    assert [(p.name, p.default) for p in stream.values()] == [(p.name, p.default) for p in whole.values()]


def test_progress_is_shown_only_when_asked_for(capfd):
    model = model_of()
    generate = partial(model.generate, tokens_of(model), max_new_tokens=3)
    generate()
    assert capfd.readouterr().err == ""
    generate(verbose=True)
    assert "3/3" in capfd.readouterr().err
