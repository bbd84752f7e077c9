"""The hub, without a network: what would be uploaded loads again, and what goes wrong is one sentence."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from writesae.config import WriteSAEConfig
from writesae.interop.hub import card, fetch, push
from writesae.sae import WriteSAE


class Hub:
    """The four calls that are made of the hub, on a folder per repository and branch."""

    def __init__(self, root):
        self.root, self.private, self.branches, self.log = root, {}, {("me/old", None)}, []

    def create_repo(self, repo_id, *, private, exist_ok, token):
        assert exist_ok
        self.log.append(("create", token))
        self.private.setdefault(repo_id, bool(private))

    def repo_info(self, repo_id, *, token):
        return SimpleNamespace(private=self.private[repo_id])

    def create_branch(self, repo_id, *, branch, exist_ok, token):
        assert exist_ok
        self.branches.add((repo_id, branch))

    def upload_folder(self, *, repo_id, folder_path, revision, token, commit_message):
        assert revision is None or (repo_id, revision) in self.branches
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"), dirs_exist_ok=True)
        self.log.append(("upload", token))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id, *, revision, allow_patterns, token):
        self.log.append(("download", token, tuple(allow_patterns)))
        return str(self.root / repo_id / (revision or "main"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "repo_info", "create_branch", "upload_folder", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


@pytest.fixture
def sae():
    sae = WriteSAE(WriteSAEConfig(d_k=5, d_v=4, n_atoms=9, k=2))
    split = {"split": "train", "seed": 3}
    sae.provenance.update(
        model="owner/model", hook="blocks.1.mixer.hook_write", head=2, split=split, metrics={"fvu": 0.5}
    )
    return sae


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    "where", [{}, {"revision": "half"}, {"subfolder": "l1/h2"}, {"revision": "half", "subfolder": "l1"}]
)
def test_what_is_pushed_loads_again(hub, sae, where):
    assert sae.push_to_hub("me/sae", token="secret", **where) == "https://hub/me/sae/commit/1"
    loaded = WriteSAE.from_pretrained("me/sae", token="secret", **where)
    assert same(sae, loaded) and loaded.provenance == sae.provenance
    folder = hub.root / "me/sae" / where.get("revision", "main") / where.get("subfolder", "")
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "sae.safetensors"]
    assert {call[1] for call in hub.log} == {"secret"} and "secret" not in (folder / "README.md").read_text()
    prefix = f"{where['subfolder']}/" if "subfolder" in where else ""
    assert hub.log[-1][2] == (f"{prefix}config.json", f"{prefix}sae.safetensors")


def test_the_card_says_what_the_provenance_says_and_its_code_runs(hub, sae):
    push(sae, "me/sae", revision="half")
    text = (hub.root / "me/sae/half/README.md").read_text()
    assert text.startswith("---\nlibrary_name: hooked-recurrent\nbase_model: owner/model\n")
    for row in ("| model | `owner/model` |", "| head | `2` |", '| split | `{"split": "train", "seed": 3}` |',
                "| revision | not recorded |", "| layout | `key_first` |"):  # fmt: skip
        assert row in text
    record = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert record["metrics"] == {"fvu": 0.5}
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.strip().splitlines()) == 4
    names = {"x": torch.randn(3, 5, 4)}
    exec(code, names)
    assert names["x_hat"].shape == (3, 5, 4)


def test_a_card_of_vectors_and_of_a_model_without_a_repository():
    sae = WriteSAE(WriteSAEConfig(d_k=6, d_v=1, n_atoms=9, k=2))
    sae.provenance["model"] = "tiny | one\nline"
    text = card(sae, "me/sae", subfolder="a b")
    assert "9 atoms of 1 x 6 (vectors)" in text and "base_model" not in text
    assert "| model | `tiny \\| one line` |" in text and 'from_pretrained("me/sae", subfolder="a b")' in text


def test_a_private_dictionary_is_not_uploaded_to_a_public_repository(hub, sae):
    hub.private["me/old"] = False
    with pytest.raises(ValueError, match="'me/old' exists and is public"):
        sae.push_to_hub("me/old", private=True)
    assert not (hub.root / "me/old").exists()
    hub.private["me/old"] = True
    sae.push_to_hub("me/old", private=True)
    sae.push_to_hub("me/new", private=True)
    assert hub.private["me/new"] is True and (hub.root / "me/new").exists()


def test_a_local_folder_needs_no_hub(tmp_path, monkeypatch, sae):
    sae.save(tmp_path / "deep" / "inner")
    monkeypatch.chdir(tmp_path)
    assert same(WriteSAE.from_pretrained("deep/inner"), sae)
    assert same(WriteSAE.from_pretrained(tmp_path / "deep", subfolder="inner"), sae)
    with pytest.raises(ValueError, match="revision 'v1' belongs to a repository"):
        fetch("deep/inner", revision="v1")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./a/b", "/a/b", "a//b", "https://hub/a/b", "../a", Path("a/b")])
def test_what_is_neither_folder_nor_repository(hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is neither a folder nor a repository of the hub"):
        WriteSAE.from_pretrained(name)
    assert hub.log == []


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_stays_inside(hub, sae, subfolder):
    for call in (lambda: fetch("me/sae", subfolder=subfolder), lambda: push(sae, "me/sae", subfolder=subfolder)):
        with pytest.raises(ValueError, match="must lie inside the repository"):
            call()
    assert hub.log == []


def test_without_a_network_there_is_one_sentence(sae):
    # conftest sets HF_HUB_OFFLINE, which huggingface_hub reads as it is imported
    with pytest.raises(ValueError, match="could not push to 'me/sae': OfflineModeIsEnabled: Cannot reach") as raised:
        sae.push_to_hub("me/sae", token="secret")
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
    with pytest.raises(
        ValueError, match="could not fetch 'me/sae' at revision 'v1' from the hub: LocalEntryNotFound"
    ) as raised:
        WriteSAE.from_pretrained("me/sae", revision="v1")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [HfHubHTTPError, RevisionNotFoundError])
def test_a_refusal_of_the_hub_is_one_sentence(hub, sae, monkeypatch, kind):
    def refuse(*args, **kwargs):
        raise kind("401 Unauthorized\n\nHere is a page of advice.", response=SimpleNamespace(headers={}, request=None))

    for name, call in (("upload_folder", lambda: push(sae, "me/sae")), ("snapshot_download", lambda: fetch("me/sae"))):
        monkeypatch.setattr(huggingface_hub, name, refuse)
        with pytest.raises(ValueError, match=f"'me/sae'.*: {kind.__name__}: 401 Unauthorized$"):
            call()


def test_a_repository_without_a_dictionary_is_named(hub):
    (hub.root / "me/other/main").mkdir(parents=True)
    (hub.root / "me/other/main/config.json").write_text("{}")
    with pytest.raises(ValueError, match="'me/other' holds no saved WriteSAE: it has no sae.safetensors$"):
        WriteSAE.from_pretrained("me/other")
