"""One run over all of its attempts: what is recorded of them, how one goes, and what its end means."""
