"""The distributed runtime: a FedLab server manager and its workers. The only importer of torch.distributed."""
