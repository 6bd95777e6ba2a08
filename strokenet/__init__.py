"""strokenet: from raw T1/FLAIR scans to a stroke lesion mask, the whole nnU-Net method in plain PyTorch."""

__version__ = "0.1.0"
