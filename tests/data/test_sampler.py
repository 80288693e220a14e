import numpy as np
import pytest

from hfllm.data import rows_at, rows_of_step


def test_each_epoch_visits_each_row_once():
    rows = rows_at(np.arange(30), num_rows=10, seed=1)
    for epoch in rows.reshape(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))


def test_epochs_and_seeds_differ():
    orders = [rows_at(np.arange(200), num_rows=100, seed=seed).reshape(2, 100).tolist() for seed in (0, 1)]
    assert len({tuple(epoch) for order in orders for epoch in order}) == 4


def test_the_order_is_a_function_of_its_arguments_alone():
    once = rows_at(np.arange(50), num_rows=20, seed=3)
    backwards = [int(rows_at(np.array([p]), num_rows=20, seed=3)[0]) for p in reversed(range(50))]
    assert once.tolist() == backwards[::-1]


def test_the_order_stays_what_it_was():
    """A run that resumes under a later version must see the rows it would have seen."""
    assert rows_at(np.arange(12), num_rows=8, seed=5).tolist() == [7, 4, 3, 5, 6, 2, 0, 1, 7, 6, 1, 5]


@pytest.mark.parametrize("num_rows", [7, 10, 24, 1000])
def test_a_step_reads_the_same_rows_on_any_number_of_processes(num_rows):
    for step in range(10):
        expected = rows_at(np.arange(step * 24, step * 24 + 24), num_rows=num_rows, seed=0)
        for num_processes in (1, 2, 4):
            for accumulation in (1, 2, 3):
                shares = [
                    rows_of_step(
                        step,
                        rows_per_step=24,
                        num_rows=num_rows,
                        seed=0,
                        process_index=process_index,
                        num_processes=num_processes,
                        accumulation=accumulation,
                    )
                    for process_index in range(num_processes)
                ]
                assert all(len(share) == accumulation for share in shares)
                assert {len(rows) for share in shares for rows in share} == {24 // num_processes // accumulation}
                union = np.concatenate([share[m] for m in range(accumulation) for share in shares])
                assert union.tolist() == expected.tolist()


def test_a_step_may_cross_from_one_epoch_into_the_next():
    (rows,) = rows_of_step(1, rows_per_step=6, num_rows=8, seed=2)  # positions 6 to 11
    first, second = (rows_at(np.arange(start, start + 8), num_rows=8, seed=2).tolist() for start in (0, 8))
    assert rows.tolist() == first[6:] + second[:4]


def test_more_rows_in_a_step_than_there_are_is_several_epochs():
    (rows,) = rows_of_step(0, rows_per_step=9, num_rows=3, seed=0)
    assert np.bincount(rows).tolist() == [3, 3, 3]


def test_what_cannot_be_cut_evenly_is_an_error():
    with pytest.raises(ValueError, match="choose a multiple of 6"):
        rows_of_step(0, rows_per_step=16, num_rows=100, seed=0, num_processes=2, accumulation=3)
    with pytest.raises(ValueError, match="process_index=2, but num_processes=2"):
        rows_of_step(0, rows_per_step=16, num_rows=100, seed=0, num_processes=2, process_index=2)
    with pytest.raises(ValueError, match="num_rows=0"):
        rows_at(np.arange(3), num_rows=0, seed=0)
