"""Records on disk: a folder of safetensors shards and a manifest, made once and read by many runs.

    manifest.json          format_version, model (name, fingerprint), tokens (shape, fingerprint), sources, dtype,
                           passages_per_shard, created, shards (file, passages, bytes)
    shard-00000.safetensors, ...    "{number of the source}.{name}" -> [passage, pos, ...]

Every file is written whole under another name and then renamed, and the manifest only lists shards that are there. So
whatever stops a write, a full disk or a kill, leaves a store that says how far it got; writing again goes on from there, and
makes shards again that were damaged since.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.files import save_tensors, write_text
from writesae.stream.sources import Described, Record, Source, collect, describe, joined, with_terms

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPOTS = 256  # numbers of every weight that go into the fingerprint


def model_fingerprint(model: HookedRecurrentModel) -> str:
    """A hash of the config and of the names, types, shapes and some numbers of all weights.

    Cheap, so not proof against everything: a change to fewer than one in 256 neighbouring numbers of a weight may escape it.
    """
    config = {name: value for name, value in model.cfg.to_dict().items() if name not in ("model_name", "backend")}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        spots = torch.linspace(0, max(len(flat) - 1, 0), min(_SPOTS, len(flat))).long().to(flat.device)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(flat[spots].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokens_fingerprint(tokens: Int[Tensor, "passage pos"]) -> str:
    """A hash of the passages."""
    return hashlib.sha256(tokens.cpu().long().contiguous().numpy().tobytes()).hexdigest()[:16]


class ActivationStore:
    """Records of some passages on disk. `ActivationStore.write` makes one, `ActivationStore.open` reads one."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.sources = tuple(Source.from_dict(entry["source"]) for entry in manifest["sources"])
        self._about = {s: Described(**entry["is"]) for s, entry in zip(self.sources, manifest["sources"], strict=True)}

    def __repr__(self) -> str:
        """One line: how many passages of which sources, and where."""
        sources = ", ".join(str(source.hook) for source in self.sources)
        return f"ActivationStore({self.n_passages:,} passages of {sources} in {str(self.folder)!r})"

    # --- making one --------------------------------------------------------------------------------------------

    @classmethod
    def write(
        cls,
        folder: str | Path,
        model: HookedRecurrentModel,
        tokens: Int[Tensor, "passage pos"],
        sources: Sequence[Source],
        *,
        dtype: str = "float32",
        passages_per_shard: int = 64,
        passages_per_forward: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> "ActivationStore":
        """Run the model over the passages and keep the records of the sources.

        Shards that are there already, of an earlier write of the same, are left as they are: a finished store is reused, one
        that was interrupted goes on, and of a damaged one only the damaged shards are made again.

        Raises:
            ValueError: a folder that holds records of another model, other tokens or sources; an unknown dtype; sources that
                the model does not have.
            OSError: the disk refuses; what had been written stays, and the message says how much that is.
        """
        folder = Path(folder)
        fresh = cls._fresh_manifest(model, tokens, sources, dtype, passages_per_shard)
        store = cls(folder, fresh)
        if (folder / MANIFEST).exists():
            store = cls(folder, _read_manifest(folder))
            if said := store._difference(fresh):
                raise ValueError(f"{str(folder)!r} holds other records ({said}); give another folder")
        for left in folder.glob(".shard-*"):  # of a write that was killed
            shutil.rmtree(left, ignore_errors=True)
        whole = {shard["file"] for shard in store.manifest["shards"] if _damage(folder, shard) is None}
        starts = range(0, len(tokens), passages_per_shard)
        for number, start in enumerate(starts):
            numbers = torch.arange(start, min(start + passages_per_shard, len(tokens)))
            if _shard_name(number) not in whole:
                records = _in_parts(model, tokens, numbers, store.sources, DTYPES[dtype], passages_per_forward)
                store._write_shard(number, numbers, records, len(starts))
            if progress:
                progress(int(numbers[-1]) + 1, len(tokens))
        return store

    @staticmethod
    def _fresh_manifest(
        model: HookedRecurrentModel, tokens: Tensor, sources: Sequence[Source], dtype: str, per_shard: int
    ) -> dict[str, Any]:
        if dtype not in DTYPES:
            raise ValueError(f"dtype of a store must be {', '.join(DTYPES)}, got {dtype!r}")
        if tokens.ndim != 2 or len(tokens) == 0:
            raise ValueError(f"tokens must be [passage, pos] with a passage or more, got shape {tuple(tokens.shape)}")
        if per_shard < 1:
            raise ValueError(f"passages_per_shard must be at least 1, got {per_shard}")
        return {
            "format_version": FORMAT_VERSION,
            "model": {"name": model.cfg.model_name, "fingerprint": model_fingerprint(model)},
            "tokens": {"shape": list(tokens.shape), "fingerprint": tokens_fingerprint(tokens)},
            "sources": [{"source": s.to_dict(), "is": asdict(describe(model, s))} for s in dict.fromkeys(sources)],
            "dtype": dtype,
            "passages_per_shard": per_shard,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "shards": [],
        }

    def _write_shard(self, number: int, numbers: Tensor, records: dict[Source, Record], total: int) -> None:
        name, shards = _shard_name(number), list(self.manifest["shards"])
        tensors = {f"{place}.{part}": t for place, s in enumerate(self.sources) for part, t in records[s].items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / name, tensors, {})
            size = (self.folder / name).stat().st_size
            # in the place of a damaged one, or behind the others
            shards[number : number + 1] = [
                {"file": name, "passages": [int(numbers[0]), int(numbers[-1]) + 1], "bytes": size}
            ]
            write_text(self.folder / MANIFEST, json.dumps({**self.manifest, "shards": shards}, indent=1) + "\n")
        except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
            why = getattr(error, "strerror", None) or str(error)
            done = sum(_damage(self.folder, shard) is None for shard in self.manifest["shards"])
            raise OSError(
                getattr(error, "errno", None),
                f"could not write {name} into {str(self.folder)!r} ({why}); {done} of {total} shards are "
                "there and whole, and writing again goes on from them",
            ) from error
        self.manifest["shards"] = shards

    # --- reading one -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path) -> "ActivationStore":
        """The store in a folder. Raises `ValueError` for a missing or damaged manifest, another version, and shards that are
        missing or truncated."""
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for shard in manifest["shards"]:
            if damage := _damage(folder, shard):
                raise ValueError(
                    f"{str(folder / shard['file'])!r} {damage}; ActivationStore.write with the same model, tokens and sources "
                    "makes it again and leaves the others as they are"
                )
        return cls(folder, manifest)

    @property
    def n_passages(self) -> int:
        """Passages that are there."""
        return self.manifest["shards"][-1]["passages"][1] if self.manifest["shards"] else 0

    @property
    def complete(self) -> bool:
        """Whether all passages are there."""
        return self.n_passages == self.manifest["tokens"]["shape"][0]

    def describe(self, source: Source) -> Described:
        """What a source is; raises `ValueError` for one that is not in the store."""
        if source not in self._about:
            raise ValueError(
                f"{source} is not in {str(self.folder)!r}, which holds {'; '.join(map(str, self.sources))}"
            )
        return self._about[source]

    def records(self, sources: Sequence[Source], passages: Int[Tensor, " passage"]) -> dict[Source, Record]:
        """Records of the chosen passages, in the order given. Raises `ValueError` for what is not there or damaged."""
        for source in sources:
            self.describe(source)
        if len(passages) and not (0 <= int(passages.min()) and int(passages.max()) < self.n_passages):
            here = f"passages 0..{self.n_passages - 1} of {self.manifest['tokens']['shape'][0]}"
            raise ValueError(f"{str(self.folder)!r} holds {here}, and passage {int(passages.max())} was asked for")
        per_shard = self.manifest["passages_per_shard"]
        found: dict[Source, dict[str, list[tuple[Tensor, Tensor]]]] = {source: {} for source in sources}
        for number in torch.unique(passages // per_shard).tolist():
            mine = (passages // per_shard == number).nonzero().squeeze(1)
            for source, record in self._read(number, sources, passages[mine] - number * per_shard).items():
                for name, tensor in record.items():
                    found[source].setdefault(name, []).append((mine, tensor))
        return {
            source: {n: _in_place(parts, len(passages)) for n, parts in found[source].items()} for source in sources
        }

    def _read(self, shard: int, sources: Sequence[Source], rows: Tensor) -> dict[Source, Record]:
        path = self.folder / self.manifest["shards"][shard]["file"]
        records: dict[Source, Record] = {source: {} for source in sources}
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():
                    place, name = key.split(".", 1)
                    if (source := self.sources[int(place)]) in records:
                        part = file.get_slice(key)  # the rest of the shard is not read
                        records[source][name] = torch.cat([part[row : row + 1] for row in rows.tolist()])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is damaged, truncated or gone: {error}") from None
        return records

    # --- finding one -------------------------------------------------------------------------------------------

    def check_tokens(self, tokens: Int[Tensor, "passage pos"]) -> None:
        """Raise `ValueError` unless the records of all of these passages are there."""
        wanted = {"shape": list(tokens.shape), "fingerprint": tokens_fingerprint(tokens)}
        held = self.manifest["tokens"]
        if wanted != held:
            raise ValueError(f"{str(self.folder)!r} holds records of other tokens: {held} there, {wanted} asked for")
        if not self.complete:
            raise ValueError(f"{str(self.folder)!r} is not finished: {self._progress()}; write it again to go on")

    def _progress(self) -> str:
        return f"{self.n_passages} of {self.manifest['tokens']['shape'][0]} passages are there"

    def mismatch(
        self, model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], sources: Sequence[Source]
    ) -> str | None:
        """Why the store cannot serve this model, these tokens and sources, in a few words; None where it can."""
        if not self.complete:
            return f"it is not finished: {self._progress()}"
        if lacking := [str(source) for source in sources if source not in self._about]:
            return f"it lacks {'; '.join(lacking)}"
        wanted = self._fresh_manifest(model, tokens, self.sources, self.manifest["dtype"], 1)
        return self._difference({**wanted, "passages_per_shard": self.manifest["passages_per_shard"]})

    def _difference(self, wanted: dict[str, Any]) -> str | None:
        for name in ("model", "tokens", "sources", "dtype", "passages_per_shard"):
            if self.manifest[name] != wanted[name]:
                return f"other {name}: {self.manifest[name]} there, {wanted[name]} asked for"
        return None

    @staticmethod
    def list(root: str | Path) -> "list[dict[str, Any]]":
        """A row for every store in or below a folder: path, model, sources, passages, of, dtype, bytes, problem."""
        rows = []
        for path in sorted(Path(root).rglob(MANIFEST)):
            row: dict[str, Any] = {"path": str(path.parent)}
            try:
                store = ActivationStore.open(path.parent)
                row |= {"model": store.manifest["model"]["name"], "sources": [str(source) for source in store.sources]}
                row |= {"passages": store.n_passages, "of": store.manifest["tokens"]["shape"][0]}
                row |= {"dtype": store.manifest["dtype"], "problem": None}
                row["bytes"] = sum(shard["bytes"] for shard in store.manifest["shards"])
            except (ValueError, KeyError) as error:
                row["problem"] = str(error)
            rows.append(row)
        return rows


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder; raises `ValueError` when it is missing, damaged or of another version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError:
        raise ValueError(f"no store of activations at {str(folder)!r}: {MANIFEST} is not there") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / MANIFEST)!r} is not the manifest of a store: {error}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{str(folder)!r} has format_version {version!r}; this version reads {FORMAT_VERSION}")
    return manifest


def _damage(folder: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard, as far as its length tells; None where nothing is."""
    path = folder / shard["file"]
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    return None if size == shard["bytes"] else f"has {size} bytes and should have {shard['bytes']}"


def _in_parts(
    model: HookedRecurrentModel,
    tokens: Tensor,
    numbers: Tensor,
    sources: Sequence[Source],
    dtype: torch.dtype,
    passages_per_forward: int,
) -> dict[Source, Record]:
    """Records of these passages on the CPU, a few of them in each forward pass."""
    parts = []
    for some in numbers.split(passages_per_forward):
        found = collect(model, tokens[some.to(tokens.device)], sources, dtype=dtype, numbers=some)
        parts.append({source: {n: tensor.cpu() for n, tensor in record.items()} for source, record in found.items()})
    return {source: joined([part.pop(source) for part in parts]) for source in sources}


def _in_place(parts: "list[tuple[Tensor, Tensor]]", n: int) -> Tensor:
    """Rows from several shards in the order in which they were asked for."""
    tensors = with_terms([tensor for _, tensor in parts])
    whole = tensors[0].new_empty(n, *tensors[0].shape[1:])
    for (places, _), tensor in zip(parts, tensors, strict=True):
        whole[places] = tensor
    return whole
