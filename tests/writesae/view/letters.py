"""A tiny random model that reads letters, with a random dictionary of one of its cells."""

from tests.hooked_recurrent.models import ALL_LINEAR
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.view.session import Session

ALPHABET = "abcdefghijklmnopqrstuvwxyz <&"
LEARNED = {
    "write": {"hook": f"blocks.{LAYER}.mixer.hook_write"},
    "net write": {"hook": f"blocks.{LAYER}.mixer.hook_write", "form": "net"},
    "state": {"hook": f"blocks.{LAYER}.mixer.hook_state"},
}
TEXT = "the quick brown fox"


class Letters:
    """As much of a tokenizer as the library asks for: a token per letter, none in front."""

    bos_token_id = eos_token_id = None

    def encode(self, text, add_special_tokens=False):
        return [ALPHABET.index(letter) for letter in text if letter in ALPHABET]

    def decode(self, tokens):
        return "".join(ALPHABET[token] for token in tokens)


def letters(layer_types=ALL_LINEAR, learned="write", **sae):
    """A session in float64; the dictionary is not trained."""
    model, dictionary, _ = cell(layer_types, **sae)
    model.tokenizer = Letters()
    dictionary.provenance.update(LEARNED[learned], layer=LAYER, head=HEAD)
    return Session(model, dictionary, LAYER, HEAD)
