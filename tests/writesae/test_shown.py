"""Whatever a user holds is a short line in a terminal, and where it is more than a number a table in a notebook."""

import pytest
import torch

import hooked_recurrent
import writesae
from hooked_recurrent.patching import Sweep
from hooked_recurrent.zoo.corpus import Corpus, SourceFile
from tests.hooked_recurrent.display.reading import Reader, table_of
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from tests.writesae.evaluation.replacing.test_replacement_result import result
from tests.writesae.training.runs import config, jobs, run
from writesae import ActivationStore, ActivationStream, Passages
from writesae.evaluation.firings import encode_cell

# Functions, and bases of what is shown below.
NOT_SHOWN = {"MixerConfig", "Samples", "Matrices", "Vectors", "LayerState"}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """One of everything, by the name of its class."""
    model, sae, tokens = cell()
    (_, state), cache = model.run_with_cache(tokens, return_state=True)
    (job, *_), text = jobs(), Passages(tokens, ("f.py",) * 300, tuple(range(300)), "train", "0f", 1, 0, 0)
    store = ActivationStore.write(tmp_path_factory.mktemp("store") / "s", model, tokens, [job.source])
    files = tuple(SourceFile(f"{index}.py", "x = 1\n" * 1000) for index in range(30))
    trained = run([job], heldout=True)[job.name]
    edits = [
        hooked_recurrent.WriteEdit(0, 1, torch.arange(40), "delete"),
        hooked_recurrent.StateEdit(0, 1, 3, "replace", matrix=torch.zeros(3, 5)),
        hooked_recurrent.ActivationEdit("blocks.0.hook_resid_pre", slice(3, None), torch.zeros(12)),
    ]
    factors = cache.factors(0)
    writes = factors.write_key[0, :, 0], factors.write_value[0, :, 0]
    things = [
        model, sae, state, cache, factors, trained, trained.sae.config, job, job.source, text, store, result(), *edits,
        hooked_recurrent.Edits(edits), model.cfg, model.cfg.mixer, config(), encode_cell(model, sae, tokens, LAYER, HEAD),
        writesae.Factored(*writes), sae.encode(*writes), sae.loss(*writes), ActivationStream(model, tokens, [job.source]),
        Sweep("done", "write", {"layer": tuple(range(90))}, torch.zeros(90), (0.5,)), Corpus(files, ()), files[0],
        *(getattr(hooked_recurrent, name)(**fields) for name, fields in CONFIGS.items()),
    ]  # fmt: skip
    return {type(thing).__name__: thing for thing in things}


CONFIGS = {
    "AttentionConfig": {"n_heads": 4, "n_key_value_heads": 2, "d_head": 6, "rotary_dims": 4},
    "DeltaNetConfig": {"n_heads": 4, "d_k": 3, "d_v": 5},
    "GatedLinearAttentionConfig": {
        "n_heads": 4, "n_key_value_heads": 2, "d_k": 3, "d_v": 5, "decay_rank": 3, "decay_divisor": 4.0,
    },
    "KimiDeltaAttentionConfig": {"n_heads": 4, "n_key_heads": 2, "d_k": 3, "d_v": 5},
    "Mamba2Config": {"n_heads": 4, "n_groups": 2, "d_k": 3, "d_v": 5},
    "RWKV7Config": {
        "n_heads": 4, "d_k": 3, "d_v": 5, "decay_rank": 2, "iclr_rank": 3, "value_rank": 2, "gate_rank": 4,
    },
}  # fmt: skip


def test_nothing_public_was_forgotten(held):
    public = {name for package in (hooked_recurrent, writesae) for name in package.__all__}
    classes = {
        name for name in public if isinstance(getattr(hooked_recurrent, name, getattr(writesae, name, None)), type)
    }
    assert classes - set(held) - NOT_SHOWN == set()


def test_everything_is_a_short_line(held):
    for name, thing in held.items():
        shown = repr(thing)
        assert (
            len(shown) < (700 if name.endswith("Config") else 400) and "\n" not in shown and "tensor(" not in shown
        ), name


def test_everything_is_well_formed_in_a_notebook(held):
    plain = {"Job", "ActivationStore", "ActivationStream", "Factored"}
    for name, thing in held.items():
        assert hasattr(thing, "_repr_html_") == (name not in plain), name
        if name not in plain:
            markup = thing._repr_html_()
            assert name in ("Edits",) or name in Reader(markup).text
            assert len(markup) < 100_000


def test_training_shows_its_quality_and_draws_its_log(held):
    trained = held["TrainResult"]
    rows = {row["measure"]: row for row in table_of(trained._repr_html_())}
    for text, numbers in trained.metrics.items():
        for name, value in numbers.items():
            assert float(rows[name][text].replace(",", "")) == pytest.approx(value, rel=1e-3)
    drawn = trained.figure().axes[0].lines[0].get_ydata()
    assert list(drawn) == [line["fvu"] for line in trained.log]
    assert f"fvu {trained.metrics['heldout']['fvu']:.4f} on heldout" in repr(trained)
    assert f"{trained.log[-1]['step']:,} steps" in repr(trained)
