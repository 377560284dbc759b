"""Sources: an index of samples, read one at a time. No key of the data_dict is named here."""
