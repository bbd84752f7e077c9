"""The partition against brute force and planted atoms, on every rule, in float64."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.hooked_recurrent.models import RULES
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae import WriteSAE
from writesae.evaluation.describing.partition import PartitionConfig, partition
from writesae.evaluation.describing.partition_result import BUNDLE, NULL, REGISTER, PartitionResult, compare_hosts
from writesae.evaluation.firings import encode_cell

pytestmark = pytest.mark.shapes_on_one_rule

CONFIG = PartitionConfig(first_position=2, strongest=5, kept_per_atom=4, seed=1)


def run(model, sae, tokens, config=CONFIG, **more):
    return partition(model, sae, tokens, layer=LAYER, head=HEAD, config=config, **more)


def states_of(model, text):
    """S_t of the cell at every position, by a hook that sees the matrices."""
    seen = []
    model.run_with_hooks(
        text,
        fwd_hooks=[(f"blocks.{LAYER}.mixer.hook_state", lambda state, hook: seen.append(state[0, :, HEAD].clone()))],
    )
    return torch.cat(seen)


@torch.no_grad()
def net_write(model, text):
    """S_t - diag(d_t) S_{t-1}, from the states themselves."""
    name = f"blocks.{LAYER}.mixer.hook_log_decay"
    _, cache = model.run_with_cache(text, names_filter=[name])
    decay = cache[name][0, :, HEAD].exp().reshape(text.shape[1], -1, 1)
    states = states_of(model, text)
    return states - decay * torch.cat([torch.zeros_like(states[:1]), states[:-1]])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_cosines_are_those_of_the_matrices(rule, rank):
    model, sae, tokens = cell((rule, rule), rank=rank)
    table = run(model, sae, tokens).table.set_index("atom")
    writes = encode_cell(model, sae, tokens, LAYER, HEAD)
    found = {"additive": {}, "net": {}}
    for passage in range(len(tokens)):
        net = net_write(model, tokens[passage : passage + 1])
        for t in range(CONFIG.first_position, tokens.shape[1]):
            additive = torch.outer(writes.key[passage, t], writes.value[passage, t])
            for atom, value in zip(writes.codes.indices[passage, t], writes.codes.values[passage, t], strict=True):
                if value > 0:
                    matrix = sae.decoder.matrices()[atom]
                    for form, native in (("additive", additive), ("net", net[t])):
                        cosine = float((matrix * native).sum() / matrix.norm() / native.norm())
                        found[form].setdefault(int(atom), []).append((float(value), cosine))
    assert set(found["additive"]) == set(table.index[table["firings"] > 0])
    for form, by_atom in found.items():
        for atom, firings in by_atom.items():
            row, cosines = table.loc[atom], [cosine for _, cosine in firings]
            assert row["firings"] == len(firings)
            assert row[f"cosine_{form}"] == pytest.approx(np.median(cosines), abs=1e-9)
            top = [abs(cosine) for _, cosine in sorted(firings, reverse=True)[: CONFIG.strongest]]
            assert row[f"strongest_cosine_{form}"] == pytest.approx(np.mean(top), abs=1e-9)
    if rank == 1:
        top = run(model, sae, tokens, PartitionConfig(first_position=2, strongest=1)).table
        top = top[top["alive"]]  # of a single firing the product of both sides' cosines is that of the write
        assert np.allclose(top["strongest_geometric"] ** 2, top["strongest_cosine_additive"])
        assert (top["cosine_key"].abs() <= 1 + 1e-9).all() and (top["cosine_value"].abs() <= 1 + 1e-9).all()


def planted(length=40):
    """Atoms 0..3 are native writes of the cell, at position 20; 4..7 are what they were; 8..11 can never fire."""
    model, sae, tokens = cell(passages=4, length=length, encoder="tied")
    native = encode_cell(model, sae, tokens, LAYER, HEAD)
    with torch.no_grad():
        sae.decoder.normalise_()
        for side, write in (("key", native.key), ("value", native.value)):
            chosen = write[torch.arange(4), 20]
            getattr(sae.decoder, f"{side}_atoms")[:4, 0] = chosen / chosen.norm(dim=1, keepdim=True)
        sae.encoder.bias.zero_()
        sae.encoder.bias[8:] = -1e9
    return model, sae, tokens


def test_planted_atoms_are_alive_and_what_cannot_fire_is_null():
    model, sae, tokens = planted()
    result = run(model, sae, tokens, PartitionConfig(first_position=2, kept_per_atom=1000))
    kept = pd.DataFrame(result.firings).groupby("atom")["cosine_additive"].max()
    assert kept[:4].min() > 1 - 1e-6 > kept[4:].max()
    table = result.table.set_index("atom")
    assert len(table) == 12 and not table.loc[8:, "alive"].any() and (table.loc[8:, "firings"] == 0).all()
    assert table.loc[8:, "cosine_additive"].isna().all()
    for cut in ("mixture", "threshold"):
        labels = result.labels("additive", cut)
        assert (labels[8:] == NULL).all() and set(labels[table["alive"]]) <= {REGISTER, BUNDLE, "one group"}
    threshold = result.labels("additive", "threshold")
    alive = table[table["alive"]]
    assert ((alive["cosine_additive"] > 0.05) == (threshold[alive.index] == REGISTER)).all()
    row = result.summary(n_resamples=20)[0]
    assert row["n_alive"] + row["n_null"] == 12
    assert row["register_at_0.05"] == row["register_threshold"] == (threshold == REGISTER).sum()
    assert row["register_at_0.02"] >= row["register_at_0.1"]
    assert row["gaussian_null"] == pytest.approx(2 / np.pi / np.sqrt(3 * 5))


def test_null_never_meets_its_own_token_and_frequent_is_a_share():
    model, sae, tokens = cell(passages=2, length=30)
    result = run(model, sae, tokens, PartitionConfig(first_position=2, alive="frequent"))
    table, n = result.table, 2 * 28
    assert result.tokens == n
    assert (table["frequency"] == table["firings"] / n).all()
    assert (table["alive"] == (table["firings"] / n >= 0.01)).all()
    kept = result.firings
    assert max(np.unique(kept["atom"], return_counts=True)[1]) <= 10
    assert not np.isclose(kept["cosine_additive"], kept["null_additive"]).any()


def test_a_counter_of_the_training_can_call_atoms_dead():
    model, sae, tokens = cell()
    sae.steps_since_active[:] = torch.arange(12) * 20  # 5 and later were last seen 100 batches ago, or more
    config = PartitionConfig(first_position=2, alive="recent")
    table = run(model, sae, tokens, config).table.set_index("atom")
    assert table["alive_fired"].sum() > table["alive"].sum()
    assert (table["alive"] == (table["alive_fired"] & (table.index < 5))).all()
    sae.steps_since_active[:] = 1000
    with pytest.raises(ValueError, match="no atom is alive by the criterion 'recent'"):
        run(model, sae, tokens, config)


def test_the_result_survives_its_file_and_batching(tmp_path):
    model, sae, tokens = cell(passages=10, length=16)
    told = []
    result = run(model, sae, tokens, on_progress=lambda *progress: told.append(progress))
    assert told[-1] == (140, 140)
    again = PartitionResult.from_json(result.to_json(tmp_path / "result.json"))
    for one, other in zip(again.summary(n_resamples=20), result.summary(n_resamples=20), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == other[name] or value == pytest.approx(other[name], rel=1e-9, nan_ok=True)
    assert result.figure().axes[1].get_ylabel() == "BIC (lower is better)"
    with pytest.raises(KeyError, match="additive, net"):
        result.fits("total")
    with pytest.raises(KeyError, match="mixture and threshold"):
        result.labels(cut="component")


def test_a_dictionary_of_another_seed_is_matched(tmp_path):
    model, sae, tokens = cell()
    twin = WriteSAE.load(sae.save(tmp_path / "sae"))
    other = WriteSAE(sae.config).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    result = run(model, sae, tokens, others=[twin, other])
    shares = {(match["other"], match["atoms"]): match["share"] for match in result.matches}
    assert shares[0, "all"] == shares[0, "alive"] == 1
    assert shares[1, "all"] < 0.5
    assert result.summary(n_resamples=20)[0]["matched_seed_1_all"] == 1


def test_hosts_are_compared_in_pairs():
    results = {}
    for rule in ("gated_delta_net", "mamba2", "rwkv7"):
        model, sae, tokens = cell((rule, rule))
        results[rule] = run(model, sae, tokens)
    table = compare_hosts(results, n_resamples=50)
    assert len(table) == 3 and (table["p_holm"] >= table["p"]).all()
    same = compare_hosts({"one": results["mamba2"], "two": results["mamba2"]}, n_resamples=50)
    assert same.loc[0, "ks"] == 0 and same.loc[0, "p"] == 1
    with pytest.raises(ValueError, match="two partitions or more"):
        compare_hosts({"one": results["mamba2"]})


def test_bad_input_is_refused_before_anything_runs():
    model, sae, tokens = cell()
    with pytest.raises(ValueError, match="need at least 9"):
        run(model, sae, tokens[:, :8], PartitionConfig())
    with pytest.raises(ValueError, match="did you mean 'fired'"):
        PartitionConfig(alive="fire")
    with pytest.raises(IndexError, match="layer 5"):
        partition(model, sae, tokens, layer=5, head=0)
