"""LoRA adapters: reading them, their algebra, and merging them with each other and into models."""
