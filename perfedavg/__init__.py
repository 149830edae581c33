"""Personalized FedAvg (Jiang et al. 2019, arXiv 1909.12488): the algorithm, free of network, framework and flags."""
