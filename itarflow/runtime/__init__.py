"""The ground that everything stands on: kernels, devices, processes, files, seeds. Of flows it knows no more than
what lies in a checkpoint's folder.
"""
