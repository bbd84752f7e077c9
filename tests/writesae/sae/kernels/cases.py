"""What the kernels' tests share: tensors with NaN around them, and the comparison of values and gradients."""

import torch

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
COMMON = (torch.float32, torch.bfloat16)
_BESIDE = 700


def surrounded(tensor):
    """The same numbers in the middle of memory full of NaN; around indices stands one that points at the NaN after a table."""
    beside = torch.nan if tensor.is_floating_point() else int(tensor.max()) + 1 if tensor.numel() else 0
    memory = torch.full((tensor.numel() + 2 * _BESIDE,), beside, dtype=tensor.dtype)
    middle = memory[_BESIDE : _BESIDE + tensor.numel()].view(tensor.shape)
    middle.copy_(tensor)
    return middle


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(batch, terms, rows, seed=0):
    """Row numbers, the last row among them, and some of them twice in a sample where there are several terms."""
    indices = torch.randint(rows, (batch, terms), generator=torch.Generator().manual_seed(seed))
    indices[0, 0] = rows - 1
    if terms > 1:
        indices[-1, -1] = indices[-1, 0]
    return indices


def error(got, expected):
    """Relative, by norms; absolute where nothing is expected."""
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-3)).item()


def outcome(function, inputs, **options):
    """The value, and the gradients of the inputs that have one, for a fixed gradient of the value."""
    leaves = [one.detach().requires_grad_() if one.is_floating_point() else one for one in inputs]
    value = function(*leaves, **options)
    value.backward(random(*value.shape, seed=99).to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())]


def compare(function, expected, inputs, bound, **options):
    """The function on its inputs amid NaN against the expected one in float64: values, gradients and their dtypes."""
    got = outcome(function, [surrounded(one) for one in inputs], **options)
    wide = outcome(expected, [one.double() if one.is_floating_point() else one for one in inputs], **options)
    assert [one.dtype for one in got[1:]] == [one.dtype for one in inputs if one.is_floating_point()]
    errors = [error(one, other) for one, other in zip(got, wide, strict=True)]
    assert all(one < bound for one in errors), errors  # max() would pass over a NaN
    return got
