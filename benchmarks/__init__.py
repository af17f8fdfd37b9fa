"""Stage latency, memory, parity and peers."""
