"""Sources: an index of samples, read one at a time; streams: shards, read front to back. No key of the data_dict is named."""
