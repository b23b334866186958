"""A web page that compares adapters with their base: python -m demo --adapter a.safetensors."""
