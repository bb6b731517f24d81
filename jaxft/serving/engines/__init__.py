"""The engines that answer, as the server sees them: processes, who waits for them, and when they give way."""
