"""Files of the paper's code: every layout is read, and what is read computes what their formulas say."""

import json
import math
import os

import pytest
import torch
from torch import nn

from writesae.interop import published
from writesae.interop.published import convert, infer_type, load_published
from writesae.sae import WriteSAE

N, FIRST, SECOND, K = 7, 5, 4, 3  # FIRST != SECOND: a wrong axis cannot hide
TYPES = [
    "flat", "rank1", "bilinear", "bilinear_tied", "bilinear_flat", "bilinear_gated", "bilinear_jumprelu"
]  # fmt: skip


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def state_dict(kind, rank=1):
    """Tensors as their code names and shapes them, away from unit norm."""
    factors = lambda: (1.5 * randn(N, rank, FIRST), randn(N, rank, SECOND))  # noqa: E731
    state = {"steps_since_active": torch.arange(N)}
    if kind in ("flat", "rank1"):
        state |= {"encoder.weight": randn(N, FIRST * SECOND), "encoder.bias": randn(N)}
    elif kind != "bilinear_tied":
        state["V_enc"], state["W_enc"] = factors()
    if kind == "bilinear_gated":
        state |= {"b_gate": randn(N) / 10, "b_mag": randn(N), "r_mag": randn(N) / 3}
    elif kind.startswith("bilinear"):
        state["b_enc"] = randn(N)
    if kind == "bilinear_jumprelu":
        state["log_threshold"] = randn(N)
    if kind in ("flat", "bilinear_flat"):
        state |= {"decoder.weight": randn(FIRST * SECOND, N), "decoder.bias": randn(FIRST * SECOND)}
    else:
        names = ("V", "W") if kind == "rank1" else ("V_dec", "W_dec")
        state |= dict(zip(names, factors(), strict=True)) | {"bias": randn(FIRST, SECOND)}
    return state


def config(kind, **fields):
    sizes = {"n_features": N, "d_k": FIRST, "d_v": SECOND, "d_in": FIRST * SECOND, "k": K, "rank": 1}
    return {"sae_type": kind, "layer": 9, "head": 4, "use_batchtopk": False, "seed": 42, **sizes, **fields}


def theirs(kind, state, x):
    """Codes [batch, n] and reconstructions of their states x [batch, first, second], by the formulas of the paper's code."""
    decoder = None
    if "decoder.weight" not in state:
        v, w = (state["V"], state["W"]) if kind == "rank1" else (state["V_dec"], state["W_dec"])
        decoder = torch.einsum("nri,nrj->nij", v, w)
    if kind in ("flat", "rank1"):
        scores = x.flatten(1) @ state["encoder.weight"].T + state["encoder.bias"]
    else:
        v, w = (state["V_dec"], state["W_dec"]) if kind == "bilinear_tied" else (state["V_enc"], state["W_enc"])
        scores = torch.einsum("nri,bij,nrj->bn", v, x, w) + state.get("b_enc", 0)
    if kind == "bilinear_gated":
        gate = torch.sigmoid((scores + state["b_gate"]) / 0.1)
        codes = gate * torch.relu(state["r_mag"].exp() * scores + state["b_mag"])
    elif kind == "bilinear_jumprelu":
        codes = scores * (scores > state["log_threshold"].exp())
    else:
        kept = torch.zeros_like(scores).scatter(1, scores.topk(K).indices, 1.0)
        codes = torch.relu(scores * kept)
    if decoder is None:
        flat = codes @ state["decoder.weight"].T + state["decoder.bias"]
        return codes, flat.view(-1, FIRST, SECOND)
    return codes, torch.einsum("bn,nij->bij", codes, decoder) + state["bias"]


def agree(sae, kind, state, layout="key_first"):
    """Whether a loaded dictionary computes what the formulas say, to 1e-12."""
    x = 2 * randn(30, FIRST, SECOND)
    codes, rebuilt = theirs(kind, state, x)
    assert (codes > 0).any() and (codes == 0).any() or kind == "bilinear_gated"
    ours = sae.encode_matrix(x if layout == "key_first" else x.transpose(1, 2))
    torch.testing.assert_close(ours.dense(N), codes, rtol=1e-12, atol=1e-12)
    decoded = sae.decode(ours)
    torch.testing.assert_close(
        decoded if layout == "key_first" else decoded.transpose(1, 2), rebuilt, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("layout", ["key_first", "value_first"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_computes_what_its_formulas_say(kind, rank, layout, tmp_path):
    file, state = tmp_path / "best.pt", state_dict(kind, rank)
    torch.save(
        {"model_state_dict": state, "config": config(kind, rank=rank), "epoch": 3, "step": 9, "val_mse": 0.5}, file
    )
    sae = load_published(file, layout=layout, model="some/model")
    assert (sae.config.d_k, sae.config.d_v) == ((FIRST, SECOND) if layout == "key_first" else (SECOND, FIRST))
    agree(sae, kind, state, layout)
    assert torch.equal(sae.steps_since_active, state["steps_since_active"])
    origin = sae.provenance
    assert (origin["model"], origin["hook"], origin["head"]) == ("some/model", "blocks.9.mixer.hook_state", 4)
    assert origin["layout"] == "key_first" and origin["training"]["seed"] == 42
    assert origin["published"] == {
        "file": "best.pt", "type": kind, "layout": layout, "epoch": 3, "step": 9, "val_mse": 0.5
    }  # fmt: skip
    agree(WriteSAE.load(convert(file, tmp_path / "ours", layout=layout)), kind, state, layout)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", ["bare", "sae", "sibling", "2-D factors", "sae with config"])
def test_every_layout_of_the_file(kind, form, tmp_path):
    file, state = tmp_path / "sae.pt", state_dict(kind)
    told = {}
    if form == "2-D factors":
        stored = {name: tensor[:, 0] if tensor.ndim == 3 else tensor for name, tensor in state.items()}
        torch.save({"model_state_dict": stored, "config": config(kind)}, file)
    elif form == "sae with config":
        torch.save({"sae": {"model_state_dict": state, "config": config(kind)}}, file)
    elif form == "sibling":
        torch.save({"model_state_dict": state}, file)
        (tmp_path / "config.json").write_text(json.dumps(config(kind)))
    else:
        del state["steps_since_active"]
        torch.save(state if form == "bare" else {"sae": state}, file)
        told = {"k": K, "d_k": FIRST, "d_v": SECOND, "hook": "blocks.1.mixer.hook_write", "head": 2}
    sae = load_published(file, **told)
    agree(sae, kind, state)
    assert sae.provenance["published"]["type"] == kind
    assert sae.provenance["head"] == (told.get("head") or 4)


@pytest.mark.parametrize("kind", TYPES)
def test_the_type_follows_from_the_names(kind):
    assert infer_type(state_dict(kind)) == kind


def test_the_order_of_the_questions():
    assert infer_type(dict.fromkeys(["V_enc", "decoder.weight", "log_threshold"])) == "bilinear_flat"
    assert infer_type(dict.fromkeys(["V_enc", "decoder.weight", "V_dec"])) == "bilinear"
    assert infer_type(dict.fromkeys(["log_threshold", "b_gate", "r_mag", "V_dec"])) == "bilinear_jumprelu"
    assert infer_type(dict.fromkeys(["b_gate", "r_mag", "V_dec"])) == "bilinear_gated"
    assert infer_type(dict.fromkeys(["V_dec", "V", "W"])) == "bilinear_tied"
    assert infer_type(dict.fromkeys(["encoder.weight"])) == "flat"


def test_batch_topk_files_are_topk_for_one_sample_or_take_a_threshold(tmp_path):
    file, state = tmp_path / "sae.pt", state_dict("bilinear")
    torch.save({"model_state_dict": state, "config": config("bilinear", use_batchtopk=True)}, file)
    sae = load_published(file)
    assert sae.config.activation == "topk" and sae.provenance["training"]["use_batchtopk"] is True
    agree(sae, "bilinear", state)
    sae = load_published(file, threshold=0.75)
    assert sae.config.activation == "batch_topk" and sae.config.k == K
    x = 2 * randn(30, FIRST, SECOND)
    scores = torch.einsum("nri,bij,nrj->bn", state["V_enc"], x, state["W_enc"]) + state["b_enc"]
    torch.testing.assert_close(sae.encode_matrix(x).dense(N), scores * (scores > 0.75), rtol=1e-12, atol=1e-12)


def test_what_training_further_needs_is_kept(tmp_path):
    told = {"lambda_sparsity": 1e-5, "bandwidth": 2e-3, "init_threshold": 1e-4}
    torch.save(
        {"model_state_dict": state_dict("bilinear_jumprelu"), "config": config("bilinear_jumprelu", **told)},
        tmp_path / "a",
    )
    ours = load_published(tmp_path / "a").config
    assert (ours.sparsity, ours.bandwidth, ours.init_threshold, ours.k) == (1e-5, 2e-3, 1e-4, N)


def test_atoms_keep_their_norms_and_float32_stays_float32(tmp_path):
    file = tmp_path / "sae.pt"
    state = {name: t.float() if t.is_floating_point() else t for name, t in state_dict("bilinear").items()}
    torch.save({"model_state_dict": state, "config": config("bilinear")}, file)
    sae = load_published(file)
    assert torch.equal(sae.key_atoms, state["V_dec"]) and sae.key_atoms.dtype == torch.float32
    assert float(sae.input_scale) == 1


class Hostile:
    """Unpickling this creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["alone", "state", "config", "sae"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(place, tmp_path):
    file, trap = tmp_path / "best.pt", tmp_path / "it ran"
    content = {"model_state_dict": state_dict("bilinear"), "config": config("bilinear"), "sae": {}}
    if place == "alone":
        content = Hostile(trap)
    elif place == "sae":
        content["sae"] = Hostile(trap)
    else:
        content["model_state_dict" if place == "state" else "config"]["extra"] = Hostile(trap)
    torch.save(content, file)
    with pytest.raises(
        ValueError, match=r"nothing in it was run: it asks for .*mkdir.*'model_state_dict': sae.state_dict"
    ):
        load_published(file)
    assert not trap.exists()
    torch.load(file, weights_only=False)  # the trap is real
    assert trap.exists()


def test_a_pickled_module_is_refused_and_told_how_to_re_save(tmp_path):
    torch.save({"sae": nn.Linear(2, 3)}, tmp_path / "sae.pt")
    with pytest.raises(
        ValueError, match=r"asks for torch.nn.modules.linear.Linear, .*where you trust it, .*torch.save\("
    ):
        load_published(tmp_path / "sae.pt")


@pytest.mark.parametrize("keep", [0, 10, -200])
def test_a_truncated_file_is_refused(keep, tmp_path):
    file = tmp_path / "sae.pt"
    torch.save({"model_state_dict": state_dict("bilinear"), "config": config("bilinear")}, file)
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep >= 0 else len(content) + keep])
    with pytest.raises(ValueError, match="was refused, and nothing in it was run: it is damaged"):
        load_published(file)
    with pytest.raises(FileNotFoundError, match="no weights file at .*absent.pt"):
        load_published(tmp_path / "absent.pt")


def broken(kind, told=None, **tensors):
    state = {**state_dict(kind), **tensors}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    return {"model_state_dict": state, "config": {**config(kind), **(told or {})}}


@pytest.mark.parametrize(
    ("content", "told", "word"),
    [
        (broken("bilinear", b_enc=torch.full((N,), math.nan)), {}, "NaN or infinity in b_enc"),
        (broken("bilinear", b_enc=None), {}, "no dictionary of type 'bilinear': it lacks b_enc$"),
        (broken("bilinear", V=randn(2), b_enc=None), {}, "it lacks b_enc and has V$"),
        (broken("bilinear"), {"sae_type": "bilinear_jumprelu"}, "it lacks log_threshold"),
        (broken("bilinear"), {"sae_type": "bilinaer"}, "did you mean 'bilinear'"),
        (broken("bilinear"), {"layout": "values_first"}, "did you mean 'value_first'"),
        (broken("bilinear", {"rank": 2}), {}, "factors of rank 1, its config says 2"),
        (broken("bilinear", {"d_k": 6}), {}, "has V_enc of width 5 where 6 was told"),
        (broken("bilinear", b_enc=randn(N + 1)), {}, r"becomes encoder.bias has shape \(8,\), .* \(7,\)"),
        (broken("bilinear", {"k": None}), {}, "how many atoms are active at once: give k"),
        (broken("bilinear", {"k": 8}), {}, "k must be at most n_atoms=7"),
        (broken("bilinear"), {"threshold": 0.5}, "for files with use_batchtopk, got 0.5"),
        (broken("bilinear", {"use_batchtopk": True}), {"threshold": math.nan}, "a finite score .* got nan"),
        (broken("flat", {"d_k": None}), {}, "which matrices its 20 numbers are: give d_k and d_v"),
        (broken("flat", {"d_k": 6}), {}, "20 numbers, which are no matrices of 6 x 4"),
        ({"model_state_dict": state_dict("flat"), "config": "flat"}, {}, "a config that is no dict but a str"),
        ({"weights": 3}, {}, "holds no state dict, neither bare nor under"),
        ([1, 2], {}, "holds no state dict"),
    ],
)
def test_what_is_wrong_is_named(content, told, word, tmp_path):
    torch.save(content, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=word):
        load_published(tmp_path / "sae.pt", **told)


def test_a_conversion_may_stay_beside_its_source_but_not_on_its_config(tmp_path):
    file, state = tmp_path / "sae.pt", state_dict("bilinear")
    torch.save({"model_state_dict": state}, file)
    (tmp_path / "config.json").write_text(json.dumps(config("bilinear")))
    with pytest.raises(ValueError, match="not saved over another program's config.json"):
        convert(file, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config("bilinear")
    (tmp_path / "config.json").unlink()
    assert convert(file, tmp_path, k=K) == tmp_path
    again = load_published(file, k=K)
    agree(again, "bilinear", state)
    assert "training" not in again.provenance  # our header is not taken for their config


def test_the_list_of_types_is_that_of_the_presets():
    assert set(published.PRESETS) == set(published._TENSORS) == set(TYPES)
