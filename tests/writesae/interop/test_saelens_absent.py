"""Without SAELens every way to it says how to install it."""

import sys

import pytest

from writesae.config import WriteSAEConfig
from writesae.interop import saelens
from writesae.sae import WriteSAE


def test_the_way_to_install_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    sae = WriteSAE(WriteSAEConfig(4, 3, n_atoms=5, k=2))
    for call in (
        lambda: saelens.to_saelens(sae, densify=True),
        lambda: saelens.from_saelens(object()),
        lambda: saelens.save_for_saelens(sae, tmp_path / "lens"),
        saelens.register,
    ):
        with pytest.raises(ImportError, match=r"pip install 'hooked-recurrent\[sae-lens\]'"):
            call()
    assert not (tmp_path / "lens").exists()
