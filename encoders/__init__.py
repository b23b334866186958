"""Frozen encoders: ViT, of which CLIP's vision tower is one, and RoBERTa; pictures, videos and sounds made ready."""
