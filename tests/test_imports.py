"""What an import brings along: the names that a person waits for, and nothing that draws, tests or serves."""

import json
import subprocess
import sys

import pytest

import writesae
from hooked_recurrent import __version__

HEAVY = {
    *("matplotlib", "pandas", "scipy", "sklearn", "statsmodels", "triton", "PIL", "plotly"),
    *("jinja2", "typer", "IPython", "fastapi", "uvicorn", "yaml", "tensorboard", "sae_lens", "rwkv", "fla"),
}


def imported(*statements: str) -> list[set[str]]:
    """Top-level modules after each statement, one after the other in a fresh interpreter."""
    tell = "; told.append(sorted({name.split('.')[0] for name in sys.modules}))"
    code = "import json, sys; told = []\n" + "\n".join(line + tell for line in statements) + "\nprint(json.dumps(told))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout.splitlines()[-1])]


def test_hooked_recurrent_adds_nothing_heavy_to_torch_and_transformer_lens():
    theirs, ours = imported("import torch, transformer_lens", "import hooked_recurrent")
    added = ours - theirs
    assert "hooked_recurrent" in added and added & HEAVY == set()
    # safetensors is how everything is stored; whatever else a new import adds should be thought about, and named here.
    assert added - sys.stdlib_module_names - {"hooked_recurrent", "safetensors"} == set()


def test_help_waits_for_no_torch():
    _, helped, asked = imported(
        "import writesae",
        "import writesae.cli; writesae.cli.app(['--help'], standalone_mode=False)",
        "writesae.TrainConfig",
    )
    assert "typer" in helped and helped & ({"torch", "hooked_recurrent", "numpy"} | HEAVY - {"typer"}) == set()
    assert "torch" in asked  # and a name brings what it needs


def test_every_public_name_of_writesae_is_there():
    for name in writesae.__all__:
        found = getattr(writesae, name)
        assert found.__name__ == name and found.__module__.startswith("writesae.")
    assert set(writesae.__all__) <= set(dir(writesae)) and writesae.__version__ == __version__
    assert set(writesae.__all__) == writesae._HOMES.keys() - {"__version__"}
    with pytest.raises(AttributeError, match="module 'writesae' has no attribute 'WriteSAEs'"):
        _ = writesae.WriteSAEs
