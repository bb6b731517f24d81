"""A job: what is requested, what it becomes, its folder, and how the protocol shows it."""
