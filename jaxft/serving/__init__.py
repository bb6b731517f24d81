"""`jaxft serve`: fine-tuning and answers on one's own hardware, over the protocol of the `openai` SDK.

`serve` runs the server, which imports no JAX: it speaks HTTP (`http/`, `endpoints/`), keeps its state in a folder with
an SQLite database (`storage/`), and supervises one worker process for each job (`supervision/`). A worker (`worker/`)
examines the rows of its job and trains as `jaxft train` does. `jobs/` is what both know of a job. Requests for answers
(`answers/`) go to engines (`engines/`), each a process (`engine/`) that holds a base.
"""
