"""What OuroborosTrainer overrides of Trainer, by topic: batches, evaluation, checkpoints."""
