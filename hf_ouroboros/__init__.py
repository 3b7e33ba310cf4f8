"""hf_ouroboros: the Hugging Face Trainer that keeps every device busy when a model is split over several."""
