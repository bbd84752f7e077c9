"""Saving and loading: everything survives, damage is named, and a failed save leaves the earlier one as it was."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from writesae.config import WriteSAEConfig
from writesae.sae import WriteSAE, storage


def sae_of(seed=0, **fields):
    sae = WriteSAE(WriteSAEConfig(**{"d_k": 5, "d_v": 4, "n_atoms": 9, "k": 2, "seed": seed, **fields}))
    sae.calibrate_(torch.randn(30, 5), 7 * torch.randn(30, 4) + 1)
    sae.steps_since_active[3] = 17
    sae.provenance.update(model="tiny", hook="blocks.1.mixer.hook_write", head=2, metrics={"fvu": 0.25})
    return sae


@pytest.fixture
def folder(tmp_path):
    return sae_of(center=True).save(tmp_path / "deep" / "sae")


def change(folder, **tensors):
    """Rewrite the tensors file with some tensors changed, added, or (None) taken out."""
    path = folder / storage.TENSORS
    kept = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(kept, path)


@pytest.mark.parametrize("fields", [{}, {"center": True, "rank": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_survives_a_round_trip(tmp_path, fields, dtype):
    sae = sae_of(**fields).to(dtype)
    loaded = WriteSAE.load(sae.save(tmp_path / "sae"))
    assert loaded.config == sae.config and loaded.provenance == sae.provenance
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == tensor.dtype
    key, value = torch.randn(3, 5, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    assert torch.equal(loaded.encode(key, value).values, sae.encode(key, value).values)


def test_the_folder_holds_two_plain_files(folder):
    assert sorted(os.listdir(folder)) == ["config.json", "sae.safetensors"]
    header = json.loads((folder / "config.json").read_text())
    assert header["format_version"] == 2 and header["provenance"]["layout"] == "key_first"
    assert header["config"]["d_k"] == 5 and header["provenance"]["metrics"] == {"fvu": 0.25}


def test_saving_again_replaces_both_files(folder):
    sae_of(seed=5).save(folder)
    assert WriteSAE.load(folder).config.seed == 5
    assert sorted(os.listdir(folder)) == ["config.json", "sae.safetensors"]


@pytest.mark.parametrize("failing", ["save_file", "Path.write_text", "os.fsync"])
def test_a_save_that_fails_leaves_the_earlier_one(folder, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"hooked_recurrent.files.{failing}", full)
        with pytest.raises(OSError, match="No space"):
            sae_of(seed=5).save(folder)
    assert WriteSAE.load(folder).config.seed == 0
    assert sorted(os.listdir(folder)) == ["config.json", "sae.safetensors"]


def test_the_provenance_answers_every_question_if_only_with_null(folder):
    written = json.loads((folder / "config.json").read_text())["provenance"]
    questions = {"model", "revision", "hook", "head", "layout", "form", "split", "training"}
    assert set(storage.ORIGIN) == questions <= set(written)
    assert written["head"] == 2 and written["revision"] is None and written["split"] is None
    assert "revision" not in WriteSAE.load(folder).provenance  # not known is not there, as before the save


def as_version_1(folder):
    """Rewrite a header as the first version wrote it."""
    path = folder / storage.HEADER
    header = json.loads(path.read_text())
    known = ("d_k", "d_v", "n_atoms", "k", "rank", "center", "encoder", "decoder", "activation", "seed")
    header["config"] = {name: header["config"][name] for name in known}
    header["provenance"] = {"model": "tiny", "layer": 1, "head": 2, "layout": "key_first"}
    path.write_text(json.dumps({**header, "format_version": 1}))
    return path


@pytest.mark.parametrize("without", [(), ("encoder", "decoder", "activation")])
def test_version_1_is_read(folder, without):
    expected = WriteSAE.load(folder)
    path = as_version_1(folder)
    header = json.loads(path.read_text())
    for name in without:
        del header["config"][name]
    path.write_text(json.dumps(header))
    config = storage.read_folder(folder)[1]["config"]  # said, not left to today's defaults
    assert (config["encoder"], config["decoder"], config["activation"]) == ("bilinear", "outer_product", "topk")
    loaded = WriteSAE.load(folder)
    assert loaded.config == expected.config
    assert loaded.provenance == {"model": "tiny", "layer": 1, "head": 2, "layout": "key_first"}
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    loaded.save(folder)
    assert json.loads(path.read_text())["format_version"] == 2


@pytest.mark.parametrize("content", ['{"model_type": "mamba2"}', "[1]", "half a {"])
def test_the_config_of_another_program_is_not_overwritten(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="not saved over another program's config.json"):
        sae_of().save(tmp_path)
    assert (tmp_path / "config.json").read_text() == content and os.listdir(tmp_path) == ["config.json"]


def test_what_could_not_be_loaded_is_not_saved(folder):
    broken = sae_of(seed=5)
    broken.encoder.bias.data[2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in encoder.bias"):
        broken.save(folder)
    broken = sae_of(seed=5)
    broken.provenance["layout"] = "value_first"
    with pytest.raises(ValueError, match="'key_first', got 'value_first'"):
        broken.save(folder)
    assert WriteSAE.load(folder).config.seed == 0


def test_halves_of_different_saves_are_noticed(folder, tmp_path):
    other = sae_of(center=True, seed=1).save(tmp_path / "other")
    os.replace(other / storage.TENSORS, folder / storage.TENSORS)
    with pytest.raises(ValueError, match="different saves"):
        WriteSAE.load(folder)


@pytest.mark.parametrize("name", ["config.json", "sae.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}' does not exist"):
        WriteSAE.load(folder)


def test_a_missing_folder_and_a_file_in_its_place_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no saved WriteSAE at"):
        WriteSAE.load(tmp_path / "nowhere")
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        sae_of().save(tmp_path / "taken")


@pytest.mark.parametrize("keep", [0, 5, 100, -8])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / storage.TENSORS
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 0 else len(content) + keep])
    with pytest.raises(ValueError, match="damaged or truncated"):
        WriteSAE.load(folder)


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"decoder.key_atoms": None}, "lacks the tensors decoder.key_atoms"),
        ({"mean": None, "encoder.bias": None}, "lacks the tensors encoder.bias, mean"),
        ({"decoder.extra": torch.zeros(2)}, "that this configuration does not: decoder.extra"),
        ({"decoder.key_atoms": torch.zeros(9, 1, 4)}, r"decoder.key_atoms of shape \(9, 1, 4\).*\(9, 1, 5\)"),
        ({"encoder.bias": torch.full((9,), torch.nan)}, "NaN or infinity in encoder.bias"),
        ({"mean": torch.full((5, 4), torch.inf)}, "NaN or infinity in mean"),
        ({"steps_since_active": torch.zeros(9)}, "steps_since_active of type torch.float32"),
    ],
)
def test_wrong_tensors_are_named(folder, tensors, word):
    change(folder, **tensors)
    with pytest.raises(ValueError, match=word):
        WriteSAE.load(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format_version": 99}, "format_version 99; this version reads 1 and 2"),
        ({"format_version": None}, "format_version None"),
        ({"config": {"d_k": 5, "d_v": 4, "n_atom": 9}}, "did you mean 'n_atoms'"),
        ({"config": {"d_k": 5}}, "d_v"),
        ({"provenance": None}, "no 'provenance'"),
        ({"provenance": {}}, "says nothing of model, revision, hook, head, layout, form, split, training"),
        ({"provenance": {**dict.fromkeys(storage.ORIGIN), "layout": "value_first"}}, "has layout 'value_first'"),
    ],
)
def test_a_wrong_header_is_named(folder, change, word):
    path = folder / storage.HEADER
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=word):
        WriteSAE.load(folder)


@pytest.mark.parametrize(("text", "word"), [("{", "not valid JSON"), ("[]", "no format_version")])
def test_a_header_that_is_none_is_named(folder, text, word):
    (folder / storage.HEADER).write_text(text)
    with pytest.raises(ValueError, match=word):
        WriteSAE.load(folder)


def test_provenance_must_be_json(tmp_path):
    sae = sae_of()
    sae.provenance["tokens"] = torch.zeros(3)
    with pytest.raises(ValueError, match="plain JSON"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
