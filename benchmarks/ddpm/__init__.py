"""Diffusion U-Nets: a small one, trained here, compressed and sampled; and the CIFAR-10 DDPM's configuration, timed."""
