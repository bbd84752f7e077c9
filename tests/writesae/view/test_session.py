"""What a prompt shows: tokens, writes and firings, against the model and the dictionary asked directly."""

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.models import RULES, SOFTMAX, tiny_model
from tests.writesae.view.letters import LEARNED, TEXT, Letters, letters
from writesae import WriteSAE, WriteSAEConfig
from writesae.view.session import coefficient, firings, read, session, tokens_of, told, words

over_rules = pytest.mark.parametrize("rule", RULES)
over_learned = pytest.mark.parametrize("learned", LEARNED)


@over_rules
@over_learned
def test_firings_are_the_codes_of_what_the_dictionary_learned(rule, learned):
    study = letters((rule, rule), learned)
    prompt = read(study, TEXT)
    model, (layer, head) = study.model, (study.layer, study.head)
    _, cache = model.run_with_cache(prompt.tokens)
    if learned == "state":
        matrices = torch.stack([cache.state(layer, head, pos) for pos in range(len(TEXT))]).reshape(len(TEXT), 3, 5)
    else:
        matrices = torch.einsum(
            "pk,pv->pkv", *(cache[f"blocks.{layer}.mixer.hook_write_{side}"][0, :, head] for side in ("key", "value"))
        )
        if learned == "net write":
            log_decay = cache[f"blocks.{layer}.mixer.hook_log_decay"][0, :, head]
            decay = log_decay.exp() if log_decay.ndim == 2 else log_decay.exp()[:, None].expand(-1, 3)
            states = torch.stack([cache.state(layer, head, pos) for pos in range(len(TEXT))]).reshape(-1, 3, 5)
            before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
            matrices = states - decay[..., None] * before
    codes = study.sae.encode_matrix(matrices).dense(12)
    found = torch.zeros_like(codes)
    for position in range(len(TEXT)):
        for atom, value in firings(prompt, position):
            found[position, atom] = value
    assert torch.allclose(found, codes, atol=1e-9)
    if learned != "state":
        norms = torch.tensor([row["norm"] for row in told(study, prompt)["tokens"]], dtype=torch.float64)
        assert torch.allclose(norms, matrices.flatten(1).norm(dim=1), atol=1e-9)
    assert torch.allclose(prompt.logits, model(prompt.tokens)[0])


def test_what_is_told_is_what_fires():
    study = letters()
    prompt = read(study, TEXT)
    rows = told(study, prompt)["tokens"]
    assert "".join(row["text"] for row in rows) == TEXT and [row["id"] for row in rows] == prompt.tokens[0].tolist()
    for position, row in enumerate(rows):
        assert row["atoms"] == [list(pair) for pair in firings(prompt, position)]
        assert row["n_active"] == len(row["atoms"]) and row["atoms"]
        values = [value for _, value in row["atoms"]]
        assert values == sorted(values, reverse=True) and min(values) > 0
    silent = next(atom for atom in range(12) if atom not in dict(firings(prompt, 3)))
    assert (
        coefficient(prompt, 3, silent) == 0
        and coefficient(prompt, 3, firings(prompt, 3)[1][0]) == firings(prompt, 3)[1][1]
    )
    assert study.about()["learned"] == "write" and study.about()["n_atoms"] == 12


def test_a_character_of_several_tokens_stands_at_its_last_one():
    model = HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")
    text = "a \u202e\U0001f468\u200d\U0001f469<b>\x00\r\n é"
    tokens = tokens_of(model, text)[0].tolist()
    pieces = words(model, tokens)
    assert len(pieces) == len(tokens) and "" in pieces and "\ufffd" not in "".join(pieces)
    assert "".join(pieces).endswith(text)
    assert words(model, tokens[: pieces.index("") + 1])[-1] != ""  # a half character at the end is not lost
    assert words(model, []) == []


def test_errors():
    study = letters()
    with pytest.raises(ValueError, match="the prompt is empty: type some text first"):
        read(study, "")
    with pytest.raises(ValueError, match="the tokenizer makes no token of this prompt"):
        read(study, "ÄÖÜ")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        read(study, "a\ud800")
    with pytest.raises(ValueError, match="no tokenizer to read a prompt with"):
        session(tiny_model(), study.sae)
    study.sae.provenance.pop("head")
    with pytest.raises(ValueError, match="does not say which head"):
        session(study.model, study.sae)
    assert session(study.model, study.sae, head=1).head == 1
    with pytest.raises(IndexError, match="layer 7 has no writes"):
        session(study.model, study.sae, layer=7, head=0)
    with pytest.raises(ValueError, match="4 x 5"):
        session(study.model, WriteSAE(WriteSAEConfig(d_k=4, d_v=5, n_atoms=3, k=1)), layer=0, head=0)
    vectors = WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=3, k=1))
    vectors.provenance.update(hook="blocks.0.hook_resid_pre", layer=0, head=0)
    with pytest.raises(ValueError, match="needs one of writes or states"):
        session(study.model, vectors)
    hybrid = tiny_model(("gated_delta_net", SOFTMAX), tokenizer=Letters())
    with pytest.raises(IndexError, match="layer 1 has no writes"):
        session(hybrid, study.sae, layer=1, head=0)
