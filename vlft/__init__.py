"""vlft: fine-tune Qwen2-VL on your own pictures, videos and conversations. The command line is `vlft --help`."""

__version__ = "0.1.0"
