"""Frozen encoders, ViT and RoBERTa; heads on top of them; pictures and videos made ready for them."""
