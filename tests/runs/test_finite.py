import pytest
import torch

from hfllm.runs.finite import check_converged, check_finite


@pytest.mark.fault(11)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found_and_named(dtype, value):
    tensors = {"good": torch.ones(3, dtype=dtype), "bad": torch.zeros(5, 7, dtype=dtype)}
    tensors["bad"][3, 2] = value
    with pytest.raises(FloatingPointError, match=r"The model out was not written: bad holds .* not finite"):
        check_finite(tensors.items(), what="The model out")


def test_large_numbers_and_counts_are_finite():
    largest = torch.full((4,), torch.finfo(torch.float16).max, dtype=torch.float16)  # their sum overflows
    check_finite({"largest": largest, "steps": torch.tensor(7), "none": torch.empty(0)}.items(), what="The model")


@pytest.mark.fault(11, 31)
def test_a_loss_far_worse_than_a_guess_is_not_a_result():
    check_converged(2.5, num_choices=2)  # overfitted: a guess has 0.69
    check_converged(9.0, num_choices=1000, before=12.0)  # a guess has 6.9: bad, but better than it was
    check_converged(9.0, num_choices=1000, before=2.0)
    for loss, before in ((7.0, None), (float("nan"), None), (float("inf"), 1.0), (1.1, 0.7)):
        with pytest.raises(
            FloatingPointError, match=r"has diverged: .* a uniform guess has 0\.6931.*lower learning_rate"
        ):
            check_converged(loss, num_choices=2, before=before)
