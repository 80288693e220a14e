"""Exact match of answers: the fraction that equal the expected answer, after stripping."""

import datasets
import evaluate


_DESCRIPTION = """
The fraction of generated answers that equal the expected one, or one of several. Whitespace at the ends is ignored;
case is not, unless `ignore_case` is set.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the answers.
    references (list of list of str): for each answer, the right ones.
    ignore_case (bool): whether upper and lower case are the same. Defaults to False.

Returns:
    exact_match (float): from 0 to 1.
    num_right (int), num_answers (int): its numerator and denominator.

Examples:
    >>> metric = evaluate.load("hfllm/evaluation/metrics/exact_answer")
    >>> print(metric.compute(predictions=["42\\n", "True", "none"], references=[["42"], ["False"], ["None", "none"]]))
    {'exact_match': 0.6666666666666666, 'num_right': 2, 'num_answers': 3}
"""

_CITATION = """
@inproceedings{rajpurkar2016squad,
  title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  year={2016}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactAnswer(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://arxiv.org/abs/1606.05250"],
        )

    def _compute(self, predictions, references, ignore_case=False):
        def normalise(text):
            return text.strip().lower() if ignore_case else text.strip()

        num_right = sum(
            normalise(answer) in [normalise(right) for right in expected]
            for answer, expected in zip(predictions, references, strict=True)
        )
        return {"exact_match": num_right / len(predictions), "num_right": num_right, "num_answers": len(predictions)}
