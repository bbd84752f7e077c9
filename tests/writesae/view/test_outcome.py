"""What changes do, against the model run by hand: functions on its hooks, and states built step by step."""

import itertools

import pytest
import torch

from tests.hooked_recurrent.models import RULES
from tests.writesae.view.letters import LEARNED, TEXT, letters
from writesae.evaluation.outputs import compare
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.view.changes import Change, check, edits
from writesae.view.outcome import continuations, distributions, kl_along
from writesae.view.session import firings, read

AT = 5


def by_hand(study, prompt, position, new):
    """Logits of a run in which a function on hook_write puts `new(native)` in the place of one write."""

    def put(write, hook):
        write[0, hook.positions == position, study.head] = new(write[0, hook.positions == position, study.head])
        return write

    hooks = [(f"blocks.{study.layer}.mixer.hook_write", put)]
    return study.model.run_with_hooks(prompt.tokens, fwd_hooks=hooks)[0]


def every_kind(study, prompt):
    """Each change with what it makes of the additive native write."""
    atom, own = firings(prompt, AT)[0]
    matrix, quiet = study.sae.atom(atom).AB.detach(), next(a for a in range(12) if a not in dict(firings(prompt, AT)))
    other = study.sae.atom(quiet).AB.detach()
    return {
        Change(AT, "delete"): lambda native: 0 * native,
        Change(AT, "scale", None, -1.5): lambda native: -1.5 * native,
        Change(AT, "replace", atom): lambda native: own * matrix + 0 * native,
        Change(AT, "replace", quiet, 2.0): lambda native: 2.0 * other + 0 * native,
        Change(AT, "delete", atom): lambda native: native - own * matrix,
        Change(AT, "scale", atom, 3.0): lambda native: native + 2.0 * own * matrix,
        Change(AT, "add", quiet, -0.5): lambda native: native - 0.5 * other,
    }


@pytest.mark.parametrize("rule", RULES)
def test_every_change_is_what_a_hook_by_hand_does(rule):
    study = letters((rule, rule))
    prompt = read(study, TEXT)
    for change, new in every_kind(study, prompt).items():
        direct = by_hand(study, prompt, AT, new)
        found = distributions(study, prompt, [change], position=AT + 4, top=4)
        assert found["first"] == AT and [at["position"] for at in found["at"]] == [AT, AT + 1, AT + 4]
        assert [at["roles"] for at in found["at"]] == [["t"], ["t + 1"], ["chosen"]]
        assert found["kl"][:AT] == pytest.approx([0.0] * AT, abs=1e-14) and max(found["kl"][AT:]) > 1e-9, change
        for at in found["at"]:
            place = at["position"]
            measured = compare(direct[None, place : place + 1], prompt.logits[place : place + 1], prompt.tokens[0, :1])
            assert at["kl"] == pytest.approx(measured["kl"].item(), rel=1e-6, abs=1e-12), change
            after, before = direct[place].double().softmax(-1), prompt.logits[place].double().softmax(-1)
            for entry in at["top"] + at["promoted"] + at["suppressed"]:
                assert entry["before"] == pytest.approx(before[entry["id"]].item(), abs=1e-9)
                assert entry["after"] == pytest.approx(after[entry["id"]].item(), abs=1e-9)
            best = {int(one.argmax()) for one in (before, after)}
            assert best <= {entry["id"] for entry in at["top"]}
            assert at["promoted"][0]["id"] == int((after - before).argmax())
            assert at["suppressed"][0]["id"] == int((before - after).argmax())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("learned", [name for name in LEARNED if name != "write"])
def test_net_writes_and_states_are_changed_as_they_were_learned(rule, learned):
    study = letters((rule, rule), learned)
    prompt = read(study, TEXT)
    atom, own = firings(prompt, AT)[0]
    matrix = study.sae.atom(atom).AB.detach()
    model, layer, head = study.model, study.layer, study.head
    # the state is built by hand: what decay leaves of the one before, and what the change leaves of the token's doing
    _, cache = model.run_with_cache(prompt.tokens)
    state, before = (cache.state(layer, head, pos).reshape(3, 5) for pos in (AT, AT - 1))
    decay = cache[f"blocks.{layer}.mixer.hook_log_decay"][0, AT, head].exp().reshape(-1, 1)
    write = torch.outer(*(cache[f"blocks.{layer}.mixer.hook_write_{side}"][0, AT, head] for side in ("key", "value")))
    native = state - decay * before if learned == "net write" else write
    wanted = {
        Change(AT, "delete"): 0 * native,
        Change(AT, "scale", None, 0.5): 0.5 * native,
        Change(AT, "replace", atom): own * matrix,
        Change(AT, "delete", atom): native - own * matrix,
    }
    for change, new in wanted.items():

        def put(states, hook, new=new):
            states[0, hook.positions == AT, head] = state - native + new
            return states

        direct = model.run_with_hooks(prompt.tokens, fwd_hooks=[(f"blocks.{layer}.mixer.hook_state", put)])[0]
        found = distributions(study, prompt, [change])
        measured = kl_along(direct, prompt.logits).tolist()
        assert found["kl"] == pytest.approx(measured, rel=1e-6, abs=1e-12), change


def test_several_changes_act_together_and_in_order():
    study = letters()
    prompt = read(study, TEXT)
    atom, own = firings(prompt, AT)[0]
    replaced, taken = Change(AT, "replace", atom, 2.0), Change(AT, "delete", atom)
    matrix = study.sae.atom(atom).AB.detach()
    direct = by_hand(study, prompt, AT, lambda native: (2.0 - own) * matrix + 0 * native)
    found = distributions(study, prompt, [replaced, taken])
    assert found["kl"] == pytest.approx(kl_along(direct, prompt.logits).tolist(), rel=1e-6, abs=1e-12)
    turned = distributions(study, prompt, [taken, replaced])["kl"]
    assert turned == pytest.approx(distributions(study, prompt, [replaced])["kl"], rel=1e-6, abs=1e-12)
    apart = distributions(study, prompt, [Change(9, "delete"), replaced])
    assert apart["first"] == AT and apart["kl"][9] != found["kl"][9]


@pytest.mark.parametrize("sae", [{"rank": 3}, {"decoder": "dense", "encoder": "linear"}], ids=["rank 3", "dense"])
def test_other_atoms_than_outer_products(sae):
    study = letters(**sae)
    prompt = read(study, TEXT)
    atom, own = firings(prompt, AT)[0]
    matrix = study.sae.atom(atom).AB.detach()
    direct = by_hand(study, prompt, AT, lambda native: native - own * matrix)
    found = distributions(study, prompt, [Change(AT, "delete", atom)])["kl"]
    assert found == pytest.approx(kl_along(direct, prompt.logits).tolist(), rel=1e-6, abs=1e-12)
    if study.about()["dense"]:  # what a token could write: the leading singular pair
        left, sizes, right = torch.linalg.svd(matrix)
        matrix = sizes[0] * torch.outer(left[:, 0], right[0])
    direct = by_hand(study, prompt, AT, lambda native: own * matrix + 0 * native)
    found = distributions(study, prompt, [Change(AT, "replace", atom)])["kl"]
    assert found == pytest.approx(kl_along(direct, prompt.logits).tolist(), rel=1e-6, abs=1e-12)


def test_the_numbers_are_those_of_the_replacement_test():
    study = letters()
    prompt = read(study, TEXT)
    config = ReplacementConfig(total=6, horizon=1, first_position=4, readings=("in_recurrence", "cache"))
    table = replacement(
        study.model, study.sae, prompt.tokens, layer=study.layer, head=study.head, config=config
    ).to_dataframe()
    assert len(table) == 12
    for row in table.itertuples():
        later = row.reading == "cache"
        for column, change in (
            ("kl_atom_listed_coef", Change(row.position, "replace", row.atom)),
            ("kl_delete", Change(row.position, "delete")),
        ):
            found = distributions(study, prompt, [change], reading=row.reading)["kl"][row.position + later]
            assert found == pytest.approx(getattr(row, column), rel=1e-6, abs=1e-12)


def test_without_changes_nothing_moves():
    study = letters()
    prompt = read(study, TEXT)
    found = distributions(study, prompt, [])
    assert found["kl"] == [0.0] * len(TEXT) and found["first"] is None
    (last,) = found["at"]
    assert last["roles"] == ["last"] and last["position"] == len(TEXT) - 1
    assert last["promoted"] == last["suppressed"] == []
    assert sum(entry["before"] for entry in distributions(study, prompt, [], top=29)["at"][0]["top"]) == pytest.approx(
        1
    )
    end = distributions(study, prompt, [Change(len(TEXT) - 1, "delete")])
    assert [at["roles"] for at in end["at"]] == [["t", "last"]]


def test_continuations_are_the_models_own():
    study = letters()
    prompt = read(study, TEXT)
    changes = [Change(AT, "scale", None, -8.0), Change(len(TEXT) - 1, "delete")]
    for options, more in [({}, {}), ({"sample": True, "seed": 3, "temperature": 0.7}, {"do_sample": True, "seed": 3})]:
        if more:
            more["temperature"] = 0.7
        found = continuations(study, prompt, changes, new_tokens=6, **options)
        for name, made in (("plain", ()), ("edited", edits(study, prompt, changes))):
            whole = study.model.generate(prompt.tokens, 6, edits=made, **more)
            assert [entry["id"] for entry in found[name]] == whole[0, len(TEXT) :].tolist()
            assert "".join(entry["text"] for entry in found[name]) == study.model.to_string(whole[0, len(TEXT) :])
        same = [one["id"] == other["id"] for one, other in zip(found["plain"], found["edited"], strict=True)]
        assert found["same"] == sum(itertools.takewhile(bool, same)) < 6
    assert continuations(study, prompt, [], new_tokens=3)["same"] == 3


BAD = {
    "unknown change 'erase': the changes are replace, delete, scale, add": Change(AT, "erase"),
    "token 19 is not in this text, whose tokens are 0 to 18": Change(19, "delete"),
    "token -1 is not in this text": Change(-1, "delete"),
    "replace at token 5 needs an atom: say which, 0 to 11": Change(AT, "replace", None, 1.0),
    "add at token 5 needs an atom": Change(AT, "add", None, 1.0),
    "atom 12 is not in this dictionary, whose atoms are 0 to 11": Change(AT, "add", 12, 1.0),
    "atom -1 is not in this dictionary": Change(AT, "replace", -1, 1.0),
    "scale at token 5 needs an amount: give the factor to scale by": Change(AT, "scale"),
    "add at token 5, atom 1 needs an amount: give the coefficient": Change(AT, "add", 1),
    "delete at token 5 takes no amount, got 1.0: leave it out": Change(AT, "delete", None, 1.0),
    "the amount of scale at token 5 is nan: give a number between": Change(AT, "scale", None, float("nan")),
    "the amount of scale at token 5 is -inf: give a number between": Change(AT, "scale", None, float("-inf")),
    "the amount of scale at token 5 is 1000001.0: give a number between": Change(AT, "scale", None, 1000001.0),
    "is silent at token 5, so it has no share there: add it instead": "delete",
    "is silent at token 5, so it has no share there: replace the write": "replace",
}


@pytest.mark.parametrize("sentence", BAD)
def test_errors(sentence, monkeypatch):
    study = letters()
    prompt = read(study, TEXT)
    change = BAD[sentence]
    if isinstance(change, str):
        change = Change(AT, change, next(atom for atom in range(12) if atom not in dict(firings(prompt, AT))))
    monkeypatch.setattr(type(study.model), "forward", None)  # nothing may run
    for call in (lambda: check(study, prompt, change), lambda: distributions(study, prompt, [change])):
        with pytest.raises((ValueError, IndexError), match=sentence.split(":")[0]):
            call()


def test_errors_of_the_output():
    study = letters()
    prompt = read(study, TEXT)
    for bad in (-1, 19):
        with pytest.raises(IndexError, match=f"token {bad} is not in this text"):
            distributions(study, prompt, [], position=bad)
    for bad in (0, 30):
        with pytest.raises(ValueError, match=f"top must be between 1 and the 29 tokens there are, got {bad}"):
            distributions(study, prompt, [], top=bad)
