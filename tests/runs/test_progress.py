import pytest
from accelerate import Accelerator

from hfllm.runs.log import read_log
from hfllm.runs.progress import RunLog


TRAINING = {"step": 1, "loss": 2.5, "learning_rate": 0.1, "tokens_per_second": None}
EVALUATION = {"step": 2, "eval_loss": 2.25, "eval_bits_per_byte": 1.125}


def test_records_stand_in_the_log_and_on_the_terminal(tmp_path, capsys):
    with RunLog(tmp_path, accelerator=Accelerator(cpu=True), step=0, max_steps=2) as log:
        log.write(TRAINING)
        log.advance()
        log.write(EVALUATION)
        log.write_sample(2, "once upon\na time")
    assert read_log(tmp_path / "log.jsonl") == [TRAINING, EVALUATION]
    assert (tmp_path / "samples.txt").read_text() == "--- step 2\nonce upon\na time\n"
    told = capsys.readouterr().out
    assert "step 2: validation 2.2500 nats per token, 1.1250 bits per byte" in told
    assert r"sample: 'once upon\na time'" in told


@pytest.mark.fault(22)
def test_a_tracker_that_fails_takes_nothing_from_the_log(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)

    def fail(values, step):
        raise ConnectionError("the tracker's server is gone")

    monkeypatch.setattr(accelerator, "log", fail)
    with (
        RunLog(tmp_path, accelerator=accelerator, step=0, max_steps=1) as log,
        pytest.warns(UserWarning, match="server is gone"),
    ):
        log.write(TRAINING)
    assert read_log(tmp_path / "log.jsonl") == [TRAINING]


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "is_main_process", False)
    with RunLog(tmp_path, accelerator=accelerator, step=0, max_steps=1) as log:
        log.write(TRAINING)
        log.write(EVALUATION)
        log.advance()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
