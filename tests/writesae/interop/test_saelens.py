"""SAELens: the same codes and reconstructions on both sides, our architecture among theirs, their trainer on our models."""

import json
import warnings

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.zoo.corpus import standard_library
from writesae.config import WriteSAEConfig
from writesae.interop import saelens
from writesae.interop.saelens_model import saelens_model
from writesae.sae import WriteSAE

pytestmark = pytest.mark.sae_lens  # run by `make test-sae-lens`, in an environment that has it
N, K = 11, 3
FORMS = [("bilinear", "outer_product"), ("tied", "outer_product"), ("linear", "outer_product"), ("bilinear", "dense")]
ACTIVATIONS = ["topk", "batch_topk", "jumprelu", "gated", "soft_gated"]
SHAPES = [(6, 1), (4, 3)]


def sae_of(
    activation="topk", encoder="linear", decoder="dense", shape=(4, 3), dtype=torch.float64, rank=1, center=True
):
    """A dictionary away from its initial point, in units of its own."""
    fields = {"n_atoms": N, "k": K, "rank": rank, "center": center, "encoder": encoder, "decoder": decoder}
    sae = WriteSAE(WriteSAEConfig(*shape, activation=activation, **fields)).to(dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        sae.input_scale.fill_(0.6)
        if center:
            sae.mean.add_(torch.randn_like(sae.mean))
        if activation == "batch_topk":
            sae.activation.threshold.fill_(0.4)
    sae.provenance.update(model="tiny-gated-deltanet", hook="blocks.1.mixer.hook_write", head=2)
    return sae


def close(ours, theirs):
    limit = 1e-12 if ours.dtype == torch.float64 else 1e-6
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


def agree(sae, lens):
    """Whether both give the same codes and reconstructions of the same inputs."""
    x = 2 * torch.randn(
        2, 20, sae.config.d_k, sae.config.d_v, dtype=sae.mean.dtype if sae.mean is not None else torch.float64
    )
    ours, theirs = sae.encode_matrix(x), lens.encode(x.flatten(2))
    assert theirs.shape == (2, 20, sae.config.n_atoms) and 0 < (theirs > 0).sum()
    close(ours.dense(sae.config.n_atoms), theirs)
    close(sae.decode(ours).flatten(2), lens.decode(theirs))
    close(sae.decode(ours).flatten(2), lens(x.flatten(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[:-1])
def test_flat_dictionaries_go_there_and_back(activation, shape, dtype):
    sae = sae_of(activation, shape=shape, dtype=dtype)
    lens = saelens.to_saelens(sae)
    agree(sae, lens)
    assert lens.cfg.architecture() == {"batch_topk": "jumprelu"}.get(activation, activation)
    assert (lens.cfg.d_in, lens.cfg.d_sae, lens.cfg.apply_b_dec_to_input) == (shape[0] * shape[1], N, False)
    assert (lens.cfg.metadata.hook_name, lens.cfg.metadata.hook_head_index) == ("blocks.1.mixer.hook_write", 2)
    back = saelens.from_saelens(lens)
    agree(back, lens)
    assert (back.config.d_k, back.config.d_v) == shape
    assert {**back.provenance, "sae_lens": None} == {**sae.provenance, "sae_lens": None}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_factors_are_written_out_when_asked(form, rank, center):
    sae = sae_of("topk", *form, rank=rank, center=center)
    with pytest.raises(ValueError, match="densify=True writes them out"):
        saelens.to_saelens(sae)
    lens = saelens.to_saelens(sae, densify=True)
    agree(sae, lens)
    if form[1] == "outer_product":
        close(lens.W_dec[4], sae.atom(4).AB.flatten())


def test_what_saelens_does_not_have_is_named():
    with pytest.raises(ValueError, match="SAELens has no 'soft_gated' activation"):
        saelens.to_saelens(sae_of("soft_gated"), densify=True)


def lens_sae(architecture, training=False, **fields):
    """One of SAELens's own SAEs with random weights."""
    import sae_lens

    name = {"topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated", "standard": "Standard", "batchtopk": "BatchTopK"}
    word = f"{name[architecture]}{'Training' * training}SAE"
    sizes = {"d_in": 12, "d_sae": N, "dtype": "float64", **({"k": K} if "topk" in architecture else {})}
    lens = getattr(sae_lens, word)(getattr(sae_lens, f"{word}Config")(**sizes, **fields))
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return lens


@pytest.mark.parametrize("bias_first", [True, False])
@pytest.mark.parametrize("shape", [{}, {"d_k": 4, "d_v": 3}, {"d_v": 2}])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "standard"])
def test_their_dictionaries_become_ours(architecture, shape, bias_first):
    lens = lens_sae(architecture, apply_b_dec_to_input=bias_first)
    sae = saelens.from_saelens(lens, **shape)
    assert (sae.config.d_k, sae.config.d_v) == {0: (12, 1), 1: (6, 2), 2: (4, 3)}[len(shape)]
    agree(sae, lens)
    assert sae.provenance["sae_lens"]["architecture"] == architecture
    agree(sae, saelens.to_saelens(sae))


@pytest.mark.parametrize("training", [True, False])
def test_scores_measured_by_the_decoder_are_folded(training):
    lens = lens_sae("topk", training, rescale_acts_by_decoder_norm=True)
    sae = saelens.from_saelens(lens)
    agree(sae, lens)
    close(sae.decoder.atoms.flatten(1).norm(dim=1), torch.ones(N, dtype=torch.float64))


def test_a_batchtopk_in_training_has_its_threshold(tmp_path):
    import sae_lens

    lens = lens_sae("batchtopk", training=True)
    lens.topk_threshold.fill_(0.8)
    sae = saelens.from_saelens(lens)
    assert (sae.config.activation, sae.config.k) == ("batch_topk", K)
    lens.save_inference_model(tmp_path)  # which is how SAELens uses it: as a jumprelu
    agree(sae, sae_lens.SAE.load_from_disk(tmp_path))


def test_what_has_no_counterpart_is_named():
    lens = lens_sae("topk")
    lens.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="normalises its inputs .layer_norm., which no WriteSAE does"):
        saelens.from_saelens(lens)
    with pytest.raises(ValueError, match="must multiply to d_in=12, got 5 and 2"):
        saelens.from_saelens(lens_sae("topk"), d_k=5, d_v=2)
    import sae_lens

    config = sae_lens.MatchingPursuitSAEConfig(d_in=12, d_sae=N)
    with pytest.raises(ValueError, match="architecture 'matching_pursuit' has no counterpart"):
        saelens.from_saelens(sae_lens.MatchingPursuitSAE(config))


def test_an_exported_dictionary_is_loaded_by_saelens(tmp_path):
    import sae_lens

    sae = sae_of("jumprelu")
    saelens.to_saelens(sae).save_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    agree(sae, loaded)
    assert saelens.from_saelens(loaded).config.d_v == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [*FORMS, ("linear", "dense")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saelens_reads_our_architecture_with_its_factors(activation, form, dtype, tmp_path):
    import sae_lens

    sae = sae_of(activation, *form, rank=2 if "outer" in form[1] else 1, dtype=dtype)
    sae.steps_since_active[3] = 17
    folder = saelens.save_for_saelens(sae, tmp_path / "lens")
    loaded = sae_lens.SAE.load_from_disk(folder)
    agree(sae, loaded)
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "writesae"
    assert loaded.get_W_dec_norm().shape == (N,) and loaded.W_enc.shape == (12, N)
    close(loaded.get_W_dec_norm(), sae.decoder.norms())
    assert loaded.dictionary.steps_since_active.dtype == torch.int64  # SAELens reads everything as floats
    back = saelens.from_saelens(loaded)
    assert back.config == sae.config and back.provenance == sae.provenance
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor) and back.state_dict()[name].dtype == tensor.dtype


def test_our_architecture_has_saelens_hooks_and_gradients(tmp_path):
    import sae_lens

    sae = sae_of("topk", "bilinear", "outer_product")
    lens = sae_lens.SAE.load_from_disk(saelens.save_for_saelens(sae, tmp_path))
    x = torch.randn(5, 12, dtype=torch.float64)
    out, cache = lens.run_with_cache(x)
    assert set(cache) == {f"hook_sae_{name}" for name in ("input", "acts_pre", "acts_post", "recons", "output")}
    close(cache["hook_sae_acts_post"], lens.encode(x))
    only = torch.nn.functional.one_hot(torch.tensor([4] * 5), N).to(x)
    edited = lens.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: only)])
    close(edited - lens.b_dec, sae.atom(4).AB.flatten().expand(5, -1))
    acts = torch.zeros(1, N, dtype=torch.float64, requires_grad=True)
    lens.decode(acts)[0, 7].backward()
    close(acts.grad[0], lens.W_dec[:, 7])
    with pytest.raises(NotImplementedError, match="keep their norms"):
        lens.fold_W_dec_norm()
    for fold in (
        lambda: lens.fold_activation_norm_scaling_factor(2.0),
        lambda: lens.fold_activation_whitening(x, x, x),
    ):
        with pytest.raises(NotImplementedError):
            fold()


@pytest.fixture(scope="module")
def model():
    return HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")


@pytest.fixture(scope="module")
def text():
    from datasets import Dataset

    return Dataset.from_dict({"text": [file.text for file in standard_library("train")[:60]]})


def train(model, text, folder, steps, **fields):
    """SAELens's own runner on one of our models; the trained SAE and how well it rebuilds what it was trained on."""
    import sae_lens

    sae = sae_lens.TopKTrainingSAEConfig(d_in=fields.pop("d_in"), d_sae=128, k=8)
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae, model_name="tiny-gated-deltanet", is_dataset_tokenized=False, streaming=False, context_size=64,
        training_tokens=256 * steps, train_batch_size_tokens=256, store_batch_size_prompts=8, n_batches_in_buffer=8,
        lr=5e-3, logger=sae_lens.LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=str(folder),
        verbose=False, **fields,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=text, override_model=model)
        return runner.run(), runner


def explained(sae, x):
    rest = x - sae.decode(sae.encode_matrix(x[..., None]))[..., 0]
    return 1 - float(rest.square().sum() / (x - x.mean(0)).square().sum())


def test_saelens_trains_on_our_model_by_hook_name(model, text, tmp_path):
    import sae_lens

    hook = "blocks.1.mixer.hook_write_value"
    trained, runner = train(model, text, tmp_path, 300, hook_name=hook, hook_head_index=2, d_in=32)
    sae = saelens.from_saelens(trained)
    origin = sae.provenance
    assert (origin["model"], origin["hook"], origin["head"]) == ("tiny-gated-deltanet", hook, 2)
    assert (sae.config.d_k, sae.config.d_v, sae.config.k) == (32, 1, 8)
    tokens = model.to_tokens(standard_library("heldout")[0].text)[:, :512]
    x = model.run_with_cache(tokens, names_filter=[hook])[1][hook][0, 1:, 2].detach()
    close_enough = {"rtol": 1e-4, "atol": 1e-4}  # their float32 and ours, sums of 32
    torch.testing.assert_close(sae.encode_matrix(x[..., None]).dense(128), trained.encode(x), **close_enough)
    assert explained(sae, x) > 0.5
    saved = sae.save(tmp_path / "ours")
    lens = saelens.to_saelens(WriteSAE.load(saved))
    torch.testing.assert_close(lens(x), trained(x), **close_enough)
    torch.testing.assert_close(lens(x), sae_lens.SAE.load_from_disk(tmp_path)(x), **close_enough)


def test_saelens_trains_on_matrices_and_evaluates_through_a_view(model, text, tmp_path):
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    hook = "blocks.1.mixer.hook_write"
    view = saelens_model(model, hook, 2)
    trained, runner = train(view, text, tmp_path, 60, hook_name=hook, d_in=32 * 32)
    sae = saelens.from_saelens(trained, d_k=32, d_v=32)
    dense = saelens.save_for_saelens(sae, tmp_path / "ours")
    import sae_lens

    factored = sae_lens.SAE.load_from_disk(dense)
    factored.cfg.metadata.hook_name = hook
    settings = {"compute_kl": True, "compute_ce_loss": True, "compute_variance_metrics": True}
    config = EvalConfig(
        batch_size_prompts=2, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1,
        compute_l2_norms=True, compute_sparsity_metrics=True, **settings,
    )  # fmt: skip
    runner.activations_store.iterable_sequences = runner.activations_store._iterate_tokenized_sequences()
    metrics, _ = run_evals(factored, runner.activations_store, view, ActivationScaler(), config)
    assert metrics["sparsity"]["l0"] <= 8
    kept = metrics["model_behavior_preservation"]
    assert 0 < kept["kl_div_with_sae"] < kept["kl_div_with_ablation"]  # the reconstruction really went into the head
