"""JHMDB-Sentences, scored like A2D-Sentences."""

from flowmask.trainer.score.protocols.a2d_sentences import A2dSentences


class JhmdbSentences(A2dSentences):
    """Samples are the frames in the dataset's list."""

    sources = ("jhmdb_sentences",)
