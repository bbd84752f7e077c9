"""WriteSAEs on the Hugging Face hub: a repository (or a folder of one) is a saved folder with a card.

    README.md          what the provenance says, and how to load it
    config.json, sae.safetensors      as `WriteSAE.save` writes them

`WriteSAE.push_to_hub` and `WriteSAE.from_pretrained` call `push` and `fetch`.
"""

import json
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from hooked_recurrent.files import write_text
from writesae.sae.storage import HEADER, ORIGIN, TENSORS
from writesae.sae.write_sae import WriteSAE

CARD = "README.md"


def push(
    sae: WriteSAE,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
) -> str:
    """Upload a dictionary with a generated card; the repository and the branch are made where they are missing.

    Args:
        sae: the dictionary.
        repo_id: "owner/name".
        private: whether the repository is private. True also refuses one that exists and is public: nothing is uploaded.
        revision: branch; by default the main one.
        token: by default the one of `hf auth login`.
        subfolder: folder inside the repository, for several dictionaries in one; by default its top.

    Returns:
        The address of the commit.

    Raises:
        ValueError: with one sentence, when the repository's name is none, the hub cannot be reached or refuses, or a private
            repository was asked for and this one is public.
    """
    folder = _subfolder(subfolder)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / folder
        sae.save(place)
        write_text(place / CARD, card(sae, repo_id, subfolder, revision))
        try:
            huggingface_hub.create_repo(repo_id, private=private, exist_ok=True, token=token)
            # The hub leaves the visibility of a repository that exists as it is, whatever was asked.
            public = private and huggingface_hub.repo_info(repo_id, token=token).private is False
            if not public:
                if revision is not None:
                    huggingface_hub.create_branch(repo_id, branch=revision, exist_ok=True, token=token)
                commit = huggingface_hub.upload_folder(
                    repo_id=repo_id,
                    folder_path=scratch,
                    revision=revision,
                    token=token,
                    commit_message=f"Upload a WriteSAE of {sae.config.n_atoms} atoms",
                )
        except (
            Exception
        ) as error:  # its HTTP client, and with it the class of its errors, changed from version to version
            raise ValueError(f"could not push to {repo_id!r}: {_first_sentence(error)}") from error
    if public:
        raise ValueError(f"{repo_id!r} exists and is public, so a private dictionary was not uploaded to it")
    return str(commit.commit_url)


def fetch(
    repo_id_or_folder: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The local folder of a dictionary: a folder of this machine, or the two files of a repository in the hub's cache.

    Args:
        repo_id_or_folder: a local folder, which comes first, or "owner/name".
        subfolder: folder inside it.
        revision: branch, tag or commit of a repository.
        token: for private repositories; by default the one of `hf auth login`.

    Raises:
        ValueError: with one sentence, when it is neither, the hub cannot be reached or refuses, or the repository holds no
            WriteSAE there.
    """
    inside = _subfolder(subfolder)
    local = Path(repo_id_or_folder).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} belongs to a repository of the hub, and {str(local)!r} is a folder"
            )
        return local / inside
    name = str(repo_id_or_folder)
    if isinstance(repo_id_or_folder, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{name!r} is neither a folder nor a repository of the hub, 'owner/name'")
    files = [str(inside / file) for file in (HEADER, TENSORS)]
    try:
        root = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files, token=token)
    except Exception as error:  # as in `push`
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(f"could not fetch {name!r}{at} from the hub: {_first_sentence(error)}") from error
    missing = [file for file in files if not (Path(root) / file).is_file()]
    if missing:
        raise ValueError(f"{name!r} holds no saved WriteSAE: it has no {' and no '.join(missing)}")
    return Path(root) / inside


def card(sae: WriteSAE, repo_id: str, subfolder: str | None = None, revision: str | None = None) -> str:
    """The README.md of a repository: what the dictionary is, what its provenance says, how to load it."""
    config, origin = sae.config, sae.provenance
    answers = {name: meaning for name, meaning in ORIGIN.items() if name != "training"}
    rows = [f"| {name} | {_cell(origin.get(name))} | {meaning} |" for name, meaning in answers.items()]
    model = origin.get("model")
    base = [f"base_model: {model}"] if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) else []
    arguments = [json.dumps(repo_id)]
    arguments += [
        f"{name}={json.dumps(given)}" for name, given in (("subfolder", subfolder), ("revision", revision)) if given
    ]
    rest = {name: value for name, value in origin.items() if name == "training" or name not in ORIGIN}
    size = f"{config.d_k} x {config.d_v}" if config.d_v > 1 else f"1 x {config.d_k} (vectors)"
    lines = [
        "---",
        "library_name: hooked-recurrent",
        *base,
        "tags:",
        "- sparse-autoencoder",
        "- mechanistic-interpretability",
        "- writesae",
        "---",
        "",
        f"# WriteSAE: {config.n_atoms} atoms of {size}",
        "",
        f"Encoder `{config.encoder}`, decoder `{config.decoder}` of rank {config.rank}, activation `{config.activation}`, "
        f"k = {config.k}.",
        "",
        "```python",
        "from writesae import WriteSAE",
        f"sae = WriteSAE.from_pretrained({', '.join(arguments)})",
        f"codes = sae.encode_matrix(x)  # x [..., {config.d_k}, {config.d_v}], key side first",
        "x_hat = sae.decode(codes)",
        "```",
        "",
        "| | | |",
        "|---|---|---|",
        *rows,
        "",
        "Training and everything else on record:",
        "",
        "```json",
        json.dumps(rest, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _cell(answer: Any) -> str:
    if answer is None:
        return "not recorded"
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")


def _subfolder(subfolder: str | None) -> PurePosixPath:
    folder = PurePosixPath(subfolder or "")
    if folder.is_absolute() or ".." in folder.parts:
        raise ValueError(f"subfolder must lie inside the repository, got {subfolder!r}")
    return folder


def _first_sentence(error: Exception) -> str:
    """What the hub says, without its paragraphs of advice."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0]}" if said else type(error).__name__
