"""The small models that this package trains and ships: their text, tokenizer, training, evaluation and card."""

from hooked_recurrent.zoo.corpus import SourceFile, fingerprint, standard_library
from hooked_recurrent.zoo.tokenizer import END_OF_TEXT, encode_documents, train_tokenizer

__all__ = ["END_OF_TEXT", "SourceFile", "encode_documents", "fingerprint", "standard_library", "train_tokenizer"]
