"""What methods share that sample answers while they train."""
