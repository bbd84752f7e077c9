"""What a dictionary would have put in the place of a state: the memory of a head after a prefix, rebuilt.

    state        the state's own reconstruction: dictionaries of states
    writes       the state that the head would hold if every additive write of the prefix had been its reconstruction, under the
                 decay and the erase that the model computed (the erase meets the rebuilt memory)
    net_writes   the same for dictionaries of net writes, which hold the erase; what remains of the rule is its decay

Codes of writes are those of the native run.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, WriteEdit
from hooked_recurrent.memory.changes import changes
from hooked_recurrent.memory.source import ROLES
from hooked_recurrent.scan.dispatch import scan
from writesae.sae.samples import Factored
from writesae.sae.write_sae import WriteSAE

STATE, WRITES, NET_WRITES = "state", "writes", "net_writes"
Matrix = Float[Tensor, "d_k d_v"]


def splice_kind(sae: WriteSAE) -> str:
    """Which of the three a dictionary can do, by what it was trained on; `ValueError` where that was no memory."""
    hook, form = sae.provenance.get("hook") or "hook_write", sae.provenance.get("form") or "additive"
    if hook.endswith("hook_state"):
        return STATE
    if not hook.endswith("hook_write"):
        raise ValueError(f"the dictionary was trained on {hook}; a splice needs one of states or writes")
    return NET_WRITES if form == "net" else WRITES


def by_head(named: Sequence[tuple[str, WriteSAE]]) -> dict[int, WriteSAE]:
    """Dictionaries, each with a name for messages, by the head that it was trained on.

    Raises `ValueError` for one that does not say its layer and head, for layers that differ, and for two of one head.
    """
    for name, sae in named:
        if not {"layer", "head"} <= sae.provenance.keys():
            raise ValueError(f"the dictionary in {name} does not say which layer and head it was trained on")
    if len({sae.provenance["layer"] for _, sae in named}) > 1:
        told = ", ".join(f"{name} of layer {sae.provenance['layer']}" for name, sae in named)
        raise ValueError(f"the dictionaries must be of one layer, got {told}")
    names: dict[int, str] = {}
    for name, sae in named:
        head = sae.provenance["head"]
        if head in names:
            raise ValueError(f"the dictionaries in {names[head]} and {name} are both of head {head}")
        names[head] = name
    return {sae.provenance["head"]: sae for _, sae in named}


def check_dictionaries(model: HookedRecurrentModel, saes: Mapping[int, WriteSAE], layer: int) -> str:
    """The one kind of all these dictionaries, by head.

    Raises `IndexError` for a layer or head without memory, `ValueError` for no dictionary, kinds that differ, and atoms of
    another shape than the states.
    """
    cfg = model.cfg
    if layer not in cfg.recurrent_layers:
        raise IndexError(f"layer {layer} has no memory: the recurrent layers are {cfg.recurrent_layers}")
    if not saes:
        raise ValueError("a splice needs the dictionary of at least one head")
    for head, sae in saes.items():
        if not 0 <= head < cfg.n_heads:
            raise IndexError(f"head {head} is out of range: the layer has heads 0 to {cfg.n_heads - 1}")
        came, expected = (sae.config.d_k, sae.config.d_v), (cfg.d_k, cfg.d_v)
        if came != expected:
            raise ValueError(
                f"the atoms of head {head} are {came[0]} x {came[1]}, its states {expected[0]} x {expected[1]}"
            )
    kinds = {head: splice_kind(sae) for head, sae in saes.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"head {head} {kind}" for head, kind in kinds.items())
        raise ValueError(f"the dictionaries must be of one kind, got {told}")
    return next(iter(kinds.values()))


def check_throughout(saes: Mapping[int, WriteSAE], kind: str) -> None:
    """Raise `ValueError` unless `write_edits` can make edits of all of them, dictionaries of one kind.

    They need reconstructions of additive writes that are sums of a few outer products; dense or centred ones are not.
    """
    if kind != WRITES:
        raise ValueError(f"throughout replaces additive writes, and this dictionary rebuilds {kind}")
    for sae in saes.values():
        if sae.config.decoder == "dense" or sae.mean is not None:
            what = "a mean" if sae.mean is not None else "dense atoms"
            raise ValueError(
                f"a dictionary with {what} does not rebuild writes from outer products: leave throughout out"
            )


@torch.no_grad()
def native_states(
    model: HookedRecurrentModel, text: Int[Tensor, "one pos"], layer: int, heads: list[int]
) -> Float[Tensor, "head d_k d_v"]:
    """The memory of some heads after the whole text."""
    end = text.shape[1]
    matrix = model.snapshots(text, [end])[end].layers[layer].matrix
    assert matrix is not None  # the layer was checked to be recurrent
    return matrix[0, heads].clone()


@torch.no_grad()
def rebuilt_states(
    model: HookedRecurrentModel,
    saes: Mapping[int, WriteSAE],
    text: Int[Tensor, "one pos"],
    layer: int,
    native: Float[Tensor, "head d_k d_v"],
) -> Float[Tensor, "head d_k d_v"]:
    """What the dictionaries make of the memory after the text; heads in the order of `saes`, as in `native`.

    Writes are taken off one pass over the text and carried by the step loop, since a reconstruction is a matrix.
    """
    kind, heads = check_dictionaries(model, saes, layer), list(saes)
    if kind == STATE:
        return torch.stack([sae(native[place]).to(native) for place, sae in enumerate(saes.values())])
    names = [f"blocks.{layer}.mixer.hook_{role}" for role in ROLES]
    names = [name for name in names if name in model.hook_dict]
    _, cache = model.run_with_cache(text, names_filter=names, return_type=None, stop_at_layer=layer + 1)
    if kind == NET_WRITES:
        net = changes(cache, layer, heads)
        factors, key, value = net.factors(), net.key[0], net.value[0]
    else:
        factors = cache.factors(layer).map(lambda tensor: tensor[:, :, heads])
        key, value = factors.write_key[0, :, :, None], factors.write_value[0, :, :, None]
    writes = []
    for place, sae in enumerate(saes.values()):
        codes = sae.encode_samples(Factored(key[:, place].to(sae.dtype), value[:, place].to(sae.dtype)))
        writes.append(sae.decode(codes))
    _, state = scan(factors, writes=torch.stack(writes, dim=1)[None].to(native), backend="step")
    assert state is not None  # it was not left out
    return state[0].to(native)


@torch.no_grad()
def write_edits(
    model: HookedRecurrentModel, sae: WriteSAE, text: Int[Tensor, "one pos"], layer: int, head: int
) -> list[WriteEdit]:
    """Edits that put a reconstruction in the place of every additive write of the text, while the model reads it.

    Raises `ValueError` for a dictionary whose reconstructions are no sum of a few outer products: a dense or centred one.
    """
    if sae.config.decoder == "dense" or sae.mean is not None:
        what = "a mean" if sae.mean is not None else "dense atoms"
        raise ValueError(
            f"a dictionary with {what} does not rebuild writes from outer products; leave `throughout` out"
        )
    names = [f"blocks.{layer}.mixer.hook_write_{side}" for side in ("key", "value")]
    _, cache = model.run_with_cache(text, names_filter=names, return_type=None, stop_at_layer=layer + 1)
    key, value = (cache[name][0, :, head] for name in names)
    codes = sae.encode(key, value)
    keys = (sae.key_atoms[codes.indices] * codes.values[..., None, None]).flatten(1, 2)
    values = sae.value_atoms[codes.indices].flatten(1, 2)
    here = slice(0, text.shape[1])
    return [
        WriteEdit(
            layer, head, here, "replace" if term == 0 else "add", keys[:, term].to(key), values[:, term].to(value)
        )
        for term in range(keys.shape[1])
    ]
