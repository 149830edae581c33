"""What a process knows of the machine that it runs on: kernels, cores, descriptors, forks, versions."""
