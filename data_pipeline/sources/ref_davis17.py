"""Ref-DAVIS17, converted to the layout of Ref-YouTube-VOS: four sentences per object, one from each annotator.

An expression's id is object * 4 + annotator; each object's four sentences name one `obj_id`. Scores are means over
annotators, so ids other than 0, 1, 2, ... in fours are refused, and also four sentences with different objects.
Masks are public for `train` and `valid`.
"""

from collections.abc import Sequence

from flowmask.data_pipeline.sources.base import Expression
from flowmask.data_pipeline.sources.ref_youtube_vos import RefYoutubeVosSource
from flowmask.models.errors import DataError

ANNOTATORS = 4


class RefDavis17Source(RefYoutubeVosSource):
    """One split of the converted dataset."""

    def check_expressions(self, expressions: Sequence[Expression], *, where: str) -> None:
        by_id = {expression.exp_id: expression for expression in expressions}
        if len(expressions) % ANNOTATORS or by_id.keys() != {str(i) for i in range(len(expressions))}:
            raise DataError(
                f"{where} has the ids {', '.join(by_id)[:40]}; expected 0, 1, 2, ... in fours: "
                f"object * {ANNOTATORS} + annotator"
            )
        for first in range(0, len(expressions), ANNOTATORS):
            group = [by_id[str(first + annotator)] for annotator in range(ANNOTATORS)]
            objects = [", ".join(expression.anno_ids) or "nothing" for expression in group]
            if len(set(objects)) > 1:
                raise DataError(
                    f"{where}.{first}..{first + ANNOTATORS - 1}.obj_id are {', '.join(objects)}; the "
                    f"{ANNOTATORS} annotators' sentences of an object must name the same one"
                )
