"""Checkpoint and tokenizer loaders, adapter import and export, chat templates, conversations, and requests."""
