"""One small file for each peer. They run in environments of their own, as scripts, and know nothing of Clarifier."""
