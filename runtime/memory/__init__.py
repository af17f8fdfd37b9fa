"""What a request takes in memory."""
