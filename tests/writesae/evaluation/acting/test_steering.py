"""Steering against generation by hand, in float64: pushes, controls of equal norm, and the statistics."""

import pandas as pd
import pytest
import torch
from scipy import stats

from hooked_recurrent.edits import StateEdit
from tests.hooked_recurrent.models import ALL_LINEAR, RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.evaluation.acting.steering import SteeringConfig, steering, wanted_tokens
from writesae.evaluation.acting.steering_pushes import head_push, is_boundary, mean_coefficients
from writesae.evaluation.acting.steering_result import SteeringResult
from writesae.evaluation.firings import encode_cell

pytestmark = pytest.mark.shapes_on_one_rule

SMALL = {"token": (3, 5, 7, 11), "top": 2, "doses": (1.0, 40.0), "prompts": 3, "prompt_length": 5, "new_tokens": 4}
CONFIG = SteeringConfig(**SMALL, first_position=2, seed=9)
WANTED = torch.tensor(SMALL["token"])
STUDIES = {}


class Letters:
    """A tokenizer whose token i is the letter i, and whose token 7 is a newline and 11 two."""

    bos_token_id = eos_token_id = None

    def __len__(self):
        return 29

    def decode(self, tokens, **options):
        if isinstance(tokens, int):
            tokens = [tokens]
        return "".join({7: "\n", 11: "\n\n", 0: " "}.get(int(token), chr(97 + int(token) % 26)) for token in tokens)


def study(layer_types=ALL_LINEAR, config=CONFIG, tokenizer=None):
    key = (layer_types, config, tokenizer is None)
    if key not in STUDIES:
        model, sae, tokens = cell(layer_types, passages=8, length=24)
        model.requires_grad_(False)
        model.tokenizer = tokenizer
        STUDIES[key] = (model, sae, tokens, steering(model, sae, tokens, layer=LAYER, head=HEAD, config=config))
    return STUDIES[key]


def push_of(model, sae, tokens, config=CONFIG):
    return head_push(model, sae, tokens[:-3], layer=LAYER, head=HEAD, wanted=WANTED, config=config)


@pytest.mark.parametrize("rule", RULES)
def test_generation_and_kl_are_those_of_a_state_changed_by_hand(rule):
    """Token by token, with the push added to the matrix after every generated token, and never during the prompt."""
    config = SteeringConfig(**{**CONFIG.to_dict(), "greedy": True, "doses": (40.0,)})
    model, sae, tokens, result = study((rule, rule), config)
    push, prompts = push_of(model, sae, tokens), tokens[-3:, :5]
    matrices = {"atoms": push.atoms_matrix, "other_atoms": push.other, "gaussian": push.gaussian}
    native = by_hand(model, prompts, push.atoms_matrix * 0)[0]
    for name, matrix in matrices.items():
        made, _ = by_hand(model, prompts, 40 * matrix)
        _, logprobs = by_hand(model, prompts, 40 * matrix, forced=native)
        _, plain = by_hand(model, prompts, 0 * matrix, forced=native)
        kl = (logprobs.exp() * (logprobs - plain)).sum(-1)
        assert kl[:, :2].abs().max() < 1e-12  # the first two choices are out of its reach
        rows = result.table[(result.table["condition"] == name) & (result.table["dose"] == 40.0)]
        assert rows["tokens"].tolist() == torch.isin(made, WANTED).sum(1).tolist()
        assert rows["kl"].tolist() == pytest.approx(kl[:, 2:].mean(1).tolist(), abs=1e-10)
    assert result.floor() < 1e-12 and result.table["kl"].max() > 1e-6


def by_hand(model, prompts, matrix, forced=None):
    """(four tokens, greedy or forced; log-probabilities before each)."""
    logits, state = model(prompts, return_state=True)
    made, logprobs = [], []
    for step in range(4):
        logprobs.append(logits[:, -1].log_softmax(-1))
        made.append(logprobs[-1].argmax(-1) if forced is None else forced[:, step])
        logits, state = model(made[-1][:, None], state=state, return_state=True)
        memory = state.layers[LAYER].matrix.clone()
        memory[:, HEAD] += matrix
        state = state.with_matrix(LAYER, memory)
    return torch.stack(made, 1), torch.stack(logprobs, 1)


def test_atoms_are_scored_at_exactly_the_positions_before_wanted_tokens():
    model, sae, tokens, result = study()
    dense = encode_cell(model, sae, tokens[:-3], LAYER, HEAD).codes.dense(12)
    here, there = [], []
    for passage in range(5):
        for t in range(2, 23):
            (here if int(tokens[passage, t + 1]) in SMALL["token"] else there).append(dense[passage, t])
    boundary, elsewhere = torch.stack(here).mean(0), torch.stack(there).mean(0)
    score = boundary - elsewhere
    told = {row["atom"]: row for row in result.about["atoms"] if row["role"] == "atoms"}
    assert list(told) == score.topk(2).indices.tolist() and score.topk(2).values.min() > 0
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for atom, row in told.items():
        assert (row["score"], row["boundary"]) == pytest.approx((float(score[atom]), float(boundary[atom])))
        expected += boundary[atom] * sae.atom(atom).AB.detach()
    push = push_of(model, sae, tokens)
    assert (push.atoms_matrix - expected).abs().max() < 1e-12
    others = {row["atom"] for row in result.about["atoms"] if row["role"] == "other_atoms"}
    assert len(others) == 2 and not others & set(told)
    assert all(boundary[atom] + elsewhere[atom] > 0 for atom in others)


def test_controls_have_the_norm_of_the_push():
    model, sae, tokens, _ = study()
    push = push_of(model, sae, tokens)
    size = float(push.atoms_matrix.norm())
    assert size > 0 and torch.linalg.matrix_rank(push.gaussian) == 1
    for control in (push.other, push.gaussian):
        assert float(control.norm()) == pytest.approx(size) and (control - push.atoms_matrix).norm() > 0.1 * size


def test_the_atoms_are_not_chosen_on_the_prompts():
    """Other prompts, same atoms; other passages before them, other atoms or scores."""
    model, sae, tokens, result = study()
    changed = tokens.clone()
    changed[-3:] = (changed[-3:] + 1) % 29
    again = steering(model, sae, changed, layer=LAYER, head=HEAD, config=CONFIG)
    assert again.about["atoms"] == result.about["atoms"]
    assert not again.table["kl"].equals(result.table["kl"])


def test_heads_steer_together_each_with_its_own_dictionary():
    model, sae, tokens, alone = study()
    both = steering(model, {HEAD: sae, 0: sae}, tokens, layer=LAYER, config=CONFIG)
    assert both.about["heads"] == [0, HEAD] and both.head == 0
    assert [row for row in both.about["atoms"] if row["head"] == HEAD] == alone.about["atoms"]
    assert {row["head"] for row in both.about["atoms"]} == {0, HEAD}
    steered = (both.table["condition"] == "atoms") & (both.table["dose"] == 40.0)
    assert (both.table[steered]["kl"] - alone.table[steered]["kl"]).abs().min() > 1e-9


def test_samples_share_their_random_numbers_and_come_from_the_seed():
    model, sae, tokens, result = study()
    faint = SteeringConfig(**{**CONFIG.to_dict(), "doses": (1e-9, 40.0)})
    again = steering(model, sae, tokens, layer=LAYER, head=HEAD, config=faint).table
    hard = [table[table["dose"] == 40.0].reset_index(drop=True) for table in (again, result.table)]
    pd.testing.assert_frame_equal(*hard)  # whatever other doses there are
    table = again[again["dose"] < 1]
    assert table.groupby("prompt")["tokens"].nunique().max() == 1  # hardly pushed, nothing changes


def test_texts_are_measured(monkeypatch):
    model, sae, tokens, result = study(tokenizer=Letters())
    assert wanted_tokens(model, None).tolist() == [7, 11]
    for row in result.table.itertuples():
        assert row.newlines == row.text.count("\n") and row.paragraphs == row.text.count("\n\n") + 1
        words = row.text.split()
        assert row.word_length == pytest.approx(sum(map(len, words)) / len(words))
        assert len(row.text) >= 4
    assert {row["metric"] for row in result.summary(20)} == {"tokens", "newlines", "word_length"}


def test_the_summary_pairs_prompts(tmp_path):
    result = study()[3]
    rows = {(row["condition"], row["dose"]): row for row in result.summary(50) if row["metric"] == "tokens"}
    table = result.table.assign(tokens=[(7 * i) % 11 for i in range(len(result.table))])
    made = SteeringResult(table, LAYER, HEAD, CONFIG.to_dict(), result.about)
    wide, (row,) = made.wide("tokens"), [r for r in made.summary(50) if (r["condition"], r["dose"]) == ("atoms", 40.0)]
    difference = wide["atoms", 40.0] - wide["baseline", 0.0]
    assert row["difference"] == pytest.approx(difference.mean())
    assert row["cohen_d"] == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert row["p"] == pytest.approx(stats.ttest_rel(wide["atoms", 40.0], wide["baseline", 0.0]).pvalue)
    assert row["minus_other"] == pytest.approx((wide["atoms", 40.0] - wide["other_atoms", 40.0]).mean())
    one = next(r for r in made.summary(50) if (r["condition"], r["dose"]) == ("atoms", 1.0))
    assert min(row["p_holm"], one["p_holm"]) == pytest.approx(min(1, 2 * min(row["p"], one["p"])))
    assert set(rows) == {("baseline", 0.0)} | {
        (c, d) for c in ("atoms", "other_atoms", "gaussian") for d in (1.0, 40.0)
    }
    back = SteeringResult.from_json(result.to_json(tmp_path / "steer.json"))
    assert back.about == result.about and len(back.summary(50)) == len(rows)
    assert made.figure().axes[0].get_ylabel() == "steered minus unsteered"


def test_boundaries_and_means():
    found = is_boundary(torch.tensor([[1, 3, 3, 9, 5, 3]]), torch.tensor([3, 5]), first=1)
    assert found.tolist() == [[False, True, False, True, True, False]]
    values, indices = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[1, 0], [0, 1]])
    assert mean_coefficients(values, indices, 3).tolist() == [0.5, 2.5, 0.0]


def test_a_push_is_a_state_edit_behind_the_prompt_alone():
    model, sae, tokens, _ = study()
    push = push_of(model, sae, tokens)
    edit = StateEdit(LAYER, HEAD, slice(5, None), "add", matrix=40 * push.atoms_matrix, reading="cache")
    text = tokens[-1:, :9]
    changed = (model(text, edits=[edit]) - model(text)).abs().amax(-1)[0]
    assert changed[:6].max() < 1e-12 and changed[6:].min() > 1e-9


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token": ()}, "token is empty"),
        ({"doses": (0.0,)}, "doses must be different numbers greater than 0"),
        ({"new_tokens": 2}, "new_tokens must be at least 3"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=words):
        SteeringConfig(**fields)


def test_bad_studies():
    model, sae, tokens, _ = study()
    run = {"layer": LAYER, "head": HEAD}
    for more, config, error, words in (
        ({"head": None}, {}, ValueError, "one dictionary needs the head that it steers"),
        ({}, {"token": (29,)}, IndexError, "token 29 is out of range: the vocabulary has 29 tokens"),
        ({}, {"token": None}, ValueError, "no tokenizer to find newlines with"),
        ({}, {"prompts": 7}, ValueError, "7 prompts need 9 passages"),
        ({}, {"prompt_length": 30}, ValueError, "passages have 24 tokens; this test needs at least 30"),
        ({}, {"token": tuple(range(29))}, ValueError, "no elsewhere position is left"),
        ({}, {"top": 12}, ValueError, "other alive atoms, but its control needs"),
    ):
        with pytest.raises(error, match=words):
            bad = SteeringConfig(**{**CONFIG.to_dict(), **config})
            steering(model, sae, tokens, **{**run, **more}, config=bad)
    with pytest.raises(ValueError, match="but head 2 was given too"):
        steering(model, {HEAD: sae}, tokens, **run)
