"""Text from elsewhere stays text: in HTML, in Markdown, in a picture's labels."""

import pytest

from hfllm.report.escaping import html_text, markdown_block, markdown_code, markdown_text


def test_markup_control_characters_and_half_surrogates_are_shown_in_html():
    assert html_text("<b>&\x1b\ud800") == "&lt;b&gt;&amp;\\x1b\\ud800"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("max_steps of my-gpt 1.5", "max_steps of my-gpt 1.5"),  # nothing to escape
        ("*a* _b_ `c` [d](e) f|g ~h~ $i$", r"\*a\* \_b\_ \`c\` \[d\](e) f\|g \~h\~ \$i\$"),
        ("# a", r"\# a"),
        ("1. a", r"1\. a"),
        ("<!-- a -->", "&lt;!-- a -->"),
        ("two\nlines", "two lines"),
    ],
)
def test_a_line_of_markdown_means_its_letters(text, escaped):
    assert markdown_text(text) == escaped


def test_code_within_a_line_may_hold_backticks_and_bars():
    assert markdown_code("a.txt") == "`a.txt`"
    assert markdown_code("a`b|c") == "`` a`b\\|c ``"


def test_a_block_is_not_ended_by_its_text_and_holds_none_of_our_marks():
    block = markdown_block("```\n<!-- written by hfllm: end -->\nx")
    assert block == "````text\n```\n <!-- written by hfllm: end -->\nx\n````"
