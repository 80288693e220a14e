"""Bits per byte and perplexity, from summed losses."""

import math

import datasets
import evaluate


_DESCRIPTION = """
Bits per byte is the number of bits that a language model needs for a byte of text. Unlike perplexity, it does not
depend on the tokenizer, so models with different vocabularies can be compared. Both are computed here from sums,
because means of batches weigh tokens unequally.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): sums of the negative log-likelihoods, in nats, of parts of a text (documents, batches).
    references (list of dict): for each part, `num_tokens`, how many tokens were predicted, and `num_bytes`, how long
        their text is in UTF-8.

Returns:
    bits_per_byte (float): nats / ln 2 / bytes.
    perplexity (float): exp(nats / tokens); inf if it is too large for a float.
    loss (float): nats per token.
    num_tokens (int), num_bytes (int): the sums.

Examples:
    >>> metric = evaluate.load("hfllm/evaluation/metrics/bits_per_byte")
    >>> nats = [8 * 0.6931471805599453, 4 * 0.6931471805599453]
    >>> counts = [{"num_tokens": 2, "num_bytes": 8}, {"num_tokens": 4, "num_bytes": 4}]
    >>> results = metric.compute(predictions=nats, references=counts)
    >>> print(results["bits_per_byte"], round(results["perplexity"], 6), results["num_tokens"])
    1.0 4.0 6
"""

_CITATION = """
@article{gao2020pile,
  title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and others},
  journal={arXiv preprint arXiv:2101.00027},
  year={2020}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    def _info(self):
        counts = {"num_tokens": datasets.Value("int64"), "num_bytes": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": counts}),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions, references):
        nats = math.fsum(predictions)
        num_tokens = sum(count["num_tokens"] for count in references)
        num_bytes = sum(count["num_bytes"] for count in references)
        if num_tokens <= 0 or num_bytes <= 0:
            raise ValueError(f"{num_tokens:,} tokens of {num_bytes:,} bytes: there is nothing to divide by.")
        loss = nats / num_tokens
        return {
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "loss": loss,
            "num_tokens": num_tokens,
            "num_bytes": num_bytes,
        }
