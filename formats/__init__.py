"""Checkpoint and tokenizer loaders, adapter import and export, and chat templates."""
