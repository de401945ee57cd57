"""The ground that everything stands on: kernels, devices, processes, files, seeds. It knows nothing of flows."""
