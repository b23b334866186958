"""A page to try adapters on, and to see their prompts at work: python -m demo --adapter a.safetensors."""
