import math

from hfllm.evaluation.tasks import numbers_of


def test_scores_have_our_names_and_json_can_hold_them():
    results = {
        "quiz": {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1},
        "text": {"word_perplexity,none": math.inf, "bits_per_byte,none": math.nan, "sample_len": 3},
    }
    assert numbers_of(results) == {
        "test_quiz_acc": 0.5,
        "test_quiz_exact_match_strict": 1.0,
        "test_text_word_perplexity": None,
        "test_text_bits_per_byte": None,
    }
