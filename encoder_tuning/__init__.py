"""ViT and RoBERTa with the same prompts and gates, and a head on top: python -m encoder_tuning train|evaluate."""
