"""P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602): a learned key/value prefix in every layer of a frozen model."""
