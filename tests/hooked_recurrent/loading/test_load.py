"""from_pretrained, from_hf and save_pretrained: names, folders, shards, dtypes, and one copy of the weights in memory."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.loading import load
from hooked_recurrent.loading.checkpoint import FolderCheckpoint
from tests.hooked_recurrent.loading.official import MODELS, logits_of, qwen3_5, text_model, tokens_of
from tests.hooked_recurrent.models import HYBRID, distance, tiny_model
from tests.hooked_recurrent.models import tokens_of as our_tokens

BOUND = 1e-5


def saved(folder, kind="text", layers="hybrid", **options):
    """A folder that the official class wrote, and the model that wrote it."""
    theirs = MODELS[kind](layers=layers, initializer_range=0.1, **options.pop("sizes", {}))
    theirs.save_pretrained(folder, **options)
    return theirs


def rewrite(folder, change):
    """Load the tensors of a folder, let `change` alter the dictionary, write them back."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_folder_gives_the_logits_of_its_model(tmp_path, kind, tied):
    theirs = saved(tmp_path, kind, sizes={"tie_word_embeddings": tied})
    ours = HookedRecurrentModel.from_pretrained(tmp_path)
    tokens = tokens_of(3, 30)
    assert distance(ours(tokens), logits_of(theirs, tokens)) <= BOUND
    assert ours.cfg.tied_embeddings == tied == ("unembed.weight" not in ours.state_dict())
    assert ours.cfg.model_name == str(tmp_path) and not ours.training
    assert torch.equal(HookedRecurrentModel.from_pretrained(str(tmp_path))(tokens), ours(tokens))


@pytest.mark.parametrize("kind", MODELS)
def test_shards(tmp_path, kind):
    theirs = saved(tmp_path, kind, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    ours = HookedRecurrentModel.from_pretrained(tmp_path)
    tokens = tokens_of(3, 30)
    assert distance(ours(tokens), logits_of(theirs, tokens)) <= BOUND


def test_attention_with_biases(tmp_path):
    theirs = text_model(layers="hybrid", initializer_range=0.1, attention_bias=True)
    for name, weight in theirs.named_parameters():
        if name.endswith("proj.bias"):
            weight.normal_()
    theirs.save_pretrained(tmp_path)
    ours = HookedRecurrentModel.from_pretrained(tmp_path)
    assert ours.cfg.attention.bias
    tokens = tokens_of(3, 30)
    assert distance(ours(tokens), logits_of(theirs, tokens)) <= BOUND


def test_the_vision_tower_and_the_prediction_head_are_left_out(tmp_path):
    saved(tmp_path, "multimodal")
    before = HookedRecurrentModel.from_pretrained(tmp_path)
    assert any(name.startswith("model.visual.") for name in load_file(tmp_path / "model.safetensors"))
    rewrite(tmp_path, lambda tensors: tensors.update({"mtp.layers.0.weight": torch.full((2, 2), torch.nan)}))
    after = HookedRecurrentModel.from_pretrained(tmp_path)
    assert after.parameter_count() == before.parameter_count()


def test_a_tied_head_may_be_written_out_all_the_same(tmp_path):
    saved(tmp_path, sizes={"tie_word_embeddings": True})
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    for dtype in (torch.float32, torch.bfloat16):
        assert "unembed.weight" not in HookedRecurrentModel.from_pretrained(tmp_path, dtype=dtype).state_dict()
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding] + 1}))
    with pytest.raises(ValueError, match="embeddings are tied, but its lm_head.weight differs"):
        HookedRecurrentModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(tmp_path, dtype):
    theirs = saved(tmp_path)
    ours = HookedRecurrentModel.from_pretrained(tmp_path, dtype=dtype)
    assert {weight.dtype for weight in ours.parameters()} == {dtype} == {ours.dtype}
    tokens = tokens_of(3, 30)
    bound = 0.03 if dtype == torch.bfloat16 else BOUND
    assert distance(ours(tokens).double(), logits_of(theirs, tokens).double()) <= bound
    if dtype == torch.bfloat16:
        theirs = qwen3_5.Qwen3_5ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert distance(ours(tokens).float(), logits_of(theirs, tokens).float()) <= bound
        again = HookedRecurrentModel.from_hf(theirs)
        assert again.dtype == dtype and torch.equal(again(tokens), ours(tokens))


def test_a_bfloat16_file_is_read_exactly(tmp_path):
    theirs = text_model(initializer_range=0.1).bfloat16()
    theirs.save_pretrained(tmp_path)
    wide = HookedRecurrentModel.from_pretrained(tmp_path)
    assert wide.dtype == torch.float32
    tokens = tokens_of(3, 30)
    assert distance(wide(tokens), logits_of(theirs.float(), tokens)) <= BOUND


def test_device(tmp_path):
    saved(tmp_path)
    assert HookedRecurrentModel.from_pretrained(tmp_path, device="cpu").device == torch.device("cpu")


def test_training_a_copy_leaves_the_source_alone():
    theirs = text_model(tie_word_embeddings=True)
    kept = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = HookedRecurrentModel.from_hf(theirs)
    pointers = {tensor.data_ptr() for tensor in theirs.state_dict().values()}
    assert not pointers & {weight.data_ptr() for weight in ours.parameters()}
    ours.train()
    loss = ours(tokens_of(2, 12), return_type="loss")
    loss.backward()
    with torch.no_grad():
        for weight in ours.parameters():
            assert weight.requires_grad and weight.is_contiguous()
            weight -= weight.grad
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_training_a_loaded_model_leaves_the_file_alone(tmp_path):
    saved(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    ours = HookedRecurrentModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert HookedRecurrentModel.from_pretrained(tmp_path).W_E.abs().max() > 0


def test_tokenizer_goes_along():
    tokenizer = object()
    assert HookedRecurrentModel.from_hf(text_model(), tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        HookedRecurrentModel.from_hf(torch.nn.Linear(2, 2))


class Spy(FolderCheckpoint):
    """Notes how many tensors it handed out are still alive, and as whose, whenever it hands out another."""

    def __init__(self, folder):
        super().__init__(folder)
        self.given, self.alive = [], []

    def take(self, name):
        self.alive.append(sum(reference() is not None for _, reference in self.given))
        tensor = super().take(name)
        self.given.append((name, weakref.ref(tensor)))
        return tensor


@pytest.fixture
def spies(monkeypatch):
    made = []

    def make(folder):
        made.append(Spy(folder))
        return made[-1]

    monkeypatch.setattr(load, "FolderCheckpoint", make)
    return made


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_tensors_are_read_one_at_a_time(tmp_path, spies, kind, options):
    """Each once, and none is held while the next is read: beside the model, one tensor is in memory."""
    saved(tmp_path, kind, **options)
    model = HookedRecurrentModel.from_pretrained(tmp_path, dtype=torch.float64)  # another dtype: nothing can be shared
    (spy,) = spies
    names = [name for name, _ in spy.given]
    assert len(names) == len(set(names)) > 30
    assert not any(name.startswith("model.visual.") for name in names)
    assert max(spy.alive) <= 1
    assert not any(weight.is_meta for weight in model.parameters())


def test_weights_of_the_files_own_dtype_are_not_copied(tmp_path, spies):
    saved(tmp_path)
    model = HookedRecurrentModel.from_pretrained(tmp_path)
    own = {weight.data_ptr() for weight in model.parameters()}
    (spy,) = spies
    for name, reference in spy.given:
        tensor = reference()
        assert tensor is None or tensor.data_ptr() in own, name
    # and a part of a larger tensor does not keep the whole alive
    for name, weight in model.named_parameters():
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size(), name


def test_a_misfit_is_found_before_anything_is_read(tmp_path, spies):
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="'extra'"):
        HookedRecurrentModel.from_pretrained(tmp_path)
    assert spies[0].given == []


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layers", ["linear", "hybrid"])
def test_what_we_save_transformers_loads(tmp_path, kind, tied, layers):
    """From every family into the one layout that is written, qwen3_5_text, and back by either library."""
    source = MODELS[kind](layers=layers, initializer_range=0.1, tie_word_embeddings=tied)
    ours = HookedRecurrentModel.from_hf(source)
    assert ours.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    theirs, report = qwen3_5.Qwen3_5ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = tokens_of(3, 30)
    assert distance(logits_of(theirs, tokens), logits_of(source, tokens)) <= BOUND
    again = HookedRecurrentModel.from_pretrained(folder)
    assert torch.equal(again(tokens), ours(tokens))
    for name, weight in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_our_own_models_survive_saving(tmp_path, dtype):
    """A model made here, in which every weight counts, with sizes whose rotary share is no finite binary fraction."""
    model = tiny_model(HYBRID, seed=3, dtype=dtype, tied=False).requires_grad_(False)
    model.save_pretrained(tmp_path)
    again = HookedRecurrentModel.from_pretrained(tmp_path, dtype=dtype)
    assert again.cfg.to_dict() | {"model_name": ""} == model.cfg.to_dict() | {"model_name": ""}
    tokens = our_tokens(model)
    assert torch.equal(again(tokens), model(tokens))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    edits = [WriteEdit(0, 1, 4, "delete")]
    assert torch.equal(again(tokens, edits=edits), model(tokens, edits=edits))


def test_saving_over_a_model_replaces_it(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    other = tiny_model(seed=2, dtype=torch.float32)
    other.save_pretrained(tmp_path)
    assert torch.equal(HookedRecurrentModel.from_pretrained(tmp_path).W_E, other.W_E)


def test_saving_into_the_folder_that_was_loaded(tmp_path):
    """The weights in memory may be backed by the very file that is being replaced."""
    saved(tmp_path)
    model = HookedRecurrentModel.from_pretrained(tmp_path).requires_grad_(False)
    tokens = tokens_of(2, 9)
    expected = model(tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(HookedRecurrentModel.from_pretrained(tmp_path)(tokens), expected)


def test_shards_of_an_older_model_do_not_win_over_what_is_saved(tmp_path):
    saved(tmp_path, max_shard_size="20KB")
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert torch.equal(HookedRecurrentModel.from_pretrained(tmp_path).W_E, model.W_E)
