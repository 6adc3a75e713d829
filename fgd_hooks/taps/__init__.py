"""Where a model's feature maps are, and how they are captured in its forward pass."""
