"""Records on disk: a folder of safetensors shards and a manifest, made once and read by many runs.

    manifest.json          format_version, model (name, fingerprint), tokens (shape, fingerprint), sources, dtype,
                           passages_per_shard, shards (file, passages, bytes)
    shard-00000.safetensors, ...    "{number of the source}.{name}" -> [passage, pos, ...]

Every file is written whole under another name and then renamed, and the manifest only lists shards that are there. So
whatever stops a write, a full disk or a kill, leaves a store that says how far it got; writing again goes on from there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.files import save_tensors, write_text
from writesae.stream.sources import Described, Record, Source, collect, describe

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WIDE = ("log_decay", "squared_norm")  # small, and what running sums are built on: never narrowed below float32
_SPOTS = 64  # numbers of every weight that go into the fingerprint


def model_fingerprint(model: HookedRecurrentModel) -> str:
    """A hash of the names, shapes and some numbers of all weights: another model, or other weights, give another."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        spots = torch.linspace(0, max(len(flat) - 1, 0), min(_SPOTS, len(flat))).long().to(flat.device)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
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
        """Run the model over the passages and keep the records of the sources; goes on where an earlier write stopped.

        Raises:
            ValueError: a folder that holds records of another model, other tokens or sources; an unknown dtype; sources that
                the model does not have.
            OSError: the disk refuses; what had been written stays, and the message says how much that is.
        """
        folder = Path(folder)
        fresh = cls._fresh_manifest(model, tokens, sources, dtype, passages_per_shard)
        store = cls(folder, fresh)
        if (folder / MANIFEST).exists():
            store = cls.open(folder)
            if said := store._difference(fresh):
                raise ValueError(f"{str(folder)!r} holds other records ({said}); give another folder")
        starts = range(0, len(tokens), passages_per_shard)
        for number, start in enumerate(starts):
            if number >= len(store.manifest["shards"]):
                rows = tokens[start : start + passages_per_shard]
                store._write_shard(
                    number, start, _in_parts(model, rows, store.sources, passages_per_forward), len(starts)
                )
            if progress:
                progress(min(start + passages_per_shard, len(tokens)), len(tokens))
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
            "shards": [],
        }

    def _write_shard(self, number: int, start: int, records: dict[Source, Record], total: int) -> None:
        name, dtype = f"shard-{number:05d}.safetensors", DTYPES[self.manifest["dtype"]]
        tensors = {}
        for place, source in enumerate(self.sources):
            for part, tensor in records[source].items():
                wide = torch.float64 if part == "squared_norm" else torch.float32
                tensors[f"{place}.{part}"] = tensor.to(wide if part in _WIDE and dtype.itemsize < 8 else dtype).cpu()
        count = len(next(iter(tensors.values())))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / name, tensors, {})
            size = (self.folder / name).stat().st_size
            shards = [*self.manifest["shards"], {"file": name, "passages": [start, start + count], "bytes": size}]
            write_text(self.folder / MANIFEST, json.dumps({**self.manifest, "shards": shards}, indent=1) + "\n")
        except OSError as error:
            done = len(self.manifest["shards"])
            raise OSError(
                error.errno,
                f"could not write {name} into {str(self.folder)!r} ({error.strerror or error}); {done} of {total} shards are "
                "there and whole, and writing again goes on from them",
            ) from error
        self.manifest["shards"] = shards

    # --- reading one -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | Path) -> "ActivationStore":
        """The store in a folder. Raises `ValueError` for a missing or damaged manifest, another version, and shards that are
        missing or truncated."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = manifest["format_version"]
        except FileNotFoundError:
            raise ValueError(f"no store of activations at {str(folder)!r}: {MANIFEST} is not there") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(folder / MANIFEST)!r} is not the manifest of a store: {error}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{str(folder)!r} has format_version {version!r}; this version reads {FORMAT_VERSION}")
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                came = "is missing" if size is None else f"has {size} bytes and should have {shard['bytes']}"
                raise ValueError(
                    f"{str(path)!r} {came}; delete {MANIFEST} and write the store again, or restore the shard"
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
                        records[source][name] = file.get_tensor(key)[rows]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is damaged, truncated or gone: {error}") from None
        return records

    # --- finding one -------------------------------------------------------------------------------------------

    def mismatch(
        self, model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], sources: Sequence[Source]
    ) -> str | None:
        """Why the store cannot serve this model, these tokens and sources, in a few words; None where it can."""
        if not self.complete:
            return f"it is not finished: {self.n_passages} of {self.manifest['tokens']['shape'][0]} passages are there"
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


def _in_parts(
    model: HookedRecurrentModel, tokens: Tensor, sources: Sequence[Source], passages_per_forward: int
) -> dict[Source, Record]:
    parts = [collect(model, rows, sources) for rows in tokens.split(passages_per_forward)]
    return {s: {name: torch.cat([part[s][name] for part in parts]) for name in parts[0][s]} for s in sources}


def _in_place(parts: "list[tuple[Tensor, Tensor]]", n: int) -> Tensor:
    """Rows from several shards in the order in which they were asked for."""
    whole = parts[0][1].new_empty(n, *parts[0][1].shape[1:])
    for places, tensor in parts:
        whole[places] = tensor
    return whole
