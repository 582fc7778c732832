"""What a training recipe costs, before it is paid for: counted on networks without memory."""
