"""Train and evaluate adaption prompts, gates and a head on a frozen ViT or RoBERTa: python -m encoder_tuning."""
