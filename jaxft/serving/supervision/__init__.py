"""The supervision of workers: starting, watching and ending them, by locks that the kernel frees."""
