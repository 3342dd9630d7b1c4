"""Start a run from the weights, head and users of another run or of an exported folder (`train.init_from`)."""
