"""SAE -> numbers: how well it reconstructs activations, and what the reconstruction does to the subject model."""
