"""A store gives what the model gives; whatever stops a write loses no finished shard; damage is named."""

import errno
import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

import writesae.stream.store as store_module
from tests.hooked_recurrent.models import HYBRID, tiny_model, tokens_of
from writesae.stream import ActivationStore, ActivationStream, Source
from writesae.stream.sources import collect
from writesae.stream.store import model_fingerprint

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
    assert record["log_decay"].dtype == record["squared_norm"].dtype == torch.float64


def fail_at(monkeypatch, calls, error):
    """Saving fails at the given call."""
    real, count = store_module.save_tensors, [0]

    def failing(*args):
        count[0] += 1
        if count[0] == calls:
            raise error
        return real(*args)

    monkeypatch.setattr(store_module, "save_tensors", failing)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: No space left on device"),  # what safetensors makes of it
    ],
)
def test_a_full_disk_keeps_what_is_there_and_writing_goes_on(tmp_path, monkeypatch, model, tokens, error):
    fail_at(monkeypatch, 2, error)
    with pytest.raises(OSError, match="No space left on device.*1 of 3 shards are there and whole"):
        write(tmp_path / "a", model, tokens)
    half = ActivationStore.open(tmp_path / "a")
    assert half.n_passages == 3 and not half.complete
    assert "not finished: 3 of 7" in half.mismatch(model, tokens, SOURCES)
    with pytest.raises(ValueError, match="holds passages 0..2 of 7, and passage 5"):
        half.records(SOURCES, torch.tensor([5]))
    first = (tmp_path / "a" / "shard-00000.safetensors").stat().st_mtime_ns
    runs = []
    monkeypatch.setattr(store_module, "collect", lambda *args, **kw: runs.append(1) or collect(*args, **kw))
    done = write(tmp_path / "a", model, tokens)
    assert done.complete and len(runs) == 2  # the two shards that were missing
    assert (tmp_path / "a" / "shard-00000.safetensors").stat().st_mtime_ns == first


def test_a_system_that_refuses_a_large_file_is_a_full_disk(tmp_path, model, tokens):
    """Not played: the system itself stops the write in the middle of a shard."""
    resource = pytest.importorskip("resource")
    write(tmp_path / "a", model, tokens[:3])  # how long a shard is
    size = (tmp_path / "a" / "shard-00000.safetensors").stat().st_size
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        with pytest.raises(OSError, match="could not write shard-00000.safetensors .*0 of 3 shards"):
            write(tmp_path / "b", model, tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "b").iterdir()) == []
    assert write(tmp_path / "b", model, tokens).complete


def test_a_kill_between_shard_and_manifest_only_costs_that_shard(tmp_path, monkeypatch, model, tokens):
    real = store_module.write_text
    monkeypatch.setattr(store_module, "write_text", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", model, tokens)
    monkeypatch.setattr(store_module, "write_text", real)
    left = tmp_path / "a" / ".shard-00001.safetensors.abc"  # a kill in the middle of a shard
    left.mkdir()
    assert write(tmp_path / "a", model, tokens).complete
    assert ActivationStore.open(tmp_path / "a").complete and not left.exists()


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


@pytest.mark.parametrize("number", [0, 1, 2])
def test_of_a_damaged_store_only_the_damaged_shard_is_made_again(tmp_path, monkeypatch, model, tokens, number):
    before = write(tmp_path / "a", model, tokens).records(SOURCES, torch.arange(7))
    shard = tmp_path / "a" / f"shard-0000{number}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="makes it again and leaves the others as they are"):
        ActivationStore.open(tmp_path / "a")
    fail_at(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="2 of 3 shards are there and whole"):
        write(tmp_path / "a", model, tokens)
    runs = []
    monkeypatch.setattr(store_module, "collect", lambda *args, **kw: runs.append(1) or collect(*args, **kw))
    after = write(tmp_path / "a", model, tokens).records(SOURCES, torch.arange(7))
    assert len(runs) == 1 and ActivationStore.open(tmp_path / "a").complete
    assert all(torch.equal(after[s][name], tensor) for s, record in before.items() for name, tensor in record.items())


def test_a_finished_store_is_reused(tmp_path, monkeypatch, model, tokens):
    write(tmp_path / "a", model, tokens)
    monkeypatch.setattr(store_module, "collect", None)
    assert write(tmp_path / "a", model, tokens).complete


def test_a_stream_refuses_a_store_of_other_tokens_or_an_unfinished_one(tmp_path, monkeypatch, model, tokens):
    store = write(tmp_path / "a", model, tokens)
    with pytest.raises(ValueError, match="records of other tokens"):
        ActivationStream(store, tokens.flip(0), SOURCES)
    with pytest.raises(ValueError, match="records of other tokens"):
        ActivationStream(store, tokens[:3], SOURCES)
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError):
        write(tmp_path / "b", model, tokens)
    with pytest.raises(ValueError, match="not finished: 3 of 7 passages"):
        ActivationStream(ActivationStore.open(tmp_path / "b"), tokens, SOURCES)


def test_a_stream_narrower_than_its_store_has_the_norms_of_its_own_states(tmp_path, model, tokens):
    store = write(tmp_path / "a", model, tokens)
    batch = ActivationStream(store, tokens, SOURCES, dtype=torch.bfloat16).batch(0)[SOURCES[1]]
    exact = batch.to(dtype=torch.float64)
    torch.testing.assert_close(exact.squared_norms(), exact.matrices().square().sum((1, 2)), rtol=1e-9, atol=1e-9)


def test_a_bad_number_stops_the_writing_and_is_found_at_its_passage(tmp_path, monkeypatch, model, tokens):
    def spoiled(model, rows, sources, **options):
        if options["numbers"].tolist() == [4, 5]:
            with model.hooks([("blocks.2.mixer.hook_write_key", lambda x, hook: x / 0)]):
                return collect(model, rows, sources, **options)
        return collect(model, rows, sources, **options)

    monkeypatch.setattr(store_module, "collect", spoiled)
    with pytest.raises(ValueError, match=r"hook_write_key .*row 0 \(the rows are passages 4, 5\)"):
        write(tmp_path / "a", model, tokens, passages_per_shard=4, passages_per_forward=2)
    assert ActivationStore.open(tmp_path / "a").n_passages == 4


def test_the_fingerprint_tells_models_apart(model):
    assert model_fingerprint(model) == model_fingerprint(tiny_model(HYBRID))
    others = [tiny_model(HYBRID, seed=1), tiny_model(HYBRID, dtype=torch.float32), tiny_model(HYBRID, tied=False)]
    eps = tiny_model(HYBRID)
    eps.cfg = replace(eps.cfg, norm_eps=1e-3)
    named = tiny_model(HYBRID)
    named.cfg = replace(named.cfg, model_name="x")
    prints = [model_fingerprint(one) for one in (model, *others, eps)]
    assert len(set(prints)) == 5 and model_fingerprint(named) == prints[0]


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
