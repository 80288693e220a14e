import json
import logging
import math
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from hfllm.report import plot_attention, plot_curves, plot_probabilities
from hfllm.report.confusion import plot_confusion
from hfllm.report.pictures import _smooth
from hfllm.runs.log import append_to_log, read_log


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def panels(figure) -> dict:
    return {axes.get_ylabel(): axes for axes in figure.axes}


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def entry(step, **numbers):
    return {"step": step, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1e5, **numbers}


def test_a_log_is_read_line_by_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 4.5}\n{"step": 2, "loss": NaN, "eval_loss": null}\n\n')
    first, second = read_log(tmp_path / "log.jsonl")
    assert first == {"step": 1, "loss": 4.5}
    assert math.isnan(second["loss"]) and second["eval_loss"] is None


def test_a_torn_last_line_is_left_out_and_reported(tmp_path, caplog):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 4.5}\n{"step": 2, "lo')
    with caplog.at_level(logging.WARNING):
        assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 4.5}]
    assert "log.jsonl, line 2 is incomplete or not a log entry" in caplog.text


def test_a_resumed_run_takes_back_what_it_logged_after_its_checkpoint(tmp_path):
    # Killed after step 4, resumed from a checkpoint at step 2, and now at step 3: the first step 4 never happened.
    points = [(1, 11), (2, 12), (3, 13), (4, 14), (3, 23)]
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in points]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 11},
        {"step": 2, "loss": 12},
        {"step": 3, "loss": 23},
    ]


def test_two_lines_of_one_step_are_one_entry_and_the_later_number_holds(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 4.5}\n{"step": 1, "loss": 4.0, "eval_loss": 5.0}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 4.0, "eval_loss": 5.0}]


def test_every_number_that_was_logged_has_its_panel(tmp_path, drawn):
    log = [entry(step, loss=6 / step) for step in range(1, 21)]
    log[9] |= {"eval_loss": 1.0, "eval_bits_per_byte": 0.4}
    log[19] |= {"eval_loss": 0.75, "eval_bits_per_byte": 0.3}
    path = plot_curves(log, tmp_path / "curves.png", title="A run")
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert list(panels(figure)) == [
        "loss (nats per token)",
        "validation bits per byte",
        "learning rate",
        "gradient norm",
        "tokens per second",
    ]
    losses = panels(figure)["loss (nats per token)"]
    assert legend(losses) == ["training, 0.300 at the end", "validation, 0.750 at the end"]
    training, validation = losses.get_lines()
    assert training.get_xdata().tolist() == list(range(1, 21)) and training.get_ydata()[1] == 3.0
    assert validation.get_xdata().tolist() == [10, 20] and validation.get_ydata().tolist() == [1.0, 0.75]
    assert figure.get_suptitle() == "A run"


def test_a_number_that_was_never_logged_has_no_panel(tmp_path, drawn):
    plot_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.9, "grad_norm": None}], tmp_path / "curves.png")
    assert list(panels(drawn[0])) == ["loss (nats per token)"]
    assert legend(drawn[0].axes[0]) == ["training, 1.900 at the end"]


def test_one_point_is_seen(tmp_path, drawn):
    plot_curves([entry(1)], tmp_path / "curves.png")
    for axes in drawn[0].axes:
        assert axes.get_lines()[0].get_marker() == "o"


def test_a_loss_that_is_not_finite_is_marked_and_hides_nothing(tmp_path, drawn):
    plot_curves([entry(1), entry(2, loss=math.nan, grad_norm=math.inf), entry(3)], tmp_path / "curves.png")
    assert legend(drawn[0].axes[0]) == ["training, 3.000 at the end", "training loss not finite (1 of 3 points)"]
    assert drawn[0].axes[0].get_lines()[1].get_xdata().tolist() == [2]
    plot_curves([{"step": 1, "loss": math.nan}], tmp_path / "curves.png")
    assert legend(drawn[1].axes[0]) == ["training loss not finite (1 of 1 points)"]


def test_many_points_are_drawn_thin_under_their_running_mean(tmp_path, drawn):
    rng = np.random.default_rng(0)
    log = [entry(step, loss=2 + rng.normal()) for step in range(1, 3001)]
    plot_curves(log, tmp_path / "curves.png")
    raw, mean = drawn[0].axes[0].get_lines()
    assert raw.get_linewidth() < 1 < mean.get_linewidth()
    assert np.std(mean.get_ydata()[100:-100]) < np.std(raw.get_ydata()) / 5
    assert legend(drawn[0].axes[0])[0].startswith("training (mean over 61 points), ")


def test_the_running_mean_by_hand():
    values = np.arange(200.0)
    values[100] = np.nan
    smoothed = _smooth(values)  # two points to either side
    assert smoothed[0] == 0 and smoothed[1] == 1 and smoothed[199] == 199  # fewer towards the ends, and no lag
    assert smoothed[50] == 50
    assert smoothed[101] == (99 + 101 + 102 + 103) / 4
    assert np.isnan(_smooth(np.array([np.nan, 1.0]))[0])


def test_an_empty_log_is_reported(tmp_path):
    with pytest.raises(ValueError, match="the log has no entries"):
        plot_curves([], tmp_path / "curves.png")


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path):
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    plot_curves([entry(1), entry(2)], tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before and _pylab_helpers.Gcf.figs == {}


def test_appending_ends_a_torn_line_first(tmp_path):
    log = tmp_path / "log.jsonl"
    append_to_log(log, {"step": 1, "loss": 2.0})
    with log.open("a") as file:
        file.write('{"step": 2, "lo')  # killed here
    append_to_log(log, {"step": 2, "loss": 1.5})
    append_to_log(log, {"step": 3, "loss": 1.0})
    assert read_log(log) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.0}]


def uniform_attention(num_tokens: int) -> np.ndarray:
    return np.tril(np.ones((num_tokens, num_tokens))) / np.arange(1, num_tokens + 1)[:, None]


def tick_labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_an_attention_map_shows_the_weights_up_to_each_token_and_nothing_after_it(tmp_path, drawn):
    weights = uniform_attention(3)
    path = plot_attention(weights[None], ["layer 0, head 0"], ["a", "b", "c"], tmp_path / "map.png", num_columns=1)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown.mask, np.triu(np.ones((3, 3), dtype=bool), 1))
    np.testing.assert_allclose(shown.data, weights)
    assert axes.images[0].get_clim() == (0, 1)
    assert tick_labels(axes.xaxis) == tick_labels(axes.yaxis) == ["a", "b", "c"]
    written = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()}
    assert written == {(0, 0): "1", (0, 1): ".50", (1, 1): ".50", (0, 2): ".33", (1, 2): ".33", (2, 2): ".33"}


def test_maps_share_the_labels_at_the_edges_and_say_where_not_every_token_is_labelled(tmp_path, drawn):
    maps = np.stack([uniform_attention(4)] * 3)
    plot_attention(maps, ["one", "two", "three"], ["a", "b", "c", "d"], tmp_path / "maps.png", num_columns=2)
    first, second, third, _color_bar = drawn[0].axes
    assert [axes.get_title() for axes in (first, second, third)] == ["one", "two", "three"]
    assert [tick_labels(axes.yaxis) for axes in (first, second, third)] == [list("abcd"), [], list("abcd")]
    assert [tick_labels(axes.xaxis) for axes in (first, second, third)] == [[], list("abcd"), list("abcd")]

    tokens = [str(number) for number in range(130)]
    plot_attention(np.stack([uniform_attention(130)] * 4), ["h"] * 4, tokens, tmp_path / "many.png", num_columns=4)
    assert tick_labels(drawn[1].axes[0].yaxis) == tokens[::3]
    assert drawn[1].get_suptitle() == "(1 token of 3 is labelled)"


def test_every_token_of_a_long_prompt_can_be_read(tmp_path, drawn):
    tokens = [str(number) for number in range(47)]
    plot_attention(np.stack([uniform_attention(47)] * 8), ["h"] * 8, tokens, tmp_path / "map.png", num_columns=2)
    first = drawn[0].axes[0]
    assert tick_labels(first.yaxis) == tokens
    assert first.get_yticklabels()[0].get_fontsize() >= 5.5
    points_of_a_row = first.get_window_extent().height / drawn[0].dpi * 72 / 47
    assert points_of_a_row > 0.9 * first.get_yticklabels()[0].get_fontsize()  # labels do not overlap


def test_dollar_signs_in_labels_and_names_of_runs_are_text(tmp_path, drawn):
    scores = {"confusion": [[1, 0], [1, 2]], "accuracy": 0.75, "f1_macro": 0.7, "ece": 0.1, "reliability": []}
    plot_confusion(scores, ["$5_$10", "$^$"], tmp_path / "confusion.png", title="run$_$x: 4 texts")
    plot_curves([{"step": 1, "loss": 2.0, "grad_norm": 0.1}], tmp_path / "curves.png", title="run$_$x")
    assert tick_labels(drawn[0].axes[0].yaxis) == ["$5_$10", "$^$"]
    assert [figure.get_suptitle() for figure in drawn] == ["run$_$x: 4 texts", "run$_$x"]


def test_tokens_that_the_font_lacks_or_that_look_like_mathematics_stay_readable(tmp_path, drawn):
    tokens = ["日本", "$x$", "␣é", "\u200b", "a_very_long_identifier"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
        plot_attention(uniform_attention(5)[None], ["x"], tokens, tmp_path / "map.png", num_columns=1)
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["\\u65e5\\u672c", "$x$", "␣é", "\\u200b", "a_very_long_ident…"]
    assert not any(label.get_parse_math() for label in labels)


def test_probabilities_show_the_token_that_came_among_the_likeliest(tmp_path, drawn):
    candidates = [[("b", 0.6), ("c", 0.3)], [("a", 0.5), ("b", 0.0004)], [("x", 0.9), ("y", 0.05)]]
    plot_probabilities(["c", "d"], [0.3, 0.01], [2, 1234], candidates, tmp_path / "probabilities.png", title="a model")
    bars, table, below = drawn[0].axes
    assert tick_labels(bars.yaxis) == ["c", "d"] and [bar.get_width() for bar in bars.patches] == [0.3, 0.01]
    assert [text.get_text().strip() for text in bars.texts] == ["30%, rank 2", "1.0%, rank 1,234"]
    assert [text.get_text() for text in table.texts] == ["b  60%", "c  30%", "a  50%", "b  <0.1%"]
    (outline,) = [patch for patch in table.patches if not patch.get_fill()]
    center = (outline.get_x() + outline.get_width() / 2, outline.get_y() + outline.get_height() / 2)
    assert center == pytest.approx((1, 0))  # the second candidate of the first row
    assert tick_labels(below.yaxis) == ["x", "y"] and [bar.get_width() for bar in below.patches] == [0.9, 0.05]


def test_without_a_token_that_was_predicted_only_what_comes_next_is_drawn(tmp_path, drawn):
    plot_probabilities([], [], [], [[("x", 0.9), ("y", 0.05)]], tmp_path / "next.png")
    (axes,) = drawn[0].axes
    assert tick_labels(axes.yaxis) == ["x", "y"]
