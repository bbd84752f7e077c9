"""What a result shows is its summary, whatever the experiment; hostile words in it stay words."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from tests.hooked_recurrent.display.reading import Reader, table_of
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from tests.writesae.evaluation.replacing.test_replacement_result import N, result
from writesae.evaluation.describing.contexts import contexts_html, top_contexts
from writesae.evaluation.firings import encode_cell
from writesae.evaluation.result import Result


@dataclass(frozen=True, repr=False)
class Hostile(Result):
    """A result whose words are markup, and whose summary may not exist."""

    kind = "hostile"

    def summary(self):
        if self.layer == 3:
            raise ValueError("nothing <fired>")
        return [{"word": "<script>", "share": np.float64(0.25), "interval": [0.125, float("nan")], "n": 1234}]


def made(layer=1, head=0):
    return Hostile(pd.DataFrame({"word": ["<img src=x>", "b"], "n": [1, 2]}), layer, head, {"k<": 3}, {"model": "<m>"})


def test_one_line_with_the_cell():
    assert repr(made()) == "Hostile(layer 1, head 0, 2 measurements)"
    assert repr(made(-1, -1)) == "Hostile(several cells, 2 measurements)"


def test_summary_first_measurements_and_config_are_shown():
    reader = Reader(made()._repr_html_())
    summary, first, config, about = reader.tables
    assert summary == [["word", "share", "interval", "n"], ["<script>", "0.25", "0.125, ", "1,234"]]
    assert first == [["word", "n"], ["<img src=x>", "1"], ["b", "2"]]
    assert config == [["name", "value"], ["k<", "3"]] and about[1] == ["model", "'<m>'"]
    assert "hostile; result.figure() draws it" in reader.text and "layer 1, head 0" in reader.text
    assert not {"img", "svg"} & set(reader.tags)  # a picture comes when it is asked for


def test_a_result_without_a_summary_says_why_and_shows_the_rest():
    reader = Reader(made(layer=3)._repr_html_())
    assert "no summary: nothing <fired>" in reader.text and reader.tables[0][1] == ["<img src=x>", "1"]


def test_a_replacement_shows_what_its_summary_says():
    one = result()
    rows, expected = table_of(one._repr_html_()), one.summary()
    assert len(rows) == len(expected) and repr(one) == f"ReplacementResult(layer 1, head 2, {2 * N} measurements)"
    for row, line in zip(rows, expected, strict=True):
        assert (row["reading"], row["pool"], row["scale"]) == (line["reading"], line["pool"], line["scale"])
        assert float(row["win_rate"]) == pytest.approx(line["win_rate"], rel=1e-3)
        assert [float(end) for end in row["by_passage"].split(", ")] == pytest.approx(line["by_passage"], rel=1e-3)


def test_contexts_of_an_atom_share_a_scale_and_frame_the_firing_token():
    model, sae, tokens = cell()
    model.to_str_tokens = lambda row: [f"<{int(token)}>" for token in row]
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    atom = writes.codes.busiest(1)[0]
    contexts = top_contexts(model, writes, tokens, atom, before=3, after=2)
    shown = contexts_html(contexts, title=f"atom {atom}")
    assert len(shown) == len(contexts) > 1 and Reader(str(shown)).text.count("<") >= 6
    for view, context in zip(shown.views, contexts, strict=True):
        assert view.rows[0].scale == max(max(one["weights"]) for one in contexts)
        assert view.mark == context["firing_index"] and view.first + view.mark == context["position"]
        assert view.rows[0].values.tolist() == context["weights"] and context["file"] in view.rows[0].name
    assert len(contexts_html([])) == 0
