"""Deep examination of rows: duplicates, leaks into held-out rows, contradictions, odd shapes and balance."""
