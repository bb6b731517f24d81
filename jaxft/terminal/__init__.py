"""Text of others on terminals and in logs: nothing of it moves the cursor, hides, or is read as markup."""
