"""ViT and RoBERTa tuned by the same prompts and gates, with a head on top: python -m encoder_tuning train|evaluate."""
