"""One process per device: the same workers and schedules over torch.distributed, times data-parallel replicas."""
