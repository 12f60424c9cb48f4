"""Speed and correctness on GPUs, kernel tuning and disassembly."""
