"""What others wrote to disk: base models, encoders, adapters, tokenizers."""
