"""Next-token distributions: the numbers are the softmax's, before and after."""

import pytest
import torch

from hooked_recurrent.display import next_tokens_html
from tests.hooked_recurrent.display.reading import Reader, table_of

BEFORE, AFTER = torch.tensor([0.0, 3.0, 1.0, -2.0]), torch.tensor([4.0, 3.0, 1.0, -2.0])
WORDS = ["<b>", " the", "\n", "\u202e"]


def test_the_likeliest_tokens_with_their_probabilities():
    view = next_tokens_html(BEFORE, WORDS.__getitem__, top=2)
    chances = BEFORE.double().softmax(0).tolist()
    assert view.table["id"].tolist() == [1, 2] and view.table["before"].tolist() == pytest.approx(chances[1:3])
    rows = table_of(str(view))
    assert [row["token"] for row in rows] == [" the", "↵"]
    assert [float(row["before"]) for row in rows] == pytest.approx(chances[1:3], abs=5e-5)
    assert view.kl is None and "KL" not in str(view)


def test_after_a_change_the_likeliest_of_both_and_the_divergence():
    view = next_tokens_html(BEFORE, WORDS.__getitem__, AFTER, top=1)
    one, two = (x.double().log_softmax(0) for x in (BEFORE, AFTER))
    assert view.table["id"].tolist() == [1, 0]
    assert view.table["change"].tolist() == pytest.approx((two - one)[[1, 0]].tolist())
    assert view.kl == pytest.approx(float((one.exp() * (one - two)).sum()))
    assert f"= {view.kl:.4g} nats" in Reader(str(view)).text
    assert [float(row["change"]) for row in table_of(str(view))] == pytest.approx(
        (two - one)[[1, 0]].tolist(), abs=5e-4
    )
    assert repr(view).startswith("NextTokens(' the' 0.8") and "KL" in repr(view) and "\n" not in repr(view)


def test_the_longest_bar_is_the_largest_probability():
    markup = str(next_tokens_html(BEFORE, WORDS.__getitem__, AFTER, top=4))
    widths = [float(style.split("width:")[1].split("%")[0]) for style in Reader(markup).of("style") if "%;" in style]
    assert len(widths) == 8 and max(widths) == 100.0


def test_a_token_that_cannot_come_takes_nothing_away():
    masked = torch.tensor([0.0, float("-inf")])
    assert next_tokens_html(masked, str, torch.tensor([0.0, 0.0])).kl == pytest.approx(0.6931472)


def test_hostile_tokens_are_text():
    reader = Reader(str(next_tokens_html(BEFORE, ["<script>x</script>", *WORDS[1:]].__getitem__, title="<i>")))
    assert "<script>x</script>" in reader.text and "U+202E" in reader.text


@pytest.mark.parametrize(
    ("before", "after", "top", "words"),
    [
        (torch.zeros(2, 4), None, 3, r"one position \[d_vocab\], got \(2, 4\)"),
        (torch.zeros(4), torch.zeros(5), 3, r"got \(4,\) and \(5,\)"),
        (torch.zeros(4), None, 0, "must be 1 or more, got 0"),
    ],
)
def test_logits_that_do_not_fit_are_refused(as_users_run, before, after, top, words):
    with pytest.raises(ValueError, match=words):
        next_tokens_html(before, str, after, top=top)
