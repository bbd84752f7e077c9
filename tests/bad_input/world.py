"""What the rows of bad input are evaluated in, as a user's own script would: without the checks that tests turn on.

`python tests/bad_input/world.py` reads a JSON list of expressions from standard input and prints what each of them came to: the
classes of its exception, and the message.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path


def recurrent(folder: Path) -> dict:
    """Names for rows about `hooked_recurrent`."""
    import torch

    import hooked_recurrent
    from hooked_recurrent import memory, patching
    from hooked_recurrent.zoo.corpus import standard_library

    names = {**vars(hooked_recurrent), **vars(memory), **vars(patching), "torch": torch, "folder": folder}
    model = hooked_recurrent.HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")
    text = "def main():\n    import os\n"
    tokens = model.to_tokens(text)
    _, cache = model.run_with_cache(text)
    state = model(tokens, return_state=True)[1]
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "junk.safetensors").write_bytes(b"nonsense")
    state.save(folder / "state.safetensors")
    whole = (folder / "state.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    hooked_recurrent.save_edits(folder / "edits.safetensors", [hooked_recurrent.WriteEdit(0, 0, 1, "delete")])
    broken = hooked_recurrent.HookedRecurrentModel.from_pretrained("tiny-gated-deltanet")
    broken.blocks[1].ln1.weight.data[0] = float("nan")
    names |= {"model": model, "broken": broken, "text": text, "tokens": tokens, "cache": cache, "state": state}
    names |= {"key": torch.ones(32), "value": torch.ones(32), "nan": float("nan"), "inf": float("inf")}
    names |= {"last": lambda logits: logits[0, -1, 5], "same": lambda tensor, hook: tensor}
    return names | {"standard_library": standard_library, "hook_q": "blocks.0.mixer.hook_q"}


def dictionaries(folder: Path) -> dict:
    """Names for rows about `writesae`, beside those of `recurrent`."""
    import torch

    import writesae
    from hooked_recurrent.zoo.corpus import SourceFile
    from writesae import evaluate
    from writesae.evaluation.replacing.replacement_cells import find_cells
    from writesae.interop.published import convert
    from writesae.stream.corpus import text_folder
    from writesae.training.plan import RunPlan, read_plan

    def config(**fields):
        return writesae.WriteSAEConfig(**{"d_k": 32, "d_v": 32, "n_atoms": 16, "k": 2, **fields})

    sae = writesae.WriteSAE(config())
    sae.calibrate_(torch.randn(64, 32), torch.randn(64, 32))
    sae.provenance.update(model="tiny-gated-deltanet", hook="blocks.2.mixer.hook_write", layer=2, head=1)
    saved = sae.save(folder / "sae")

    def changed(name, file, change):
        """A copy of the saved dictionary, one file of which is changed."""
        shutil.copytree(saved, folder / name)
        (folder / name / file).write_bytes(change((folder / name / file).read_bytes()))
        return folder / name

    for name in ("texts", "latin", "short"):
        (folder / name).mkdir()
    (folder / "texts" / "a.md").write_text("hello")
    for number in range(30):
        (folder / "latin" / f"{number}.txt").write_bytes(b"\xff\xfe")
        (folder / "short" / f"{number}.txt").write_text("hi")
    (folder / "junk.pt").write_bytes(b"nonsense")
    passages = torch.randint(1, 4000, (4, 40))
    names = {name: getattr(room, name) for room in (writesae, evaluate) for name in room.__all__} | {"sae": sae}
    names |= {"saved": saved, "config": config, "changed": changed, "few": writesae.TrainConfig(steps=2)}
    names |= {"words": passages, "write": "blocks.2.mixer.hook_write", "cell": {"layer": 2, "head": 1}}
    names |= {"SourceFile": SourceFile, "text_folder": text_folder, "find_cells": find_cells, "convert": convert}
    return names | {"RunPlan": RunPlan, "read_plan": read_plan}


def outcome(expression: str, names: dict) -> dict:
    """The classes of what an expression raises, nearest first, and its message; an expression without one says so."""
    try:
        result = eval(expression, names)  # noqa: S307
    except Exception as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
        return {"classes": [kind.__name__ for kind in type(error).__mro__], "message": message}
    return {"classes": [], "message": f"no error, but {type(result).__name__}"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        world = recurrent(Path(place))
        world |= dictionaries(Path(place))
        print(json.dumps([outcome(expression, world) for expression in json.load(sys.stdin)]))
