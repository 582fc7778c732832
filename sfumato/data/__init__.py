"""What is read: prompts, and images with captions, in a resumable order."""
