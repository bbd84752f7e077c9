"""A store gives what the model gives; whatever stops a write loses no finished shard; damage is named."""

import errno
import json

import pytest
import torch

import writesae.stream.store as store_module
from tests.hooked_recurrent.models import HYBRID, tiny_model, tokens_of
from writesae.stream import ActivationStore, ActivationStream, Source
from writesae.stream.sources import collect

SOURCES = [
    Source("blocks.2.mixer.hook_write", 1),
    Source("blocks.2.mixer.hook_state", 0),
    Source("blocks.1.hook_resid_post"),
]


@pytest.fixture
def model():
    return tiny_model(HYBRID)


@pytest.fixture
def tokens(model):
    return tokens_of(model, batch=7, length=9)


def write(folder, model, tokens, sources=SOURCES, **options):
    return ActivationStore.write(
        folder, model, tokens, sources, **{"dtype": "float64", "passages_per_shard": 3, **options}
    )


def test_a_store_gives_what_the_model_gives(tmp_path, model, tokens):
    told = []
    write(tmp_path / "a", model, tokens, progress=lambda done, total: told.append((done, total)))
    store = ActivationStore.open(tmp_path / "a")
    assert store.complete and store.n_passages == 7 and told == [(3, 7), (6, 7), (7, 7)]
    rows = torch.tensor([6, 0, 3, 2])
    live, stored = collect(model, tokens[rows], SOURCES), store.records(SOURCES, rows)
    for source in SOURCES:
        assert set(live[source]) == set(stored[source])
        for name, tensor in live[source].items():
            torch.testing.assert_close(stored[source][name], tensor.to(stored[source][name]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_stream_from_a_store_needs_no_model(tmp_path, model, tokens, cache_bytes):
    store = write(tmp_path / "a", model, tokens)
    options = {"batch_size": 8, "cache_bytes": cache_bytes, "buffer_samples": 24, "dtype": torch.float64}
    for sources in (SOURCES, SOURCES[:1]):  # a store serves any part of what it holds
        live, stored = (ActivationStream(origin, tokens, sources, **options) for origin in (model, store))
        for number in (0, 5):
            for source in sources:
                ours, theirs = live.batch(number)[source].matrices(), stored.batch(number)[source].matrices()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_narrow_stores_keep_decays_and_norms_wide(tmp_path, model, tokens):
    record = write(tmp_path / "a", model, tokens, dtype="bfloat16").records(SOURCES, torch.arange(2))[SOURCES[1]]
    assert record["key"].dtype == torch.bfloat16
    assert record["log_decay"].dtype == torch.float32 and record["squared_norm"].dtype == torch.float64


def fail_at(monkeypatch, calls, error):
    """Saving fails at the given call."""
    real, count = store_module.save_tensors, [0]

    def failing(*args):
        count[0] += 1
        if count[0] == calls:
            raise error
        return real(*args)

    monkeypatch.setattr(store_module, "save_tensors", failing)


def test_a_full_disk_keeps_what_is_there_and_writing_goes_on(tmp_path, monkeypatch, model, tokens):
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device.*1 of 3 shards are there and whole"):
        write(tmp_path / "a", model, tokens)
    half = ActivationStore.open(tmp_path / "a")
    assert half.n_passages == 3 and not half.complete
    assert "not finished: 3 of 7" in half.mismatch(model, tokens, SOURCES)
    with pytest.raises(ValueError, match="holds passages 0..2 of 7, and passage 5"):
        half.records(SOURCES, torch.tensor([5]))
    first = (tmp_path / "a" / "shard-00000.safetensors").stat().st_mtime_ns
    runs = []
    monkeypatch.setattr(store_module, "collect", lambda *args: runs.append(1) or collect(*args))
    done = write(tmp_path / "a", model, tokens)
    assert done.complete and len(runs) == 2  # the two shards that were missing
    assert (tmp_path / "a" / "shard-00000.safetensors").stat().st_mtime_ns == first


def test_a_kill_between_shard_and_manifest_only_costs_that_shard(tmp_path, monkeypatch, model, tokens):
    real = store_module.write_text
    monkeypatch.setattr(store_module, "write_text", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", model, tokens)
    monkeypatch.setattr(store_module, "write_text", real)
    assert write(tmp_path / "a", model, tokens).complete
    assert ActivationStore.open(tmp_path / "a").complete


def test_a_truncated_or_missing_shard_is_named(tmp_path, model, tokens):
    write(tmp_path / "a", model, tokens)
    shard = tmp_path / "a" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' has \d+ bytes and should have \d+"):
        ActivationStore.open(tmp_path / "a")
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors' is missing"):
        ActivationStore.open(tmp_path / "a")
    shard.write_bytes(whole)
    store = ActivationStore.open(tmp_path / "a")
    shard.write_bytes(whole[:100])  # while a run is going on
    with pytest.raises(ValueError, match="damaged, truncated or gone"):
        store.records(SOURCES, torch.tensor([4]))


def test_a_store_is_reused_only_for_what_it_holds(tmp_path, model, tokens):
    store = write(tmp_path / "a", model, tokens)
    assert store.mismatch(model, tokens, SOURCES[1:]) is None
    assert "other model" in store.mismatch(tiny_model(HYBRID, seed=5), tokens, SOURCES)
    assert "other tokens" in store.mismatch(model, tokens.flip(0), SOURCES)
    other = Source("blocks.0.mixer.hook_write", 1)
    assert "lacks blocks.0.mixer.hook_write, head 1" in store.mismatch(model, tokens, [other])
    with pytest.raises(ValueError, match="holds other records .*other tokens"):
        write(tmp_path / "a", model, tokens.flip(0))
    with pytest.raises(ValueError, match="is not in"):
        store.describe(other)


def test_stores_are_listed_with_what_is_wrong_with_them(tmp_path, model, tokens):
    write(tmp_path / "good", model, tokens)
    write(tmp_path / "deep" / "bad", model, tokens)
    manifest = tmp_path / "deep" / "bad" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 9}))
    bad, good = ActivationStore.list(tmp_path)
    assert "format_version 9" in bad["problem"] and good["problem"] is None
    assert good["passages"] == good["of"] == 7 and good["sources"][0] == "blocks.2.mixer.hook_write, head 1"
    assert good["bytes"] == sum(path.stat().st_size for path in (tmp_path / "good").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "word"), [(None, "manifest.json is not there"), ("{", "not the manifest"), ("{}", "not the manifest")]
)
def test_a_folder_that_is_no_store_is_named(tmp_path, text, word):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=word):
        ActivationStore.open(tmp_path)


def test_options_that_make_no_sense_are_refused(tmp_path, model, tokens):
    with pytest.raises(ValueError, match="dtype of a store must be float64, float32, bfloat16, float16, got 'int8'"):
        write(tmp_path / "a", model, tokens, dtype="int8")
    with pytest.raises(ValueError, match="passages_per_shard must be at least 1"):
        write(tmp_path / "a", model, tokens, passages_per_shard=0)
