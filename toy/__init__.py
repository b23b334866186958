"""The embedded default: an almanac, handwritten digits, and the tiny models that are pre-trained for them."""
