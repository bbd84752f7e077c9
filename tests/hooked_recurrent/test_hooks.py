"""Hook points: what counts as reading, what counts as editing, and what a function may return."""

from functools import partial

import pytest
import torch

from hooked_recurrent import reads_only
from hooked_recurrent.hooks import Clock, RecurrentHookPoint, promises_to_read
from tests.hooked_recurrent.models import HYBRID, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule


def point_with(*functions, dir="fwd"):
    point = RecurrentHookPoint()
    point.clock = Clock()
    point.clock.positions = torch.tensor([3, 4])
    for function in functions:
        point.add_hook(function, dir=dir)
    return point


def nothing(tensor, hook):
    return None


@reads_only
def watch(tensor, hook, log=None):
    return None


def test_reads_only_is_seen_through_partial():
    assert promises_to_read(watch) and promises_to_read(partial(partial(watch, log=[]), hook=None))
    assert not promises_to_read(nothing) and not promises_to_read(partial(nothing))
    assert promises_to_read(reads_only(partial(nothing)))


class Log:
    def __init__(self):
        self.shapes = []

    def note(self, tensor, hook):
        self.shapes.append(tuple(tensor.shape))


def test_a_bound_method_can_promise_to_read():
    log = Log()
    point = point_with(reads_only(log.note))
    point(torch.ones(1, 2))
    assert log.shapes == [(1, 2)] and not point.may_edit
    assert not promises_to_read(Log().note)  # the promise is of this method of this object


def test_what_is_attached_decides_whether_a_point_may_edit():
    assert (point_with().in_use, point_with().may_edit) == (False, False)
    assert (point_with(watch).in_use, point_with(watch).may_edit) == (True, False)
    assert (point_with(nothing).in_use, point_with(nothing).may_edit) == (True, True)
    assert point_with(watch, nothing).may_edit
    backward = point_with(watch, dir="bwd")
    assert (backward.in_use, backward.may_edit, backward.has_editor) == (True, True, False)


def test_removal_is_noticed():
    point = point_with(watch, nothing)
    point.remove_hooks()
    assert not point.in_use and not point.may_edit
    point.add_hook(watch)
    assert point.in_use and not point.may_edit


def test_an_editor_gets_a_copy_and_a_reader_the_tensor_itself():
    x = torch.ones(1, 2, 3)
    given = []
    assert point_with()(x) is x
    point_with(reads_only(lambda tensor, hook: given.append(tensor)))(x)
    assert given[0] is x

    def fill(tensor, hook):
        tensor.fill_(7.0)

    changed = point_with(fill)(x)
    assert x.eq(1).all() and changed.eq(7).all()


def test_functions_run_in_order_and_see_each_other():
    def double(tensor, hook):
        return 2 * tensor

    def add_one(tensor, hook):
        return tensor + 1

    point = point_with(double, add_one)
    assert point(torch.ones(1, 2)).eq(3).all()
    point.add_hook(add_one, prepend=True)
    assert point(torch.ones(1, 2)).eq(5).all()


def test_positions():
    point = point_with()
    assert point.positions.tolist() == [3, 4]
    with pytest.raises(RuntimeError, match="belongs to no model yet"):
        RecurrentHookPoint().positions  # noqa: B018


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: x[:, :1], r"blocks.0.mixer.hook_q returned \(2, 1, 4, 3\), expected .* \(2, 12, 4, 3\)"),
        (lambda x: x[0], r"returned \(12, 4, 3\)"),
        (lambda x: 3.0, "returned float"),
        (lambda x: (x, x), "returned tuple"),
    ],
)
def test_a_function_that_returns_something_else_is_named(returned, words, as_users_run):
    model = tiny_model()
    with pytest.raises(ValueError, match=words):
        model.run_with_hooks(
            tokens_of(model), fwd_hooks=[("blocks.0.mixer.hook_q", lambda tensor, hook: returned(tensor))]
        )


def test_the_name_of_every_hook_is_its_place_in_the_tree():
    model = tiny_model(HYBRID)
    for name, point in model.hook_dict.items():
        assert model.get_submodule(name) is point and point.name == name
        assert isinstance(point, RecurrentHookPoint) and point.clock is model.clock


def test_the_vocabulary():
    """The names that notebooks and other people's code depend on (design, section 3)."""
    model = tiny_model(HYBRID)
    block = ["hook_resid_pre", "hook_mixer_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"]
    block += [f"ln{i}.hook_{what}" for i in (1, 2) for what in ("scale", "normalized")]
    block += [f"mlp.hook_{what}" for what in ("pre", "pre_linear", "post")]
    roles = "q k v beta log_decay erase probe write_key write_value query write state read z".split()
    softmax = [f"hook_{name}" for name in "q k v gate rot_q rot_k attn_scores pattern z".split()]
    softmax += [f"{side}_norm.hook_{what}" for side in "qk" for what in ("scale", "normalized")]
    expected = {"hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    for layer in range(3):
        inside = [f"attn.{name}" for name in softmax] if layer == 1 else [f"mixer.hook_{name}" for name in roles]
        expected |= {f"blocks.{layer}.{name}" for name in [*block, *inside]}
    assert set(model.hook_dict) == expected


def test_shapes_of_every_hook():
    model = tiny_model(HYBRID)
    _, cache = model.run_with_cache(tokens_of(model), names_filter=lambda name: True)
    lead = (2, 12)
    mixer = {
        **dict.fromkeys(["q", "k", "erase", "probe", "write_key", "query"], (*lead, 4, 3)),
        **dict.fromkeys(["v", "write_value", "read", "z"], (*lead, 4, 5)),
        **dict.fromkeys(["beta", "log_decay"], (*lead, 4)),
        **dict.fromkeys(["write", "state"], (*lead, 4, 3, 5)),
    }
    attention = {
        **dict.fromkeys(["q", "gate", "rot_q", "z"], (*lead, 4, 6)),
        **dict.fromkeys(["k", "v", "rot_k"], (*lead, 2, 6)),
        **dict.fromkeys(["attn_scores", "pattern"], (2, 4, 12, 12)),
    }
    for layer in range(3):
        for name, shape in (attention if layer == 1 else mixer).items():
            assert cache[f"blocks.{layer}.{'attn' if layer == 1 else 'mixer'}.hook_{name}"].shape == shape, name
        for name, width in (
            ("hook_resid_pre", 12),
            ("ln1.hook_scale", 1),
            ("ln2.hook_normalized", 12),
            ("mlp.hook_post", 16),
        ):
            assert cache[f"blocks.{layer}.{name}"].shape == (*lead, width)
