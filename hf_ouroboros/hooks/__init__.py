"""What OuroborosTrainer overrides of Trainer, by topic: batches, evaluation, checkpoints, logs, a script's own code."""
