import json
import math

import pytest

from hfllm.report.metrics import add_metrics, metrics_table


def test_what_training_wrote_stays_and_what_was_added_may_be_written_again(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"test_loss": 1.0, "seed": 3}))
    assert "test_loss already, from training: ours are named evaluate_... there" in add_metrics(
        tmp_path, {"test_loss": 2.0, "test_texts": 5}
    )
    assert "already" not in add_metrics(tmp_path, {"test_texts": 6})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "test_loss": 1.0,
        "seed": 3,
        "evaluate_test_loss": 2.0,
        "test_texts": 6,
        "evaluated": ["evaluate_test_loss", "test_texts"],
    }


@pytest.mark.parametrize("text", ["{half", "[1, 2]"])
def test_numbers_are_not_added_to_what_is_not_an_object(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json is not a JSON object, so nothing can be added to it"):
        add_metrics(tmp_path, {"test_loss": 2.0})
    assert (tmp_path / "metrics.json").read_text() == text


def test_a_number_that_is_not_finite_is_not_added(tmp_path):
    (tmp_path / "metrics.json").write_text('{"seed": 3}')
    with pytest.raises(FloatingPointError, match="test_loss is not a finite number"):
        add_metrics(tmp_path, {"test_loss": math.nan})
    assert (tmp_path / "metrics.json").read_text() == '{"seed": 3}'


def test_models_stand_side_by_side_and_a_matrix_is_left_out():
    table = metrics_table({"a": {"loss": 0.123456789, "confusion": [[1]]}, "b": {"loss": 2.0, "texts": 1234}})
    assert [line.split() for line in table.splitlines()] == [["a", "b"], ["loss", "0.123457", "2"], ["texts", "1,234"]]
