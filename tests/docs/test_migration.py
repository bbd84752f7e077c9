"""The names of transformer_lens on the migration page are names of transformer_lens; ours are hooks and calls of ours."""

import inspect
import re
from pathlib import Path

import pytest
import transformer_lens
from transformer_lens import ActivationCache, patching

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.models import RULES, tiny_model
from writesae.cli import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
NAME = re.compile(r"`([^`]+)`")


def table(heading: str, number: int = 0) -> list[list[str]]:
    """The rows of a section's table, as cells."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = [lines.strip().splitlines()[2:] for lines in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[number]]


def test_calls_of_transformer_lens_are_there():
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    assert bridge.boot_transformers and transformer_lens.FactoredMatrix
    calls = [name for row in table("transformer_lens") if row[1] == "the same" for name in NAME.findall(row[0])]
    methods = {name.split("(")[0].split("[")[0].removeprefix("cache.") for name in calls}
    assert len(methods) > 10
    for name in methods - {"cache"}:
        owners = (bridge, HookedRecurrentModel) if hasattr(bridge, name) else (ActivationCache, ActivationCache)
        assert hasattr(owners[0], name), name
        assert hasattr(owners[1], name) or name in dir(tiny_model()), name
    assert patching.get_act_patch_resid_pre and patching.get_act_patch_attn_head_out_by_pos
    settings = inspect.signature(bridge.enable_compatibility_mode).parameters
    assert {"fold_ln", "center_unembed"} <= set(settings)


def test_hooks_of_the_bridges_are_there_and_so_are_ours():
    parts = pytest.importorskip("transformer_lens.model_bridge.generalized_components")
    mixers = [parts.gated_delta_net.GatedDeltaNetBridge, parts.ssm2_mixer.SSM2MixerBridge]
    theirs: set[str] = set()
    for mixer in mixers:
        theirs |= set(mixer("mixer").hook_points) if hasattr(mixer, "hook_points") else set()
        theirs |= {name for name, _ in mixer("mixer").named_modules() if name.startswith("hook_")} | set(
            mixer.hook_aliases
        )
    named = [name for row in table("transformer_lens", 1) for name in NAME.findall(row[0]) if name.startswith("hook_")]
    assert len(named) >= 10 and set(named) <= theirs
    ours = {
        name.split(".", 3)[-1] for rule in RULES for name in tiny_model((rule, rule)).hook_dict if ".mixer." in name
    }
    ours = {name.removeprefix("mixer.") for name in ours}
    here = [name for row in table("transformer_lens", 1) for name in NAME.findall(row[1]) if name.startswith("hook_")]
    assert set(here) <= ours


def test_our_side_of_mambalens_is_there():
    model = tiny_model(("mamba2", "mamba2"))
    names = [name for row in table("MambaLens") for name in NAME.findall(row[1]) if "hook_" in name]
    for name in names:
        full = name.replace("{l}", "1") if name.startswith(("blocks", "ln_final")) else f"blocks.1.{name}"
        assert full in model.hook_dict, name


def test_commands_are_commands():
    known = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    named = {name.split()[1] for name in NAME.findall(PAGE) if name.startswith("writesae ")}
    assert len(named) > 5 and named <= known
