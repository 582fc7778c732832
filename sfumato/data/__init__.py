"""What is read: prompts, in a resumable order."""
