"""RWKV's World tokenizer: the rwkv package's own ids, from nothing but installed packages; folders run no code."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.loading.world_tokenizer import VOCABULARY_FILE, is_world
from tests.hooked_recurrent.loading.official_rwkv7 import convert, official_tensors

TEXTS = [
    "Hello , world .  It 's  fine,don 't worry !",
    "  def f(x):\r\n\t\treturn x\n\n\n",
    "日本語のテキストと中文 — Ωμέγα, Привет, мир! مرحبا",
    "é ü ñ e\u0301 🙂 👩‍👩‍👧 🇩🇪 \u200b\ufffd",
    "\x00\x01 \x7f\u00a0",
    "",
]
SMALL = [bytes([byte]) for byte in range(256)] + ["né".encode(), b"Hello", b" world"]


@pytest.fixture(scope="module")
def world_file(tmp_path_factory):
    """An official file with World's 65,536 rows."""
    file = tmp_path_factory.mktemp("world") / "model.pth"
    torch.save(official_tensors(d_model=64, n_layers=1, d_vocab=65536, d_mlp=64), file)
    return file


@pytest.fixture(scope="module")
def world(world_file):
    return HookedRecurrentModel.from_pretrained(world_file)


@pytest.fixture(scope="module")
def reference():
    import rwkv
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(Path(rwkv.__file__).with_name(VOCABULARY_FILE)))


def test_the_ids_and_texts_of_the_rwkv_package(world, reference):
    for text in TEXTS:
        ids = reference.encode(text)
        assert world.to_tokens(text).tolist() == [ids], text
        assert world.to_string(ids) == text == reference.decode(ids)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 65530, (500,), generator=generator).tolist()
    assert world.to_string(ids) == reference.decodeBytes(ids).decode("utf-8", errors="replace")


def test_text_goes_into_the_model(world):
    """No BOS token is put in front; the end of a text is token 0; the model reads text and generates it."""
    tokens = world.to_tokens("Hello 世界")
    assert torch.equal(world("Hello 世界"), world(tokens))
    assert world.tokenizer.bos_token_id is None and world.tokenizer.eos_token_id == 0
    assert "".join(world.to_str_tokens("Hello world")) == "Hello world"
    assert world.to_single_token(" the") == world.to_tokens(" the").item()
    with pytest.raises(ValueError, match="prepend_bos=True, but this tokenizer has no BOS token"):
        world.to_tokens("Hello", prepend_bos=True)
    assert world.generate("Hello", max_new_tokens=3, return_type="tokens").shape == (1, 4)


@pytest.mark.parametrize("missing", ["rwkv", "rwkv7_hf.tokenization_rwkv7"])
def test_without_the_packages_the_model_loads_and_says_what_to_install(missing, world_file, monkeypatch, as_users_run):
    monkeypatch.setitem(sys.modules, missing, None)
    model = HookedRecurrentModel.from_pretrained(world_file)
    assert model.tokenizer is None and model(torch.tensor([[5, 6]])).shape == (1, 2, 65536)
    words = r"no tokenizer: RWKV's World tokenizer needs .* pip install 'hooked-recurrent\[rwkv\]'; or pass tokens"
    with pytest.raises(ValueError, match=words):
        model("Hello")


def test_another_vocabulary_gets_no_tokenizer(tmp_path, as_users_run):
    torch.save(official_tensors(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="this model has no tokenizer: pass tokens, or give one"):
        HookedRecurrentModel.from_pretrained(tmp_path / "model.pth")("Hello")


@pytest.fixture
def folder(tmp_path):
    """What rwkv7_hf saves, code and all, with a small vocabulary; every piece of code in it would leave a mark."""
    lines = [f"{i} {text!r} {len(text)}\n" for i, text in enumerate(SMALL, start=1)]
    (tmp_path / "vocabulary.txt").write_text("".join(lines))
    torch.save(official_tensors(d_vocab=260), tmp_path / "model.pth")
    saved = convert(tmp_path / "model.pth", tmp_path / "saved", tmp_path / "vocabulary.txt")
    code = list(saved.glob("*.py"))
    assert {"tokenization_rwkv7.py", "configuration_rwkv7.py", "modeling_rwkv7.py"} <= {file.name for file in code}
    for file in code:
        file.write_text(f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n")
    assert json.loads((saved / "tokenizer_config.json").read_text())["auto_map"]
    return saved


def test_a_folder_of_rwkv7_hf_brings_its_vocabulary_and_runs_nothing(folder, as_users_run):
    model = HookedRecurrentModel.from_pretrained(folder)
    assert model.to_tokens("Hello né!").tolist() == [[258, 33, 257, 34]]
    assert model.to_string([258, 259]) == "Hello world"
    trap = folder.parent / "it ran"
    assert not trap.exists()
    exec((folder / "tokenization_rwkv7.py").read_text(), {"__name__": "trap"})  # the trap is real
    assert trap.exists()


def test_unknown_tokenizer_code_is_refused_and_not_run(folder, as_users_run):
    """A class that only the folder has: an error, no question on the terminal, and the code stays where it is."""
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("RWKV7Tokenizer", "StrangeTokenizer"))
    (folder / VOCABULARY_FILE).unlink()
    with pytest.raises(ValueError, match="the tokenizer of .* is code of that folder, which is never run"):
        HookedRecurrentModel.from_pretrained(folder)
    assert not (folder.parent / "it ran").exists()
    path.unlink()
    assert HookedRecurrentModel.from_pretrained(folder).tokenizer is None


def test_the_tokenizer_is_saved_with_the_model(folder, tmp_path, as_users_run):
    model = HookedRecurrentModel.from_pretrained(folder)
    written = model.save_pretrained(tmp_path / "again")
    assert not list(written.glob("*.py")) and (written / VOCABULARY_FILE).is_file()
    for file in folder.iterdir():
        file.unlink()
    again = HookedRecurrentModel.from_pretrained(written)
    assert again.to_tokens("Hello né!").tolist() == [[258, 33, 257, 34]]
    assert torch.equal(again("Hello né!"), model(torch.tensor([[258, 33, 257, 34]])))


def test_tokenizers_in_transformers_format_are_left_to_transformers(folder):
    assert is_world(folder)
    (folder / VOCABULARY_FILE).unlink()
    assert is_world(folder)  # by the name of its class
    for text in ("{}", "[", '{"tokenizer_class": "GPT2Tokenizer"}'):
        (folder / "tokenizer_config.json").write_text(text)
        assert not is_world(folder)
    (folder / VOCABULARY_FILE).write_text("")
    (folder / "tokenizer.json").write_text("{}")
    assert not is_world(folder)


def test_a_vocabulary_is_read_and_not_evaluated(folder, tmp_path, as_users_run):
    """The rwkv package's own class evaluates every line of the file; the one used here takes literals alone."""
    trap = tmp_path / "evaluated"
    (folder / VOCABULARY_FILE).write_text(f"1 open({str(trap)!r},'w').name.encode() {len(str(trap))}\n")
    with pytest.raises(ValueError, match=f"{VOCABULARY_FILE} is no vocabulary of RWKV's World tokenizer: "):
        HookedRecurrentModel.from_pretrained(folder)
    assert not trap.exists()
