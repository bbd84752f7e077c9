"""From a name, a folder or a transformers model to a HookedRecurrentModel: find the family, build on meta, fill."""

import json
import os
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hooked_recurrent.config import ModelConfig, check_device
from hooked_recurrent.files import make_folder, sync
from hooked_recurrent.loading import delta_net, gla, kda, kimi, mamba2, qwen, rwkv7, rwkv7_official, world_tokenizer
from hooked_recurrent.loading.checkpoint import (
    Checkpoint,
    FolderCheckpoint,
    MemoryCheckpoint,
    TorchCheckpoint,
    export,
    fill,
    read_mapping,
)
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.zoo.bundled import bundled_models

# A family is a module of one checkpoint layout: MODEL_TYPES it reads, and the RULE that it saves and SAVED_AS what. Where
# READS_MAPPING, it reads config.json itself; where `holds` says no, a later family of the rule may save the model; `ignored`
# names the tensors that it leaves out.
FAMILIES = {
    model_type: family
    for family in (qwen, mamba2, rwkv7, delta_net, gla, kimi, kda)
    for model_type in family.MODEL_TYPES
}
TORCH_FILES = (".pth", ".pt", ".bin")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_pretrained(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> HookedRecurrentModel:
    """Load by the name of a bundled model, a local folder or file, or a hub repository "owner/name".

    The folder is in transformers' layout or, for Mamba-2, in that of state-spaces/mamba; weights are safetensors or, where
    there are none, `pytorch_model.bin`, of which tensors are read and nothing is run. A file is an RWKV-7 checkpoint of
    RWKV-LM (`.pth`, read as carefully, or safetensors). Tensors are read one at a time, so the peak of memory is about one
    copy of the model.

    Raises:
        ValueError: for an unknown name or family, and a checkpoint that does not fit its config.
        FileNotFoundError: for a folder without config or weights.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name must be a bundled model, a folder, a file or a hub name, got {type(name).__name__}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be torch.float32, float64, bfloat16 or float16, got {dtype!r}")
    device = check_device(device)
    file = _find_file(name)
    if file is not None:
        folder, checkpoint, tokenizer = file.parent, _open_file(file), None
        model_type, cfg = rwkv7.SAVED_AS, rwkv7_official.config_from_tensors(checkpoint, str(name))
    else:
        folder = _find_folder(name)
        model_type, cfg = read_config(folder, str(name))
        checkpoint, tokenizer = open_folder(folder), _load_tokenizer(folder)
    model = _build(model_type, cfg, checkpoint, tokenizer, dtype, device)
    if tokenizer is None and cfg.mixer.rule == rwkv7.RULE:
        world_tokenizer.attach(model, folder)
    return model


def open_folder(folder: Path) -> Checkpoint:
    """The weights of a local folder: safetensors where there are any, else `pytorch_model.bin`."""
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file() and not any(folder.glob("model.safetensors*")):
        return TorchCheckpoint(pickled)
    return FolderCheckpoint(folder)


def load_from_hf(hf_model: nn.Module, tokenizer: Any = None) -> HookedRecurrentModel:
    """Convert a transformers model in memory, keeping its dtype and device; the weights are copied."""
    config: Any = getattr(hf_model, "config", None)
    if config is None:
        raise TypeError(f"expected a transformers model, got {type(hf_model).__name__}")
    family, name = _family(config.model_type), config.name_or_path or type(hf_model).__name__
    weight = next(hf_model.parameters())
    checkpoint = MemoryCheckpoint(hf_model.state_dict(), type(hf_model).__name__)
    if getattr(family, "READS_MAPPING", False):
        cfg = family.config_from_mapping(_completed(family, config.to_dict(), lambda: checkpoint), name)
    else:
        cfg = family.config_from_hf(config, name)
    return _build(config.model_type, cfg, checkpoint, tokenizer, weight.dtype, weight.device)


def save_pretrained(model: HookedRecurrentModel, folder: Path) -> Path:
    """Write the model in transformers' layout, each file atomically; returns the folder."""
    fitting = (family for family in FAMILIES.values() if model.cfg.mixer.rule == family.RULE)
    family = next((family for family in fitting if not hasattr(family, "holds") or family.holds(model.cfg)), None)
    if family is None:
        raise ValueError(
            f"transformers has no layout for models of rule {model.cfg.mixer.rule!r}, so it cannot be saved"
        )
    config = family.config_to_hf(model.cfg) | {"dtype": str(model.dtype).removeprefix("torch.")}
    tensors = export(model, family.entries(model.cfg, [], family.SAVED_AS))
    make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        (Path(temporary) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            sync(file)
            os.replace(file, folder / file.name)
    return folder


def read_config(folder: Path, name: str) -> tuple[str, ModelConfig]:
    """The model type of a folder, which names its family, and our config."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no model folder in transformers' layout")
    raw = read_mapping(folder / "config.json", "model config")
    if mamba2.is_original(raw):
        return mamba2.SAVED_AS, mamba2.config_from_original(raw, name)
    family = _family(raw.get("model_type"))
    if getattr(family, "READS_MAPPING", False):
        return raw["model_type"], family.config_from_mapping(_completed(family, raw, lambda: open_folder(folder)), name)
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # Not AutoConfig: once flash-linear-attention is imported, that gives its class, with its defaults, for "mamba2".
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[raw["model_type"]])
    return raw["model_type"], family.config_from_hf(config_class.from_pretrained(folder), name)


def _completed(family: Any, raw: dict[str, Any], checkpoint: Callable[[], Checkpoint]) -> dict[str, Any]:
    """A config with what it leaves to its checkpoint, for a family whose configs do so."""
    return family.complete(raw, checkpoint) if hasattr(family, "complete") else raw


def _build(
    model_type: str,
    cfg: ModelConfig,
    checkpoint: Checkpoint,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str | torch.device,
) -> HookedRecurrentModel:
    family = _family(model_type)
    with torch.device("meta"):
        model = HookedRecurrentModel(cfg, tokenizer)
    names = checkpoint.names()
    tied_copy = "lm_head.weight" if cfg.tied_embeddings else None
    entries = family.entries(cfg, names, model_type)
    fill(
        model,
        entries,
        checkpoint,
        ignored=lambda tensor: tensor == tied_copy or (hasattr(family, "ignored") and family.ignored(tensor)),
        dtype=dtype,
        device=device,
    )
    if tied_copy in names and not torch.equal(checkpoint.take("lm_head.weight").to(model.W_E), model.W_E):
        raise ValueError(f"{checkpoint.origin} says its embeddings are tied, but its lm_head.weight differs from them")
    return model.eval()


def _family(model_type: str | None) -> Any:
    if model_type not in FAMILIES:
        near = get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"model type {model_type!r} is not supported; known are {', '.join(FAMILIES)}{hint}")
    return FAMILIES[model_type]


def _find_file(name: str | Path) -> Path | None:
    """The checkpoint of RWKV-LM that is meant: a file, or a folder's only .pth if it has no config.json."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not str(name) or not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.pth"))
    if len(files) > 1:
        raise ValueError(
            f"{path} has no config.json and several checkpoints: name one of {', '.join(f.name for f in files)}"
        )
    return files[0] if files else None


def _open_file(file: Path) -> Checkpoint:
    if file.suffix == ".safetensors":
        return FolderCheckpoint(file)
    if file.suffix in TORCH_FILES:
        return TorchCheckpoint(file)
    raise ValueError(
        f"{file} is no file of weights that can be loaded; expected RWKV-7's .pth or .safetensors, or a folder"
    )


def looks_local(name: str | Path) -> bool:
    """Whether a name that was not found cannot be meant for the hub, whose names are "owner/name"."""
    local = isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1
    return local or Path(name).suffix in (*TORCH_FILES, ".safetensors")


def unknown_model(name: str | Path) -> ValueError:
    """The error for a name that is nothing known, with the nearest bundled model."""
    bundled = bundled_models()
    near = get_close_matches(str(name), bundled, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(bundled) or "none"
    return ValueError(
        f"{str(name)!r} is neither a folder, nor a hub name 'owner/name', nor a file, nor bundled ({known}){hint}"
    )


def _find_folder(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    bundled = bundled_models()
    if str(name) in bundled:
        return bundled[str(name)]
    if looks_local(name):
        raise unknown_model(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*HUB_FILES, "pytorch_model.bin"]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(
            f"could not fetch {str(name)!r} from the hub ({said}), and there is no folder of that name here"
        ) from error


def _load_tokenizer(folder: Path) -> Any:
    if world_tokenizer.is_world(folder):
        return None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer, PretrainedConfig

    family = FAMILIES.get(read_mapping(folder / "config.json", "model config").get("model_type"))
    # transformers warns of model types that it does not know, though it reads their tokenizers: an empty config has none.
    config = {"config": PretrainedConfig()} if getattr(family, "READS_MAPPING", False) else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **config)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {folder} is code of that folder, which is never run; without tokenizer_config.json the model "
            "loads and takes tokens"
        ) from None
