"""JHMDB-Sentences, scored as A2D-Sentences is."""

from flowmask.trainer.score.protocols.a2d_sentences import A2dSentences


class JhmdbSentences(A2dSentences):
    """Samples are the frames that the dataset's list names."""

    sources = ("jhmdb_sentences",)
