"""The tables, as a list of migrations: the database says in `user_version` how many of them it has had."""

APPLICATION = 0x6A667376  # "jfsv" in application_id, by which a database is known as ours

MIGRATIONS = (
    """
    CREATE TABLE files (
        n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL,
        filename TEXT NOT NULL, bytes INTEGER NOT NULL, purpose TEXT NOT NULL, sha256 TEXT NOT NULL,
        expires_at INTEGER, deleted INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE uploads (
        id TEXT PRIMARY KEY, created_at INTEGER NOT NULL, bytes INTEGER NOT NULL, filename TEXT NOT NULL,
        purpose TEXT NOT NULL, mime_type TEXT NOT NULL, status TEXT NOT NULL, expires_at INTEGER NOT NULL,
        file_seconds INTEGER, file_id TEXT
    ) STRICT;
    CREATE TABLE parts (
        id TEXT PRIMARY KEY, upload_id TEXT NOT NULL REFERENCES uploads(id), created_at INTEGER NOT NULL,
        bytes INTEGER NOT NULL, md5 TEXT NOT NULL
    ) STRICT;
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, hash TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL,
        created_at INTEGER NOT NULL, last_used_at INTEGER, revoked_at INTEGER
    ) STRICT;
    CREATE TABLE jobs (
        n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, finished_at INTEGER,
        base TEXT NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL, resolved TEXT, seed INTEGER NOT NULL,
        suffix TEXT NOT NULL, model_tag TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT,
        metadata TEXT NOT NULL, error TEXT, fine_tuned_model TEXT, result_files TEXT NOT NULL DEFAULT '[]',
        trained_tokens INTEGER, phase TEXT NOT NULL DEFAULT '', deaths INTEGER NOT NULL DEFAULT 0,
        death_step INTEGER NOT NULL DEFAULT 0, stop_requested INTEGER NOT NULL DEFAULT 0, key_id TEXT NOT NULL,
        request_hash TEXT NOT NULL, idempotency_key TEXT
    ) STRICT;
    CREATE INDEX jobs_by_status ON jobs (status);
    CREATE TABLE events (
        n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL REFERENCES jobs(id),
        kind TEXT NOT NULL, step INTEGER NOT NULL, created_at INTEGER NOT NULL, level TEXT NOT NULL,
        type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL, UNIQUE (job_id, kind, step)
    ) STRICT;
    CREATE TABLE models (
        n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, base TEXT NOT NULL,
        job_id TEXT NOT NULL REFERENCES jobs(id), checkpoint_id TEXT NOT NULL, step INTEGER NOT NULL,
        kind TEXT NOT NULL, folder TEXT NOT NULL, created_at INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0,
        metrics TEXT NOT NULL DEFAULT '{}'
    ) STRICT;
    CREATE INDEX models_by_job ON models (job_id, step);
    """,
)
