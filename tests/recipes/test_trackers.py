"""Trackers, by accelerate's own classes: several at once, and offline."""

import sqlite3

import pytest

from hfllm.runs.log import read_log


@pytest.mark.slow
def test_tensorboard_and_trackio_get_what_the_log_gets(run_pretrain, small, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    pytest.importorskip("trackio")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_pretrain(**small, report_to=["tensorboard", "trackio"])
    losses = {entry["step"]: entry["loss"] for entry in read_log(small["output_dir"] / "log.jsonl") if "loss" in entry}
    events = EventAccumulator(str(small["output_dir"] / "hfllm"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)
    (database,) = (tmp_path / "trackio").rglob("hfllm*.db")
    rows = sqlite3.connect(database).execute("select step, json_extract(metrics, '$.loss') from metrics").fetchall()
    assert {step: loss for step, loss in rows if loss is not None} == pytest.approx(losses)
