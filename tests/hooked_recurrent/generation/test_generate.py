"""Generation: the same numbers as full passes, with hooks and edits firing at prompt and generated positions alike."""

from functools import lru_cache, partial

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import HYBRID, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule


@lru_cache
def model_of(layer_types=HYBRID, tokenizer=None):
    return tiny_model(layer_types, seed=1, tokenizer=tokenizer).requires_grad_(False)


def repeated_argmax(model, tokens, new, **options):
    """Greedy decoding by full passes over the whole text, the definition."""
    for _ in range(new):
        logits = model.run_with_hooks(tokens, return_state=True, **options)[0]
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def flip(tensor, hook, *, every, name=""):
    """Change every `every`-th absolute position."""
    here = (hook.positions % every == 1).nonzero()[:, 0]
    tensor[:, here] = -1.5 * tensor[:, here].flip(-1)


def hooks_and_edits(layers):
    names = ["hook_k", "hook_write_value", "hook_state", "hook_write"]
    hooks = [(f"blocks.0.mixer.{name}", partial(flip, every=every)) for every, name in enumerate(names, 2)]
    hooks.append(("blocks.1.hook_resid_post", partial(flip, every=4)))
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(3, generator=generator, dtype=torch.float64)
    value = 5 * torch.randn(5, generator=generator, dtype=torch.float64)
    last = layers[-1]
    edits = [
        WriteEdit(0, 1, 2, "replace", key=key, value=value),
        WriteEdit(last, 2, 9, "add", key=key, value=value),
        WriteEdit(0, 3, slice(6, None), "scale", scale=-2.0),
        WriteEdit(last, 0, torch.tensor([3, 12]), "delete", form="net"),
    ]
    return {"fwd_hooks": hooks, "edits": edits}


@over_stacks
@pytest.mark.parametrize("changed", [False, True], ids=["plain", "hooks and edits"])
def test_greedy_is_repeated_argmax(layer_types, changed):
    model = model_of(layer_types)
    tokens = tokens_of(model, batch=3, length=7)
    options = hooks_and_edits(model.cfg.recurrent_layers) if changed else {}
    out = model.generate(tokens, max_new_tokens=12, **options)
    assert torch.equal(out, repeated_argmax(model, tokens, 12, **options))
    assert torch.equal(out[:, :7], tokens)
    if changed:
        assert not torch.equal(out, model.generate(tokens, max_new_tokens=12))
    assert not any(point.in_use for point in model.hook_dict.values())


def test_hooks_fire_once_at_every_position():
    model = model_of()
    seen = {}

    def note(tensor, hook):
        assert tensor.shape[1] == len(hook.positions)
        seen.setdefault(hook.name, []).extend(hook.positions.tolist())

    names = ["hook_embed", "blocks.0.mixer.hook_write_key", "blocks.0.mixer.hook_state", "blocks.1.attn.hook_z"]
    model.generate(tokens_of(model, length=5), max_new_tokens=4, fwd_hooks=[(name, note) for name in names])
    assert seen == {name: list(range(8)) for name in names}  # the last new token is not read any more


@pytest.mark.parametrize("position", [2, 6, 8])
def test_an_edit_changes_nothing_before_it(position):
    """Logits of the generated text, teacher-forced: those before the edit are the plain ones, the rest are not."""
    model = model_of()
    tokens = tokens_of(model, length=5)
    logits = []

    def keep(tensor, hook):
        logits.append(tensor.clone())

    edit = WriteEdit(0, 1, position, "scale", scale=30.0)
    out = model.generate(tokens, max_new_tokens=6, edits=[edit], fwd_hooks=[("ln_final.hook_normalized", keep)])
    final = torch.cat(logits, dim=1)
    text = out[:, :-1]
    _, forced = model.run_with_cache(text, names_filter="ln_final.hook_normalized", edits=[edit])
    _, plain = model.run_with_cache(text, names_filter="ln_final.hook_normalized")
    forced, plain = forced["ln_final.hook_normalized"], plain["ln_final.hook_normalized"]
    assert distance(final, forced) <= 1e-12
    assert distance(final[:, :position], plain[:, :position]) <= 1e-12
    assert distance(final[:, position], plain[:, position]) > 1e-4


def test_going_on_from_a_state():
    model = model_of()
    tokens = tokens_of(model, length=9)
    options = hooks_and_edits(model.cfg.recurrent_layers)
    whole, last = model.generate(tokens, max_new_tokens=6, return_state=True, **options)
    with model.hooks(fwd_hooks=options["fwd_hooks"]):
        _, state = model(tokens[:, :5], return_state=True, edits=options["edits"])
    rest = model.generate(tokens[:, 5:], max_new_tokens=6, state=state, **options)
    assert torch.equal(rest, whole[:, 5:])
    assert last.position == 14 and whole.shape[1] == 15
    # the state has read all but the last token, so that token goes first into the next call
    more = model.generate(whole[:, -1:], max_new_tokens=3, state=last, **options)
    assert torch.equal(torch.cat([whole, more[:, 1:]], dim=1), model.generate(tokens, max_new_tokens=9, **options))


def test_sampling_is_reproducible_by_its_seed():
    model = model_of()
    tokens = tokens_of(model, batch=2, length=4)
    sample = partial(model.generate, tokens, max_new_tokens=20, do_sample=True)
    torch.manual_seed(1)
    first = sample(seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, sample(seed=5))
    assert not torch.equal(first, sample(seed=6))
    assert torch.equal(sample(seed=5, top_k=1), model.generate(tokens, max_new_tokens=20))
    assert torch.equal(sample(seed=5, temperature=1e-6), model.generate(tokens, max_new_tokens=20))


def test_samples_follow_the_distribution():
    """1,500 draws of one next token, with temperature and top_k, against the softmax of the five best logits."""
    model = model_of()
    tokens = tokens_of(model, batch=1, length=4)
    logits = model(tokens)[0, -1]
    best = logits.topk(5)
    expected = torch.zeros_like(logits).index_put((best.indices,), (best.values / 0.7).softmax(-1))
    draws = model.generate(tokens.expand(1500, -1), max_new_tokens=1, do_sample=True, temperature=0.7, top_k=5, seed=0)[
        :, -1
    ]
    measured = torch.bincount(draws, minlength=29) / 1500
    spread = (expected * (1 - expected) / 1500).sqrt()
    assert ((measured - expected).abs() <= 4 * spread).all()
    assert set(draws.tolist()) == set(best.indices.tolist())


@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_nucleus(top_p):
    """2,000 draws against the softmax of the fewest tokens that together reach top_p, worked out one by one."""
    model = model_of()
    tokens = tokens_of(model, batch=1, length=4)
    probabilities = (model(tokens)[0, -1] / 1.5).softmax(-1)
    kept, total = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total < top_p:
            kept.append(token)
            total += float(probabilities[token])
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / total
    options = {"do_sample": True, "temperature": 1.5, "top_p": top_p, "seed": 0}
    draws = model.generate(tokens.expand(2000, -1), max_new_tokens=1, **options)[:, -1]
    measured = torch.bincount(draws, minlength=29) / 2000
    assert ((measured - expected).abs() <= 4 * (expected * (1 - expected) / 2000).sqrt() + 1e-12).all()


def test_frequency_penalty_counts_every_token_of_the_text():
    """As transformer_lens has it; a large one makes every token of the vocabulary come once before any comes again."""
    model = model_of()
    tokens = tokens_of(model, batch=2, length=4)
    tokens[:] = torch.arange(4)
    out = model.generate(tokens, max_new_tokens=25, do_sample=True, freq_penalty=1e4, seed=0)
    assert (out.sort(dim=1).values == torch.arange(29)).all()


def test_only_the_last_position_is_unembedded():
    model = model_of()
    tokens = tokens_of(model, length=9)
    last, state = model(tokens, last_only=True, return_state=True)
    whole = model(tokens)
    assert last.shape == (2, 1, 29) and state.position == 9
    assert distance(last[:, 0], whole[:, -1]) <= 1e-13
    with pytest.raises(ValueError, match="last_only keeps no logits to make a loss of, but return_type is 'both'"):
        model(tokens, return_type="both", last_only=True)

    def spoil(tensor, hook):
        tensor[1, 3] = torch.nan

    # the first of them never reaches the last position
    for name in ("blocks.2.hook_resid_post", "blocks.0.mixer.hook_k"):
        with pytest.raises(ValueError, match=f"NaN in {name} at position 3 of batch row 1"):
            model.generate(tokens, fwd_hooks=[(name, spoil)])


class Tokenizer:
    bos_token_id, eos_token_id = None, 0

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_the_tokenizers_own_end_of_text():
    free = model_of().generate(tokens_of(model_of(), batch=1, length=6), max_new_tokens=10)
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = int(free[0, 8])
    first = 6 + (free[0, 6:] == tokenizer.eos_token_id).nonzero()[0].item()
    model = model_of(tokenizer=tokenizer)
    generate = partial(model.generate, free[:, :6], max_new_tokens=10)
    assert torch.equal(generate(), free[:, : first + 1])
    assert torch.equal(generate(stop_at_eos=False), free)
    assert torch.equal(generate(stop_at_eos=False, eos_token_id=tokenizer.eos_token_id), free)
    text = " ".join(map(str, free[0, :6].tolist()))
    assert model.generate(text, max_new_tokens=10) == tokenizer.decode(free[0, : first + 1].tolist())


def test_several_tokens_may_end_a_row():
    model = model_of()
    tokens = tokens_of(model, batch=3, length=6)
    free = model.generate(tokens, max_new_tokens=10)[:, 6:]
    stops = {int(free[0, 3]), int(free[2, 7])}
    assert len(stops) == 2
    for ids in (list(stops), stops, (token for token in stops)):
        out = model.generate(tokens, max_new_tokens=10, eos_token_id=ids)[:, 6:]
        for row, expected in zip(out.tolist(), free.tolist(), strict=True):
            end = next((place for place, token in enumerate(expected) if token in stops), 10)
            wanted = expected[: end + 1] + expected[end : end + 1] * 10  # the token that ended it, again and again
            assert row == wanted[: len(row)]


def test_rows_of_a_batch_are_independent():
    model = model_of()
    tokens = tokens_of(model, batch=3, length=6)
    out = model.generate(tokens, max_new_tokens=8)
    for row in range(3):
        assert torch.equal(out[[row]], model.generate(tokens[[row]], max_new_tokens=8))


def test_a_row_stops_at_the_end_of_its_text():
    model = model_of()
    tokens = tokens_of(model, batch=3, length=6)
    free = model.generate(tokens, max_new_tokens=10)[:, 6:]
    stop = int(free[0, 3])
    out = model.generate(tokens, max_new_tokens=10, eos_token_id=stop)[:, 6:]
    ends = [(row == stop).nonzero()[0].item() if (row == stop).any() else 10 for row in free]
    assert out.shape[1] == min(10, max(ends) + 1)
    for row, expected, end in zip(out, free, ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1][: len(row)])
        assert row[end:].eq(stop).all()


def test_generation_ends_when_every_row_has():
    model = model_of()
    tokens = tokens_of(model, batch=1, length=6)
    free = model.generate(tokens, max_new_tokens=10)
    stop = int(free[0, 8])
    out = model.generate(tokens, max_new_tokens=10, eos_token_id=stop)
    first = (free[0, 6:] == stop).nonzero()[0].item()
    assert torch.equal(out, free[:, : 6 + first + 1])


BAD_CALLS = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "return type": ({"return_type": "text"}, "unknown return_type 'text'; expected 'input', 'tokens' or 'str'"),
    "temperature": ({"do_sample": True, "temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
    "nan temperature": (
        {"do_sample": True, "temperature": float("nan")},
        "temperature must be greater than 0, got nan",
    ),
    "top_k": ({"do_sample": True, "top_k": 30}, "top_k must be between 1 and 29, got 30"),
    "no top_k": ({"do_sample": True, "top_k": 0}, "top_k must be between 1 and 29, got 0"),
    "top_p": ({"do_sample": True, "top_p": 1.5}, "top_p must be greater than 0 and at most 1, got 1.5"),
    "freq_penalty": ({"do_sample": True, "freq_penalty": -1.0}, "freq_penalty must not be negative, got -1.0"),
    "eos": ({"eos_token_id": [3, 29]}, "eos_token_id 29 is out of range: the vocabulary has 29 tokens"),
    "str": ({"return_type": "str"}, "this model has no tokenizer"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    model = model_of()
    options, words = BAD_CALLS[case]
    passes = []
    with pytest.raises(ValueError, match=words):
        model.generate(tokens_of(model), fwd_hooks=[("hook_embed", lambda x, hook: passes.append(1))], **options)
    assert not passes  # refused at the door, not after the work


def test_edits_beyond_the_generated_text():
    model = model_of()
    tokens = tokens_of(model, length=5)
    with pytest.raises(IndexError, match="position 9 is out of range: the text ends before position 9"):
        model.generate(tokens, max_new_tokens=4, edits=[WriteEdit(0, 0, 9, "delete")])
    with pytest.raises(IndexError, match="head 7 is out of range"):
        model.generate(tokens, max_new_tokens=4, edits=[WriteEdit(0, 7, 2, "delete")])
    _, state = model(tokens, return_state=True)
    model.generate(tokens, state=state, max_new_tokens=4, edits=[WriteEdit(0, 0, 12, "delete")])
