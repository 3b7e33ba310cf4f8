"""Share of tokens predicted right, leaving out the labels that are -100."""

from __future__ import annotations

import datasets
import evaluate
import numpy

_DESCRIPTION = """
Token accuracy of a language model: the share of labels that equal the predicted id. Labels of -100 do not
count. Predictions and labels stand at the same positions; shift them before, if need be.
"""

_INPUTS = """
Args:
    predictions (list of int, or list of lists of int): predicted token ids, flat or one list per sequence.
    references (the same): label ids; -100 is left out.

Returns:
    token_accuracy (float): between 0 and 1.

Example:
    >>> token_accuracy.compute(predictions=[[5, 6, 7], [8]], references=[[-100, 6, 1], [8]])
    {'token_accuracy': 0.6666666666666666}
"""

_IGNORE_INDEX = -100


class TokenAccuracy(evaluate.Metric):
    """Token-weighted accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        token = datasets.Value("int64")
        tokens = datasets.Sequence(token)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": tokens, "references": tokens}),
                datasets.Features({"predictions": token, "references": token}),
            ],
        )

    # `evaluate.combine` hands the inputs of every metric to each of them, hence `others`.
    def _compute(self, *, predictions: list, references: list, **others: object) -> dict[str, float]:
        lengths = [numpy.size(row) for row in predictions], [numpy.size(row) for row in references]
        for row, (predicted, labelled) in enumerate(zip(*lengths, strict=True)):
            if predicted != labelled:
                raise ValueError(f"Sequence {row} has {predicted} predictions but {labelled} references.")
        predicted_ids = numpy.concatenate([numpy.ravel(row) for row in predictions])
        label_ids = numpy.concatenate([numpy.ravel(row) for row in references])
        counted = label_ids != _IGNORE_INDEX
        if not counted.any():
            raise ValueError(f"token_accuracy got no label but {_IGNORE_INDEX} ({counted.size} labels).")
        return {"token_accuracy": float((predicted_ids == label_ids)[counted].mean())}
