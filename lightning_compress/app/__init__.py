"""The command line: train, compress, fine-tune, measure; one job or a sweep."""
