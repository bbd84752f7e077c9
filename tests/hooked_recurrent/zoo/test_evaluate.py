import json
import lzma
import math
import shutil
import subprocess

import pytest
import torch
import typer
from typer.testing import CliRunner

from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.zoo import corpus, evaluate
from hooked_recurrent.zoo.corpus import SourceFile

FILES = [
    SourceFile("b.py", "import os\n\n\ndef f(x):\n    return os.path.join(x, 'é')\n" * 3),
    SourceFile("a.py", "x = 1\n"),
    SourceFile("c.py", "class A:\n    def g(self):\n        yield from range(10)\n" * 5),
]


def test_bits_are_those_of_one_long_pass(small_model):
    result = evaluate.evaluate(small_model, FILES, window=16, batch=2)
    for file, score in zip(FILES, result.files, strict=True):
        ids = [0, *small_model.tokenizer.encode(file.text, add_special_tokens=False), 0]
        loss = small_model(torch.tensor([ids]), return_type="loss")
        assert score.n_tokens == len(ids) - 1
        assert score.bits == pytest.approx(loss.item() * score.n_tokens / math.log(2), rel=1e-5)
    total = sum(score.bits for score in result.files) / sum(file.n_bytes for file in FILES)
    assert result.bits_per_byte == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("window", "batch"), [(3, 3), (17, 1), (64, 2), (1000, 3)])
def test_windows_and_batches_change_nothing(small_model, window, batch):
    small_model.double()
    expected = evaluate.evaluate(small_model, FILES, window=31, batch=1)
    result = evaluate.evaluate(small_model, FILES, window=window, batch=batch)
    assert result.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
    for life, other in zip(result.half_lives, expected.half_lives, strict=True):
        assert (life.layer, life.head) == (other.layer, other.head)
        assert life.median == pytest.approx(other.median, rel=1e-4)


def test_half_lives_of_known_rates():
    rates = torch.tensor([[-1.0, -4.0], [-2.0, -4.0], [-3.0, -4.0]]) * math.log(2)
    first, second = evaluate.half_lives({5: rates})
    assert (first.layer, first.head, second.head) == (5, 0, 1)
    assert first.median == pytest.approx(1 / 2) and first.of_mean_log_decay == pytest.approx(1 / 2)
    assert first.lower_quartile == pytest.approx(1 / 2.5) and first.upper_quartile == pytest.approx(1 / 1.5)
    assert second.lower_quartile == second.upper_quartile == pytest.approx(1 / 4)


def test_channels_count_like_tokens():
    rates = -torch.rand(7, 2, 5).double()
    flat = rates.transpose(1, 2).flatten(0, 1)
    assert evaluate.half_lives({0: rates}) == evaluate.half_lives({0: flat})


def test_a_head_that_never_forgets_fits_in_json():
    (life,) = evaluate.half_lives({0: torch.zeros(4, 1)})
    assert math.isfinite(life.median) and life.median > 1e8


def test_half_life_is_that_of_the_cached_decay(small_model):
    file = FILES[2]
    result = evaluate.evaluate(small_model, [file])
    tokens = torch.tensor([[0, *small_model.tokenizer.encode(file.text, add_special_tokens=False)]])
    _, cache = small_model.run_with_cache(tokens)
    for life in result.half_lives:
        rates = cache[f"blocks.{life.layer}.mixer.hook_log_decay"][0, :, life.head]
        assert life.median == pytest.approx(math.log(0.5) / rates.double().quantile(0.5).item(), rel=1e-4)


def test_xz_yardsticks(small_model):
    result = evaluate.evaluate(small_model, FILES)
    sizes = [len(lzma.compress(file.text.encode(), preset=9 | lzma.PRESET_EXTREME)) for file in FILES]
    n_bytes = sum(file.n_bytes for file in FILES)
    assert [score.xz_bytes for score in result.files] == sizes
    assert result.xz_bits_per_byte_each_file == pytest.approx(8 * sum(sizes) / n_bytes)
    in_name_order = (FILES[1].text + FILES[0].text + FILES[2].text).encode()
    assert result.xz_bits_per_byte_joined == pytest.approx(8 * evaluate.xz_size(in_name_order) / n_bytes)


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz command here")
def test_xz_size_is_that_of_the_command():
    data = corpus.standard_library("heldout")[0].text.encode()
    made = subprocess.run(["xz", "-9e", "--stdout", "--threads=1"], input=data, capture_output=True, check=True).stdout
    assert evaluate.xz_size(data) == len(made)


def test_command_reads_a_folder_and_writes_json(small_model, tmp_path, monkeypatch):
    small_model.save_pretrained(tmp_path / "small-folder")
    monkeypatch.setattr(corpus, "standard_library", lambda split: FILES if split == "heldout" else [])
    app = typer.Typer()
    app.command()(evaluate.main)
    target = tmp_path / "evaluation.json"
    result = CliRunner().invoke(app, [str(tmp_path / "small-folder"), "--json", str(target)])
    assert result.exit_code == 0, result.output
    written = json.loads(target.read_text())
    assert written["model_name"] == "small-folder" and len(written["half_lives"]) == 4
    assert f"{written['bits_per_byte']:.3f}" in result.output


def test_errors_are_clear(small_model, small_config):
    with pytest.raises(ValueError, match="at least one file"):
        evaluate.evaluate(small_model, [])
    with pytest.raises(ValueError, match="window and batch must be at least 1, got 0 and 8"):
        evaluate.evaluate(small_model, FILES, window=0)
    with pytest.raises(ValueError, match="model with a tokenizer"):
        evaluate.evaluate(HookedRecurrentModel(small_config), FILES)
