"""One module per host: how distillation gets into its training."""
