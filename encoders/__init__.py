"""Frozen encoders (ViT and RoBERTa), their heads, and the preprocessing of images and videos."""
