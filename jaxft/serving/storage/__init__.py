"""State on disk: one folder with an SQLite database and the files, models and jobs that its rows name."""
