"""What transformers' tensor-parallel styles make of a head's forward, and which of them the fused head takes over."""

import pytest
from support import llama
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from wit_plugins import WITConfigError
from wit_plugins.loss.fused import FusedHead
from wit_plugins.loss.tensor_parallel import below_tensor_parallelism


def installed(style):
    """A linear layer with the style's forward; only when it is called does that look at the mesh."""
    return ALL_PARALLEL_STYLES[style].install_forward(nn.Linear(4, 6), None)


@pytest.mark.parametrize("style", ["colwise_gather_output", "colwise_rep"])
def test_a_head_whose_logits_every_rank_is_given(style):
    head = installed(style)
    assert head.forward.__name__ == "tp_forward"
    own = below_tensor_parallelism(head.forward)
    assert own.__func__ is nn.Linear.forward
    assert own.__self__ is head


@pytest.mark.parametrize("style", ["colwise", "rowwise", "rowwise_rep", "all_reduce"])
def test_other_styles_are_refused(style):
    with pytest.raises(WITConfigError, match=r"runs the tensor-parallel .* head by \w+Parallel.*colwise_gather_output"):
        below_tensor_parallelism(installed(style).forward)


def test_another_way_to_run_a_head_is_refused():
    """Transformers up to 5.14 leaves the forward, splits the weight into plain tensors, and hooks what gathers."""
    model = llama()
    FusedHead(model)
    model.lm_head._hf_tp_plan = "colwise_rep"
    with pytest.raises(WITConfigError, match=r"in a way of its own.*loss_impl: logits"):
        FusedHead(model)
    linear = nn.Linear(4, 6)
    with pytest.raises(WITConfigError, match="in a way of its own"):
        below_tensor_parallelism(lambda x: linear(x))
