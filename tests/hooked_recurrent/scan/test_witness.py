"""Outside witness: transformers' own gated delta rule (float32), with d_k != d_v and an initial state."""

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hooked_recurrent.factors import Factors
from hooked_recurrent.layers.norm import l2_normalize
from hooked_recurrent.scan.dispatch import scan
from tests.hooked_recurrent.models import distance


@pytest.mark.parametrize("theirs", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
@pytest.mark.parametrize("ours", ["step", "chunked"])
@pytest.mark.parametrize("length", [1, 63, 150])
def test_gated_delta_rule(theirs, ours, length):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(2, length, 3, *shape, generator=generator)

    query, key, value, initial = normal(8), normal(8), normal(6), torch.randn(2, 3, 8, 6, generator=generator)
    log_decay, beta = -normal().square(), normal().sigmoid()
    expected_read, expected_state = getattr(qwen, theirs)(
        query,
        key,
        value,
        g=log_decay,
        beta=beta,
        initial_state=initial.clone(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    factors = Factors(
        log_decay=log_decay,
        write_key=l2_normalize(key),
        write_value=beta[..., None] * value,
        query=l2_normalize(query) * 8**-0.5,
        erase_strength=-log_decay.exp() * beta,
    )
    read, state = scan(factors, initial, backend=ours)
    assert distance(read, expected_read) <= 2e-6
    assert distance(state, expected_state) <= 2e-6
