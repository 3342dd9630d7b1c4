"""What a record says, for tests of sources."""

from pal_ds.data.records import Record


def preferred(record: Record) -> object:
    """The response that the record says is better."""
    pair = record.responses if record.responses is not None else record.response_features
    assert pair is not None
    return pair[0 if record.label == -1 else 1]
