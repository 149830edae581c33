"""Personalized FedAvg (Jiang et al. 2019, arXiv 1909.12488): the algorithm and its runs.

Imports neither the network nor FedLab, and parses no flags. Its errors name flags all the same: a flag is what their
reader can mend.
"""
