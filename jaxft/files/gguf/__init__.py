"""The file format GGUF: its header, the kinds of its metadata, and files in parts."""
