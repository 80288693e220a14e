"""The faults that tests inject for real, and the table of them at the end of a test run.

A test that injects one is marked `@pytest.mark.fault(number)`. The table tells for each how many tests tried it in this
run, and whether the run survived it.
"""

from collections import defaultdict

import pytest


FAULTS = {
    1: "kill -9 during a save, at random moments",
    2: "kill -9 between steps and during an evaluation",
    3: "a truncated, empty or missing file in the newest checkpoint",
    4: "one flipped byte in weights or optimizer state",
    5: "the optimizer's or the loop's state missing",
    6: "a full disk",
    7: "an output folder that is read-only, or gone",
    8: "two runs in one output folder",
    9: "another number of processes than were launched",
    10: "SIGTERM and Ctrl-C",
    11: "a loss or gradient that is not finite",
    12: "a spike of loss or gradient",
    13: "a process of several dies, or their launcher",
    14: "a corrupt JSON line, or records of mixed shapes",
    15: "bytes that are not UTF-8, NUL, byte-order marks",
    16: "empty files and documents, and too little text",
    17: "control tokens' text in a document",
    18: "a tokenizer that does not fit the model, or has changed",
    19: "resuming with another shape, text, seed or schedule",
    20: "resuming a finished run",
    21: "a pickle in a checkpoint",
    22: "the Hub or a tracker that fails",
    23: "killed, or out of disk, between the last checkpoint and the end",
    24: "kill -9 at random moments of every recipe that writes",
    25: "a checkpoint of Trainer's that is damaged or incomplete",
    26: "data, base or tokenizer changed before a fine-tuning run resumes",
    27: "killed in a later epoch, with and without packing",
    28: "SIGTERM and Ctrl-C in fine-tuning",
    29: "a flipped bit in cached rows or documents",
    30: "the lock of a dead run, of another host, under another clock",
    31: "a learning rate at which training diverges",
    32: "overwriting what is not the run's own",
    33: "two exports, tokenizers or pushes at once",
    34: "a server's client that leaves, or asks for what cannot be",
    35: "markup and control characters in what is shown",
    36: "links, code and default names that lead to somebody else's",
    37: "a terminal that cannot show a character",
    38: "another release of transformers",
}
OUTCOMES: dict[int, list[str]] = defaultdict(list)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or not report.passed:  # a fixture that fails or skips counts too
        for mark in item.iter_markers("fault"):
            for number in mark.args:
                assert number in FAULTS, f"{item.nodeid} injects fault {number}, which tests/faults.py does not list"
                report.user_properties.append(("fault", number))  # what a worker of pytest-xdist hands over too


def pytest_runtest_logreport(report):
    for name, number in report.user_properties:
        if name == "fault":
            OUTCOMES[number].append(report.outcome)


def pytest_terminal_summary(terminalreporter):
    if not OUTCOMES:
        return
    terminalreporter.section("faults tried")
    for number in sorted(OUTCOMES):
        failed, passed, skipped = (OUTCOMES[number].count(outcome) for outcome in ("failed", "passed", "skipped"))
        verdict = "FAILED" if failed else "survived" if passed else "skipped"
        counts = f"{passed + failed} tests" + (f", {skipped} skipped" if skipped else "")
        terminalreporter.write_line(f"{number:3d}  {FAULTS[number]:66s} {verdict:10s} {counts}")
    if others := [str(number) for number in FAULTS if number not in OUTCOMES]:
        terminalreporter.write_line(f"not tried by the tests selected here: {', '.join(others)}")
