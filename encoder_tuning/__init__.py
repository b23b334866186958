"""Adaption prompts, gates and a head for a frozen ViT or RoBERTa: python -m encoder_tuning train|evaluate."""
