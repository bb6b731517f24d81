"""What rows of data hold: values, messages, marks, columns, and the rows that cannot be trained on."""
