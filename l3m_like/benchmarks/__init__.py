"""Speed and memory of a run, beside what other libraries make of the same work."""
